"""What pretraining is worth, and which of its choices matter: ``python tests/bench/design_choices.py FOLDER``.

Simulates patches, pretrains encoders in every variant of ``VARIANTS`` with several seeds, fine-tunes them and encoders
from scratch on small shares of the labelled patches, probes them frozen, and writes ``docs/design-choices.md`` with all
figures in ``docs/design-choices.csv``. Pretraining and fine-tuning are ordinary runs, each with a folder of its own
under FOLDER, so the same command goes on where it was stopped. Variants without results are left out of the report.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import json
import math
import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

DOCS = Path(__file__).parents[2] / "docs"
REPORT = "design-choices.md"
PATCHES, SAMPLE_SEED = 1000, 11
SEEDS = (0, 1, 2)
FRACTIONS = (0.01, 0.05, 0.1)
MIDDLE = 0.05  # where every variant is fine-tuned; the main ones are at all fractions
IMAGE, SERIES = "AERIAL_RGBI", "SENTINEL2_TS"
SENSORS = (IMAGE, "SPOT_RGBI", SERIES)
_COMMON = ["workers=0", "engine.save_every=0", "engine.log_every=50"]
PRETRAIN = ["recipe=quickstart", "engine.steps=400", "engine.optimizer.warmup_steps=40", "pictures=0", *_COMMON]
MASKED = ["weights.masked=1", "weights.contrastive=0"]
FINETUNE = ["recipe=finetune_quickstart", "predictions=0", "test=none", "batch_size=8", *_COMMON]
FINETUNE += ["engine.optimizer.learning_rate=5.0e-3", "encoder_lr=0.2"]
BEGIN, END = "<!-- figures -->", "<!-- end of figures -->"
STEPS, LONGER = 250, 3  # of fine-tuning; the longer control takes so many times as many
T_95 = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776}  # of Student's distribution, by degrees of freedom


@dataclass(frozen=True)
class Task:
    """What encoders are fine-tuned for."""

    sensor: str
    words: list[str]


TASKS = {
    "land cover": Task(IMAGE, ["window=25.6"]),
    "crops": Task(SERIES, ["label=ALL_LABEL-LPIS", "window=51.2"]),
}


SPREAD = {"spread image": IMAGE, "spread series": SERIES}


@dataclass(frozen=True)
class Variant:
    """One way to pretrain: what it changes, by groups of sensors that are pretrained together."""

    about: str
    words: list[str] = field(default_factory=list)
    groups: tuple[tuple[str, ...], ...] = (SENSORS,)
    main: bool = False
    against: str = "masked"  # what it is compared with


VARIANTS = {
    "masked": Variant("masked, packed, masks of each sensor its own", MASKED, main=True),
    "combined": Variant("masked and dense contrast, as `mae_multimodal`", main=True),
    "less contrast": Variant("masked and a little dense contrast", ["weights.contrastive=0.02"]),
    "contrastive": Variant("dense contrast alone", ["weights.masked=0", "weights.contrastive=1"], main=True),
    "one sensor": Variant("masked, each sensor from itself alone", MASKED, ((IMAGE,), (SERIES,))),
    "all maps": Variant("masked, no map hidden from the objective", [*MASKED, "masking.map_ratio=0"]),
    "mask_token": Variant("masked, `mask_token`", [*MASKED, "masking.images=mask_token"]),
    "ratio 0.6": Variant(
        "`mask_token`, 0.6 of units instead of 0.75",
        [*MASKED, "masking.images=mask_token", "masking.ratio=0.6"],
        against="mask_token",
    ),
    "ratio 0.9": Variant(
        "`mask_token`, 0.9 of units instead of 0.75",
        [*MASKED, "masking.images=mask_token", "masking.ratio=0.9"],
        against="mask_token",
    ),
    "joint": Variant("masked, the same ground hidden from all images", [*MASKED, "masking.joint=true"]),
    "plain targets": Variant("masked, targets not normalised", [*MASKED, "masked.normalize_targets=false"]),
}
SCRATCH, LONG = "scratch", f"scratch, {LONGER} x steps"


class Study:
    """The runs of one folder."""

    def __init__(self, folder: Path, processes: int) -> None:
        self.folder, self.processes = folder, processes
        self.environment = {**os.environ, "OMP_NUM_THREADS": "1", "WANDB_MODE": "offline"}

    def command(self, log: str, *words: str | Path) -> None:
        """Run Python with these words; the output goes to a log."""
        path = self.folder / "logs" / f"{log}.log"
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("ab") as output:
            done = subprocess.run(
                [sys.executable, *map(str, words)], env=self.environment, stdout=output, stderr=output, check=False
            )
        if done.returncode:
            raise SystemExit(f"{log} ended with status {done.returncode}: see {path}")

    def data(self) -> Path:
        """Shards of simulated patches."""
        tree, shards = self.folder / "tree", self.folder / "shards"
        if not (shards / "manifest.parquet").exists():
            many = str(self.processes)
            size = ["--patches", str(PATCHES), "--seed", str(SAMPLE_SEED), "--workers", many]
            self.command("sample", "-m", "bocage.tools.main", "sample", tree, *size)
            size = ["--workers", many, "--shard-mb", "64"]
            self.command("shard", "-m", "bocage.tools.main", "shard", tree, shards, *size)
        return shards

    def pretraining(self, variant: str, seed: int) -> list[tuple[tuple[str, ...], list[str], Path]]:
        """Sensors, words of the command line and folder of each run of a variant; other words, another folder."""
        found = []
        for names in VARIANTS[variant].groups:
            words = [*PRETRAIN, *VARIANTS[variant].words, f"modalities=[{','.join(names)}]", f"engine.seed={seed}"]
            found.append((names, words, self.folder / "pretrain" / _named(f"{variant}-{seed}", words)))
        return found

    def encoder(self, variant: str, seed: int, sensor: str) -> Path:
        """Where an encoder of a variant is."""
        output = next(folder for names, _, folder in self.pretraining(variant, seed) if sensor in names)
        return output / "encoders" / sensor

    def pretrain(self, variant: str, seed: int) -> None:
        """Pretrain all groups of sensors of a variant."""
        for names, words, output in self.pretraining(variant, seed):
            if not (output / "encoders" / names[-1] / "config.json").exists():
                words = [*words, f"shards={self.data()}", f"output={output}"]
                self.command(f"pretrain-{output.name}", "-m", "bocage.ssl.pretrain", *words)

    def finetuning(self, start: str, seed: int, task: str, fraction: float) -> tuple[list[str], Path]:
        """Words of the command line and folder of a fine-tuning run, from a variant's encoder or from scratch."""
        sensor, steps = TASKS[task].sensor, STEPS * (LONGER if start == LONG else 1)
        words = [*FINETUNE, *TASKS[task].words, f"modalities=[{sensor}]", f"train_fraction={fraction:g}"]
        words += [f"engine.seed={seed}", f"engine.steps={steps}"]
        if start in VARIANTS:
            words.append(f"encoders.{sensor}={self.encoder(start, seed, sensor)}")
        return words, self.folder / "finetune" / _named(f"{start}-{seed}-{task}-{fraction:g}", words)

    def finetune(self, start: str, seed: int, task: str, fraction: float) -> None:
        """Fine-tune for a task."""
        words, output = self.finetuning(start, seed, task, fraction)
        if not (output / "metrics.json").exists():
            words = [*words, f"shards={self.data()}", f"output={output}"]
            self.command(f"finetune-{output.name}", "-m", "bocage.tools.main", "finetune", *words)

    def probed(self, start: str, seed: int) -> Path:
        """The file of a start's probes."""
        words = [str(self.encoder(start, seed, sensor)) for sensor in (IMAGE, SERIES)] if start in VARIANTS else []
        return self.folder / "probe" / f"{_named(f'{start}-{seed}', words)}.json"

    def probe(self, start: str, seed: int) -> None:
        """Measure frozen encoders of a variant, or random ones."""
        output = self.probed(start, seed)
        if not output.exists():
            words = ["--probe", start, "--seed", str(seed)]
            self.command(f"probe-{output.stem}", __file__, self.folder, *words)

    def chain(self, start: str, seed: int) -> list[Callable[[], None]]:
        """All runs of a start and a seed, in the order in which they need each other."""
        pretrained = start in VARIANTS
        work: list[Callable[[], None]] = [lambda: self.pretrain(start, seed)] if pretrained else []
        if start != LONG:
            work.append(lambda: self.probe(start, seed))
        everywhere = not pretrained or VARIANTS[start].main
        for fraction in FRACTIONS if everywhere else (MIDDLE,):
            work += [lambda t=task, f=fraction: self.finetune(start, seed, t, f) for task in TASKS]  # type: ignore[misc]
        return work

    def run(self, starts: Iterable[str]) -> None:
        """Everything, the chains of ``processes`` starts at a time; the first seed of all comes first."""
        self.data()
        chains = [self.chain(start, seed) for seed in SEEDS for start in starts]
        columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
        with Progress(TextColumn("runs"), *columns) as progress:
            bar = progress.add_task("runs", total=sum(len(chain) for chain in chains))

            def work(chain: list[Callable[[], None]]) -> None:
                for item in chain:
                    item()
                    progress.advance(bar)

            with ThreadPoolExecutor(self.processes) as pool:
                futures = [pool.submit(work, chain) for chain in chains]
                try:
                    for future in futures:
                        future.result()
                except BaseException:
                    pool.shutdown(wait=False, cancel_futures=True)
                    raise

    def value(self, start: str, seed: int, what: str, fraction: float | None) -> float | None:
        """mIoU in percent: of fine-tuning, or of a probe when there is no fraction; None where it was not run."""
        if what in SPREAD:
            return self.spread(start, seed, SPREAD[what])
        if fraction is None:
            path = self.probed(start, seed)
            return json.loads(path.read_text())[what] if path.exists() else None
        path = self.finetuning(start, seed, what, fraction)[1] / "metrics.json"
        if not path.exists():
            return None
        strict = json.loads(path.read_text())["valid"]["strict"]
        return float(strict["miou" if what == "land cover" else "miou_without_background"])

    def spread(self, start: str, seed: int, sensor: str) -> float | None:
        """``feature_std`` of the deepest map of an encoder, times 100, at the end of pretraining."""
        if start not in VARIANTS:
            return None
        path = self.encoder(start, seed, sensor).parents[1] / "metrics.jsonl"
        if not path.exists():
            return None
        last = json.loads(path.read_text(encoding="utf-8").splitlines()[-1])
        return 100 * float(last[f"feature_std/{sensor}"])


