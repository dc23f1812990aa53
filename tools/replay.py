"""``bocage replay DUMP``: replay a bad step of a run and print which values are not finite."""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from bocage import recipes
from bocage.finetune.finetune_config import FinetuneConfig
from bocage.finetune.models.segmentation import segmentation_from_json
from bocage.shards.errors import InputError, counted
from bocage.shards.format.manifest import Manifest
from bocage.shards.preprocess.normalize import InputSpec
from bocage.shards.read.open import open_shards
from bocage.ssl.engine.health.bad_steps import RankDump, load_weights, read_facts, read_rank
from bocage.ssl.engine.health.replay import Finding, replay
from bocage.ssl.engine.logging.provenance import library_versions
from bocage.ssl.engine.parallel.distributed import Precision, all_gather_object, build_accelerator, rank_and_world
from bocage.ssl.pretrain import build_pretraining_model
from bocage.ssl.pretrain_config import PretrainConfig

_NAMES_SHOWN = 5
_LOSS_TOLERANCE = 1e-2  # relative; other devices compute other last digits
_RANK_TIMEOUT = 600.0  # seconds


class RankReport(NamedTuple):
    """Lines to print about a rank, and what they mean for the conclusion."""

    lines: list[str]
    non_finite: bool  # a loss or gradient is not finite
    deviates: bool  # a loss that was finite in the run has another value now


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command."""
    parser.add_argument("dump", metavar="DUMP", type=Path, help="folder of the dump, OUTPUT/bad_steps/step-*")
    parser.add_argument("--shards", metavar="PATH", help="folder of the shards, if they have moved")
    parser.add_argument("--device", metavar="NAME", help="e.g. cpu or cuda:1 (default: a GPU if there is one)")


def run(arguments: argparse.Namespace) -> int:
    """Replay the ranks of a dump one after the other, or together if a launcher started as many ranks."""
    facts = read_facts(arguments.dump)
    task, precision = _rebuild_task(arguments.dump, facts, arguments.shards)
    load_weights(arguments.dump, task)
    accelerator = build_accelerator("fp32", "none", arguments.dump, _RANK_TIMEOUT)
    rank, ranks = rank_and_world()
    if ranks not in (1, facts["ranks"]):
        raise InputError(
            f"{arguments.dump} has {facts['ranks']} ranks: start 1 rank or {facts['ranks']} ranks, not {ranks}"
        )
    device = accelerator.device if arguments.device is None else _device(arguments.device)
    if rank == 0:
        run_facts = f"{facts['ranks']} ranks, {precision}; here on {device}"
        print(f"step {facts['step']} of recipe {facts['recipe']}, {run_facts}")
    replayed_ranks = range(facts["ranks"]) if ranks == 1 else [rank]
    dumps = (read_rank(arguments.dump, facts, number) for number in replayed_ranks)
    reports = [_replay_rank(task, dump, facts, precision, device) for dump in dumps]
    all_reports = [report for rank_reports in all_gather_object(reports) for report in rank_reports]
    if rank == 0:
        for report in all_reports:
            print("\n".join(report.lines))
        if conclusion := _conclusion(facts, ranks, all_reports):
            print(conclusion)
    return 0


def _replay_rank(
    task: nn.Module, dump: RankDump, facts: dict[str, Any], precision: Precision, device: torch.device
) -> RankReport:
    lines, non_finite, deviates = [], False, False
    findings = replay(task, dump, precision=precision, scale=facts["scale"], threads=facts["threads"], device=device)
    for index, finding in enumerate(findings):
        run_loss, loss = dump.losses[index], finding.losses["loss"]
        non_finite |= not finding.finite
        deviates |= run_loss is not None and abs(loss - run_loss) > _LOSS_TOLERANCE * abs(run_loss)
        was = "not finite" if run_loss is None else f"{run_loss:.6g}"
        lines.append(f"rank {dump.rank}, micro-batch {index + 1}: loss {loss:.6g}, was {was}")
        lines += [f"  {line}" for line in _describe(finding)]
    return RankReport(lines, non_finite, deviates)


def _conclusion(facts: dict[str, Any], ranks: int, reports: list[RankReport]) -> str:
    if ranks < facts["ranks"] and any(report.deviates for report in reports):
        return (
            "losses differ from those of the run: loss terms compare samples of all ranks, and this replay runs one "
            f"rank at a time; replay all ranks together: torchrun --nproc_per_node {facts['ranks']} -m bocage replay "
            "DUMP"
        )
    if any(report.non_finite for report in reports):
        return ""
    run_versions, versions = facts["versions"], library_versions()
    changed = [
        f"{name} {run_versions.get(name)} in the run, {version} here"
        for name, version in versions.items()
        if run_versions.get(name) != version
    ]
    return (
        "everything is finite here, with the weights, batches and random numbers of the step, rank by rank: the device "
        f"or a library may be the cause ({'; '.join(changed) or 'library versions are the same'})"
    )


def _describe(finding: Finding) -> list[str]:
    lines = []
    if terms := [name for name, value in finding.losses.items() if not math.isfinite(value)]:
        lines.append(f"not finite: {', '.join(terms)}")
    if finding.first_module:
        lines.append(f"first module whose output is not finite: {finding.first_module}")
    if finding.gradients and not finding.first_module:
        count = len(finding.gradients) - _NAMES_SHOWN
        more = f" and {count} more" if count > 0 else ""
        lines.append(f"gradient not finite: {', '.join(finding.gradients[:_NAMES_SHOWN])}{more}")
    if finding.refusal:
        lines.append(f"samples were not tried alone, because the task does not accept one sample ({finding.refusal})")
    if finding.samples:
        lines.append(f"samples with which this happens alone: {', '.join(finding.samples)}")
    for (key, modality), count in finding.inputs.items():
        lines.append(f"{key}: {counted(count, 'value')} of {modality} not finite")
    return lines


def _rebuild_task(folder: Path, facts: dict[str, Any], shards: str | None) -> tuple[nn.Module, Precision]:
    """Build the task of the run with new weights and its input statistics; return it with its precision."""
    rebuild = facts["rebuild"]
    if rebuild is None:
        raise InputError(
            f"{folder} does not say how to build its task: only dumps of bocage pretrain and bocage finetune do"
        )
    source = f"{folder}/dump.json"
    # The dump has the weights, so the initial encoders may be gone.
    settings = {**rebuild["config"], "encoders": {}}
    if rebuild["command"] == "pretrain":
        config = recipes.config_from_dict(PretrainConfig, settings, source)
        model = build_pretraining_model(config, _open_shards(config.shards, shards, facts))
        for name, spec in rebuild["inputs"].items():
            model.encoder(name).spec = InputSpec.from_json(spec)
        return model, config.engine.precision
    finetune_config = recipes.config_from_dict(FinetuneConfig, settings, source)
    return segmentation_from_json(rebuild["model"], finetune_config.supervision), finetune_config.engine.precision


def _open_shards(path: str, moved_to: str | None, facts: dict[str, Any]) -> Manifest:
    manifest = open_shards(moved_to or path)
    if manifest.digest != facts["config"]["shards"]:
        raise InputError(f"{manifest.path} are not the shards of this run: give those by --shards")
    return manifest


def _device(name: str) -> torch.device:
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:  # torch without CUDA raises an AssertionError
        raise InputError(f"--device {name}: {str(error).splitlines()[0]}") from error
    return device
