"""Ranks and collectives, DDP and FSDP, block compilation."""
