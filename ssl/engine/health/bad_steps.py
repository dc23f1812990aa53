"""Write and read dumps of bad steps, whose loss or gradient was not finite, for ``bocage replay``.

``bad_steps/step-00000120/`` holds ``model.safetensors`` (weights and buffers before the step), ``rank-00000.pt``
(micro-batches and random state of a rank) and ``dump.json`` (description of the run and losses of each rank). A folder
is complete or absent. The ``.pt`` files hold tensors and plain containers only.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_model, save_model
from torch import nn

from bocage.shards.batch import Batch
from bocage.shards.errors import InputError
from bocage.shards.files import fsync
from bocage.ssl.engine.checkpoint.reader import load_tensors
from bocage.ssl.engine.checkpoint.writer import disk_errors, save_tensors
from bocage.ssl.engine.parallel.distributed import is_main, run_on_all_ranks

_FACTS_FILE, _WEIGHTS_FILE = "dump.json", "model.safetensors"
_FORMAT = 1
_FACTS = {"step", "threads", "found", "scale", "rebuild", "recipe", "ranks", "config", "versions"}


@dataclass(frozen=True)
class RankDump:
    """Inputs and losses of one rank in a bad step.

    Attributes:
        rank: number of the rank.
        finite: whether the loss of the rank was finite.
        losses: loss of each micro-batch; None if it was not finite.
        batches: micro-batches, on the CPU.
        random: state of the random generators before the first micro-batch (``rng.random_state``).
    """

    rank: int
    finite: bool
    losses: list[float | None]
    batches: list[Batch]
    random: dict[str, Any]


def count_dumps(root: Path) -> int:
    """Number of dumps of a run."""
    return len(list(root.glob("step-*")))


def write_dump(root: Path, step: int, task: nn.Module, rank_dump: RankDump, facts: dict[str, Any]) -> Path:
    """Write the dump of ``step`` (a collective) and return its folder.

    Args:
        root: folder of dumps.
        step: number of the step.
        task: bare module with full weights, as before the step.
        rank_dump: inputs and losses of this rank.
        facts: JSON-serialisable facts about the run.

    Raises:
        InputError: on all ranks, if any rank cannot write.
    """
    final = root / f"step-{step:08d}"
    partial = final.with_name(f".{final.name}.partial")
    main = is_main()

    def start() -> None:
        if main:
            with disk_errors(f"dump {final}"):
                shutil.rmtree(partial, ignore_errors=True)
                partial.mkdir(parents=True)

    def write_rank() -> tuple[bool, list[float | None]]:
        with disk_errors(f"dump {final}"):
            content = {"random": rank_dump.random, "batches": [_fields_of(batch) for batch in rank_dump.batches]}
            save_tensors(content, partial / f"rank-{rank_dump.rank:05d}.pt")
        return rank_dump.finite, rank_dump.losses

    def finish() -> None:
        if not main:
            return
        with disk_errors(f"dump {final}"):
            save_model(task, str(partial / _WEIGHTS_FILE))
            found = [{"rank": rank, "finite": finite, "losses": losses} for rank, (finite, losses) in enumerate(ranks)]
            # On a CPU, sums depend on the number of threads, and so may their overflow.
            threads = torch.get_num_threads()
            text = json.dumps({"format": _FORMAT, "step": step, "threads": threads, "found": found, **facts}, indent=1)
            (partial / _FACTS_FILE).write_text(text + "\n", encoding="utf-8")
            for path in (*partial.iterdir(), partial):
                fsync(path)
            if final.exists():
                shutil.rmtree(final)
            partial.rename(final)
            fsync(root)

    try:
        run_on_all_ranks(start)
        ranks = run_on_all_ranks(write_rank)
        run_on_all_ranks(finish)
    finally:
        if main:
            shutil.rmtree(partial, ignore_errors=True)
    return final


def _fields_of(batch: Batch) -> dict[str, Any]:
    def copy(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: copy(item) for name, item in value.items()}
        # Tensors of a batch may share one memory block, which torch refuses to save under several dtypes.
        return value.clone() if isinstance(value, torch.Tensor) else value

    return {item.name: copy(getattr(batch, item.name)) for item in fields(batch)}


def read_facts(folder: Path) -> dict[str, Any]:
    """Read ``dump.json`` of a dump.

    Raises:
        InputError: the file is missing, unreadable, incomplete or of another format.
    """
    path = folder / _FACTS_FILE
    try:
        facts = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        problem = "holds no dump" if folder.is_dir() else "no such folder"
        raise InputError(f"{folder}: {problem}; give OUTPUT/bad_steps/step-* of a run that had bad steps") from error
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise InputError(f"{path} is not readable JSON: {error}") from error
    if not isinstance(facts, dict) or facts.get("format") != _FORMAT:
        raise InputError(f"{path} is not of format {_FORMAT}: replay with the version of bocage that wrote it")
    if missing := _FACTS - facts.keys():
        raise InputError(f"{path} lacks {', '.join(sorted(missing))}: it is damaged")
    return facts


def read_rank(folder: Path, facts: dict[str, Any], rank: int) -> RankDump:
    """Read the inputs and losses of ``rank``.

    Raises:
        InputError: the file of the rank is missing or damaged.
    """
    path = folder / f"rank-{rank:05d}.pt"
    if not path.is_file():
        raise InputError(f"{path} is missing")
    content = load_tensors(path)
    try:
        rank_facts = facts["found"][rank]
        batches = [Batch(**batch) for batch in content["batches"]]
        return RankDump(rank, rank_facts["finite"], rank_facts["losses"], batches, content["random"])
    except (KeyError, TypeError, IndexError) as error:
        raise InputError(f"{path} does not fit {_FACTS_FILE} beside it: {error!r}") from error


def load_weights(folder: Path, task: nn.Module) -> None:
    """Load the weights from before the step into ``task``.

    Raises:
        InputError: the file is missing, damaged, or of another model.
    """
    try:
        load_model(task, folder / _WEIGHTS_FILE)
    except (OSError, SafetensorError, RuntimeError) as error:
        raise InputError(f"{folder / _WEIGHTS_FILE} does not fit this run: {' '.join(str(error).split())}") from error
