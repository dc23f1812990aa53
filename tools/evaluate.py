"""``bocage evaluate RUN SHARDS OUT``: score a fine-tuned model, also with some of its sensors removed."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from rich.table import Table

from bocage.finetune.evaluation.evaluate import (
    Confusions,
    classification_report,
    compute_confusions,
    labelled_rows,
    rows_with_all_modalities,
    sensor_ablations,
    write_results,
)
from bocage.finetune.models.segmentation import load_segmentation
from bocage.shards.errors import InputError, counted
from bocage.shards.files import atomic_write
from bocage.shards.format.manifest import EVERY_SAMPLE
from bocage.shards.read.open import open_shards
from bocage.shards.read.patches import ShardPatches
from bocage.ssl.engine.parallel.distributed import build_accelerator, is_main
from bocage.tools.cli.arguments import non_negative_int, positive_int, split_value
from bocage.tools.cli.progress import ProgressBars
from bocage.tools.cli.reports import text_console

_RANK_TIMEOUT = 1800.0  # seconds


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command."""
    parser.add_argument("run_folder", metavar="RUN", type=Path, help="output folder of `bocage finetune`")
    parser.add_argument("shards", metavar="SHARDS", help="folder that `bocage shard` wrote, or its address")
    parser.add_argument("out", metavar="OUT", type=Path, help="folder for metrics.json, tables and pictures")
    parser.add_argument("--split", default=EVERY_SAMPLE, metavar="COLUMN", help="e.g. split_1 (default: all patches)")
    parser.add_argument("--value", help="with --split: its value (default: test)")
    parser.add_argument(
        "--without", nargs="+", default=[], metavar="MODALITY", help="sensors to remove from the model's inputs"
    )
    parser.add_argument(
        "--missing",
        action="store_true",
        help="also score without each sensor and with each one alone, on the patches that have all sensors",
    )
    parser.add_argument("--batch-size", type=positive_int, default=4, help="patches per batch (default: %(default)s)")
    parser.add_argument("--workers", type=non_negative_int, default=0, help="DataLoader workers (default: %(default)s)")


def run(arguments: argparse.Namespace) -> int:
    """Score the model, print the scores and write them to files."""
    task = load_segmentation(arguments.run_folder / "model")
    manifest = open_shards(arguments.shards)
    if unknown := [name for name in arguments.without if name not in task.modalities]:
        raise InputError(f"--without {unknown[0]}: the model reads {', '.join(task.modalities)}")
    inputs = [name for name in task.modalities if name not in arguments.without and name in manifest.registry]
    if lacking := [name for name in (*task.modalities, *task.labels) if name not in manifest.registry]:
        print(f"bocage: {manifest.path} has no {', '.join(lacking)}: scoring without", file=sys.stderr)
    sensor_sets = {"all" if not arguments.without else f"without {' '.join(arguments.without)}": inputs}
    if arguments.missing:
        sensor_sets |= sensor_ablations(inputs, arguments.without)
    if not inputs or (task.model.official and (arguments.without or arguments.missing)):
        reason = "the official architecture needs all its sensors" if inputs else "the model has no input left"
        raise InputError(f"--without, --missing: {reason}")
    patches = ShardPatches(manifest)
    value = split_value(arguments.split != EVERY_SAMPLE, arguments.value)
    rows = labelled_rows(patches, task, arguments.split, value, modalities=inputs)
    if arguments.missing:
        total, rows = len(rows), rows_with_all_modalities(patches, rows, inputs)
        if not len(rows):
            raise InputError(f"--missing: no patch has all of {', '.join(inputs)}, which the comparison needs")
        if len(rows) < total:
            print(
                f"bocage: {total - len(rows):,} of {counted(total, 'patch')} left out: they lack a sensor",
                file=sys.stderr,
            )
    accelerator = build_accelerator("fp32", "none", arguments.out, _RANK_TIMEOUT)
    task = task.to(accelerator.device).eval()
    parts: dict[str, Confusions] = {}
    world = accelerator.num_processes
    with ProgressBars(active=is_main()) as bars:
        for name, modalities in sensor_sets.items():
            # With two sensors, "without A" equals "only B".
            if same := next((other for other in parts if sensor_sets[other] == modalities), None):
                parts[name] = parts[same]
                continue
            bar = bars.add(name, "patches", len(rows))
            parts[name] = compute_confusions(
                task,
                manifest,
                rows,
                batch_size=arguments.batch_size,
                workers=arguments.workers,
                modalities=modalities,
                progress=lambda done, bar=bar: bar.update(min(done * world, len(rows))),  # type: ignore[misc]
            )
    if is_main():
        _write_and_print(arguments.out, parts, len(rows))
    accelerator.wait_for_everyone()  # gloo aborts when a rank exits before the others
    return 0


def _write_and_print(out: Path, parts: dict[str, Confusions], patches: int) -> None:
    try:
        out.mkdir(parents=True, exist_ok=True)
        write_results(out, parts)
        metrics = {
            part: {name: classification_report(matrix) for name, matrix in confusions.items()}
            for part, confusions in parts.items()
        }
        with atomic_write(out / "metrics.json") as path:
            path.write_text(json.dumps({"patches": patches, **metrics}, indent=1) + "\n", encoding="utf-8")
    except OSError as error:
        raise InputError(f"{out} cannot be written: {error.strerror}") from error
    console = text_console()
    for label in next(iter(metrics.values())):  # one table per label, since a common one would be too wide
        table = Table(title=f"{label}, {counted(patches, 'patch')}")
        table.add_column("sensors", no_wrap=True)
        for name in ("mIoU strict", "mIoU official", "OA strict", "OA official"):
            table.add_column(name, justify="right")
        for part, by_label in metrics.items():
            strict, official = by_label[label]["strict"], by_label[label]["official"]
            scores = (strict["miou"], official["miou"], strict["oa"], official["oa"])
            table.add_row(part, *(f"{score:.2f}" for score in scores))
        console.print(table)
    print(f"scores: {out / 'metrics.json'}")
