"""``bocage replay DUMP``: a bad step of a run once more, and what in it is not finite."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from torch import nn

from bocage import recipes
from bocage.finetune.train import FinetuneConfig
from bocage.finetune.train import build_task as build_segmentation
from bocage.shards.errors import InputError
from bocage.shards.remote import open_shards
from bocage.ssl.engine.dumps import load_weights, read_facts, read_rank
from bocage.ssl.engine.provenance import library_versions
from bocage.ssl.engine.replay import Finding, replay
from bocage.ssl.pretrain import PretrainConfig
from bocage.ssl.pretrain import build_task as build_pretraining

_SHOWN = 5


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command."""
    parser.add_argument("dump", metavar="DUMP", type=Path, help="a folder OUTPUT/bad_steps/step-*")
    parser.add_argument("--shards", metavar="PATH", help="where the shards are now, if they were moved")
    parser.add_argument("--device", metavar="NAME", help="e.g. cpu or cuda:1 (default: a GPU if there is one)")


def run(arguments: argparse.Namespace) -> int:
    """Replay every rank of the dump."""
    facts = read_facts(arguments.dump)
    task, precision = _task(arguments.dump, facts, arguments.shards)
    load_weights(arguments.dump, task)
    device = _device(arguments.device)
    print(f"step {facts['step']} of recipe {facts['recipe']}, {facts['ranks']} ranks, {precision}; here on {device}")
    reproduced = False
    for rank in range(facts["ranks"]):
        dump = read_rank(arguments.dump, facts, rank)
        findings = replay(
            task, dump, precision=precision, scale=facts["scale"], threads=facts["threads"], device=device
        )
        for index, finding in enumerate(findings):
            reproduced |= not finding.finite
            then = dump.losses[index]
            print(f"rank {rank}, micro-batch {index + 1}: loss {finding.losses['loss']:.6g}", end="")
            print(f", was {'not finite' if then is None else f'{then:.6g}'}")
            for line in _lines(finding):
                print(f"  {line}")
    if not reproduced:
        there, here = facts["versions"], library_versions()
        changed = "; ".join(f"{name} {there.get(name)} there, {here[name]} here" for name in here) or "same libraries"
        print(
            "everything is finite here, with the weights, batches and random draws of the step, rank by rank: look at "
            f"the device and at what differs ({changed})"
        )
    return 0


def _lines(finding: Finding) -> list[str]:
    lines = []
    if terms := [name for name, value in finding.losses.items() if value != value or abs(value) == float("inf")]:
        lines.append(f"not finite: {', '.join(terms)}")
    if finding.where:
        lines.append(f"first module whose output is not finite: {finding.where}")
    if finding.gradients and not finding.where:
        more = f" and {len(finding.gradients) - _SHOWN} more" if len(finding.gradients) > _SHOWN else ""
        lines.append(f"gradient not finite: {', '.join(finding.gradients[:_SHOWN])}{more}")
    if finding.samples:
        lines.append(f"samples with which this happens alone: {', '.join(finding.samples)}")
    for (key, modality), count in finding.inputs.items():
        lines.append(f"{key}: {count} values of {modality} are not finite")
    return lines


def _task(folder: Path, facts: dict[str, Any], shards: str | None) -> tuple[nn.Module, Any]:
    """The task of the run, with fresh weights, and its precision."""
    rebuild = facts.get("rebuild")
    if rebuild is None:
        raise InputError(
            f"{folder} does not say how its task is built: only runs of pretrain.py and finetune can replay"
        )
    source = f"{folder}/dump.json"
    if rebuild["command"] == "pretrain":
        pretraining = recipes.restored(PretrainConfig, rebuild["config"], source)
        manifest = _shards(pretraining.shards, shards, facts)
        return build_pretraining(pretraining, manifest), pretraining.engine.precision
    config = recipes.restored(FinetuneConfig, rebuild["config"], source)
    return build_segmentation(config, _shards(config.shards, shards, facts)), config.engine.precision


def _shards(then: str, now: str | None, facts: dict[str, Any]) -> Any:
    manifest = open_shards(now or then)
    if manifest.digest != facts["config"]["shards"]:
        raise InputError(f"{manifest.path} are not the shards of this run: give those by --shards")
    return manifest


def _device(name: str | None) -> torch.device:
    found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    try:
        device = torch.device(name or found or "cpu")
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:  # torch without CUDA asserts
        raise InputError(f"--device {name}: {str(error).splitlines()[0]}") from error
    return device
