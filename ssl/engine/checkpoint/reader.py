"""Find, verify and read checkpoints; resume from the newest intact one."""

from __future__ import annotations

import json
import logging
import pickle
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_model
from torch import nn
from torch.distributed.tensor import DTensor

from bocage.shards.errors import InputError
from bocage.shards.files import sha256
from bocage.ssl.engine.checkpoint.writer import COMPLETE_FILE, FORMAT, TrainingState, disk_errors, step_folders
from bocage.ssl.engine.engine_config import EngineConfig
from bocage.ssl.engine.logging.provenance import differences, matches
from bocage.ssl.engine.parallel.distributed import is_main, run_on_all_ranks
from bocage.ssl.engine.parallel.fsdp import shard_like

_REQUIRED_FILES = {"model.safetensors", "optimizer.pt", "ranks.pt", "state.json"}

logger = logging.getLogger(__name__)


def checkpoint_to_resume(root: Path, config: EngineConfig, description: dict[str, Any]) -> Path | None:
    """Choose the checkpoint to resume from, the same on all ranks; None for a new run.

    Args:
        root: folder of checkpoints.
        config: settings of the run.
        description: facts about the run, as stored in checkpoints; its configuration must equal the saved one.

    Raises:
        InputError: on all ranks, if ``engine.resume`` or a changed configuration forbids to continue here.
    """

    def choose() -> Path | None:
        return _checkpoint_to_resume(root, config, description) if is_main() else None

    folder: Path | None = run_on_all_ranks(choose)[0]
    return folder


def _checkpoint_to_resume(root: Path, config: EngineConfig, description: dict[str, Any]) -> Path | None:
    if config.resume == "never":
        if has_checkpoints(root):
            raise InputError(
                f"engine.resume=never, but {root} has checkpoints: choose another output, delete them, "
                "or use engine.resume=auto"
            )
        return None
    with disk_errors(f"output folder {root.parent}"):
        folder = newest_intact(root)
    if folder is None:
        return None
    _, saved = read_state(folder)
    changed = differences(saved["config"], description["config"])
    if refused := [f"{key}: {change}" for key, change in changed.items() if not matches(key, config.resume_allow)]:
        raise InputError(
            f"{folder} was made with another configuration ({'; '.join(refused)}): restore these keys, choose "
            "another output, or accept the change by engine.resume_allow=[KEY,...]"
        )
    if changed:
        accepted = "; ".join(f"{key}: {change}" for key, change in changed.items())
        logger.warning("resuming with changes that engine.resume_allow accepts: %s", accepted)
    samples, saved_samples = description["samples_a_step"], saved.get("samples_a_step")
    if saved_samples not in (None, samples):
        logger.warning(
            "a step now has %d samples in place of %d (%d ranks, were %d); batch_size and engine.accumulation are per "
            "rank",
            samples,
            saved_samples,
            description["ranks"],
            saved["ranks"],
        )
    return folder


def has_checkpoints(root: Path) -> bool:
    """Whether ``root`` has any checkpoint, complete or not."""
    return bool(step_folders(root))


def newest_intact(root: Path) -> Path | None:
    """Find the newest checkpoint of ``root`` whose files all match their hashes; None without one. Rank 0 only.

    Newer checkpoints that are damaged are logged and renamed to ``*.damaged``, never deleted. Temporary folders of an
    interrupted save are removed.
    """
    _remove_leftovers(root)
    for _, folder in sorted(step_folders(root).items(), reverse=True):
        problem = find_damage(folder)
        if problem is None:
            return folder
        damaged = folder.with_name(f"{folder.name}.damaged")
        if damaged.exists():
            shutil.rmtree(damaged)
        folder.rename(damaged)
        logger.warning("checkpoint %s is damaged (%s); renamed to %s and skipped", folder, problem, damaged.name)
    return None


def _remove_leftovers(root: Path) -> None:
    for item in root.glob(".step-*") if root.is_dir() else ():
        original = root / item.stem[1:]
        if item.suffix == ".replaced" and not original.exists():
            item.rename(original)  # the process was killed between the two renames of `_replace_folder`
        elif item.suffix in (".partial", ".replaced"):
            shutil.rmtree(item)


def latest_checkpoint(root: Path) -> Path:
    """Return the newest checkpoint without renaming or removing anything: another process may own the run.

    Raises:
        InputError: there is no checkpoint, or the newest one is damaged.
    """
    folders = step_folders(root)
    if not folders:
        raise InputError(f"{root} has no checkpoint: give the folder of a run")
    folder = folders[max(folders)]
    if problem := find_damage(folder):
        raise InputError(f"checkpoint {folder} is damaged: {problem}")
    return folder


