"""``bocage demo OUT``: simulate, shard, pretrain and fine-tune, and compare pretrained encoders with scratch."""

from __future__ import annotations

import argparse
import json
import os
import statistics
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from bocage.shards.format.manifest import Manifest
from bocage.tools.cli.steps import DemoSteps, TrainingProcess, interruptible

SEEDS = (0, 1, 2, 3, 4)
INITIALIZATIONS = ("pretrained", "scratch")
PATCHES = 120
SAMPLE_SEED = 7
LABEL_FRACTION = 0.5
FINETUNE_STEPS = 80


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command."""
    parser.add_argument(
        "out",
        metavar="OUT",
        nargs="?",
        type=Path,
        default=Path("runs/demo"),
        help="folder for all files of the demo (default: %(default)s)",
    )
    parser.add_argument("--patches", type=int, default=PATCHES, help="simulated patches (default: %(default)s)")
    parser.epilog = "Run again, it skips finished steps; delete OUT to start anew."


def run(arguments: argparse.Namespace) -> int:
    """Sample, shard, pretrain, fine-tune from both initializations with several seeds, and compare."""
    return interruptible(lambda: _demo(arguments))


def _demo(arguments: argparse.Namespace) -> int:
    console = Console(highlight=False, emoji=False)
    demo, out = DemoSteps(console), arguments.out
    processes = min(2, os.cpu_count() or 1)
    tree, shards, pretrained = out / "tree", out / "shards", out / "pretrain"

    demo.announce("1. Simulate patches in FLAIR-HUB's own format")
    command = ["sample", tree, "--patches", arguments.patches, "--seed", SAMPLE_SEED, "--workers", processes]
    demo.command("bocage", "bocage", command)

    demo.announce("2. Write WebDataset shards")
    demo.command("bocage", "bocage", ["shard", tree, shards, "--workers", processes, "--shard-mb", 32])

    demo.announce("3. Pretrain one encoder per sensor, without labels")
    command = [
        "pretrain",
        "recipe=quickstart",
        f"shards={shards}",
        f"output={pretrained}",
        f"batch_size={8 // processes}",
    ]
    launcher = ["torch.distributed.run", "--standalone", "--nproc_per_node", processes, "-m"]
    demo.command(f"torchrun --nproc_per_node {processes} -m bocage", [*launcher, "bocage"], command)

    demo.announce("4. Fine-tune on few labels, from pretrained encoders and from scratch, one process per core")
    registry = Manifest.open(shards).registry
    sensors = [registry.by_role(role)[0].name for role in ("image", "series")]
    runs: dict[tuple[str, int], TrainingProcess] = {}
    for seed in SEEDS:
        for initialization in INITIALIZATIONS:
            output = out / "finetune" / f"{initialization}-{seed}"
            command = [
                "recipe=finetune_quickstart",
                f"shards={shards}",
                f"output={output}",
                f"modalities=[{','.join(sensors)}]",
                f"train_fraction={LABEL_FRACTION}",
                f"engine.steps={FINETUNE_STEPS}",
                f"engine.seed={seed}",
            ]
            if initialization == "pretrained":
                command += [f"encoders.{name}={pretrained / 'encoders' / name}" for name in sensors]
            runs[initialization, seed] = TrainingProcess(
                f"{initialization}, seed {seed}",
                "bocage finetune",
                ("bocage", "finetune", "engine.log_every=5"),
                tuple(command),
                output,
                "metrics.json",
                FINETUNE_STEPS,
            )
    demo.side_by_side(list(runs.values()), processes)

    demo.announce("Done")
    scores = {key: json.loads((job.output / "metrics.json").read_text()) for key, job in runs.items()}
    console.print(_comparison(scores))
    console.print(
        "error: standard error of the mean over seeds. Both runs of a seed have the same decoder and batches."
    )
    paths = {
        "shards": shards,
        "encoders": pretrained / "encoders",
        "reconstruction": sorted((pretrained / "reconstructions").glob("*.png"))[-1],
        "prediction": next((runs["pretrained", SEEDS[0]].output / "predictions").glob("*.png")),
    }
    for name, path in paths.items():
        console.print(f"{name + ':':16}{path}", markup=False, soft_wrap=True)
    return 0


def _comparison(scores: dict[tuple[str, int], dict[str, Any]]) -> Table:
    """Table of mIoU by initialization and of their difference, on validation and test patches."""
    one = scores[INITIALIZATIONS[0], SEEDS[0]]
    (label,) = one["labels"]
    # Without vertical lines, ten columns fit into a terminal of 80 characters.
    table = Table(title=f"{label}: strict mIoU (%) after {one['patches']['train']} labelled patches", box=SIMPLE_HEAD)
    table.add_column("patches", no_wrap=True)
    table.add_column("encoders", no_wrap=True)
    for seed in SEEDS:
        table.add_column(f"seed {seed}", justify="right")
    table.add_column("mean", justify="right", style="bold")
    table.add_column("error", justify="right")
    for part in ("valid", "test"):
        rows = {
            initialization: [float(scores[initialization, seed][part][label]["strict"]["miou"]) for seed in SEEDS]
            for initialization in INITIALIZATIONS
        }
        rows["difference"] = [first - second for first, second in zip(*rows.values(), strict=True)]
        for name, values in rows.items():
            figures = [*values, statistics.mean(values), statistics.stdev(values) / len(values) ** 0.5]
            where = f"{one['patches'][part]} {part}" if name == INITIALIZATIONS[0] else ""
            table.add_row(where, name, *(f"{figure:.1f}" for figure in figures), end_section=name == "difference")
    return table
