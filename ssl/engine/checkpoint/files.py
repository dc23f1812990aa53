"""Checkpoints: folders that are either complete and proven by hashes, or not there.

``checkpoints/step-00000120/`` holds ``model.safetensors`` (every parameter and buffer), ``optimizer.pt`` (and the loss
scaler), ``ranks.pt`` (random generators and metric window of every rank), ``ema.safetensors`` (the moving average of
the weights, where one is kept), ``state.json`` (where the run stands and what it is), ``export/`` (what the caller
exports, such as encoders) and, written last, ``complete.json``: size and SHA-256 of every other file. A folder is
written under a temporary name, flushed and renamed, by rank 0 alone, but for ``optimizer-RANK-of-RANKS.safetensors``
where the averages of the optimiser are divided; every rank reads it, so several machines need a shared file system. The
``.pt`` files hold tensors and plain containers only and are read with ``weights_only=True``.
"""

from __future__ import annotations

import json
import pickle
import re
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_model, save_file, save_model
from torch import nn

from bocage.shards.errors import InputError
from bocage.shards.files import flush, sha256
from bocage.ssl.engine import ema

_NAME = re.compile(r"step-(\d{8,})")
_MARKER = "complete.json"
_REQUIRED = {"model.safetensors", "optimizer.pt", "ranks.pt", "state.json"}
_FORMAT = 1
Inventory = dict[str, Any]
"""Size and SHA-256 of a file."""


@dataclass
class TrainingState:
    """Where a run stands.

    Attributes:
        run: identifier of the run, the same after every resume; trackers use it.
        step: optimiser steps done, skipped ones included.
        position: samples of the global order consumed.
        reported_step: last step whose metrics were recorded and, where due, evaluated. Less than ``step`` when a
            signal stopped the run in between: the resumed run makes up for it.
        skipped: steps skipped because a loss or gradient was not finite.
        skipped_in_a_row: how many of them came last, without a good one between.
        best_step, best_value: where the monitored metric was highest.
        metrics: latest value of everything recorded.
    """

    run: str
    step: int = 0
    position: int = 0
    reported_step: int = 0
    skipped: int = 0
    skipped_in_a_row: int = 0
    best_step: int | None = None
    best_value: float | None = None
    metrics: dict[str, float | None] = field(default_factory=dict)


def step_folder(root: Path, step: int) -> Path:
    """The checkpoint of ``step``."""
    return root / f"step-{step:08d}"


def _steps(root: Path) -> dict[int, Path]:
    """Checkpoint folders by step, complete or not."""
    found = {}
    for item in root.iterdir() if root.is_dir() else ():
        if match := _NAME.fullmatch(item.name):
            found[int(match[1])] = item
    return found


def has_checkpoints(root: Path) -> bool:
    """Whether any checkpoint, complete or not, is in ``root``."""
    return bool(_steps(root))


def damage(folder: Path) -> str | None:
    """What is wrong with a checkpoint, naming the file; None when every file has the size and hash it was given."""
    try:
        files = json.loads((folder / _MARKER).read_text(encoding="utf-8"))["files"]
        expected = {str(name): (int(entry["size"]), str(entry["sha256"])) for name, entry in files.items()}
    except FileNotFoundError:
        return f"{_MARKER} is missing"
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{_MARKER} cannot be read: {error!r}"
    if unlisted := sorted(_REQUIRED - expected.keys()):
        return f"{_MARKER} does not list {', '.join(unlisted)}"
    for name, (size, digest) in expected.items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != size:
            return f"{name} has {path.stat().st_size} bytes instead of {size}"
        if sha256(path) != digest:
            return f"the SHA-256 of {name} is not the one it was written with"
    return None


