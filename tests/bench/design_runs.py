"""The runs of the study of ``design_choices.py``: what is pretrained, fine-tuned and probed, and where."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

PATCHES, SAMPLE_SEED = 1000, 11
SEEDS = (0, 1, 2)
FRACTIONS = (0.01, 0.05, 0.1)
MIDDLE = 0.05  # where every variant is fine-tuned, and encoders from scratch for longer
IMAGE, SERIES = "AERIAL_RGBI", "SENTINEL2_TS"
SENSORS = (IMAGE, "SPOT_RGBI", SERIES)
_COMMON = ["workers=0", "engine.save_every=0", "engine.log_every=50"]
PRETRAIN = ["recipe=quickstart", "engine.steps=400", "engine.optimizer.warmup_steps=40", "reconstructions=0", *_COMMON]
MASKED = ["weights.masked=1", "weights.contrastive=0"]
FINETUNE = ["recipe=finetune_quickstart", "predictions=0", "test=none", "batch_size=8", *_COMMON]
FINETUNE += ["engine.optimizer.learning_rate=5.0e-3", "encoder_lr_scale=0.2", "window=25.6"]
SHORT, STEPS, LONG = 250, 750, 2250  # of fine-tuning


PROBED = {"land cover": (IMAGE, "AERIAL_LABEL-COSIA"), "crops": (SERIES, "ALL_LABEL-LPIS")}
"""What frozen encoders are probed for: the sensor and its label."""


@dataclass(frozen=True)
class Case:
    """A way to fine-tune the image's encoder for land cover."""

    fraction: float  # of the labelled patches
    steps: int = STEPS
    frozen: bool = False  # the encoder stays as it is

    @property
    def title(self) -> str:
        """For the head of a column."""
        steps = f", {self.steps:,} steps" if self.steps != STEPS else ""
        return f"{'frozen, ' if self.frozen else ''}{self.fraction:.0%}{steps}"


SPREAD = {"spread image": IMAGE, "spread series": SERIES}


@dataclass(frozen=True)
class Variant:
    """One way to pretrain: what it changes, by groups of sensors that are pretrained together."""

    about: str
    words: list[str] = field(default_factory=list)
    groups: tuple[tuple[str, ...], ...] = (SENSORS,)
    main: bool = False  # fine-tuned at all fractions, others at one
    short: bool = False  # fine-tuned for fewer steps too
    against: str = "masked"  # what it is compared with


VARIANTS = {
    "masked": Variant("masked, packed, masks of each sensor its own", MASKED, main=True, short=True),
    "combined": Variant(
        "masked and dense contrast at a weight of 0.1", ["weights.contrastive=0.1"], main=True, short=True
    ),
    "less contrast": Variant("masked and dense contrast at 0.02, as `mae_multimodal`", ["weights.contrastive=0.02"]),
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
    "combined, 4 x": Variant(
        "combined, four times the steps", ["weights.contrastive=0.1", "engine.steps=1600"], against="combined"
    ),
}
SCRATCH = "scratch"


def cases(start: str) -> list[Case]:
    """How encoders of a start are fine-tuned, what matters most first."""
    variant = VARIANTS.get(start)
    if variant and not variant.main:
        return [Case(MIDDLE)]
    found = [Case(MIDDLE), Case(MIDDLE, frozen=True)]
    found += [Case(fraction) for fraction in FRACTIONS if fraction != MIDDLE]
    if not variant:
        found.append(Case(MIDDLE, LONG))
    if not variant or variant.short:
        found += [Case(fraction, SHORT) for fraction in FRACTIONS]
    return found


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
            self.command("sample", "-m", "bocage", "sample", tree, *size)
            size = ["--workers", many, "--shard-mb", "64"]
            self.command("shard", "-m", "bocage", "shard", tree, shards, *size)
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
                self.command(f"pretrain-{output.name}", "-m", "bocage", "pretrain", *words)

    def finetuning(self, start: str, seed: int, case: Case) -> tuple[list[str], Path]:
        """Words of the command line and folder of a fine-tuning run, from a variant's encoder or from scratch."""
        words = [*FINETUNE, f"modalities=[{IMAGE}]", f"train_fraction={case.fraction:g}"]
        words += [f"engine.seed={seed}", f"engine.steps={case.steps}"]
        if start in VARIANTS:
            words.append(f"encoders.{IMAGE}={self.encoder(start, seed, IMAGE)}")
        if case.frozen:
            words.append(f"freeze=[{IMAGE}]")
        return words, self.folder / "finetune" / _named(f"{start}-{seed}-land_cover-{case.fraction:g}", words)

    def finetune(self, start: str, seed: int, case: Case) -> None:
        """Fine-tune."""
        words, output = self.finetuning(start, seed, case)
        if not (output / "metrics.json").exists():
            words = [*words, f"shards={self.data()}", f"output={output}"]
            self.command(f"finetune-{output.name}", "-m", "bocage", "finetune", *words)

    def probed(self, start: str, seed: int) -> Path:
        """The file of a start's probes."""
        words = [str(self.encoder(start, seed, sensor)) for sensor in (IMAGE, SERIES)] if start in VARIANTS else []
        return self.folder / "probe" / f"{_named(f'{start}-{seed}', words)}.json"

    def probe(self, start: str, seed: int) -> None:
        """Measure frozen encoders of a variant, or random ones."""
        output = self.probed(start, seed)
        if not output.exists():
            words = [self.folder, "--probe", start, "--seed", str(seed)]
            self.command(f"probe-{output.stem}", Path(__file__).with_name("design_choices.py"), *words)

    def run(self, starts: list[str]) -> None:
        """Everything, ``processes`` runs at a time: pretraining and probes, then fine-tuning, by importance."""
        self.data()

        def prepare(start: str, seed: int) -> None:
            if start in VARIANTS:
                self.pretrain(start, seed)
            self.probe(start, seed)

        every = [(start, case) for start in starts for case in cases(start)]
        rank = {case: number for number, case in enumerate(cases(SCRATCH))}
        every.sort(key=lambda item: rank[item[1]])
        first = [partial(prepare, start, seed) for start in starts for seed in SEEDS]
        then = [partial(self.finetune, start, seed, case) for start, case in every for seed in SEEDS]
        columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
        with Progress(TextColumn("runs"), *columns) as progress:
            bar = progress.add_task("runs", total=len(first) + len(then))
            for work in (first, then):
                with ThreadPoolExecutor(self.processes) as pool:
                    futures = [pool.submit(item) for item in work]
                    try:
                        for future in as_completed(futures):
                            future.result()
                            progress.advance(bar)
                    except BaseException:
                        pool.shutdown(wait=False, cancel_futures=True)
                        raise

    def value(self, start: str, seed: int, what: str | Case) -> float | None:
        """mIoU in percent, of fine-tuning or of a probe, or a spread; None where it was not run."""
        if isinstance(what, Case):
            path = self.finetuning(start, seed, what)[1] / "metrics.json"
            if not path.exists():
                return None
            strict = next(iter(json.loads(path.read_text())["valid"].values()))["strict"]
            return float(strict["miou"])
        if what in SPREAD:
            return self.spread(start, seed, SPREAD[what])
        path = self.probed(start, seed)
        return json.loads(path.read_text())[what] if path.exists() else None

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
