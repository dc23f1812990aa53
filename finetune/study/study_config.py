"""A study of few labels: the grid of shares, draws, seeds, starts, modes and rates, and the run that each cell is.

The protocol is that of GEO-Bench (arXiv 2306.03831) and rliable (arXiv 2108.13264) where they agree: fixed optimiser
steps, one grid of learning rates for every start, the rate chosen on validation, several draws of labels and training
seeds, which starts share.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import cache
from typing import Any, Literal, get_args

from bocage import recipes
from bocage.finetune.finetune_config import FinetuneConfig
from bocage.finetune.probes.probe import PROBE_KINDS
from bocage.finetune.subsets.sampling import SAMPLING_UNITS, SamplingUnit
from bocage.shards.errors import InputError
from bocage.shards.format.manifest import EVERY_SAMPLE
from bocage.ssl.engine.config import EngineConfig
from bocage.ssl.engine.logging.provenance import CHANGEABLE_KEYS, flat, matches

Mode = Literal["knn", "linear", "frozen", "full"]
MODES: tuple[Mode, ...] = get_args(Mode)
_OWN = ("recipe", "shards", "output", "train_fraction", "draw", "sampling_unit", "encoders", "freeze", "engine.seed")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*")
_PLACES = ("shards", "cache", "output", "predictions", "pictures")
_DECISIVE = ("engine.steps", "engine.evaluate_every")  # which a resumed run may change, and which change its result


@dataclass(frozen=True, kw_only=True)
class LabelFraction:
    """A share of the labelled patches.

    Attributes:
        fraction: of them.
        draws: different subsets of that size. Of all patches there is one.
        seeds: trainings on each.

    Raises:
        ValueError: ``fraction`` outside (0, 1], no draw or seed, or several draws of all patches.
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
            raise ValueError(f"draws={self.draws}: of fraction=1 there is one draw; give seeds")


@dataclass(frozen=True, kw_only=True)
class StudyConfig:
    """A study.

    Attributes:
        recipe: name of the recipe it came from.
        shards: folder that ``bocage shard`` wrote, or its address.
        output: folder of the study: ``cells/`` with a run each, ``features/`` of probes, ``report/``.
        finetune: recipe of the runs.
        words: what the runs change of it, ``key=value`` each, e.g. ``engine.steps=20000``.
        starts: by name, what encoders start from: by modality as in ``encoders.MODALITY=...``. Those not named start
            from scratch; ``{}`` is all of them.
        reference: the start that others are compared with.
        modes: probes of frozen features (``knn``, ``linear``), everything but the encoders trained (``frozen``), or all
            of it (``full``).
        shares: shares of the labelled patches.
        sampling_unit: whether patches or whole regions are labelled, see ``finetune.subsets``.
        learning_rates: of trained modes, each tried with every start; the best on validation counts, by start, mode and
            share. None is that of the recipe.
        background: whether the mean IoU counts the background of crops (LPIS), which covers most of the ground.
        interquartile: report the mean of the middle half of the runs rather than of all.
        replicates: of the bootstrap.
        missing: also measure trained cells of several sensors without each of them, and with each alone.
        watts: power of what a process runs on, to estimate energy from hours; 0: it is not reported.
        keep_models: keep checkpoints and models of finished runs, not only their scores.

    Raises:
        ValueError: nothing to run, a name unknown or given twice, a number out of its range, a word of the study's own.
    """

    recipe: str = ""
    shards: str = ""
    output: str = ""
    finetune: str = "finetune_cosia"
    words: list[str] = field(default_factory=list)
    starts: dict[str, dict[str, str]] = field(default_factory=dict)
    reference: str = "scratch"
    modes: list[str] = field(default_factory=lambda: ["full"])
    shares: list[LabelFraction] = field(default_factory=list)
    sampling_unit: SamplingUnit = "patch"
    learning_rates: list[float] = field(default_factory=list)
    background: bool = True
    interquartile: bool = False
    replicates: int = 2000
    missing: bool = False
    watts: float = 0.0
    keep_models: bool = False

    def __post_init__(self) -> None:
        if not self.starts:
            raise ValueError("starts: name at least one, e.g. starts={scratch: {}, ours: {AERIAL_RGBI: FOLDER}}")
        if self.reference not in self.starts:
            raise ValueError(f"reference={self.reference} is not one of starts: {', '.join(self.starts)}")
        if wrong := [name for name in self.starts if not _NAME.fullmatch(name)]:
            raise ValueError(f"starts: {wrong[0]!r}: names become folders: letters, digits, then also - and _")
        if not self.modes or (unknown := [mode for mode in self.modes if mode not in MODES]):
            raise ValueError(f"modes: {', '.join(unknown) if self.modes else 'none'}; there are {', '.join(MODES)}")
        if not self.shares:
            raise ValueError("shares: name at least one, e.g. shares=[{fraction: 0.01, draws: 5}]")
        fractions = [share.fraction for share in self.shares]
        for key, values in (("shares", fractions), ("modes", self.modes), ("learning_rates", self.learning_rates)):
            if len(set(values)) < len(values):
                raise ValueError(f"{key}: each can be given once")
        if self.sampling_unit not in SAMPLING_UNITS:
            raise ValueError(f"sampling_unit={self.sampling_unit} is not one of {', '.join(SAMPLING_UNITS)}")
        if self.replicates < 1000:
            raise ValueError(f"replicates={self.replicates} must be at least 1000")
        if not 0 <= self.watts < math.inf:
            raise ValueError(f"watts={self.watts} must not be negative")
        if not all(0 < rate < math.inf for rate in self.learning_rates):
            raise ValueError("learning_rates must be positive")
        for word in self.words:
            if own := [key for key in _OWN if word.startswith((f"{key}=", f"{key}."))]:
                raise ValueError(f"words: {word}: the study itself gives {own[0]}")


