"""Whether a run may go on in a folder: no other one is there, and its configuration is that of the checkpoint."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from bocage.shards.errors import InputError
from bocage.shards.locks import FileLock
from bocage.ssl.engine.checkpoint import files as checkpoint
from bocage.ssl.engine.config import EngineConfig
from bocage.ssl.engine.logging.provenance import differences, matches
from bocage.ssl.engine.parallel.distributed import is_main, run_on_all_ranks


@contextmanager
def run_lock(output: Path) -> Iterator[None]:
    """Context in which no other run trains in ``output``; all ranks enter together.

    Raises:
        InputError: another run does.
    """
    with ExitStack() as stack:

        def claim() -> None:
            # A folder that cannot be written is told of by what has to write there.
            if is_main():
                with suppress(OSError):
                    stack.enter_context(FileLock(output / ".claim", range(1), output))

        run_on_all_ranks(claim)
        yield


def checkpoint_to_resume(root: Path, config: EngineConfig, description: dict[str, Any]) -> Path | None:
    """The checkpoint to continue from, agreed by all ranks, or None for a new run.

    Raises:
        InputError: on all ranks, when a run must not go on here.
    """
    found: Path | None = run_on_all_ranks(lambda: _found(root, config, description) if is_main() else None)[0]
    return found


def _found(root: Path, config: EngineConfig, description: dict[str, Any]) -> Path | None:
    if config.resume == "never":
        if checkpoint.has_checkpoints(root):
            raise InputError(
                f"engine.resume=never, but {root} has checkpoints: choose another output, delete them, "
                "or use engine.resume=auto"
            )
        return None
    with checkpoint.disk_faults(f"output folder {root.parent}"):
        found = checkpoint.newest_intact(root)
    if found is None:
        return None
    _, saved = checkpoint.read_state(found)
    changed = differences(saved["config"], description["config"])
    if refused := [f"{key}: {change}" for key, change in changed.items() if not matches(key, config.resume_allow)]:
        raise InputError(
            f"{found} was made with another configuration ({'; '.join(refused)}): restore these keys, choose "
            "another output, or accept the change by engine.resume_allow=[KEY,...]"
        )
    if changed:
        accepted = "; ".join(f"{key}: {change}" for key, change in changed.items())
        print(f"bocage: resuming with changes that engine.resume_allow accepts: {accepted}", file=sys.stderr)
    now, then = description["samples_a_step"], saved.get("samples_a_step")
    if then not in (None, now):
        print(
            f"bocage: a step now has {now} samples in place of {then} ({description['ranks']} ranks, were "
            f"{saved['ranks']}); batch_size and engine.accumulation are per rank",
            file=sys.stderr,
        )
    return found
