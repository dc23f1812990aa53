"""The optimiser's state in a checkpoint: whole in ``optimizer.pt``, or divided among files of the ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch.distributed.tensor import DTensor

from bocage.shards.errors import InputError
from bocage.ssl.engine.parallel.fsdp import full_tensor, local_shard, shard_like

_PARTS = "optimizer-{rank:05d}-of-{ranks:05d}.safetensors"


def part_file(rank: int, ranks: int) -> str:
    """Name of the file that holds what one rank has of the averages of ``divided``."""
    return _PARTS.format(rank=rank, ranks=ranks)


def gathered_whole(optimizer: torch.optim.Optimizer, keep: bool) -> dict[str, Any]:
    """``optimizer.state_dict()`` with divided tensors put together on the CPU; all take part, some ``keep`` it."""

    def put_together(value: Any) -> Any:
        if not isinstance(value, DTensor):
            return value
        tensor = full_tensor(value)
        return tensor.cpu() if keep else None

    return _mapped(optimizer.state_dict(), put_together)


def divided(optimizer: torch.optim.Optimizer) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """``optimizer.state_dict()`` with None for divided tensors (N, ...), and this rank's rows of those, by name.

    These are on the CPU.
    """
    saved = optimizer.state_dict()
    parts = {
        f"{index}.{name}": local_shard(value).detach().cpu().contiguous()
        for index, state in saved["state"].items()
        for name, value in state.items()
        if isinstance(value, DTensor)
    }
    return _mapped(saved, lambda value: None if isinstance(value, DTensor) else value), parts


def _mapped(saved: dict[str, Any], change: Any) -> dict[str, Any]:
    state = {index: {name: change(value) for name, value in values.items()} for index, values in saved["state"].items()}
    return {**saved, "state": state}


class _Parts:
    """Rows of tensors that the files of several ranks hold one below the other."""

    def __init__(self, folder: Path) -> None:
        self._files = [safe_open(path, framework="pt") for path in sorted(folder.glob("optimizer-*-of-*.safetensors"))]

    def rows(self, key: str, wanted: slice) -> torch.Tensor:
        found, first = [], 0
        for file in self._files:
            rows = file.get_slice(key)
            count = rows.get_shape()[0]
            low, high = max(wanted.start - first, 0), min(wanted.stop - first, count)
            if low < high:
                found.append(rows[low:high])
            first += count
        return torch.cat(found) if found else self._files[0].get_slice(key)[:0]


def load_optimizer(optimizer: torch.optim.Optimizer, saved: dict[str, Any], folder: Path) -> None:
    """Load the moving averages that the checkpoint ``folder`` has in ``saved``, or in the files of its ranks.

    Rates, decay and everything else of the groups is the configuration's: it may have changed where the user accepted
    it, and what a device can do (fused or not) decides where the state must lie. How the averages were divided, if
    they were, need not be how they are divided now.

    Raises:
        InputError: another optimiser, or other groups of parameters.
    """
    groups, kept = optimizer.param_groups, saved["param_groups"]
    if [len(group["params"]) for group in groups] != [len(group["params"]) for group in kept] or any(
        ("betas" in group) != ("betas" in other) for group, other in zip(groups, kept, strict=True)
    ):
        raise InputError(
            f"{folder} was made with another optimiser or other parameter groups: engine.optimizer.name, "
            "engine.optimizer.layer_decay and what is frozen must stay as they were; choose another output for new ones"
        )
    for group, other in zip(groups, kept, strict=True):
        other.update({key: value for key, value in group.items() if key not in ("params", "lr")})
    parts = _Parts(folder)
    parameters = [parameter for group in groups for parameter in group["params"]]

    def own(index: int, name: str, value: torch.Tensor | None) -> Any:
        parameter = parameters[index]
        if value is None:
            return shard_like(parameter, lambda wanted: parts.rows(f"{index}.{name}", wanted))
        if isinstance(parameter, DTensor) and value.shape == parameter.shape:
            return shard_like(parameter, lambda wanted: value[wanted].clone())
        # A copy: the file it is mapped from may be deleted before the run ends.
        return value.clone() if isinstance(value, torch.Tensor) else value

    state = {
        index: {name: own(index, name, value) for name, value in values.items()}
        for index, values in saved["state"].items()
    }
    optimizer.load_state_dict({**saved, "state": state})