@dataclass(frozen=True)
class StudyRun:
    """One run of a grid; ``rate`` is None where the recipe's is used, and for probes."""

    start: str
    mode: Mode
    fraction: float
    draw: int
    seed: int
    rate: float | None

    @property
    def name(self) -> str:
        """The name of its folder."""
        rate = "" if self.rate is None else f"-rate{self.rate:g}"
        return f"{self.start}-{self.mode}-{self.fraction:g}-draw{self.draw}-seed{self.seed}{rate}"


def study_runs(study: StudyConfig) -> list[StudyRun]:
    """All cells of a grid: small shares first, and what starts share side by side.

    Raises:
        InputError: shares or learning rates so close to each other that two cells would have one name.
    """

    def every() -> Iterator[StudyRun]:
        for share in sorted(study.shares, key=lambda share: share.fraction):
            for mode in study.modes:
                rates: list[float | None] = [None]
                if study.learning_rates and mode not in PROBE_KINDS:
                    rates = [*study.learning_rates]
                seeds = 1 if mode in PROBE_KINDS else share.seeds  # a probe of the same features gives the same again
                for draw in range(share.draws):
                    for seed in range(seeds):
                        for rate in rates:
                            for start in study.starts:
                                yield StudyRun(start, mode, share.fraction, draw, seed, rate)  # type: ignore[arg-type]

    found = list(every())
    names = Counter(cell.name for cell in found)
    if twice := [name for name, count in names.items() if count > 1]:
        raise InputError(f"shares, learning_rates: two cells have the name {twice[0]}: take values further apart")
    return found


def run_config(study: StudyConfig, cell: StudyRun, output: str) -> FinetuneConfig:
    """The fine-tuning run of a cell. Encoders and frozen parts are those of the cell, whatever the recipe says.

    Raises:
        InputError: the recipe or a word of the study is wrong, or the run would validate on what it trains on.
    """
    config = _resolved(study.finetune, tuple(study.words))
    if config.split == EVERY_SAMPLE:
        raise InputError(f"words: split={EVERY_SAMPLE} validates on what is trained on; a study needs a split")
    if cell.mode == "frozen" and not config.modalities:
        raise InputError("words: name modalities=[...], which mode frozen freezes")
    engine = config.engine
    if cell.mode in PROBE_KINDS:  # they are not trained: what is said of training makes no other cell of them
        engine = EngineConfig()
    if cell.rate is not None:
        engine = replace(engine, optimizer=replace(engine.optimizer, learning_rate=cell.rate))
    return replace(
        config,
        shards=study.shards,
        output=output,
        train_fraction=cell.fraction,
        draw=cell.draw,
        sampling_unit=study.sampling_unit,
        encoders=dict(study.starts[cell.start]),
        freeze=list(config.modalities) if cell.mode == "frozen" else [],
        engine=replace(engine, seed=100 * cell.draw + cell.seed),
    )


@cache
def _resolved(recipe: str, words: tuple[str, ...]) -> FinetuneConfig:
    """What a recipe and words say: the same for all cells, and not resolved at once."""
    return recipes.resolve(FinetuneConfig, [f"recipe={recipe}", *words])


def comparable_config(config: FinetuneConfig) -> dict[str, Any]:
    """The configuration of a cell in JSON's types, without the places of things."""
    kept = {key: value for key, value in asdict(config).items() if key not in _PLACES}
    found: dict[str, Any] = json.loads(json.dumps(kept))
    return found


def differing_keys(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[str]:
    """Keys that make two configurations, as ``comparable_config`` gives them, give different results.

    A key that one of them does not know, being of another version of bocage, has its default there.
    """
    default = flat(comparable_config(FinetuneConfig()))
    old, new = default | flat(found), default | flat(wanted)
    return [
        key
        for key in sorted(old.keys() | new.keys())
        if old.get(key) != new.get(key) and (key in _DECISIVE or not matches(key, CHANGEABLE_KEYS))
    ]
