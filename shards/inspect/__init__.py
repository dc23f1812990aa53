"""Verify and summarise shards, and draw their patches."""
