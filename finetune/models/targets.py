"""Prediction targets: one band of a label raster, with its own classes or with grouped ones."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from bocage.shards.batch import Batch
from bocage.shards.classes import GROUPINGS, ClassScheme
from bocage.shards.errors import InputError
from bocage.shards.format.manifest import Manifest
from bocage.shards.modality import Modality


@dataclass(frozen=True, kw_only=True)
class Target:
    """One label to predict.

    Attributes:
        label: modality of the label raster.
        band: band of the raster, counted from 0; FLAIR-HUB's LPIS has one per level.
        grouping: name in ``classes.GROUPINGS`` of the grouping of its classes; empty keeps the raster's classes.

    Raises:
        InputError: the label has no such band, or the grouping is unknown or made for other classes.
    """

    label: Modality
    band: int = 0
    grouping: str = ""

    def __post_init__(self) -> None:
        levels = len(self.label.schemes)
        if not 0 <= self.band < levels:
            has = "one level" if levels == 1 else f"levels 1 to {levels}"
            raise InputError(f"{self.name} has {has}, not {self.band + 1}")
        if not self.grouping:
            return
        if self.grouping not in GROUPINGS:
            raise InputError(f"tasks.{self.name}.grouping={self.grouping} is not one of {', '.join(GROUPINGS)}")
        source = GROUPINGS[self.grouping].source
        if source.classes != self.label.schemes[self.band].classes:
            raise InputError(
                f"tasks.{self.name}.grouping={self.grouping} groups the classes of FLAIR-HUB's {source.name} only: "
                "leave it out"
            )

    @property
    def name(self) -> str:
        """Name of the label, which identifies its decoder, loss and scores."""
        return self.label.name

    @property
    def scheme(self) -> ClassScheme:
        """Classes to predict."""
        return GROUPINGS[self.grouping].scheme if self.grouping else self.label.schemes[self.band]

    @property
    def groups(self) -> tuple[int, ...] | None:
        """Class in ``scheme`` of each class of the raster; None without grouping."""
        return GROUPINGS[self.grouping].groups if self.grouping else None

    def truth(self, batch: Batch) -> torch.Tensor:
        """Return the ground truth of each sample, (B, H, W) uint8; zeros for a sample without the label."""
        values = batch.values[self.name][:, self.band]
        if self.groups is None:
            return values
        return torch.tensor(self.groups, dtype=torch.uint8, device=values.device)[values.long()]

    def scheme_to_json(self) -> dict[str, Any]:
        """Return the level, grouping and classes, which files of scores store; see ``scheme_from_json``."""
        scheme = self.scheme
        return {
            "level": self.band + 1,
            "grouping": self.grouping,
            "classes": list(scheme.classes),
            "unscored": list(scheme.unscored),
            "background": scheme.background,
        }

    def to_json(self) -> dict[str, Any]:
        """Return the fields for ``from_json``."""
        return {"label": self.label.to_json(), "band": self.band, "grouping": self.grouping}

    @classmethod
    def from_json(cls, item: dict[str, Any]) -> Target:
        """Build the target that ``to_json`` described.

        Raises:
            InputError: a value is invalid. Malformed entries also raise KeyError, TypeError or other built-in errors.
        """
        return cls(label=Modality.from_json(item["label"]), band=item["band"], grouping=item["grouping"])


def only_label(manifest: Manifest) -> str:
    """Return the name of the only label raster of the shards, the default of ``labels``.

    Raises:
        InputError: the shards have no label raster or several ones.
    """
    names = [label.name for label in manifest.registry.labels]
    if not names:
        raise InputError(f"labels: {manifest.path} has no label raster, so there is nothing to predict")
    if len(names) > 1:
        raise InputError(f"labels is not set: {manifest.path} has {', '.join(names)}; name those to predict")
    return names[0]


def scheme_from_json(name: str, item: dict[str, Any]) -> ClassScheme:
    """Build the class scheme that ``Target.scheme_to_json`` described; all colours are black."""
    classes = tuple(item["classes"])
    return ClassScheme(
        name=name,
        classes=classes,
        colours=("000000",) * len(classes),
        unscored=tuple(item["unscored"]),
        background=item["background"],
    )
