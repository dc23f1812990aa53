"""Nodata of a sensor: which values are missing, and which value the shards store for missing pixels."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Nodata:
    """Nodata values of a sensor, as ``SensorDescription.nodata`` defines them.

    Attributes:
        values: values up to 0, which also mark all lower ones, and values above 0, which also mark all higher ones.
        accepts_nan: whether NaN marks missing pixels.
        fill: value that the shards store for missing pixels; None if the description names none.
    """

    values: tuple[float, ...] = ()
    accepts_nan: bool = False
    fill: float | None = None

    @classmethod
    def of_sensor(cls, dtype: str, nodata: list[float]) -> Nodata:
        """Nodata of a sensor of a dtype; ``nodata`` may hold NaN."""
        values = tuple(value for value in nodata if not math.isnan(value))
        accepts_nan = len(values) < len(nodata)
        if dtype == "float32":
            return cls(values, accepts_nan, math.nan if accepts_nan else next(iter(values), None))
        limits = np.iinfo(dtype)
        fill = next((int(value) for value in values if limits.min <= value <= limits.max), None)
        return cls(values, accepts_nan, fill)

    def __bool__(self) -> bool:
        """Whether any value marks missing pixels."""
        return self.accepts_nan or bool(self.values)

    @property
    def below(self) -> float | None:
        """Highest value that marks itself and all lower values as missing; None if there is none."""
        return max((value for value in self.values if value <= 0), default=None)

    @property
    def above(self) -> float | None:
        """Lowest value that marks itself and all higher values as missing; None if there is none."""
        return min((value for value in self.values if value > 0), default=None)

    def is_missing(self, values: np.ndarray, declared: float | None = None) -> np.ndarray:
        """Mask of missing pixels, bool of the shape of ``values``.

        Args:
            values: values of one band or several.
            declared: nodata value that the file declares, if any.
        """
        missing = np.zeros(values.shape, bool)
        if values.dtype.kind == "f" and (self.accepts_nan or (declared is not None and math.isnan(declared))):
            missing |= np.isnan(values)
        if declared is not None and not math.isnan(declared):
            missing |= values == declared
        if self.below is not None:
            missing |= values <= _as_integer(self.below)
        if self.above is not None:
            missing |= values >= _as_integer(self.above)
        return missing


def _as_integer(value: float) -> float:
    """The value as an integer if it is whole: integer arrays are compared faster with integers."""
    return int(value) if value.is_integer() else value
