"""``bocage study subsets|run|report|demo|probe``: how few labels encoders need."""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from bocage.shards.errors import InputError
from bocage.shards.files import atomic_write
from bocage.shards.format.manifest import EVERY_SAMPLE
from bocage.tools.cli.arguments import unit_fraction, non_negative_int, positive_int
from bocage.tools.cli.examples import add_examples
from bocage.tools.cli.interrupts import InterruptedCommand, Interrupts
from bocage.tools.cli.progress import ProgressBar, ProgressBars

_STUDY_WORDS = "recipe=label_efficiency shards=PATH output=PATH, and any key of the recipe"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command."""
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)

    subsets = actions.add_parser("subsets", help="write nested, stratified subsets of the labelled patches")
    subsets.add_argument("shards", metavar="SHARDS", help="folder that `bocage shard` wrote, or its address")
    subsets.add_argument("out", metavar="OUT", type=Path, help="folder for subsets.parquet, classes.csv, subsets.json")
    _labels(subsets)
    subsets.add_argument("--split", default="split_1", metavar="COLUMN", help="default: %(default)s; or all")
    subsets.add_argument("--value", default="train", help="value of the split to draw from (default: %(default)s)")
    subsets.add_argument("--fractions", nargs="+", type=unit_fraction, metavar="SHARE", help="shares of the patches")
    subsets.add_argument("--draws", type=positive_int, default=5, help="subsets of each share up to 0.05 (default: 5)")
    subsets.add_argument("--draws-above", type=positive_int, default=3, help="subsets of larger shares (default: 3)")
    subsets.set_defaults(act=_subsets)

    run = actions.add_parser("run", help="run the grid of a study, what is missing of it")
    run.add_argument("words", nargs="*", metavar="key=value", help=_STUDY_WORDS)
    run.add_argument("--processes", type=positive_int, default=1, help="runs at a time (default: 1)")
    run.add_argument("--dry-run", action="store_true", help="print the grid and what it will cost, run nothing")
    run.add_argument("--slurm", type=Path, metavar="FILE", help="write an array script for sbatch, run nothing")
    run.add_argument(
        "--sbatch", nargs="+", default=[], metavar="OPTION", help="with --slurm: e.g. gpus=1 time=04:00:00"
    )
    launcher = "with --slurm: what starts a run (default: bocage), e.g. 'accelerate launch -m bocage'"
    run.add_argument("--launcher", default="bocage", help=launcher)
    run.add_argument("--cell", metavar="NAME", help="run this one in this process")
    run.set_defaults(act=_run)

    report = actions.add_parser("report", help="write a page of what the finished runs say")
    report.add_argument("words", nargs="*", metavar="key=value", help=_STUDY_WORDS)
    report.add_argument("--out", type=Path, metavar="FOLDER", help="default: report in the study's output")
    report.set_defaults(act=_report)

    demo = actions.add_parser("demo", help="a small study from nothing: under twenty minutes, 2 GB")
    demo.add_argument("out", metavar="OUT", type=Path, help="folder for everything; run again, it goes on")
    demo.add_argument("--report", type=Path, metavar="FOLDER", help="where the two reports go (default: in OUT)")
    demo.add_argument("--processes", type=positive_int, default=2, help="trainings at a time (default: %(default)s)")
    demo.set_defaults(act=_demo)

    run_probe = actions.add_parser("probe", help="what an encoder's frozen features tell, taught with few labels")
    run_probe.add_argument("encoder", metavar="ENCODER", help="folder of an encoder, or hf:org/name")
    run_probe.add_argument("shards", metavar="SHARDS", help="folder that `bocage shard` wrote, or its address")
    run_probe.add_argument("out", metavar="OUT", type=Path, help="folder for features and scores")
    _labels(run_probe)
    run_probe.add_argument("--split", default="split_1", metavar="COLUMN", help="with train, valid and test patches")
    run_probe.add_argument("--fraction", type=unit_fraction, default=1.0, help="of the training patches (default: all)")
    run_probe.add_argument("--draw", type=non_negative_int, default=0, help="which subset of that size (default: 0)")
    run_probe.add_argument(
        "--sampling-unit", choices=("patch", "roi"), default="patch", help="label patches, or whole regions"
    )
    run_probe.add_argument("--kinds", nargs="+", choices=("knn", "linear"), default=["knn", "linear"], metavar="KIND")
    run_probe.add_argument("--batch-size", type=positive_int, default=8, help="patches at a time (default: 8)")
    run_probe.add_argument("--workers", type=non_negative_int, default=0, help="reading processes (default: 0)")
    run_probe.set_defaults(act=_probe)

    for name, action in actions.choices.items():
        add_examples(action, f"study {name}")


def _labels(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--label", default="AERIAL_LABEL-COSIA", help="the label raster (default: %(default)s)")
    parser.add_argument("--level", type=positive_int, default=1, help="which of its bands (default: 1)")


def run(arguments: argparse.Namespace) -> int:
    """Do what was asked for; the exit status."""
    act: Callable[[argparse.Namespace], int] = arguments.act
    return act(arguments)


def _subsets(arguments: argparse.Namespace) -> int:
    from bocage.finetune.models.targets import Target
    from bocage.finetune.subsets.sampling import LabelledPatches
    from bocage.finetune.subsets.subset_files import DESCRIPTION, SubsetPlan, write_subsets
    from bocage.shards.read.open import open_shards
    from bocage.shards.read.patches import ShardPatches

    manifest = open_shards(arguments.shards)
    registry = manifest.registry
    if arguments.label not in registry or registry[arguments.label].role != "label":
        there = ", ".join(item.name for item in registry.labels) or "none"
        raise InputError(f"--label {arguments.label}: no label of {arguments.shards}; labels: {there}")
    rows = manifest.split(arguments.split, arguments.value)
    rows = rows[ShardPatches(manifest).has_modality(arguments.label)[rows]]
    target = Target(label=registry[arguments.label], band=arguments.level - 1)
    patches = LabelledPatches.read(manifest, rows, [target])
    plan = SubsetPlan(draws=arguments.draws, draws_above=arguments.draws_above)
    try:
        if arguments.fractions is not None:
            plan = replace(plan, fractions=tuple(arguments.fractions))
    except ValueError as error:
        raise InputError(f"--fractions: {error}") from error
    source = {
        "shards": manifest.digest,
        "split": arguments.split if arguments.split == EVERY_SAMPLE else f"{arguments.split}={arguments.value}",
        "label": arguments.label,
        "level": arguments.level,
    }
    with ProgressBars() as bars:
        bar = bars.add("draws", "draws", len(list(plan.subsets())))
        try:
            found = write_subsets(arguments.out, patches, plan, source, bar.update)
        except OSError as error:
            raise InputError(f"{arguments.out} cannot be written: {error.strerror}") from error
    table = Table(title=f"{len(patches):,} patches, {len(set(patches.rois)):,} regions")
    for name in ("sampling_unit", "share", "draws", "patches", "regions", "classes left out of some draw"):
        table.add_column(name, justify="left" if name.startswith(("sampling_unit", "classes")) else "right")
    groups: dict[tuple[str, float], list[dict[str, Any]]] = {}
    for item in found["subsets"]:
        groups.setdefault((item["sampling_unit"], item["fraction"]), []).append(item)
    for (sampling_unit, fraction), items in sorted(groups.items()):
        lost = sorted({name.partition("/")[2] for item in items for name in item["without"]})
        counts = [_range(item[key] for item in items) for key in ("patches", "regions")]
        table.add_row(sampling_unit, f"{100 * fraction:g} %", str(len(items)), *counts, ", ".join(lost) or "none")
    Console().print(table)
    print(f"subsets: {arguments.out / DESCRIPTION}")
    return 0


def _range(values: Any) -> str:
    found = sorted(set(values))
    return f"{found[0]:,}" if len(found) == 1 else f"{found[0]:,}-{found[-1]:,}"


def _run(arguments: argparse.Namespace) -> int:
    from bocage import recipes
    from bocage.finetune.study.execute import execute_run
    from bocage.finetune.study.launch import Failure, ParallelRunner
    from bocage.finetune.study.run_folders import RunFolders, slurm_script
    from bocage.finetune.study.study_config import StudyConfig, study_runs

    study = recipes.resolve(StudyConfig, arguments.words)
    if arguments.cell:
        return execute_run(study, arguments.cell)
    folders, grid = RunFolders(study), study_runs(study)
    wanted = [cell for cell in grid if not folders.finished(cell)]
    folders.check(wanted)
    if arguments.slurm:
        options = [f"--{option}" for option in arguments.sbatch]
        text = slurm_script(folders, grid, arguments.launcher, arguments.words, options)
        try:
            with atomic_write(arguments.slurm) as path:
                path.write_text(text, encoding="utf-8")
        except OSError as error:
            raise InputError(f"--slurm {arguments.slurm}: cannot be written: {error.strerror}") from error
        print(f"sbatch {arguments.slurm}")
        return 0
    if arguments.dry_run:
        return _dry_run(study, folders, arguments.processes)
    runner = ParallelRunner(folders, execute_run, arguments.processes)
    with Interrupts(), ProgressBars() as bars:
        bar = bars.add("runs", "runs", len(grid))
        bar.update(len(grid) - len(wanted))

        def done(cell: Any, failure: Failure | None) -> None:
            bar.advance()
            if failure is not None:
                bars.say(f"failed: {cell.name}: {failure.line}")

        try:
            failures = runner.run(grid, done)
        except InterruptedCommand as interruption:
            print(f"\nbocage: stopped; the same command goes on with what is missing ({interruption.name})")
            return interruption.exit_code
    if not failures:
        print(f"{len(grid)} runs in {folders.root / 'cells'}; `bocage study report` tells what they scored")
        return 0
    print(f"{len(failures)} of {len(grid)} runs failed; the same command tries them again:")
    for failure in failures:
        print(f"  {failure.cell.name} (status {failure.status}): {folders.of(failure.cell) / 'log.txt'}")
    return 1


def _dry_run(study: Any, folders: Any, processes: int) -> int:
    from bocage.finetune.probes.probe import PROBE_KINDS
    from bocage.finetune.study.execute import Cost, measure_cost
    from bocage.finetune.study.study_config import study_runs

    grid = study_runs(study)
    table = Table(title=f"{len(grid)} runs")
    for name in ("mode", "runs", "finished", "seconds a run", "seconds a step", "hours left", "MB left"):
        table.add_column(name, justify="left" if name == "mode" else "right")
    hours, unknown = 0.0, False
    for mode in study.modes:
        cells_here = [cell for cell in grid if cell.mode == mode]
        there = [cell for cell in cells_here if folders.finished(cell)]
        left = len(cells_here) - len(there)
        cost: Cost | int | None = None
        if there:
            seconds = statistics.mean(folders.seconds(cell) for cell in there)
            size = statistics.mean(
                sum(path.stat().st_size for path in folders.of(cell).rglob("*") if path.is_file()) for cell in there
            )
            cost = Cost(seconds, None, int(size))
        elif mode not in PROBE_KINDS:
            cost = measure_cost(study, cells_here[-1])
        if isinstance(cost, int):
            print("bocage: stopped before the cost was measured; nothing of it is kept")
            return cost
        if cost is None:
            table.add_row(mode, str(len(cells_here)), "0", "not measured", "", "", "")
            unknown = True
            continue
        hours += left * cost.seconds / 3600
        table.add_row(
            mode,
            str(len(cells_here)),
            str(len(there)),
            f"{cost.seconds:.0f}",
            "" if cost.step_seconds is None else f"{cost.step_seconds:.2f}",
            f"{left * cost.seconds / 3600:.2f}",
            f"{left * cost.bytes / 1e6:.0f}",
        )
    console = Console()
    console.print(table)
    for cell in grid:
        console.print(f"  {cell.name}{'  finished' if folders.finished(cell) else ''}", highlight=False, soft_wrap=True)
    if set(study.modes) & set(PROBE_KINDS):
        size = f"{folders.feature_bytes() / 1e6:.0f} MB at most in {folders.features}"
        print(f"probes keep features of each encoder: {size}")
    together = f"{hours / processes:.2f} with --processes {processes}, if they do not slow each other down"
    print(f"{hours:.2f} hours of a process, {together}{'; what is not measured comes on top' if unknown else ''}")
    return 0


def _report(arguments: argparse.Namespace) -> int:
    from bocage import recipes
    from bocage.finetune.study.report import write_report
    from bocage.finetune.study.run_folders import RunFolders
    from bocage.finetune.study.study_config import StudyConfig, study_runs

    study = recipes.resolve(StudyConfig, arguments.words)
    out = arguments.out or Path(study.output) / "report"
    try:
        print(f"report: {write_report(study, out)}")
        folders, grid = RunFolders(study), study_runs(study)
        if unfinished := sum(not folders.finished(cell) for cell in grid):
            print(f"{unfinished} of {len(grid)} cells have no result yet: `bocage study run` runs them")
    except OSError as error:
        raise InputError(f"{out} cannot be written: {error.strerror}") from error
    return 0


def _demo(arguments: argparse.Namespace) -> int:
    from bocage.tools.cli.steps import interruptible
    from bocage.tools.cli.study_demo import study_demo

    return interruptible(lambda: study_demo(arguments.out, arguments.report, arguments.processes))


def _probe(arguments: argparse.Namespace) -> int:
    from bocage.finetune.finetune_config import FinetuneConfig
    from bocage.finetune.models.supervision import TaskConfig
    from bocage.finetune.probes.probe import run_probe
    from bocage.shards.read.open import open_shards
    from bocage.ssl.encoders.export import load_encoder
    from bocage.ssl.encoders.initialization import weights_digest

    modality = load_encoder(arguments.encoder).spec.modality
    try:
        config = FinetuneConfig(
            shards=arguments.shards,
            labels=[arguments.label],
            tasks={arguments.label: TaskConfig(level=arguments.level)},
            modalities=[modality],
            encoders={modality: arguments.encoder},
            split=arguments.split,
            train_fraction=arguments.fraction,
            draw=arguments.draw,
            sampling_unit=arguments.sampling_unit,
            batch_size=arguments.batch_size,
            workers=arguments.workers,
        )
    except ValueError as error:
        raise InputError(str(error)) from error
    outputs = {kind: arguments.out / _probe_folder(arguments, kind) for kind in arguments.kinds}
    weights = {name: weights_digest(source) for name, source in config.encoders.items()}
    wanted = {"weights": weights, "split": config.split, "shards": open_shards(arguments.shards).digest}
    for output in outputs.values():
        _refuse_other(output, wanted)
    rows = []
    for kind, output in outputs.items():
        with ProgressBars() as bars:
            found = run_probe(
                replace(config, output=str(output)), kind, arguments.out / "features", partial(_show, bars, {})
            )
        for part in [name for name in ("valid", "test") if name in found]:
            strict = found[part][arguments.label]["strict"]
            scores = (strict["miou"], strict["miou_without_background"], strict["oa"])
            rows.append(
                [kind, part, f"{found['patches'][part]:,}", *("" if item is None else f"{item:.2f}" for item in scores)]
            )
    table = Table(title=f"{arguments.label} from frozen features of {modality}, strict scores")
    for name in ("probe", "patches of", "count", "mIoU", "without background", "OA"):
        table.add_column(name, justify="left" if name in ("probe", "patches of") else "right")
    for row in rows:
        table.add_row(*row)
    Console().print(table)
    print(f"scores: {', '.join(str(output / 'metrics.json') for output in outputs.values())}")
    return 0


def _show(bars: ProgressBars, shown: dict[str, ProgressBar], name: str, total: int, done: int) -> None:
    if name not in shown:  # features that are there take no time, and no bar
        shown[name] = bars.add(name, "patches", total)
    shown[name].update(done)


def _probe_folder(arguments: argparse.Namespace, kind: str) -> str:
    """Name of the folder of a probe's scores: another label or share is another folder."""
    level = "" if arguments.level == 1 else f"-level{arguments.level}"
    sampling_unit = "" if arguments.sampling_unit == "patch" else f"-{arguments.sampling_unit}"
    return f"{kind}-{arguments.label}{level}-{arguments.fraction:g}{sampling_unit}-draw{arguments.draw}"


def _refuse_other(output: Path, wanted: dict[str, Any]) -> None:
    """Raise ``InputError`` where a folder holds the scores of another probe."""
    path = output / "metrics.json"
    if not path.is_file():
        return
    found = json.loads(path.read_text(encoding="utf-8"))
    if other := [key for key, value in wanted.items() if found.get(key) != value]:
        raise InputError(f"{output} holds scores of other {' and '.join(other)}: give another OUT")