def _named(name: str, words: list[str]) -> str:
    """A name for files that tells other words from these."""
    own = hashlib.sha256(json.dumps(words).encode()).hexdigest()[:8]
    return f"{name.replace(', ', '-').replace(' ', '_')}-{own}"


def probe(study: Study, start: str, seed: int) -> None:
    """Linear and kNN probes of frozen encoders: land cover from the image, crops from the series."""
    import torch

    from bocage import recipes
    from bocage.shards.files import written_atomically
    from bocage.shards.manifest import Manifest
    from bocage.ssl.pretrain import PretrainConfig, build_task
    from bocage.ssl.probe import Probe, ProbeConfig

    torch.set_num_threads(1)
    manifest = Manifest.open(study.data())
    found: dict[str, float] = {}
    for task, label in (("land cover", "AERIAL_LABEL-COSIA"), ("crops", "ALL_LABEL-LPIS")):
        sensor = TASKS[task].sensor
        words = ["recipe=quickstart", f"modalities=[{sensor}]", *MASKED]
        if start in VARIANTS:
            words.append(f"encoders.{sensor}={study.encoder(start, seed, sensor)}")
        torch.manual_seed(seed)
        encoders = build_task(recipes.resolve(PretrainConfig, words), manifest).eval()
        figures = Probe(manifest, ProbeConfig(label=label, patches=100), "split_1").figures(encoders, 8, 0)
        found |= {f"{kind} {task}": figures[f"{kind}_miou/{sensor}"] for kind in ("linear", "knn")}
    path = study.probed(start, seed)
    path.parent.mkdir(exist_ok=True)
    with written_atomically(path) as temporary:
        temporary.write_text(json.dumps(found), encoding="utf-8")


