"""Distributed training: ranks, collectives, FSDP, block compilation."""
