"""Pretraining, fine-tuning and probing runs of the study ``design_choices.py``, and their folders."""

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
MIDDLE = 0.05  # fraction of the frozen and the LONG runs, and of all runs of variants that are not ``main``
IMAGE, SERIES = "AERIAL_RGBI", "SENTINEL2_TS"
SENSORS = (IMAGE, "SPOT_RGBI", SERIES)
_COMMON = ["workers=0", "engine.save_every=0", "engine.log_every=50"]
PRETRAIN = ["recipe=quickstart", "engine.steps=400", "engine.optimizer.warmup_steps=40", "reconstructions=0", *_COMMON]
MASKED = ["weights.masked=1", "weights.contrastive=0"]
FINETUNE = ["recipe=finetune_quickstart", "predictions=0", "test=none", "batch_size=8", *_COMMON]
FINETUNE += ["engine.optimizer.learning_rate=5.0e-3", "encoder_lr_scale=0.2", "window=25.6"]
SHORT, STEPS, LONG = 250, 750, 2250  # numbers of fine-tuning steps

PROBED = {"land cover": (IMAGE, "AERIAL_LABEL-COSIA"), "crops": (SERIES, "ALL_LABEL-LPIS")}
"""Modality and label of each probe."""


@dataclass(frozen=True)
class FinetuneCase:
    """Settings of a fine-tuning run of the aerial encoder for land cover.

    Attributes:
        fraction: fraction of the labelled training patches.
        steps: number of steps.
        frozen: whether the encoder's weights are frozen.
    """

    fraction: float
    steps: int = STEPS
    frozen: bool = False

    @property
    def title(self) -> str:
        """Column title in the report."""
        steps = f", {self.steps:,} steps" if self.steps != STEPS else ""
        return f"{'frozen, ' if self.frozen else ''}{self.fraction:.0%}{steps}"


SPREAD = {"spread image": IMAGE, "spread series": SERIES}
"""Modality whose ``feature_std`` each measure reports."""


@dataclass(frozen=True)
class Variant:
    """One way to pretrain.

    Attributes:
        about: description for the report.
        overrides: command-line arguments that differ from ``PRETRAIN``.
        groups: modalities of each pretraining run; modalities of one group are pretrained together.
        main: whether to fine-tune at all fractions; other variants are only probed and fine-tuned at ``MIDDLE``.
        short: whether to fine-tune for ``SHORT`` steps as well.
        against: variant to compare with.
    """

    about: str
    overrides: list[str] = field(default_factory=list)
    groups: tuple[tuple[str, ...], ...] = (SENSORS,)
    main: bool = False
    short: bool = False
    against: str = "masked"


VARIANTS = {
    "masked": Variant("masked, `packed`, independent masks", MASKED, main=True, short=True),
    "combined": Variant("masked and dense contrast at weight 0.1", ["weights.contrastive=0.1"], main=True, short=True),
    "less contrast": Variant(
        "masked and dense contrast at weight 0.02, as in `mae_multimodal`", ["weights.contrastive=0.02"]
    ),
    "contrastive": Variant("dense contrast alone", ["weights.masked=0", "weights.contrastive=1"], main=True),
    "one sensor": Variant("masked, each sensor pretrained alone", MASKED, ((IMAGE,), (SERIES,))),
    "all maps": Variant("masked, no feature map left out (`masking.map_ratio=0`)", [*MASKED, "masking.map_ratio=0"]),
    "mask_token": Variant("masked, `mask_token`", [*MASKED, "masking.images=mask_token"]),
    "ratio 0.6": Variant(
        "`mask_token`, masked fraction 0.6 instead of 0.75",
        [*MASKED, "masking.images=mask_token", "masking.ratio=0.6"],
        against="mask_token",
    ),
    "ratio 0.9": Variant(
        "`mask_token`, masked fraction 0.9 instead of 0.75",
        [*MASKED, "masking.images=mask_token", "masking.ratio=0.9"],
        against="mask_token",
    ),
    "joint": Variant("masked, one mask for all images", [*MASKED, "masking.joint=true"]),
    "pixels": Variant("masked, pixels alone as targets", [*MASKED, "masked.targets.statistics=0"]),
    "statistics": Variant("masked, statistics alone as targets", [*MASKED, "masked.targets.pixels=0"]),
    "plain targets": Variant("masked, targets not normalised", [*MASKED, "masked.normalize_pixels=false"]),
    "combined, 4 x": Variant(
        "combined, four times the steps", ["weights.contrastive=0.1", "engine.steps=1600"], against="combined"
    ),
}
SCRATCH = "scratch"


