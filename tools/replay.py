"""``bocage replay DUMP``: a bad step of a run once more, and what in it is not finite."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from torch import nn

from bocage import recipes
from bocage.finetune.finetune_config import FinetuneConfig
from bocage.finetune.models.segmentation import segmentation_from_json
from bocage.shards.errors import InputError
from bocage.shards.preprocess.normalize import InputSpec
from bocage.shards.read.open import open_shards
from bocage.ssl.engine.health.bad_steps import RankDump, load_weights, read_facts, read_rank
from bocage.ssl.engine.health.replay import Finding, replay
from bocage.ssl.engine.logging.provenance import library_versions
from bocage.ssl.engine.parallel.distributed import Precision, all_gather_object, build_accelerator, rank_and_world
from bocage.ssl.pretrain import PretrainConfig
from bocage.ssl.pretrain import build_task as build_pretraining

_SHOWN = 5
_CLOSE = 1e-2  # of a loss to what it was; other devices compute other last digits
_PATIENCE = 600.0  # seconds that ranks wait for each other


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command."""
    parser.add_argument("dump", metavar="DUMP", type=Path, help="a folder OUTPUT/bad_steps/step-*")
    parser.add_argument("--shards", metavar="PATH", help="where the shards are now, if they were moved")
    parser.add_argument("--device", metavar="NAME", help="e.g. cpu or cuda:1 (default: a GPU if there is one)")


def run(arguments: argparse.Namespace) -> int:
    """Replay every rank of the dump: one after the other, or all at once where as many are started here."""
    facts = read_facts(arguments.dump)
    task, precision = _task(arguments.dump, facts, arguments.shards)
    load_weights(arguments.dump, task)
    accelerator = build_accelerator("fp32", "none", arguments.dump, _PATIENCE)
    rank, ranks = rank_and_world()
    if ranks not in (1, facts["ranks"]):
        raise InputError(f"{arguments.dump} is of {facts['ranks']} ranks: start one, or as many, not {ranks}")
    device = accelerator.device if arguments.device is None else _device(arguments.device)
    if rank == 0:
        where = f"{facts['ranks']} ranks, {precision}; here on {device}"
        print(f"step {facts['step']} of recipe {facts['recipe']}, {where}")
    numbers = range(facts["ranks"]) if ranks == 1 else [rank]
    dumps = (read_rank(arguments.dump, facts, number) for number in numbers)
    told = [_replayed(task, dump, facts, precision, device) for dump in dumps]
    everyones = [entry for entries in all_gather_object(told) for entry in entries]
    if rank == 0:
        for lines, _, _ in everyones:
            print("\n".join(lines))
        for line in _conclusions(facts, ranks, any(bad for _, bad, _ in everyones), any(off for *_, off in everyones)):
            print(line)
    return 0


def _replayed(
    task: nn.Module, dump: RankDump, facts: dict[str, Any], precision: Precision, device: torch.device
) -> tuple[list[str], bool, bool]:
    """What to print about a rank, whether anything was not finite, and whether a finite loss is not what it was."""
    lines, bad, off = [], False, False
    findings = replay(task, dump, precision=precision, scale=facts["scale"], threads=facts["threads"], device=device)
    for index, finding in enumerate(findings):
        then, now = dump.losses[index], finding.losses["loss"]
        bad |= not finding.finite
        off |= then is not None and abs(now - then) > _CLOSE * abs(then)
        was = "not finite" if then is None else f"{then:.6g}"
        lines.append(f"rank {dump.rank}, micro-batch {index + 1}: loss {now:.6g}, was {was}")
        lines += [f"  {line}" for line in _lines(finding)]
    return lines, bad, off


def _conclusions(facts: dict[str, Any], ranks: int, bad: bool, off: bool) -> list[str]:
    if off and ranks < facts["ranks"]:
        return [
            "losses are not what they were: terms of the loss compare samples of all ranks, which are replayed singly "
            f"here; torchrun --nproc_per_node {facts['ranks']} -m bocage replay DUMP replays them together"
        ]
    if bad:
        return []
    there, here = facts["versions"], library_versions()
    changed = [f"{name} {there.get(name)} there, {here[name]} here" for name in here if there.get(name) != here[name]]
    return [
        "everything is finite here, with the weights, batches and random draws of the step, rank by rank: look at the "
        f"device and at what differs ({'; '.join(changed) or 'no library does'})"
    ]


def _lines(finding: Finding) -> list[str]:
    lines = []
    if terms := [name for name, value in finding.losses.items() if value != value or abs(value) == float("inf")]:
        lines.append(f"not finite: {', '.join(terms)}")
    if finding.where:
        lines.append(f"first module whose output is not finite: {finding.where}")
    if finding.gradients and not finding.where:
        more = f" and {len(finding.gradients) - _SHOWN} more" if len(finding.gradients) > _SHOWN else ""
        lines.append(f"gradient not finite: {', '.join(finding.gradients[:_SHOWN])}{more}")
    if finding.refused:
        lines.append(f"samples were not tried alone: the task takes none ({finding.refused})")
    if finding.samples:
        lines.append(f"samples with which this happens alone: {', '.join(finding.samples)}")
    for (key, modality), count in finding.inputs.items():
        lines.append(f"{key}: {count} values of {modality} are not finite")
    return lines


def _task(folder: Path, facts: dict[str, Any], shards: str | None) -> tuple[nn.Module, Precision]:
    """The task of the run, with fresh weights and its statistics of inputs, and its precision."""
    rebuild = facts["rebuild"]
    if rebuild is None:
        raise InputError(f"{folder} does not say how its task is built: only dumps of pretrain.py and finetune do")
    source = f"{folder}/dump.json"
    # The weights are here: what the encoders started from need not be.
    settings = {**rebuild["config"], "encoders": {}}
    if rebuild["command"] == "pretrain":
        pretraining = recipes.restored(PretrainConfig, settings, source)
        task = build_pretraining(pretraining, _shards(pretraining.shards, shards, facts))
        for name, spec in rebuild["inputs"].items():
            task.encoder(name).spec = InputSpec.from_json(spec)
        return task, pretraining.engine.precision
    tuning = recipes.restored(FinetuneConfig, settings, source)
    return segmentation_from_json(rebuild["model"], tuning.supervision), tuning.engine.precision


def _shards(then: str, now: str | None, facts: dict[str, Any]) -> Any:
    manifest = open_shards(now or then)
    if manifest.digest != facts["config"]["shards"]:
        raise InputError(f"{manifest.path} are not the shards of this run: give those by --shards")
    return manifest


def _device(name: str) -> torch.device:
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:  # torch without CUDA asserts
        raise InputError(f"--device {name}: {str(error).splitlines()[0]}") from error
    return device