@dataclass(frozen=True)
class Measure:
    """A figure that starts are compared by."""

    title: str
    what: str
    fraction: float | None = None


FINE = [Measure(f"{task}, {fraction:.0%}", task, fraction) for task in TASKS for fraction in FRACTIONS]
FROZEN = [Measure(f"{kind} {task}", f"{kind} {task}") for task in TASKS for kind in ("linear", "knn")]


SPREAD_MEASURES = [Measure(title, title) for title in SPREAD]


def _values(study: Study, start: str, measure: Measure) -> dict[int, float]:
    found = {seed: study.value(start, seed, measure.what, measure.fraction) for seed in SEEDS}
    return {seed: value for seed, value in found.items() if value is not None}


def _mean(values: dict[int, float]) -> str:
    if not values:
        return ""
    spread = f" ± {statistics.stdev(values.values()):.1f}" if len(values) > 1 else ""
    return f"{statistics.mean(values.values()):.1f}{spread}"


def _difference(one: dict[int, float], other: dict[int, float]) -> str:
    """Mean over the seeds that both have, with the 95 % interval of paired differences; bold when it leaves out 0."""
    pairs = [one[seed] - other[seed] for seed in one if seed in other]
    if len(pairs) < 2:
        return f"{pairs[0]:+.1f}" if pairs else ""
    mean = statistics.mean(pairs)
    half = T_95[len(pairs) - 1] * statistics.stdev(pairs) / math.sqrt(len(pairs))
    text = f"{mean:+.1f} ({mean - half:+.1f} to {mean + half:+.1f})"
    return f"**{text}**" if abs(mean) > half else text


