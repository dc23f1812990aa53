"""Configuration of a label-efficiency study, and its grid of runs.

A run is one combination of initialization, mode, label fraction, draw, seed, learning rate and variant. The protocol
follows GEO-Bench (arXiv 2306.03831) and rliable (arXiv 2108.13264) where they agree: a fixed number of optimizer steps,
the same learning rates and variants for every initialization, and selection on the validation patches. All
initializations share the label subsets and the training seeds.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import cache
from itertools import product
from typing import Any, Literal, get_args

from bocage import recipes
from bocage.finetune.finetune_config import FinetuneConfig
from bocage.finetune.probes.probe import PROBE_KINDS
from bocage.finetune.subsets.sampling import SAMPLING_UNITS, SamplingUnit
from bocage.shards.errors import InputError
from bocage.shards.format.manifest import EVERY_SAMPLE
from bocage.ssl.engine.engine_config import EngineConfig
from bocage.ssl.engine.logging.provenance import CHANGEABLE_KEYS, flat, matches

Mode = Literal["knn", "linear", "frozen", "full"]
MODES: tuple[Mode, ...] = get_args(Mode)
Setting = tuple[float | None, str]
"""Learning rate and variant of a run."""

_RESERVED_KEYS = (
    "recipe",
    "shards",
    "output",
    "train_fraction",
    "draw",
    "sampling_unit",
    "encoders",
    "freeze",
    "engine.seed",
)
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*")
_IRRELEVANT_KEYS = ("shards", "cache", "output", "predictions", "pictures")  # they do not change the scores
_DECISIVE_KEYS = ("engine.steps", "engine.evaluate_every")  # a resumed run may change them, but they change its scores


@dataclass(frozen=True, kw_only=True)
class LabelFraction:
    """Fraction of the labelled patches to train on.

    Attributes:
        fraction: fraction in (0, 1].
        draws: number of different subsets of this size; 1 for ``fraction=1``.
        seeds: number of training seeds per draw.

    Raises:
        ValueError: a number is out of range, or ``fraction=1`` has several draws.
    """

    fraction: float
    draws: int = 1
    seeds: int = 1

    def __post_init__(self) -> None:
        if not 0 < self.fraction <= 1:
            raise ValueError(f"fraction={self.fraction} is not in (0, 1]")
        if min(self.draws, self.seeds) < 1:
            raise ValueError("draws and seeds must be at least 1")
        if self.fraction == 1 and self.draws > 1:
            raise ValueError(f"draws={self.draws}: fraction=1 has only one draw; use seeds instead")


@dataclass(frozen=True, kw_only=True)
class StudyConfig:
    """Configuration of a label-efficiency study.

    Attributes:
        recipe: name of the study's recipe.
        shards: folder that ``bocage shard`` wrote, or its address.
        output: folder of the study, with ``runs/``, ``features/`` (cache of the probes) and ``report/``.
        finetune: recipe of the runs.
        overrides: overrides of that recipe, ``key=value`` each, e.g. ``engine.steps=20000``.
        initializations: encoder weights by name of the initialization and modality, with values as in
            ``encoders.MODALITY=...``. Modalities without an entry start from random weights; ``{}`` is scratch.
        reference: initialization that the others are compared with.
        modes: ``knn`` and ``linear`` probe frozen features, ``frozen`` trains everything but the encoders, and ``full``
            trains everything.
        fractions: fractions of the labelled patches, with their draws and seeds.
        sampling_unit: unit of the subsets, single patches (``patch``) or whole regions (``roi``).
        learning_rates: learning rates of the trained modes, all tried with every initialization. The best on the
            validation patches is selected by initialization, mode and fraction. Empty: the recipe's learning rate.
        variants: further overrides of mode ``full``, by name of the variant, e.g. ``{plain: [], slow:
            [encoder_lr_scale=0.2]}``. Each is tried with every learning rate and initialization and selected like them.
            Pretrained encoders need other settings than encoders from scratch, so one setting for both is not fair.
        background: whether the mIoU includes the background class of a label. In FLAIR-HUB, that of crops (LPIS) covers
            most of the ground.
        interquartile: whether to report the interquartile mean over runs instead of the mean.
        replicates: number of bootstrap replicates.
        missing: whether to score trained models of several sensors also without each sensor, and with each one alone.
        watts: power draw of one process in watts, to estimate energy from hours; 0 leaves energy out of the report.
        keep_models: whether to keep checkpoints and models of finished runs besides their scores.

    Raises:
        ValueError: the grid is empty, a name is unknown or repeated, a number is out of range, or an override sets a
            key that the study controls.
    """

    recipe: str = ""
    shards: str = ""
    output: str = ""
    finetune: str = "finetune_cosia"
    overrides: list[str] = field(default_factory=list)
    initializations: dict[str, dict[str, str]] = field(default_factory=dict)
    reference: str = "scratch"
    modes: list[str] = field(default_factory=lambda: ["full"])
    fractions: list[LabelFraction] = field(default_factory=list)
    sampling_unit: SamplingUnit = "patch"
    learning_rates: list[float] = field(default_factory=list)
    variants: dict[str, list[str]] = field(default_factory=dict)
    background: bool = True
    interquartile: bool = False
    replicates: int = 2000
    missing: bool = False
    watts: float = 0.0
    keep_models: bool = False

    def __post_init__(self) -> None:
        if not self.initializations:
            raise ValueError(
                "initializations: name at least one, e.g. initializations={scratch: {}, ours: {AERIAL_RGBI: FOLDER}}"
            )
        if self.reference not in self.initializations:
            raise ValueError(
                f"reference={self.reference} is not one of initializations: {', '.join(self.initializations)}"
            )
        if wrong := [name for name in self.initializations if not _NAME.fullmatch(name)]:
            raise ValueError(
                f"initializations: {wrong[0]!r} cannot be a folder name: start with a letter or digit, then use "
                "letters, digits, - and _"
            )
        if not self.modes or (unknown := [mode for mode in self.modes if mode not in MODES]):
            raise ValueError(f"modes: {', '.join(unknown) if self.modes else 'none'}; choose from {', '.join(MODES)}")
        if not self.fractions:
            raise ValueError("fractions: name at least one, e.g. fractions=[{fraction: 0.01, draws: 5}]")
        fractions = [item.fraction for item in self.fractions]
        for key, values in (("fractions", fractions), ("modes", self.modes), ("learning_rates", self.learning_rates)):
            if len(set(values)) < len(values):
                raise ValueError(f"{key}: a value is repeated")
        if self.sampling_unit not in SAMPLING_UNITS:
            raise ValueError(f"sampling_unit={self.sampling_unit} is not one of {', '.join(SAMPLING_UNITS)}")
        if self.replicates < 1000:
            raise ValueError(f"replicates={self.replicates} must be at least 1000")
        if not 0 <= self.watts < math.inf:
            raise ValueError(f"watts={self.watts} must not be negative")
        if not all(0 < rate < math.inf for rate in self.learning_rates):
            raise ValueError("learning_rates must be positive")
        if wrong := [name for name in self.variants if not _NAME.fullmatch(name)]:
            raise ValueError(f"variants: {wrong[0]!r} cannot be part of a folder name")
        for source, overrides in (
            ("overrides", self.overrides),
            *((f"variants.{name}", overrides) for name, overrides in self.variants.items()),
        ):
            for override in overrides:
                if reserved := [key for key in _RESERVED_KEYS if override.startswith((f"{key}=", f"{key}."))]:
                    raise ValueError(f"{source}: {override}: the study itself sets {reserved[0]}")


@dataclass(frozen=True)
class StudyRun:
    """One run of the grid.

    Attributes:
        initialization: name of the initialization.
        mode: training mode: a probe (``knn``, ``linear``), ``frozen`` encoders or ``full`` fine-tuning.
        fraction: fraction of the labelled patches.
        draw: index of the subset of that size.
        seed: index of the training seed.
        learning_rate: learning rate; None for the recipe's, and for probes.
        variant: name of the variant; empty without variants, and for other modes than ``full``.
    """

    initialization: str
    mode: Mode
    fraction: float
    draw: int
    seed: int
    learning_rate: float | None
    variant: str = ""

    @property
    def setting(self) -> Setting:
        """What is selected on the validation patches: learning rate and variant."""
        return self.learning_rate, self.variant

    @property
    def name(self) -> str:
        """Unique name of the run and of its folder."""
        rate = "" if self.learning_rate is None else f"-lr{self.learning_rate:g}"
        variant = f"-{self.variant}" if self.variant else ""
        return f"{self.initialization}-{self.mode}-{self.fraction:g}-draw{self.draw}-seed{self.seed}{rate}{variant}"


def study_runs(study: StudyConfig) -> list[StudyRun]:
    """List the runs of the grid, ordered by fraction; runs that differ only in the initialization are adjacent.

    Raises:
        InputError: fractions or learning rates are so close that two runs would have the same name.
    """

    def expand() -> Iterator[StudyRun]:
        for item in sorted(study.fractions, key=lambda item: item.fraction):
            for mode in study.modes:
                is_trained = mode not in PROBE_KINDS
                rates: list[float | None] = [*study.learning_rates] if study.learning_rates and is_trained else [None]
                variants = [*study.variants] if study.variants and mode == "full" else [""]
                seeds = 1 if mode in PROBE_KINDS else item.seeds  # probes are deterministic
                for draw in range(item.draws):
                    for seed in range(seeds):
                        for rate, variant, initialization in product(rates, variants, study.initializations):
                            yield StudyRun(initialization, mode, item.fraction, draw, seed, rate, variant)  # type: ignore[arg-type]

    runs = list(expand())
    counts = Counter(run.name for run in runs)
    if repeated := [name for name, count in counts.items() if count > 1]:
        raise InputError(f"fractions, learning_rates: two runs have the name {repeated[0]}: take values further apart")
    return runs


def run_config(study: StudyConfig, run: StudyRun, output: str) -> FinetuneConfig:
    """Build the fine-tuning configuration of a run.

    The run decides which encoders are loaded and which are frozen, even if the recipe differs.

    Raises:
        InputError: the recipe or an override is invalid, or the run would validate on its training patches.
    """
    config = _resolve_recipe(study.finetune, (*study.overrides, *study.variants.get(run.variant, ())))
    if config.split == EVERY_SAMPLE:
        raise InputError(f"overrides: split={EVERY_SAMPLE} validates on the training patches; a study needs a split")
    if run.mode == "frozen" and not config.modalities:
        raise InputError("overrides: name modalities=[...], which mode frozen freezes")
    engine = config.engine
    if run.mode in PROBE_KINDS:  # training options do not change the scores of a probe
        engine = EngineConfig()
    if run.learning_rate is not None:
        engine = replace(engine, optimizer=replace(engine.optimizer, learning_rate=run.learning_rate))
    return replace(
        config,
        shards=study.shards,
        output=output,
        train_fraction=run.fraction,
        draw=run.draw,
        sampling_unit=study.sampling_unit,
        encoders=dict(study.initializations[run.initialization]),
        freeze=list(config.modalities) if run.mode == "frozen" else [],
        engine=replace(engine, seed=100 * run.draw + run.seed),
    )


@cache
def _resolve_recipe(recipe: str, overrides: tuple[str, ...]) -> FinetuneConfig:
    """Resolve a recipe with its overrides; cached because it is slow and the same for all runs."""
    return recipes.resolve(FinetuneConfig, [f"recipe={recipe}", *overrides])


def comparable_config(config: FinetuneConfig) -> dict[str, Any]:
    """Convert a configuration to JSON types, without keys that do not change the scores."""
    relevant = {key: value for key, value in asdict(config).items() if key not in _IRRELEVANT_KEYS}
    converted: dict[str, Any] = json.loads(json.dumps(relevant))
    return converted


def differing_keys(stored: Mapping[str, Any], requested: Mapping[str, Any]) -> list[str]:
    """List the keys in which two ``comparable_config`` differ and that change the scores.

    A key that one of them lacks, because another version of bocage wrote it, has its default value there.
    """
    default = flat(comparable_config(FinetuneConfig()))
    old, new = default | flat(stored), default | flat(requested)
    return [
        key
        for key in sorted(old.keys() | new.keys())
        if old.get(key) != new.get(key) and (key in _DECISIVE_KEYS or not matches(key, CHANGEABLE_KEYS))
    ]
