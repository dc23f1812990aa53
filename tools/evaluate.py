"""``bocage evaluate RUN SHARDS OUT``: scores of a fine-tuned model on any patches, also without each of its sensors."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from rich.console import Console
from rich.table import Table

from bocage.finetune.evaluation.evaluate import (
    Confusions,
    compute_confusions,
    labelled_rows,
    rows_with_all_modalities,
    sensor_ablations,
    classification_report,
    write_results,
)
from bocage.finetune.models.segmentation import load_segmentation
from bocage.shards.errors import InputError
from bocage.shards.files import atomic_write
from bocage.shards.format.manifest import EVERY_SAMPLE
from bocage.shards.read.open import open_shards
from bocage.shards.read.patches import ShardPatches
from bocage.ssl.engine.parallel.distributed import build_accelerator, is_main
from bocage.tools.cli.arguments import non_negative_int, positive_int, split_value
from bocage.tools.cli.progress import ProgressBars

_PATIENCE = 1800.0  # seconds that ranks wait for each other


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command."""
    parser.add_argument("run_folder", metavar="RUN", type=Path, help="output folder of `bocage finetune`")
    parser.add_argument("shards", metavar="SHARDS", help="folder that `bocage shard` wrote, or its address")
    parser.add_argument("out", metavar="OUT", type=Path, help="folder for metrics.json, tables and pictures")
    parser.add_argument("--split", default=EVERY_SAMPLE, metavar="COLUMN", help="e.g. split_1 (default: all patches)")
    parser.add_argument("--value", help="with --split: its value (default: test)")
    parser.add_argument(
        "--without", nargs="+", default=[], metavar="MODALITY", help="sensors that the model shall not see"
    )
    parser.add_argument(
        "--missing",
        action="store_true",
        help="also without each of the sensors, and with each of them alone, all on the patches that have every sensor",
    )
    parser.add_argument("--batch-size", type=positive_int, default=4, help="patches at a time (default: %(default)s)")
    parser.add_argument("--workers", type=non_negative_int, default=0, help="reading processes (default: %(default)s)")


def run(arguments: argparse.Namespace) -> int:
    """Measure, print the scores and leave them in files."""
    task = load_segmentation(arguments.run_folder / "model")
    manifest = open_shards(arguments.shards)
    if unknown := [name for name in arguments.without if name not in task.modalities]:
        raise InputError(f"--without {unknown[0]}: the model reads {', '.join(task.modalities)}")
    seen = [name for name in task.modalities if name not in arguments.without and name in manifest.registry]
    if lacking := [name for name in (*task.modalities, *task.labels) if name not in manifest.registry]:
        print(f"bocage: {manifest.path} has no {', '.join(lacking)}: measuring without", file=sys.stderr)
    sets = {"all" if not arguments.without else f"without {' '.join(arguments.without)}": seen}
    if arguments.missing:
        sets |= sensor_ablations(seen, arguments.without)
    if not seen or (task.model.official and (arguments.without or arguments.missing)):
        why = "the official architecture needs all its sensors" if seen else "nothing is left for the model to see"
        raise InputError(f"--without, --missing: {why}")
    patches = ShardPatches(manifest)
    value = split_value(arguments.split != EVERY_SAMPLE, arguments.value)
    rows = labelled_rows(patches, task, arguments.split, value, only=seen)
    if arguments.missing:
        every, rows = len(rows), rows_with_all_modalities(patches, rows, seen)
        if not len(rows):
            raise InputError(f"--missing: no patch has all of {', '.join(seen)}, on which sets of sensors are compared")
        if len(rows) < every:
            print(f"bocage: {every - len(rows)} of {every} patches left out: they lack a sensor", file=sys.stderr)
    accelerator = build_accelerator("fp32", "none", arguments.out, _PATIENCE)
    task = task.to(accelerator.device).eval()
    parts: dict[str, Confusions] = {}
    world = accelerator.num_processes
    with ProgressBars(active=is_main()) as bars:
        for name, only in sets.items():
            if same := next((part for part in parts if sets[part] == only), None):  # of two sensors
                parts[name] = parts[same]
                continue
            bar = bars.add(name, "patches", len(rows))
            parts[name] = compute_confusions(
                task,
                manifest,
                rows,
                batch_size=arguments.batch_size,
                workers=arguments.workers,
                only=only,
                progress=lambda done, bar=bar: bar.update(min(done * world, len(rows))),  # type: ignore[misc]
            )
    if is_main():
        _leave(arguments.out, parts, len(rows))
    accelerator.wait_for_everyone()  # ranks leave together: gloo aborts when a peer goes first
    return 0


def _leave(out: Path, parts: dict[str, Confusions], patches: int) -> None:
    try:
        out.mkdir(parents=True, exist_ok=True)
        write_results(out, parts)
        metrics = {part: {name: classification_report(matrix) for name, matrix in found.items()} for part, found in parts.items()}
        with atomic_write(out / "metrics.json") as path:
            path.write_text(json.dumps({"patches": patches, **metrics}, indent=1) + "\n", encoding="utf-8")
    except OSError as error:
        raise InputError(f"{out} cannot be written: {error.strerror}") from error
    console = Console()
    for label in next(iter(metrics.values())):  # a table each: names of sensors and labels side by side are too wide
        table = Table(title=f"{label}, {patches} patches")
        table.add_column("sensors", no_wrap=True)
        for name in ("mIoU strict", "mIoU official", "OA strict", "OA official"):
            table.add_column(name, justify="right")
        for part, found in metrics.items():
            strict, official = found[label]["strict"], found[label]["official"]
            figures = (strict["miou"], official["miou"], strict["oa"], official["oa"])
            table.add_row(part, *(f"{figure:.2f}" for figure in figures))
        console.print(table)
    print(f"scores: {out / 'metrics.json'}")
