"""What pretraining is worth, and which of its choices matter: ``python tests/bench/design_choices.py FOLDER``.

Simulates patches, pretrains encoders in every variant of ``VARIANTS`` with several seeds, fine-tunes each of them and
encoders from scratch on 1, 5 and 10 % of the labelled patches, and writes ``docs/design-choices.md``. Each pretraining
and fine-tuning is an ordinary run with a folder of its own under FOLDER: the same command goes on where it was stopped.
``--only`` names variants; what has no results is left out of the report.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

REPORT = Path(__file__).parents[2] / "docs" / "design-choices.md"
PATCHES, SAMPLE_SEED = 1000, 11
SEEDS = (0, 1, 2)
FRACTIONS = (0.01, 0.05, 0.1)
IMAGE, SERIES = "AERIAL_RGBI", "SENTINEL2_TS"
SENSORS = (IMAGE, "DEM_ELEV", "SPOT_RGBI", SERIES)
PRETRAIN = ["recipe=quickstart", "engine.steps=400", "engine.optimizer.warmup_steps=40", "pictures=0", "workers=0"]
FINETUNE = ["recipe=finetune_quickstart", "predictions=0", "workers=0", "test=none", "engine.steps=300"]


@dataclass(frozen=True)
class Variant:
    """One way to pretrain: what it changes of the reference, and one run a group of sensors."""

    about: str
    words: list[str] = field(default_factory=list)
    groups: tuple[tuple[str, ...], ...] = (SENSORS,)
