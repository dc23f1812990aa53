"""What a segmentation model tells: the classes of one band of a label raster, as they are or grouped."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from bocage.shards.batch import Batch
from bocage.shards.classes import GROUPINGS, ClassScheme
from bocage.shards.errors import InputError
from bocage.shards.modality import Modality


@dataclass(frozen=True, kw_only=True)
class Target:
    """One label to predict.

    Attributes:
        label: the label raster.
        band: which of its bands, from 0; LPIS has one a level.
        grouping: which of ``classes.GROUPINGS`` its classes are put together by; empty leaves them as they are.

    Raises:
        InputError: a band that the label does not have, or a grouping that is none or of other classes.
    """

    label: Modality
    band: int = 0
    grouping: str = ""

    def __post_init__(self) -> None:
        if not 0 <= self.band < len(self.label.schemes):
            raise InputError(f"{self.name} has levels 1 to {len(self.label.schemes)}, not {self.band + 1}")
        if not self.grouping:
            return
        if self.grouping not in GROUPINGS:
            raise InputError(f"tasks.{self.name}.grouping={self.grouping} is not one of {', '.join(GROUPINGS)}")
        source = GROUPINGS[self.grouping].source
        if source.classes != self.label.schemes[self.band].classes:
            raise InputError(f"tasks.{self.name}.grouping={self.grouping} is of the classes of {source.name} only")

    @property
    def name(self) -> str:
        """The name of the label, by which its decoder, loss and scores are known."""
        return self.label.name

    @property
    def scheme(self) -> ClassScheme:
        """The classes that are told apart."""
        return GROUPINGS[self.grouping].scheme if self.grouping else self.label.schemes[self.band]

    @property
    def groups(self) -> tuple[int, ...] | None:
        """For each class of the label its class in ``scheme``; None where they are the same."""
        return GROUPINGS[self.grouping].groups if self.grouping else None

    def truth(self, batch: Batch) -> torch.Tensor:
        """The label of each sample, (B, H, W) uint8, zeros where a sample lacks it."""
        values = batch.values[self.name][:, self.band]
        if self.groups is None:
            return values
        return torch.tensor(self.groups, dtype=torch.uint8, device=values.device)[values.long()]

    def facts(self) -> dict[str, Any]:
        """What scores of it mean, for files of scores: ``label_scheme`` makes its classes of this."""
        scheme = self.scheme
        return {
            "level": self.band + 1,
            "grouping": self.grouping,
            "classes": list(scheme.classes),
            "unscored": list(scheme.unscored),
            "background": scheme.background,
        }

    def to_json(self) -> dict[str, Any]:
        """What ``from_json`` reads."""
        return {"label": self.label.to_json(), "band": self.band, "grouping": self.grouping}

    @classmethod
    def from_json(cls, item: dict[str, Any]) -> Target:
        """What ``to_json`` gave.

        Raises:
            InputError, or what Python says of a key or value that is not as ``to_json`` writes it.
        """
        return cls(label=Modality.from_json(item["label"]), band=item["band"], grouping=item["grouping"])


def label_scheme(name: str, facts: dict[str, Any]) -> ClassScheme:
    """The classes that ``Target.facts`` describes, without their colours."""
    classes = tuple(facts["classes"])
    return ClassScheme(
        name=name,
        classes=classes,
        colours=("000000",) * len(classes),
        unscored=tuple(facts["unscored"]),
        background=facts["background"],
    )