def find_damage(folder: Path) -> str | None:
    """Check the files of a checkpoint: a problem that names the file, or None if all sizes and hashes match."""
    try:
        files = json.loads((folder / COMPLETE_FILE).read_text(encoding="utf-8"))["files"]
        expected = {str(name): (int(entry["size"]), str(entry["sha256"])) for name, entry in files.items()}
    except FileNotFoundError:
        return f"{COMPLETE_FILE} is missing"
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{COMPLETE_FILE} cannot be read: {error!r}"
    if unlisted := sorted(_REQUIRED_FILES - expected.keys()):
        return f"{COMPLETE_FILE} does not list {', '.join(unlisted)}"
    for name, (size, digest) in expected.items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != size:
            return f"{name} has {path.stat().st_size} bytes instead of {size}"
        if sha256(path) != digest:
            return f"the SHA-256 of {name} differs from the one in {COMPLETE_FILE}"
    return None


def read_state(folder: Path) -> tuple[TrainingState, dict[str, Any]]:
    """Read the training state of a checkpoint and the description of its run.

    Raises:
        InputError: the format is unknown to this version of bocage.
    """
    description = json.loads((folder / "state.json").read_text(encoding="utf-8"))
    if description.pop("format", None) != FORMAT:
        raise InputError(f"{folder}/state.json is not of format {FORMAT}: resume with the version that wrote it")
    return TrainingState(**description.pop("state")), description


def load_task(folder: Path, task: nn.Module) -> None:
    """Load the weights of a checkpoint into the bare module; every key must match.

    Raises:
        InputError: names or shapes differ, which the message lists, or the file is not a safetensors file.
    """
    try:
        load_model(task, folder / "model.safetensors")
    except (RuntimeError, SafetensorError) as error:
        raise InputError(
            f"{folder}/model.safetensors does not fit this model: {' '.join(str(error).split())}"
        ) from error


def load_tensors(path: Path) -> Any:
    """Load a file of ``save_tensors`` to the CPU; only tensors and plain containers can come out.

    Raises:
        InputError: the file cannot be read or holds other objects, which are not executed.
    """
    try:
        # Memory-mapped: of tensors that FSDP shards, a rank reads its rows only.
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise InputError(
            f"{path} is damaged or holds something else than tensors; nothing in it was executed. Delete its folder"
        ) from error


class _OptimizerShards:
    """Tensors whose rows are spread over the optimiser shards of a checkpoint, in rank order."""

    def __init__(self, folder: Path) -> None:
        self._files = [safe_open(path, framework="pt") for path in sorted(folder.glob("optimizer-*-of-*.safetensors"))]

    def rows(self, key: str, rows: slice) -> torch.Tensor:
        pieces, first = [], 0
        for file in self._files:
            stored = file.get_slice(key)
            count = stored.get_shape()[0]
            low, high = max(rows.start - first, 0), min(rows.stop - first, count)
            if low < high:
                pieces.append(stored[low:high])
            first += count
        return torch.cat(pieces) if pieces else self._files[0].get_slice(key)[:0]


def load_optimizer(optimizer: torch.optim.Optimizer, saved: dict[str, Any], folder: Path) -> None:
    """Load the optimiser state of a checkpoint; it may have been sharded otherwise, or not at all.

    Learning rate, weight decay and other settings of the groups come from the configuration, because the user may have
    accepted a change. Whether AdamW is fused depends on the device, and decides where the state must lie.

    Args:
        optimizer: optimiser of the resumed run.
        saved: optimiser state in ``optimizer.pt``; None stands for tensors in the shards.
        folder: folder of the checkpoint.

    Raises:
        InputError: the checkpoint has another optimiser or other parameter groups.
    """
    groups, saved_groups = optimizer.param_groups, saved["param_groups"]
    if [len(group["params"]) for group in groups] != [len(group["params"]) for group in saved_groups] or any(
        ("betas" in group) != ("betas" in other) for group, other in zip(groups, saved_groups, strict=True)
    ):
        raise InputError(
            f"{folder} was made with another optimiser or other parameter groups: restore engine.optimizer.name, "
            "engine.optimizer.layer_decay and the frozen modules, or choose another output"
        )
    for group, saved_group in zip(groups, saved_groups, strict=True):
        saved_group.update({key: value for key, value in group.items() if key not in ("params", "lr")})
    shards = _OptimizerShards(folder)
    parameters = [parameter for group in groups for parameter in group["params"]]

    def load(index: int, name: str, value: torch.Tensor | None) -> Any:
        parameter = parameters[index]
        if value is None:
            return shard_like(parameter, lambda rows: shards.rows(f"{index}.{name}", rows))
        if isinstance(parameter, DTensor) and value.shape == parameter.shape:
            return shard_like(parameter, lambda rows: value[rows].clone())
        # Cloned, because the memory-mapped file may be deleted before the run ends.
        return value.clone() if isinstance(value, torch.Tensor) else value

    state = {
        index: {name: load(index, name, value) for name, value in values.items()}
        for index, values in saved["state"].items()
    }
    optimizer.load_state_dict({**saved, "state": state})
