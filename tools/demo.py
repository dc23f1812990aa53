"""``bocage demo``: the whole path on a simulated sample, ending with pretrained against scratch."""

from __future__ import annotations

import argparse
import json
import os
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from bocage.shards.errors import InputError
from bocage.shards.manifest import Manifest

SEEDS = (0, 1, 2)
STARTS = ("pretrained", "scratch")
PATCHES = 120
SAMPLE_SEED = 7
LABEL_SHARE = 0.5
FINETUNE_STEPS = 80


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the sub-command."""
    parser.add_argument("out", metavar="OUT", type=Path, help="folder for everything the demo makes")
    parser.add_argument("--patches", type=int, default=PATCHES, help="simulated patches (default: %(default)s)")
    parser.epilog = "Run again, it skips what is done: delete OUT to start afresh."


def run(arguments: argparse.Namespace) -> int:
    """Sample, shard, pretrain, fine-tune from both initialisations with several seeds, and compare."""
    console = Console(highlight=False)
    demo = _Demo(console, arguments.out)
    processes = min(2, os.cpu_count() or 1)
    tree, shards, pretrained = demo.out / "tree", demo.out / "shards", demo.out / "pretrain"

    demo.step("1. Simulate patches in FLAIR-HUB's own format")
    words = ["sample", tree, "--patches", arguments.patches, "--seed", SAMPLE_SEED, "--workers", processes]
    demo.command("bocage", "bocage.tools.main", words)

    demo.step("2. Write WebDataset shards")
    demo.command("bocage", "bocage.tools.main", ["shard", tree, shards, "--workers", processes, "--shard-mb", 32])

    demo.step("3. Pretrain one encoder a sensor, without labels")
    words = ["recipe=quickstart", f"shards={shards}", f"output={pretrained}", f"batch_size={8 // processes}"]
    launcher = ["torch.distributed.run", "--standalone", "--nproc_per_node", processes, "-m"]
    demo.command(f"torchrun --nproc_per_node {processes} pretrain.py", [*launcher, "bocage.ssl.pretrain"], words)

    demo.step("4. Fine-tune on few labels, from the encoders and from scratch, one process a core")
    registry = Manifest.open(shards).registry
    sensors = [registry.by_role(role)[0].name for role in ("image", "series")]
    runs: dict[tuple[str, int], list[str]] = {}
    for seed in SEEDS:
        for start in STARTS:
            words = [
                "recipe=finetune_quickstart",
                f"shards={shards}",
                f"output={demo.out / 'finetune' / f'{start}-{seed}'}",
                f"modalities=[{','.join(sensors)}]",
                f"train_fraction={LABEL_SHARE}",
                f"engine.steps={FINETUNE_STEPS}",
                f"engine.seed={seed}",
            ]
            if start == "pretrained":
                words += [f"encoders.{name}={pretrained / 'encoders' / name}" for name in sensors]
            runs[start, seed] = words
    demo.side_by_side(runs, processes)

    demo.step("Done")
    scores = {key: json.loads((demo.folder(key) / "metrics.json").read_text()) for key in runs}
    console.print(_comparison(scores))
    paths = {
        "shards": shards,
        "encoders": pretrained / "encoders",
        "reconstruction": sorted((pretrained / "pictures").glob("*.png"))[-1],
        "prediction": next((demo.folder(("pretrained", SEEDS[0])) / "predictions").glob("*.png")),
    }
    for name, path in paths.items():
        console.print(f"{name + ':':16}{path}", soft_wrap=True)
    return 0


class _Demo:
    """Runs commands as a user would, one process each, and says which."""

    def __init__(self, console: Console, out: Path) -> None:
        self.console, self.out = console, out
        self._began = time.monotonic()
        # One thread a process: the processes already fill the cores.
        self._environment = {**os.environ, "OMP_NUM_THREADS": "1"}

    def folder(self, key: tuple[str, int]) -> Path:
        """Where a fine-tuning run of (initialisation, seed) is."""
        return self.out / "finetune" / f"{key[0]}-{key[1]}"

    def step(self, title: str) -> None:
        """Announce a step and the time since the start."""
        self.console.rule(f"[bold]{title}[/bold]  ({time.monotonic() - self._began:.0f} s)", align="left")

    def _say(self, shown: str, words: Sequence[Any]) -> None:
        self.console.print(f"$ {shown} {shlex.join(map(str, words))}", style="dim", soft_wrap=True, markup=False)

    def command(self, shown: str, module: str | Sequence[Any], words: Sequence[Any]) -> None:
        """Run a module to its end; ``shown`` is what a user would type in its place."""
        self._say(shown, words)
        modules = [module] if isinstance(module, str) else module
        line = [sys.executable, "-m", *map(str, modules), *map(str, words)]
        if status := subprocess.run(line, env=self._environment, check=False).returncode:
            raise InputError(f"the step above ended with status {status}; mend its cause and run the demo again")

    def side_by_side(self, runs: dict[tuple[str, int], list[str]], processes: int) -> None:
        """Fine-tuning runs, ``processes`` at a time, with a bar each; finished ones are not repeated."""
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        waiting = [key for key in runs if not (self.folder(key) / "metrics.json").exists()]
        for key in waiting:
            self._say("bocage finetune", runs[key])
        active: dict[tuple[str, int], tuple[subprocess.Popen[bytes], Any]] = {}
        (self.out / "finetune").mkdir(parents=True, exist_ok=True)
        with Progress(*columns, console=self.console) as progress:
            try:
                while waiting or active:
                    while waiting and len(active) < processes:
                        key = waiting.pop(0)
                        log = self.folder(key).with_suffix(".log")
                        line = [sys.executable, "-m", "bocage.tools.main", "finetune", "engine.log_every=5", *runs[key]]
                        with log.open("ab") as output:
                            child = subprocess.Popen(line, env=self._environment, stdout=output, stderr=output)
                        active[key] = (child, progress.add_task(f"{key[0]}, seed {key[1]}", total=FINETUNE_STEPS))
                    time.sleep(0.5)
                    for key, (child, bar) in list(active.items()):
                        progress.update(bar, completed=_last_step(self.folder(key) / "metrics.jsonl"))
                        if child.poll() is not None:
                            del active[key]
                            if child.returncode:
                                log = self.folder(key).with_suffix(".log")
                                raise InputError(f"fine-tuning ended with status {child.returncode}: see {log}")
            finally:
                for child, _ in active.values():
                    child.terminate()
                for child, _ in active.values():
                    child.wait()


def _last_step(metrics: Path) -> int:
    """The newest step recorded in a run's ``metrics.jsonl``; 0 before there is one."""
    lines = metrics.read_text().splitlines() if metrics.exists() else []
    return int(json.loads(lines[-1])["step"]) if lines else 0


def _comparison(scores: dict[tuple[str, int], dict[str, Any]]) -> Table:
    """mIoU by initialisation on the validation and the test patches: each seed, mean and standard deviation."""
    one = scores[STARTS[0], SEEDS[0]]
    (label,) = one["labels"]
    table = Table(title=f"{label}: strict mIoU (%) after {one['patches']['train']} labelled patches")
    table.add_column("patches")
    table.add_column("encoders")
    for seed in SEEDS:
        table.add_column(f"seed {seed}", justify="right")
    table.add_column("mean", justify="right", style="bold")
    table.add_column("std", justify="right")
    for part in ("valid", "test"):
        for start in STARTS:
            values = [float(scores[start, seed][part][label]["strict"]["miou"]) for seed in SEEDS]
            figures = [*values, statistics.mean(values), statistics.stdev(values)]
            where = f"{one['patches'][part]} {part}" if start == STARTS[0] else ""
            table.add_row(where, start, *(f"{figure:.1f}" for figure in figures), end_section=start == STARTS[-1])
    return table