def _pooled(study: Study, start: str, task: str) -> dict[int, float]:
    """The mean over fractions of each seed that has them all."""
    by_seed: dict[int, list[float]] = {}
    for fraction in FRACTIONS:
        for seed, value in _values(study, start, Measure("", task, fraction)).items():
            by_seed.setdefault(seed, []).append(value)
    return {seed: statistics.mean(values) for seed, values in by_seed.items() if len(values) == len(FRACTIONS)}


def _table(head: list[str], rows: Iterable[list[str]]) -> list[str]:
    rows = [row for row in rows if any(row[1:])]
    return [f"| {' | '.join(line)} |" for line in (head, ["---"] * len(head), *rows)] + [""]


def write_report(study: Study) -> None:
    """``docs/design-choices.md`` around its figures, which replace those between the marks, and the CSV."""
    starts = [SCRATCH, LONG, *(name for name, variant in VARIANTS.items() if variant.main)]
    lines = ["Strict mIoU (%) on the validation patches, mean ± standard deviation over seeds:", ""]
    lines += _table(
        ["encoder", *(measure.title for measure in FINE)],
        ([start, *(_mean(_values(study, start, measure)) for measure in FINE)] for start in starts),
    )
    lines += ["Differences paired by seed, means over the fractions, 95 % intervals, bold where 0 is outside:", ""]
    pairs = [(one, other) for one in starts[2:] for other in starts[:2]] + [("combined", "masked")]
    lines += _table(
        ["", *TASKS],
        (
            [f"{one} - {other}", *(_difference(_pooled(study, one, t), _pooled(study, other, t)) for t in TASKS)]
            for one, other in pairs
        ),
    )
    measures = [measure for measure in FINE if measure.fraction == MIDDLE] + FROZEN
    lines += ["Choices as differences to `masked`, ratios to `mask_token`; probes are of frozen encoders:", ""]
    lines += _table(
        ["variant", *(measure.title for measure in measures)],
        (
            [one.about, *(_difference(_values(study, name, m), _values(study, one.against, m)) for m in measures)]
            for name, one in VARIANTS.items()
            if name != "masked"
        ),
    )
    lines += ["Probes themselves, and the spread of the deepest features (`feature_std`, 1 is even, times 100):", ""]
    lines += _table(
        ["encoder", *(measure.title for measure in (*FROZEN, *SPREAD_MEASURES))],
        (
            [name, *(_mean(_values(study, name, m)) for m in (*FROZEN, *SPREAD_MEASURES))]
            for name in (SCRATCH, *VARIANTS)
        ),
    )
    report = DOCS / REPORT
    before, _, rest = report.read_text(encoding="utf-8").partition(BEGIN)
    _, _, after = rest.partition(END)
    report.write_text(f"{before}{BEGIN}\n\n" + "\n".join(lines) + f"\n{END}{after}", encoding="utf-8")
    rows: list[dict[str, Any]] = []
    for start in (SCRATCH, LONG, *VARIANTS):
        for measure in (*FINE, *FROZEN, *SPREAD_MEASURES):
            for seed, value in _values(study, start, measure).items():
                rows.append({"encoder": start, "measure": measure.title, "seed": seed, "miou": f"{value:.3f}"})
    with (DOCS / "design-choices.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, ["encoder", "measure", "seed", "miou"])
        writer.writeheader()
        writer.writerows(rows)


def main() -> None:
    """Run what is missing, then write the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    starts = [SCRATCH, LONG, *VARIANTS]
    parser.add_argument("--only", nargs="*", choices=starts, default=starts, metavar="START", help=f"of {starts}")
    parser.add_argument("--report", action="store_true", help="write the report of what is there, run nothing")
    parser.add_argument("--probe", help=argparse.SUPPRESS)
    parser.add_argument("--seed", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if BEGIN not in (DOCS / REPORT).read_text(encoding="utf-8"):
        raise SystemExit(f"{DOCS / REPORT} has no line {BEGIN}, after which figures are written")
    study = Study(arguments.folder.resolve(), arguments.processes)
    if arguments.probe:
        probe(study, arguments.probe, arguments.seed)
        return
    if not arguments.report:
        study.run(arguments.only)
    write_report(study)


if __name__ == "__main__":
    main()
