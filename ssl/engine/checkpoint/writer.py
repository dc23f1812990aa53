"""Write checkpoints atomically, with a hash of every file, and prune old ones.

``checkpoints/step-00000120/`` holds:

- ``model.safetensors``: every parameter and buffer;
- ``optimizer.pt``: optimiser state, and the state of the loss scaler;
- ``optimizer-RANK-of-RANKS.safetensors``: one rank's shard of the optimiser state, with ``engine.checkpoint=sharded``;
- ``ranks.pt``: random generators and metric window of every rank;
- ``ema.safetensors``: moving average of the weights, with ``engine.ema_decay``;
- ``state.json``: training state and description of the run;
- ``export/``: files that the caller exports, such as encoders;
- ``complete.json``: size and SHA-256 of every other file, written last.

A folder is written under a temporary name, synced to disk and renamed, so it is complete or absent. Rank 0 writes it,
except for optimiser shards. Every rank reads it, so several machines need a shared file system. ``.pt`` files hold
tensors and plain containers only, and are read with ``weights_only=True``.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from safetensors import SafetensorError
from safetensors.torch import save_file, save_model
from torch import nn
from torch.distributed.tensor import DTensor

from bocage.shards.errors import InputError
from bocage.shards.files import fsync, sha256
from bocage.ssl.engine.ema import EMA_FILE, MovingAverage, swapped_weights
from bocage.ssl.engine.parallel.distributed import all_gather_object, run_on_all_ranks
from bocage.ssl.engine.parallel.fsdp import full_tensor, local_shard
from bocage.ssl.engine.rng import random_state

COMPLETE_FILE = "complete.json"
FORMAT = 1

_NAME = re.compile(r"step-(\d{8,})")

Export = Callable[[nn.Module, Path], None]
FileEntry = dict[str, Any]
"""Size and SHA-256 of a file."""


@dataclass
class TrainingState:
    """Progress of a run.

    Attributes:
        run: identifier of the run, the same after every resume; trackers use it.
        step: optimiser steps done, including skipped ones.
        position: samples of the global order consumed.
        reported_step: last step whose metrics were recorded and, where due, evaluated. It is less than ``step`` if a
            signal stopped the run in between; the resumed run then reports ``step`` first.
        skipped: steps skipped because a loss or gradient was not finite.
        skipped_in_a_row: consecutive skipped steps up to ``step``.
        best_step: step with the highest monitored metric.
        best_value: highest value of the monitored metric.
        metrics: latest value of every recorded metric.
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


class CheckpointWriter:
    """Write and prune the checkpoints of a run; all ranks take part.

    Args:
        root: folder of checkpoints.
        accelerator: Accelerator of this process.
        keep_last: number of newest checkpoints to keep.
        milestone_every: steps between checkpoints that are never deleted; 0: none.
        sharded_optimizer: whether each rank writes its shard of the optimiser state. The optimiser must be sharded.
        export: function that rank 0 calls at every save, with the task as evaluated and an empty folder.
    """

    def __init__(
        self,
        root: Path,
        accelerator: Accelerator,
        *,
        keep_last: int,
        milestone_every: int = 0,
        sharded_optimizer: bool = False,
        export: Export | None = None,
    ) -> None:
        self.root = root
        self._accelerator = accelerator
        self._keep_last = keep_last
        self._milestone_every = milestone_every
        self._sharded_optimizer = sharded_optimizer
        self._export = export

    def save(
        self,
        state: TrainingState,
        *,
        task: nn.Module,
        optimizer: torch.optim.Optimizer,
        average: MovingAverage | None,
        window: dict[str, Any],
        description: Mapping[str, Any],
    ) -> Path:
        """Write the checkpoint of ``state.step``, then delete checkpoints that need not be kept.

        Args:
            state: progress of the run.
            task: bare module with full weights.
            optimizer: optimiser of the run.
            average: moving average of the weights.
            window: ``MetricWindow.state`` of this rank.
            description: JSON-serialisable facts about the run, stored beside the state.

        Returns:
            Folder of the checkpoint.

        Raises:
            InputError: on all ranks, if any rank cannot write. Earlier checkpoints stay intact.
        """
        main, scaler = self._accelerator.is_main_process, self._accelerator.scaler
        ranks = all_gather_object({"random": random_state(), "window": window})
        averages = average.tensors(keep=main) if average is not None else None
        if self._sharded_optimizer:
            optimizer_state, shard = sharded_optimizer_state(optimizer)
        else:
            optimizer_state, shard = full_optimizer_state(optimizer, keep=main), {}

        def start() -> None:
            if main:
                self._start(state.step)

        def write_shard() -> dict[str, FileEntry]:
            return self._write_optimizer_shard(state.step, shard) if self._sharded_optimizer else {}

        def finish() -> None:
            if main:
                saved_optimizer = {
                    "optimizer": optimizer_state,
                    "scaler": scaler.state_dict() if scaler is not None else None,
                }
                self._finish(state, task, saved_optimizer, ranks, averages, description, shards)
                self._prune(state.best_step)

        try:
            run_on_all_ranks(start)
            shards = {name: entry for entries in run_on_all_ranks(write_shard) for name, entry in entries.items()}
            run_on_all_ranks(finish)
        finally:
            if main:
                self._abandon(state.step)
        return step_folder(self.root, state.step)

    def _start(self, step: int) -> None:
        """Make the temporary folder."""
        final = step_folder(self.root, step)
        with _writing(final):
            shutil.rmtree(_partial(final), ignore_errors=True)
            _partial(final).mkdir(parents=True)

    def _write_optimizer_shard(self, step: int, tensors: dict[str, torch.Tensor]) -> dict[str, FileEntry]:
        """Write this rank's shard of the optimiser state; return the entry of its file."""
        final = step_folder(self.root, step)
        name = f"optimizer-{self._accelerator.process_index:05d}-of-{self._accelerator.num_processes:05d}.safetensors"
        with _writing(final):
            path = _partial(final) / name
            save_file(tensors, path)
            fsync(path)
            return {name: _file_entry(path)}

    def _finish(
        self,
        state: TrainingState,
        task: nn.Module,
        optimizer: dict[str, Any],
        ranks: list[dict[str, Any]],
        averages: Mapping[str, torch.Tensor] | None,
        description: Mapping[str, Any],
        shards: Mapping[str, FileEntry],
    ) -> None:
        """Write all other files and rename the folder."""
        final = step_folder(self.root, state.step)
        partial = _partial(final)
        with _writing(final):
            save_model(task, str(partial / "model.safetensors"))
            save_tensors(optimizer, partial / "optimizer.pt")
            save_tensors(ranks, partial / "ranks.pt")
            if averages is not None:
                save_file(dict(averages), partial / EMA_FILE)
            _write_json({"format": FORMAT, **description, "state": asdict(state)}, partial / "state.json")
            if self._export is not None:
                (partial / "export").mkdir()
                with swapped_weights(task, averages):
                    self._export(task, partial / "export")
            paths = [path for path in sorted(partial.rglob("*")) if path.is_file() and path.name not in shards]
            entries = {path.relative_to(partial).as_posix(): _file_entry(path) for path in paths}
            _write_json({"files": {**entries, **shards}}, partial / COMPLETE_FILE)
            for path in (*partial.rglob("*"), partial):
                fsync(path)
            _replace_folder(partial, final)

    def _abandon(self, step: int) -> None:
        """Remove the temporary folder of a save that failed."""
        shutil.rmtree(_partial(step_folder(self.root, step)), ignore_errors=True)

    def _prune(self, best_step: int | None) -> None:
        """Delete all checkpoints except the newest ``keep_last``, the best one and milestones."""
        folders = step_folders(self.root)
        for step in sorted(folders)[: -self._keep_last]:
            if step != best_step and not (self._milestone_every and step % self._milestone_every == 0):
                shutil.rmtree(folders[step])


