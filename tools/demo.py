"""``bocage demo``: the whole path on a simulated sample, ending with pretrained against scratch."""

from __future__ import annotations

import argparse
import os
import statistics
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

SEEDS = (0, 1, 2)
PATCHES = 120
SAMPLE_SEED = 7
LABEL_SHARE = 0.5


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the sub-command."""
    parser.add_argument("out", metavar="OUT", type=Path, help="folder for everything the demo makes")
    parser.add_argument("--patches", type=int, default=PATCHES, help="simulated patches (default: %(default)s)")
    parser.epilog = "Run again, it skips what is done: delete OUT to start afresh."


def run(arguments: argparse.Namespace) -> int:
    """Sample, shard, pretrain, fine-tune from both initialisations with several seeds, and compare."""
    from bocage import recipes
    from bocage.finetune.train import FinetuneConfig, finetune
    from bocage.shards.manifest import Manifest
    from bocage.ssl.pretrain import PretrainConfig, pretrain
    from bocage.tools.main import main

    console = Console(stderr=False, highlight=False)
    began = time.monotonic()
    out: Path = arguments.out
    tree, shards, run_folder = out / "tree", out / "shards", out / "pretrain"
    workers = str(os.cpu_count() or 1)

    def elapsed() -> str:
        return f"{time.monotonic() - began:.0f} s"

    def announce(title: str, command: str) -> None:
        console.rule(f"[bold]{title}[/bold]  ({elapsed()})", align="left")
        console.print(f"$ {command}", style="dim", soft_wrap=True)

    for title, words in (
        (
            "1. Simulate patches in FLAIR-HUB's own format",
            [
                "sample",
                str(tree),
                "--patches",
                str(arguments.patches),
                "--seed",
                str(SAMPLE_SEED),
                "--workers",
                workers,
            ],
        ),
        ("2. Write WebDataset shards", ["shard", str(tree), str(shards), "--workers", workers, "--shard-mb", "32"]),
    ):
        announce(title, " ".join(["bocage", *words]))
        if status := main(words):
            return status

    words = ["recipe=quickstart", f"shards={shards}", f"output={run_folder}"]
    announce("3. Pretrain one encoder a sensor, without labels", " ".join(["accelerate launch pretrain.py", *words]))
    if status := pretrain(recipes.resolve(PretrainConfig, words)).exit_code:
        return status

    registry = Manifest.open(shards).registry
    modalities = [registry.by_role(role)[0].name for role in ("image", "series")]
    scores: dict[str, list[dict[str, Any]]] = {"pretrained": [], "scratch": []}
    console.rule(
        f"[bold]4. Fine-tune on few labels, from the encoders and from scratch[/bold]  ({elapsed()})", align="left"
    )
    for seed in SEEDS:
        for start in scores:
            output = out / "finetune" / f"{start}-{seed}"
            words = ["recipe=finetune_quickstart", f"shards={shards}", f"output={output}", f"engine.seed={seed}"]
            words += [f"modalities=[{','.join(modalities)}]", f"train_fraction={LABEL_SHARE}"]
            if start == "pretrained":
                words += [f"encoders.{name}={run_folder / 'encoders' / name}" for name in modalities]
            console.print(" ".join(["$ bocage finetune", *words]), style="dim", soft_wrap=True)
            result = finetune(recipes.resolve(FinetuneConfig, words))
            if result["exit_code"]:
                return int(result["exit_code"])
            scores[start].append(result)

    console.rule(f"[bold]Done[/bold]  ({elapsed()})", align="left")
    console.print(_comparison(scores))
    one = scores["pretrained"][0]
    paths = {
        "shards": shards,
        "encoders": run_folder / "encoders",
        "reconstruction": next((run_folder / "pictures").glob("*.png"), None),
        "prediction": one["picture"],
    }
    for name, path in paths.items():
        console.print(f"{name + ':':16}{path}", soft_wrap=True)
    return 0


def _comparison(scores: dict[str, list[dict[str, Any]]]) -> Table:
    """mIoU by initialisation: each seed, mean and standard deviation."""
    one = scores["pretrained"][0]
    part = "test" if "test" in one else "valid"
    table = Table(
        title=f"{one['label']}, {one['patches']['train']} labelled patches: strict mIoU (%) on {one['patches'][part]} "
        f"{part} patches"
    )
    table.add_column("encoders")
    for seed in SEEDS:
        table.add_column(f"seed {seed}", justify="right")
    table.add_column("mean", justify="right", style="bold")
    table.add_column("std", justify="right")
    for start, runs in scores.items():
        values = [float(run[part]["strict"]["miou"]) for run in runs]
        figures = [*values, statistics.mean(values), statistics.stdev(values)]
        table.add_row(start, *(f"{figure:.2f}" for figure in figures))
    return table
