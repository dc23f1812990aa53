"""``bocage study subsets|run|report|demo|probe``: label-efficiency studies of pretrained encoders."""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.table import Table

from bocage.shards.errors import InputError, counted
from bocage.shards.files import atomic_write
from bocage.shards.format.manifest import EVERY_SAMPLE
from bocage.tools.cli.arguments import non_negative_int, positive_int, unit_fraction
from bocage.tools.cli.examples import add_examples
from bocage.tools.cli.interrupts import InterruptedCommand, Interrupts
from bocage.tools.cli.logging_setup import configure_logging
from bocage.tools.cli.progress import ProgressBar, ProgressBars
from bocage.tools.cli.reports import text_console

if TYPE_CHECKING:
    from bocage.finetune.study.run_folders import RunFolders
    from bocage.finetune.study.study_config import StudyConfig
    from bocage.shards.format.manifest import Manifest

_OVERRIDES_HELP = "recipe=label_efficiency shards=PATH output=PATH, and overrides of the recipe's keys"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command."""
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)

    subsets = actions.add_parser("subsets", help="write nested, stratified subsets of the labelled patches")
    subsets.add_argument("shards", metavar="SHARDS", help="folder that `bocage shard` wrote, or its address")
    subsets.add_argument("out", metavar="OUT", type=Path, help="folder for subsets.parquet, classes.csv, subsets.json")
    _add_label_arguments(subsets)
    subsets.add_argument("--split", default="split_1", metavar="COLUMN", help="default: %(default)s; or all")
    subsets.add_argument("--value", default="train", help="value of the split to draw from (default: %(default)s)")
    subsets.add_argument(
        "--fractions", nargs="+", type=unit_fraction, metavar="FRACTION", help="fractions of the patches"
    )
    subsets.add_argument("--draws", type=positive_int, default=5, help="subsets per fraction up to 0.05 (default: 5)")
    subsets.add_argument("--draws-above", type=positive_int, default=3, help="subsets per larger fraction (default: 3)")
    subsets.set_defaults(run_action=_subsets)

    run = actions.add_parser("run", help="execute the unfinished runs of a study")
    run.add_argument("overrides", nargs="*", metavar="key=value", help=_OVERRIDES_HELP)
    run.add_argument("--processes", type=positive_int, default=1, help="runs at a time (default: 1)")
    run.add_argument("--dry-run", action="store_true", help="print the grid and its estimated cost, run nothing")
    run.add_argument("--slurm", type=Path, metavar="FILE", help="write an array script for sbatch, run nothing")
    run.add_argument(
        "--sbatch", nargs="+", default=[], metavar="OPTION", help="with --slurm: e.g. gpus=1 time=04:00:00"
    )
    launcher = "with --slurm: command that starts a run (default: bocage), e.g. 'accelerate launch -m bocage'"
    run.add_argument("--launcher", default="bocage", help=launcher)
    run.add_argument("--run", metavar="NAME", dest="run_name", help="execute only this run, in this process")
    run.set_defaults(run_action=_run)

    report = actions.add_parser("report", help="write a page with the scores of the finished runs")
    report.add_argument("overrides", nargs="*", metavar="key=value", help=_OVERRIDES_HELP)
    report.add_argument("--out", type=Path, metavar="FOLDER", help="default: OUTPUT/report of the study")
    report.set_defaults(run_action=_report)

    demo = actions.add_parser("demo", help="run a small study on simulated data: under 20 minutes, 2 GB")
    demo.add_argument(
        "out",
        metavar="OUT",
        nargs="?",
        type=Path,
        default=Path("runs/study"),
        help="folder for all files; the same command resumes (default: %(default)s)",
    )
    demo.add_argument(
        "--figures", type=Path, metavar="FOLDER", help="copy the figures and CSV tables of both reports to this folder"
    )
    demo.add_argument("--processes", type=positive_int, default=2, help="processes at a time (default: %(default)s)")
    demo.set_defaults(run_action=_demo)

    probe = actions.add_parser("probe", help="score a frozen encoder with kNN and linear probes on few labels")
    probe.add_argument("encoder", metavar="ENCODER", help="folder of an encoder, or hf:org/name")
    probe.add_argument("shards", metavar="SHARDS", help="folder that `bocage shard` wrote, or its address")
    probe.add_argument("out", metavar="OUT", type=Path, help="folder for features and scores")
    _add_label_arguments(probe)
    probe.add_argument("--split", default="split_1", metavar="COLUMN", help="with train, valid and test patches")
    probe.add_argument(
        "--fraction", type=unit_fraction, default=1.0, help="fraction of the training patches (default: all)"
    )
    probe.add_argument("--draw", type=non_negative_int, default=0, help="which subset of that size (default: 0)")
    probe.add_argument(
        "--sampling-unit",
        choices=("patch", "roi"),
        default="patch",
        help="label patches, or whole regions",
    )
    probe.add_argument("--kinds", nargs="+", choices=("knn", "linear"), default=["knn", "linear"], metavar="KIND")
    probe.add_argument("--batch-size", type=positive_int, default=8, help="patches per batch (default: 8)")
    probe.add_argument("--workers", type=non_negative_int, default=0, help="DataLoader workers (default: 0)")
    probe.set_defaults(run_action=_probe)

    for name, action in actions.choices.items():
        add_examples(action, f"study {name}")


def _add_label_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--label", metavar="NAME", help="label raster (default: the first of the shards)")
    parser.add_argument("--level", type=positive_int, default=1, help="band of the label raster (default: 1)")


def run(arguments: argparse.Namespace) -> int:
    """Run the chosen action and return the exit status."""
    action: Callable[[argparse.Namespace], int] = arguments.run_action
    return action(arguments)


def _subsets(arguments: argparse.Namespace) -> int:
    from bocage.finetune.models.targets import Target
    from bocage.finetune.subsets.sampling import LabelledPatches
    from bocage.finetune.subsets.subset_files import DESCRIPTION, SubsetPlan, write_subsets
    from bocage.shards.read.open import open_shards
    from bocage.shards.read.patches import ShardPatches

    manifest = open_shards(arguments.shards)
    label = _chosen_label(arguments, manifest)
    rows = manifest.split(arguments.split, arguments.value)
    rows = rows[ShardPatches(manifest).has_modality(label)[rows]]
    target = Target(label=manifest.registry[label], band=arguments.level - 1)
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
        "label": label,
        "level": arguments.level,
    }
    with ProgressBars() as bars:
        bar = bars.add("draws", "draws", len(list(plan.subsets())))
        try:
            description = write_subsets(arguments.out, patches, plan, source, bar.update)
        except OSError as error:
            raise InputError(f"{arguments.out} cannot be written: {error.strerror}") from error
    table = Table(title=f"{counted(len(patches), 'patch')}, {counted(len(set(patches.rois)), 'region')}")
    for name in ("sampling unit", "fraction", "draws", "patches", "regions", "classes missing in some draw"):
        table.add_column(name, justify="left" if name.startswith(("sampling", "classes")) else "right")
    groups: dict[tuple[str, float], list[dict[str, Any]]] = {}
    for item in description["subsets"]:
        groups.setdefault((item["sampling_unit"], item["fraction"]), []).append(item)
    for (sampling_unit, fraction), items in sorted(groups.items()):
        missing = sorted({name.partition("/")[2] for item in items for name in item["without"]})
        counts = [_range(item[key] for item in items) for key in ("patches", "regions")]
        table.add_row(sampling_unit, f"{100 * fraction:g} %", str(len(items)), *counts, ", ".join(missing) or "none")
    text_console().print(table)
    print(f"subsets: {arguments.out / DESCRIPTION}")
    return 0


def _chosen_label(arguments: argparse.Namespace, manifest: Manifest) -> str:
    """Return the label raster of ``--label``, or the first one of the shards.

    Raises:
        InputError: the shards have no such label raster.
    """
    names = [item.name for item in manifest.registry.labels]
    if not names:
        raise InputError(f"{arguments.shards} has no label raster")
    if arguments.label not in (None, *names):
        raise InputError(
            f"--label {arguments.label}: not a label of {arguments.shards}; its labels are: {', '.join(names)}"
        )
    return str(arguments.label or names[0])


def _range(values: Iterable[int]) -> str:
    ordered = sorted(set(values))
    return f"{ordered[0]:,}" if len(ordered) == 1 else f"{ordered[0]:,}-{ordered[-1]:,}"


def _run(arguments: argparse.Namespace) -> int:
    from bocage import recipes
    from bocage.finetune.study.execute import execute_run
    from bocage.finetune.study.launch import Failure, ParallelRunner, slurm_script
    from bocage.finetune.study.run_folders import RunFolders
    from bocage.finetune.study.study_config import StudyConfig, StudyRun, study_runs

    study = recipes.resolve(StudyConfig, arguments.overrides)
    if arguments.run_name:
        return execute_run(study, arguments.run_name)
    folders, grid = RunFolders(study), study_runs(study)
    unfinished = [run for run in grid if not folders.is_finished(run)]
    folders.check(unfinished)
    if arguments.slurm:
        options = [f"--{option}" for option in arguments.sbatch]
        text = slurm_script(folders, grid, arguments.launcher, arguments.overrides, options)
        try:
            with atomic_write(arguments.slurm) as path:
                path.write_text(text, encoding="utf-8")
        except OSError as error:
            raise InputError(f"--slurm {arguments.slurm}: cannot be written: {error.strerror}") from error
        print(f"sbatch {arguments.slurm}")
        return 0
    if arguments.dry_run:
        return _dry_run(study, folders, arguments.processes)
    runner = ParallelRunner(folders, _execute_logged, arguments.processes)
    with Interrupts(), ProgressBars() as bars:
        bar = bars.add("runs", "runs", len(grid))
        bar.update(len(grid) - len(unfinished))

        def on_done(run: StudyRun, failure: Failure | None) -> None:
            bar.advance()
            if failure is not None:
                bars.say(f"failed: {run.name}: {failure.message}")

        try:
            failures = runner.run(grid, on_done)
        except InterruptedCommand as interruption:
            print(f"\nbocage: stopped; run the same command to resume ({interruption.name})")
            return interruption.exit_code
    if not failures:
        print(f"{counted(len(grid), 'run')} in {folders.runs}; `bocage study report` shows their scores")
        return 0
    print(f"{len(failures)} of {counted(len(grid), 'run')} failed; the same command retries them:")
    for failure in failures:
        print(f"  {failure.run.name} (status {failure.status}): {folders.path(failure.run) / 'log.txt'}")
    return 1


def _execute_logged(study: StudyConfig, name: str) -> int:
    """Execute a run in its own process, where no command has configured logging."""
    from bocage.finetune.study.execute import execute_run

    configure_logging()
    return execute_run(study, name)


def _dry_run(study: StudyConfig, folders: RunFolders, processes: int) -> int:
    from bocage.finetune.probes.probe import PROBE_KINDS
    from bocage.finetune.study.execute import Cost, measure_cost
    from bocage.finetune.study.study_config import study_runs

    grid = study_runs(study)
    table = Table(title=counted(len(grid), "run"))
    for name in ("mode", "runs", "finished", "seconds per run", "seconds per step", "hours left", "MB left"):
        table.add_column(name, justify="left" if name == "mode" else "right")
    hours, has_unknown_cost = 0.0, False
    for mode in study.modes:
        runs = [run for run in grid if run.mode == mode]
        finished = [run for run in runs if folders.is_finished(run)]
        left = len(runs) - len(finished)
        cost: Cost | int | None = None
        if finished:
            seconds = statistics.mean(folders.seconds(run) for run in finished)
            size = statistics.mean(
                sum(path.stat().st_size for path in folders.path(run).rglob("*") if path.is_file()) for run in finished
            )
            cost = Cost(seconds, None, int(size))
        elif mode not in PROBE_KINDS:
            cost = measure_cost(study, runs[-1])
        if isinstance(cost, int):
            print("bocage: stopped before the cost was measured; its temporary files are deleted")
            return cost
        if cost is None:
            table.add_row(mode, str(len(runs)), "0", "not measured", "", "", "")
            has_unknown_cost = True
            continue
        hours += left * cost.seconds / 3600
        table.add_row(
            mode,
            str(len(runs)),
            str(len(finished)),
            f"{cost.seconds:.0f}",
            "" if cost.step_seconds is None else f"{cost.step_seconds:.2f}",
            f"{left * cost.seconds / 3600:.2f}",
            f"{left * cost.disk_bytes / 1e6:.0f}",
        )
    console = text_console()
    console.print(table)
    for run in grid:
        suffix = "  finished" if folders.is_finished(run) else ""
        console.print(f"  {run.name}{suffix}", highlight=False, soft_wrap=True)
    if set(study.modes) & set(PROBE_KINDS):
        print(f"probes cache at most {folders.feature_bytes() / 1e6:.0f} MB of features in {folders.features}")
    parallel = f"{hours / processes:.2f} with --processes {processes} if the processes do not slow each other down"
    print(f"{hours:.2f} process hours, {parallel}")
    if has_unknown_cost:
        print("modes that were not measured add to these hours")
    return 0


def _report(arguments: argparse.Namespace) -> int:
    from bocage import recipes
    from bocage.finetune.study.report import write_report
    from bocage.finetune.study.run_folders import RunFolders
    from bocage.finetune.study.study_config import StudyConfig, study_runs

    study = recipes.resolve(StudyConfig, arguments.overrides)
    out = arguments.out or Path(study.output) / "report"
    try:
        print(f"report: {write_report(study, out)}")
        folders, grid = RunFolders(study), study_runs(study)
        if unfinished := sum(not folders.is_finished(run) for run in grid):
            print(f"{unfinished} of {counted(len(grid), 'run')} without a result yet: `bocage study run` executes them")
    except OSError as error:
        raise InputError(f"{out} cannot be written: {error.strerror}") from error
    return 0


def _demo(arguments: argparse.Namespace) -> int:
    from bocage.tools.cli.steps import interruptible
    from bocage.tools.cli.study_demo import study_demo

    return interruptible(lambda: study_demo(arguments.out, arguments.figures, arguments.processes))


def _probe(arguments: argparse.Namespace) -> int:
    from bocage.finetune.finetune_config import FinetuneConfig
    from bocage.finetune.models.supervision import TaskConfig
    from bocage.finetune.probes.probe import run_probe
    from bocage.shards.read.open import open_shards
    from bocage.ssl.encoders.export import load_encoder
    from bocage.ssl.encoders.initialization import weights_digest
    from bocage.ssl.evaluation.probe import CONTROLS

    modality = load_encoder(arguments.encoder).spec.modality
    manifest = open_shards(arguments.shards)
    label = _chosen_label(arguments, manifest)
    try:
        config = FinetuneConfig(
            shards=arguments.shards,
            labels=[label],
            tasks={label: TaskConfig(level=arguments.level)},
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
    outputs = {kind: arguments.out / _probe_folder(arguments, label, kind) for kind in arguments.kinds}
    weights = {name: weights_digest(source) for name, source in config.encoders.items()}
    identity = {"weights": weights, "split": config.split, "shards": manifest.digest}
    for output in outputs.values():
        _check_same_probe(output, identity)
    rows = []
    for kind, output in outputs.items():
        with ProgressBars() as bars:
            metrics = run_probe(
                replace(config, output=str(output)), kind, arguments.out / "features", partial(_show, bars, {})
            )
        for part in [name for name in ("valid", "test") if name in metrics]:
            strict = metrics[part][label]["strict"]
            controls = (metrics["controls"][control][part][label] for control in CONTROLS)
            scores = (strict["miou"], *controls, strict["miou_without_background"], strict["oa"])
            patches = f"{metrics['patches'][part]:,}"
            rows.append([kind, part, patches, *("" if score is None else f"{score:.2f}" for score in scores)])
    table = Table(title=f"{label} from frozen features of {modality}, strict scores")
    control_columns = ("mIoU of random weights", "mIoU of raw inputs")
    for name in ("probe", "part", "patches", "mIoU", *control_columns, "without background", "OA"):
        table.add_column(name, justify="left" if name in ("probe", "part") else "right")
    for row in rows:
        table.add_row(*row)
    text_console().print(table)
    print(f"scores: {', '.join(str(output / 'metrics.json') for output in outputs.values())}")
    return 0


def _show(bars: ProgressBars, shown: dict[str, ProgressBar], name: str, total: int, done: int) -> None:
    """Update the progress bar of an encoder's features; cached features get no bar."""
    if name not in shown:
        shown[name] = bars.add(name, "patches", total)
    shown[name].update(done)


def _probe_folder(arguments: argparse.Namespace, label: str, kind: str) -> str:
    """Return the folder name for the scores of a probe, which contains its label, level, fraction and draw."""
    level = "" if arguments.level == 1 else f"-level{arguments.level}"
    sampling_unit = "" if arguments.sampling_unit == "patch" else f"-{arguments.sampling_unit}"
    return f"{kind}-{label}{level}-{arguments.fraction:g}{sampling_unit}-draw{arguments.draw}"


def _check_same_probe(output: Path, identity: dict[str, Any]) -> None:
    """Check that a folder has no scores of other weights, another split or other shards.

    Raises:
        InputError: the folder has such scores.
    """
    path = output / "metrics.json"
    if not path.is_file():
        return
    stored = json.loads(path.read_text(encoding="utf-8"))
    if changed := [key for key, value in identity.items() if stored.get(key) != value]:
        raise InputError(f"{output} holds scores of other {' and '.join(changed)}: give another OUT")
