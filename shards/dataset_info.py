"""What a dataset is called, and under which terms it may be used."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from bocage.shards.errors import InputError


@dataclass(frozen=True, kw_only=True)
class DatasetInfo:
    """Name and origin of a dataset, stored in its shards and printed on model cards.

    Attributes:
        name: name of the dataset.
        licence: licence of the data, such as an SPDX identifier; empty if unknown.
        attribution: credit that the licence demands; empty if unknown.
        source: address or hub id of the dataset; empty if it has none.
        citation: publication to cite; empty if there is none.
    """

    name: str
    licence: str = ""
    attribution: str = ""
    source: str = ""
    citation: str = ""

    def to_json(self) -> dict[str, str]:
        """JSON-serialisable form, which ``from_json`` reads back."""
        return asdict(self)

    @classmethod
    def from_json(cls, description: Mapping[str, Any]) -> DatasetInfo:
        """Dataset from the output of ``to_json``.

        Raises:
            InputError: fields are unknown, missing or not text.
        """
        try:
            info = cls(**description)
        except TypeError as error:
            raise InputError(f"description of a dataset cannot be read: {error}") from error
        if not all(isinstance(value, str) for value in asdict(info).values()):
            raise InputError(f"description of a dataset cannot be read: {info} holds values that are not text")
        return info


FLAIR_HUB_INFO = DatasetInfo(
    name="FLAIR-HUB",
    licence="etalab-2.0",
    attribution="IGN, FLAIR-HUB",
    source="IGNF/FLAIR-HUB",
    citation="FLAIR-HUB: Garioud et al., 2025, [arXiv 2506.07080](https://arxiv.org/abs/2506.07080).",
)
"""The dataset FLAIR-HUB of IGN."""