def newest_intact(root: Path) -> Path | None:
    """The newest complete checkpoint of ``root`` whose hashes match, or None. Rank 0 only.

    Newer ones that are damaged are named on stderr and renamed to ``*.damaged``, never deleted. What an interrupted
    save left behind is removed.
    """
    _clear_leftovers(root)
    for _, folder in sorted(_steps(root).items(), reverse=True):
        problem = damage(folder)
        if problem is None:
            return folder
        aside = folder.with_name(f"{folder.name}.damaged")
        if aside.exists():
            shutil.rmtree(aside)
        folder.rename(aside)
        print(f"bocage: checkpoint {folder} is damaged ({problem}); kept as {aside.name}, skipped", file=sys.stderr)
    return None


def last_complete(root: Path) -> Path:
    """The newest checkpoint, to read: nothing is renamed or removed, so that the run may be another process's.

    Raises:
        InputError: there is none, or it is damaged.
    """
    steps = _steps(root)
    if not steps:
        raise InputError(f"{root} has no checkpoint: give the folder of a run")
    folder = steps[max(steps)]
    if problem := damage(folder):
        raise InputError(f"checkpoint {folder} is damaged: {problem}")
    return folder


def _clear_leftovers(root: Path) -> None:
    for item in root.glob(".step-*") if root.is_dir() else ():
        original = root / item.stem[1:]
        if item.suffix == ".replaced" and not original.exists():
            item.rename(original)  # killed between the two renames of a replacement
        elif item.suffix in (".partial", ".replaced"):
            shutil.rmtree(item)


def _partial(final: Path) -> Path:
    return final.with_name(f".{final.name}.partial")


@contextmanager
def disk_faults(what: str, advice: str = "") -> Iterator[None]:
    """Context in which ``what`` is written; ``advice`` ends the message if it cannot be.

    Raises:
        InputError: the disk is full or cannot be written.
    """
    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:
        # torch reports a full disk as a RuntimeError raised while it handled the OSError.
        cause = error.__context__ if isinstance(error, RuntimeError) else error
        if not isinstance(cause, OSError | SafetensorError):
            raise
        raise InputError(f"cannot write {what}: {cause}{advice}") from error


def _writing(final: Path) -> AbstractContextManager[None]:
    advice = "; free or change the disk, then run the same command again: it resumes from the checkpoint before"
    return disk_faults(f"checkpoint {final}", advice)


def start_checkpoint(root: Path, step: int) -> None:
    """Make the folder that the checkpoint of ``step`` is written in. Rank 0 only.

    Raises:
        InputError: it cannot be made; earlier checkpoints are intact, as after the calls that follow.
    """
    final = step_folder(root, step)
    with _writing(final):
        shutil.rmtree(_partial(final), ignore_errors=True)
        _partial(final).mkdir(parents=True)


def abandon_checkpoint(root: Path, step: int) -> None:
    """Remove what there is of a checkpoint that could not be written whole. Rank 0 only."""
    shutil.rmtree(_partial(step_folder(root, step)), ignore_errors=True)


def write_part(root: Path, step: int, name: str, tensors: dict[str, torch.Tensor]) -> dict[str, Inventory]:
    """Write a file of one rank, ``name``, into a checkpoint that was started; returns what to tell about it.

    ``tensors``, by name, are contiguous and of any shape.

    Raises:
        InputError: the disk is full or cannot be written.
    """
    final = step_folder(root, step)
    with _writing(final):
        path = _partial(final) / name
        save_file(tensors, path)
        flush(path)
        return {name: _entry(path)}