def cases(initialization: str) -> list[FinetuneCase]:
    """List the fine-tuning runs of an initialization, the most important first."""
    variant = VARIANTS.get(initialization)
    if variant and not variant.main:
        return [FinetuneCase(MIDDLE)]
    chosen = [FinetuneCase(MIDDLE), FinetuneCase(MIDDLE, frozen=True)]
    chosen += [FinetuneCase(fraction) for fraction in FRACTIONS if fraction != MIDDLE]
    if not variant:
        chosen.append(FinetuneCase(MIDDLE, LONG))
    if not variant or variant.short:
        chosen += [FinetuneCase(fraction, SHORT) for fraction in FRACTIONS]
    return chosen


class Study:
    """Runs of the study in one folder. An initialization is ``SCRATCH`` or a key of ``VARIANTS``.

    Args:
        folder: folder of data, runs and logs.
        processes: number of simultaneous runs.
    """

    def __init__(self, folder: Path, processes: int) -> None:
        self.folder, self.processes = folder, processes
        self.environment = {**os.environ, "OMP_NUM_THREADS": "1", "WANDB_MODE": "offline"}

    def run_python(self, log: str, *arguments: str | Path) -> None:
        """Run Python with these arguments, append its output to ``logs/LOG.log``, and exit if it fails."""
        path = self.folder / "logs" / f"{log}.log"
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("ab") as output:
            done = subprocess.run(
                [sys.executable, *map(str, arguments)], env=self.environment, stdout=output, stderr=output, check=False
            )
        if done.returncode:
            raise SystemExit(f"{log} failed with exit code {done.returncode}: see {path}")

    def shards(self) -> Path:
        """Return the folder of the shards; simulate and shard the patches if it is missing."""
        tree, shards = self.folder / "tree", self.folder / "shards"
        if not (shards / "manifest.parquet").exists():
            workers = ["--workers", str(self.processes)]
            size = ["--patches", str(PATCHES), "--seed", str(SAMPLE_SEED)]
            self.run_python("sample", "-m", "bocage", "sample", tree, *size, *workers)
            self.run_python("shard", "-m", "bocage", "shard", tree, shards, *workers, "--shard-mb", "64")
        return shards

    def pretraining_runs(self, variant: str, seed: int) -> list[tuple[tuple[str, ...], list[str], Path]]:
        """Return modalities, arguments and folder of each run of a variant; the folder depends on the arguments."""
        runs = []
        for names in VARIANTS[variant].groups:
            arguments = [
                *PRETRAIN,
                *VARIANTS[variant].overrides,
                f"modalities=[{','.join(names)}]",
                f"engine.seed={seed}",
            ]
            runs.append((names, arguments, self.folder / "pretrain" / _run_name(f"{variant}-{seed}", arguments)))
        return runs

    def encoder_path(self, variant: str, seed: int, sensor: str) -> Path:
        """Return the folder of a pretrained encoder."""
        output = next(folder for names, _, folder in self.pretraining_runs(variant, seed) if sensor in names)
        return output / "encoders" / sensor

    def pretrain(self, variant: str, seed: int) -> None:
        """Pretrain all groups of modalities of a variant."""
        for names, arguments, output in self.pretraining_runs(variant, seed):
            if not (output / "encoders" / names[-1] / "config.json").exists():
                arguments = [*arguments, f"shards={self.shards()}", f"output={output}"]
                self.run_python(f"pretrain-{output.name}", "-m", "bocage", "pretrain", *arguments)

    def finetuning_run(self, initialization: str, seed: int, case: FinetuneCase) -> tuple[list[str], Path]:
        """Return arguments and folder of a fine-tuning run."""
        arguments = [*FINETUNE, f"modalities=[{IMAGE}]", f"train_fraction={case.fraction:g}"]
        arguments += [f"engine.seed={seed}", f"engine.steps={case.steps}"]
        if initialization in VARIANTS:
            arguments.append(f"encoders.{IMAGE}={self.encoder_path(initialization, seed, IMAGE)}")
        if case.frozen:
            arguments.append(f"freeze=[{IMAGE}]")
        name = _run_name(f"{initialization}-{seed}-land_cover-{case.fraction:g}", arguments)
        return arguments, self.folder / "finetune" / name

    def finetune(self, initialization: str, seed: int, case: FinetuneCase) -> None:
        """Fine-tune, unless the run has finished before."""
        arguments, output = self.finetuning_run(initialization, seed, case)
        if not (output / "metrics.json").exists():
            arguments = [*arguments, f"shards={self.shards()}", f"output={output}"]
            self.run_python(f"finetune-{output.name}", "-m", "bocage", "finetune", *arguments)

    def probe_path(self, initialization: str, seed: int) -> Path:
        """Return the file of the probe scores of an initialization."""
        encoders: list[str] = []  # the hash in the name depends on the probed encoders
        if initialization in VARIANTS:
            encoders = [str(self.encoder_path(initialization, seed, sensor)) for sensor in (IMAGE, SERIES)]
        return self.folder / "probe" / f"{_run_name(f'{initialization}-{seed}', encoders)}.json"

    def probe(self, initialization: str, seed: int) -> None:
        """Probe the frozen encoders of an initialization in a new process, unless the scores exist."""
        output = self.probe_path(initialization, seed)
        if not output.exists():
            arguments: list[str | Path] = [self.folder, "--probe", initialization, "--seed", str(seed)]
            self.run_python(f"probe-{output.stem}", Path(__file__).with_name("design_choices.py"), *arguments)

    def run(self, initializations: list[str]) -> None:
        """Pretrain and probe all initializations, then fine-tune them, ``processes`` runs at a time."""
        self.shards()

        def prepare(initialization: str, seed: int) -> None:
            if initialization in VARIANTS:
                self.pretrain(initialization, seed)
            self.probe(initialization, seed)

        importance = {case: number for number, case in enumerate(cases(SCRATCH))}
        finetuning = [(initialization, case) for initialization in initializations for case in cases(initialization)]
        finetuning.sort(key=lambda item: importance[item[1]])
        stages = (
            [partial(prepare, initialization, seed) for initialization in initializations for seed in SEEDS],
            [
                partial(self.finetune, initialization, seed, case)
                for initialization, case in finetuning
                for seed in SEEDS
            ],
        )
        columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
        with Progress(TextColumn("runs"), *columns) as progress:
            bar = progress.add_task("runs", total=sum(map(len, stages)))
            for stage in stages:
                with ThreadPoolExecutor(self.processes) as pool:
                    futures = [pool.submit(run) for run in stage]
                    try:
                        for future in as_completed(futures):
                            future.result()
                            progress.advance(bar)
                    except BaseException:
                        pool.shutdown(wait=False, cancel_futures=True)
                        raise

    def score(self, initialization: str, seed: int, measure: str | FinetuneCase) -> float | None:
        """Return the mIoU of fine-tuning or of a probe in percent, or 100 times a feature spread; None without a run.

        Args:
            initialization: ``SCRATCH`` or a key of ``VARIANTS``.
            seed: seed of the run.
            measure: fine-tuning case, key of ``SPREAD``, or ``linear TASK`` or ``knn TASK`` for a key of ``PROBED``.
        """
        if isinstance(measure, FinetuneCase):
            path = self.finetuning_run(initialization, seed, measure)[1] / "metrics.json"
            if not path.exists():
                return None
            strict = next(iter(json.loads(path.read_text())["valid"].values()))["strict"]
            return float(strict["miou"])
        if measure in SPREAD:
            return self.feature_spread(initialization, seed, SPREAD[measure])
        path = self.probe_path(initialization, seed)
        return json.loads(path.read_text())[measure] if path.exists() else None

    def feature_spread(self, initialization: str, seed: int, sensor: str) -> float | None:
        """Return 100 times the ``feature_std`` of an encoder's deepest map after pretraining; None without a run."""
        if initialization not in VARIANTS:
            return None
        path = self.encoder_path(initialization, seed, sensor).parents[1] / "metrics.jsonl"
        if not path.exists():
            return None
        last = json.loads(path.read_text(encoding="utf-8").splitlines()[-1])
        return 100 * float(last[f"feature_std/{sensor}"])


def _run_name(name: str, arguments: list[str]) -> str:
    """Append a hash of the arguments to a name, so that runs with other arguments get other folders."""
    digest = hashlib.sha256(json.dumps(arguments).encode()).hexdigest()[:8]
    return f"{name.replace(', ', '-').replace(' ', '_')}-{digest}"
