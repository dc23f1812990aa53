"""Which checkpoint a run goes on from, and whether its configuration allows that."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from bocage.shards.errors import InputError
from bocage.ssl.engine import checkpoint
from bocage.ssl.engine.config import EngineConfig
from bocage.ssl.engine.distributed import from_main
from bocage.ssl.engine.provenance import differences, matches


def checkpoint_to_resume(
    root: Path, config: EngineConfig, description: dict[str, Any], accelerator: Accelerator
) -> Path | None:
    """The checkpoint to continue from, agreed by all ranks, or None for a new run; refuses what must not go on."""
    found: Path | None = None
    problem: str | None = None
    if accelerator.is_main_process:
        if config.resume == "never" and checkpoint.has_checkpoints(root):
            problem = (
                f"engine.resume=never, but {root} has checkpoints: choose another output, delete them, "
                "or use engine.resume=auto"
            )
        elif config.resume == "auto" and (found := checkpoint.newest_intact(root)) is not None:
            _, saved = checkpoint.read_state(found)
            changed = differences(saved["config"], description["config"])
            if refused := [
                f"{key}: {change}" for key, change in changed.items() if not matches(key, config.resume_allow)
            ]:
                problem = (
                    f"{found} was made with another configuration ({'; '.join(refused)}): restore these keys, choose "
                    "another output, or accept the change by engine.resume_allow=[KEY,...]"
                )
            elif changed:
                accepted = "; ".join(f"{key}: {change}" for key, change in changed.items())
                print(f"bocage: resuming with changes that engine.resume_allow accepts: {accepted}", file=sys.stderr)
    found, problem = from_main((found, problem))
    if problem is not None:
        raise InputError(problem)
    return found