def step_folder(root: Path, step: int) -> Path:
    """Folder of the checkpoint of ``step``."""
    return root / f"step-{step:08d}"


def step_folders(root: Path) -> dict[int, Path]:
    """Checkpoint folders by step, complete or not."""
    folders = {}
    for item in root.iterdir() if root.is_dir() else ():
        if match := _NAME.fullmatch(item.name):
            folders[int(match[1])] = item
    return folders


def full_optimizer_state(optimizer: torch.optim.Optimizer, keep: bool) -> dict[str, Any]:
    """Gather ``optimizer.state_dict()`` with full tensors (a collective); sharded ones are on the CPU.

    Args:
        optimizer: optimiser, sharded or not.
        keep: whether this rank needs the result; other ranks get None in place of sharded tensors.
    """

    def gather(value: Any) -> Any:
        if not isinstance(value, DTensor):
            return value
        tensor = full_tensor(value)
        return tensor.cpu() if keep else None

    return _map_state(optimizer.state_dict(), gather)


def sharded_optimizer_state(optimizer: torch.optim.Optimizer) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Split ``optimizer.state_dict()`` in a part that all ranks share and this rank's shards.

    Returns:
        The state with None in place of sharded tensors (N, ...), and this rank's rows of those by name, on the CPU.
    """
    state_dict = optimizer.state_dict()
    shard = {
        f"{index}.{name}": local_shard(value).detach().cpu().contiguous()
        for index, state in state_dict["state"].items()
        for name, value in state.items()
        if isinstance(value, DTensor)
    }
    return _map_state(state_dict, lambda value: None if isinstance(value, DTensor) else value), shard


def _map_state(state_dict: dict[str, Any], function: Callable[[Any], Any]) -> dict[str, Any]:
    state = {
        index: {name: function(value) for name, value in values.items()}
        for index, values in state_dict["state"].items()
    }
    return {**state_dict, "state": state}


@contextmanager
def disk_errors(what: str, advice: str = "") -> Iterator[None]:
    """Context that turns errors of writing ``what`` into one ``InputError``, which ends with ``advice``.

    Raises:
        InputError: the disk is full or cannot be written.
    """
    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:
        # torch reports a full disk as a RuntimeError, raised while it handles the OSError.
        cause = error.__context__ if isinstance(error, RuntimeError) else error
        if not isinstance(cause, OSError | SafetensorError):
            raise
        raise InputError(f"cannot write {what}: {cause}{advice}") from error


def _writing(final: Path) -> AbstractContextManager[None]:
    advice = "; free or change the disk, then run the same command again: it resumes from the checkpoint before"
    return disk_errors(f"checkpoint {final}", advice)


def save_tensors(content: Any, path: Path) -> None:
    """Write tensors and plain containers for ``load_tensors``."""
    with path.open("wb") as file:
        torch.save(content, file)


def _write_json(content: Mapping[str, Any], path: Path) -> None:
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def _file_entry(path: Path) -> FileEntry:
    return {"size": path.stat().st_size, "sha256": sha256(path)}


def _partial(final: Path) -> Path:
    return final.with_name(f".{final.name}.partial")


def _replace_folder(partial: Path, final: Path) -> None:
    """Rename ``partial`` to ``final``; an older checkpoint of the same step is moved away first.

    If the process is killed between both renames, ``newest_intact`` moves the older one back.
    """
    replaced = partial.with_suffix(".replaced")
    if final.exists():
        final.rename(replaced)
    partial.rename(final)
    fsync(final.parent)
    if replaced.exists():
        shutil.rmtree(replaced)
