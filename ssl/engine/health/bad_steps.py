"""Dumps of bad steps: weights, batches and random state of a step whose loss or gradient was not finite, for replay.

``bad_steps/step-00000120/`` holds ``model.safetensors`` (weights and buffers before the step), ``rank-00000.pt`` (micro
batches and random state of a rank) and ``dump.json`` (which run, and what each rank found). A folder is complete or
not there. The ``.pt`` files hold tensors and plain containers only.
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
from bocage.shards.files import flush
from bocage.ssl.engine.checkpoint.files import disk_faults, load_tensors, save_tensors
from bocage.ssl.engine.parallel.distributed import is_main, run_on_all_ranks
from bocage.ssl.engine.weights import Weights

_FACTS, _WEIGHTS = "dump.json", "model.safetensors"
_FORMAT = 1
_KEYS = {"step", "threads", "found", "scale", "rebuild", "recipe", "ranks", "config", "versions"}


@dataclass(frozen=True)
class RankDump:
    """What one rank had in a bad step.

    Attributes:
        rank: which.
        finite: whether its loss was finite.
        losses: of its micro-batches; None where not finite.
        batches: its micro-batches, on the CPU.
        random: the generators before the first of them (``randomness.random_state``).
    """

    rank: int
    finite: bool
    losses: list[float | None]
    batches: list[Batch]
    random: dict[str, Any]


def count_dumps(root: Path) -> int:
    """How many dumps are in the folder of a run."""
    return len(list(root.glob("step-*")))


def write_dump(root: Path, step: int, weights: Weights, own: RankDump, facts: dict[str, Any]) -> Path:
    """Write the dump of ``step``; all ranks take part.

    Args:
        root: the folder of dumps.
        step: which.
        weights: of the run, as they were before the step.
        own: what this rank had.
        facts: of the run, JSON-serialisable.

    Raises:
        InputError: on all ranks, when one of them cannot write.
    """
    final = root / f"step-{step:08d}"
    partial = final.with_name(f".{final.name}.partial")
    main = is_main()
    weights.gather()

    def start() -> None:
        if main:
            with disk_faults(f"dump {final}"):
                shutil.rmtree(partial, ignore_errors=True)
                partial.mkdir(parents=True)

    def write_own() -> tuple[bool, list[float | None]]:
        with disk_faults(f"dump {final}"):
            content = {"random": own.random, "batches": [_plain(batch) for batch in own.batches]}
            save_tensors(content, partial / f"rank-{own.rank:05d}.pt")
        return own.finite, own.losses

    def finish() -> None:
        if not main:
            return
        with disk_faults(f"dump {final}"):
            save_model(weights.task, str(partial / _WEIGHTS))
            found = [{"rank": rank, "finite": finite, "losses": losses} for rank, (finite, losses) in enumerate(told)]
            # On a CPU sums depend on the number of threads, and whether they overflow may, too.
            threads = torch.get_num_threads()
            text = json.dumps({"format": _FORMAT, "step": step, "threads": threads, "found": found, **facts}, indent=1)
            (partial / _FACTS).write_text(text + "\n", encoding="utf-8")
            for path in (*partial.iterdir(), partial):
                flush(path)
            if final.exists():
                shutil.rmtree(final)
            partial.rename(final)
            flush(root)

    try:
        run_on_all_ranks(start)
        told = run_on_all_ranks(write_own)
        run_on_all_ranks(finish)
    finally:
        if main:
            shutil.rmtree(partial, ignore_errors=True)
    return final


def _plain(batch: Batch) -> dict[str, Any]:
    def own(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: own(item) for name, item in value.items()}
        # Tensors of a batch may lie in one block, which torch will not save under several dtypes.
        return value.clone() if isinstance(value, torch.Tensor) else value

    return {item.name: own(getattr(batch, item.name)) for item in fields(batch)}


def read_facts(folder: Path) -> dict[str, Any]:
    """``dump.json``.

    Raises:
        InputError: it is not there, not readable, or of another format.
    """
    path = folder / _FACTS
    try:
        facts = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        what = "holds no dump" if folder.is_dir() else "no such folder"
        raise InputError(f"{folder}: {what}; give OUTPUT/bad_steps/step-* of a run that had bad steps") from error
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise InputError(f"{path} is not readable JSON: {error}") from error
    if not isinstance(facts, dict) or facts.get("format") != _FORMAT:
        raise InputError(f"{path} is not of format {_FORMAT}: replay with the version of bocage that wrote it")
    if missing := _KEYS - facts.keys():
        raise InputError(f"{path} lacks {', '.join(sorted(missing))}: it is damaged")
    return facts


def read_rank(folder: Path, facts: dict[str, Any], rank: int) -> RankDump:
    """What ``rank`` had.

    Raises:
        InputError: its file is missing or damaged.
    """
    path = folder / f"rank-{rank:05d}.pt"
    if not path.is_file():
        raise InputError(f"{path} is missing")
    content = load_tensors(path)
    try:
        found = facts["found"][rank]
        batches = [Batch(**batch) for batch in content["batches"]]
        return RankDump(rank, found["finite"], found["losses"], batches, content["random"])
    except (KeyError, TypeError, IndexError) as error:
        raise InputError(f"{path} does not fit {_FACTS} beside it: {error!r}") from error


def load_weights(folder: Path, task: nn.Module) -> None:
    """Give ``task`` the weights from before the step.

    Raises:
        InputError: the file is missing, damaged, or of another model.
    """
    try:
        load_model(task, folder / _WEIGHTS)
    except (OSError, SafetensorError, RuntimeError) as error:
        raise InputError(f"{folder / _WEIGHTS} does not fit this run: {' '.join(str(error).split())}") from error