def finish_checkpoint(
    root: Path,
    state: TrainingState,
    *,
    task: nn.Module,
    optimizer: Mapping[str, Any],
    ranks: list[dict[str, Any]],
    description: Mapping[str, Any],
    parts: Mapping[str, Inventory],
    average: Mapping[str, torch.Tensor] | None = None,
    export: Callable[[nn.Module, Path], None] | None = None,
) -> Path:
    """Write the checkpoint of ``state.step``, which was started. Rank 0 only.

    Args:
        root: the folder of checkpoints.
        state: where the run stands.
        task: the bare module, without wrappers.
        optimizer: tensors and plain containers, for ``optimizer.pt``.
        ranks: one such mapping a rank, for ``ranks.pt``.
        description: JSON-serialisable facts about the run, stored beside the state.
        parts: what ``write_part`` of every rank told.
        average: the moving average of the weights by name, in their shape, for ``ema.safetensors``.
        export: called with ``task`` and an empty folder ``export/``.

    Raises:
        InputError: the disk is full or cannot be written.
    """
    final = step_folder(root, state.step)
    partial = _partial(final)
    with _writing(final):
        save_model(task, str(partial / "model.safetensors"))
        save_tensors(dict(optimizer), partial / "optimizer.pt")
        save_tensors(ranks, partial / "ranks.pt")
        if average is not None:
            save_file(dict(average), partial / ema.FILE)
        _write_json({"format": _FORMAT, **description, "state": asdict(state)}, partial / "state.json")
        if export is not None:
            (partial / "export").mkdir()
            export(task, partial / "export")
        own = [path for path in sorted(partial.rglob("*")) if path.is_file() and path.name not in parts]
        files = {path.relative_to(partial).as_posix(): _entry(path) for path in own}
        _write_json({"files": {**files, **parts}}, partial / _MARKER)
        for path in (*partial.rglob("*"), partial):
            flush(path)
        _move_into_place(partial, final)
    return final


def prune(root: Path, keep: int, best_step: int | None, milestone_every: int = 0) -> None:
    """Delete all but the newest ``keep`` checkpoints, the best one and milestones. Rank 0 only."""
    folders = _steps(root)
    for step in sorted(folders)[:-keep]:
        if step != best_step and not (milestone_every and step % milestone_every == 0):
            shutil.rmtree(folders[step])


def read_state(folder: Path) -> tuple[TrainingState, dict[str, Any]]:
    """The state of a checkpoint and the description it was saved with.

    Raises:
        InputError: another version of bocage wrote it in a format this one does not know.
    """
    description = json.loads((folder / "state.json").read_text(encoding="utf-8"))
    if description.pop("format", None) != _FORMAT:
        raise InputError(f"{folder}/state.json is not of format {_FORMAT}: resume with the version that wrote it")
    return TrainingState(**description.pop("state")), description


def load_task(folder: Path, task: nn.Module) -> None:
    """Load the weights of a checkpoint into the bare module, every key.

    Raises:
        InputError: names or shapes do not fit, and the message lists them; or it is another kind of file.
    """
    try:
        load_model(task, folder / "model.safetensors")
    except (RuntimeError, SafetensorError) as error:
        raise InputError(
            f"{folder}/model.safetensors does not fit this model: {' '.join(str(error).split())}"
        ) from error


def load_tensors(path: Path) -> Any:
    """What ``save_tensors`` wrote, on the CPU; nothing but tensors and plain containers can come out.

    Raises:
        InputError: the file holds something else, which was not executed, or cannot be read.
    """
    try:
        # Mapped: of what others divide, a rank reads its part.
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise InputError(
            f"{path} is damaged or holds something else than tensors; nothing in it was executed. Delete its folder"
        ) from error


def save_tensors(content: Any, path: Path) -> None:
    """Write tensors and plain containers for ``load_tensors``."""
    with path.open("wb") as file:
        torch.save(content, file)


def _write_json(content: Mapping[str, Any], path: Path) -> None:
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def _entry(path: Path) -> Inventory:
    return {"size": path.stat().st_size, "sha256": sha256(path)}


def _move_into_place(partial: Path, final: Path) -> None:
    """Rename, setting an older checkpoint of the same step aside first; ``_clear_leftovers`` heals a kill between."""
    replaced = partial.with_suffix(".replaced")
    if final.exists():
        final.rename(replaced)
    partial.rename(final)
    flush(final.parent)
    if replaced.exists():
        shutil.rmtree(replaced)
