"""Running statistics by channel: count, mean, sum of squared deviations, minimum and maximum.

Merging follows Chan, Golub & LeVeque (1979): it loses no precision to cancellation at billions of values.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from bocage.shards.modality import Modality
from bocage.shards.preprocess.normalize import represent

_BLOCK = 1 << 15  # values whose deviations are squared together: they fit in the CPU cache


@dataclass(frozen=True)
class RunningStats:
    """Count, mean, sum of squared deviations, minimum and maximum by channel, (C,) float64 each.

    The mean, minimum and maximum of a channel without valid values are NaN.
    """

    count: np.ndarray
    mean: np.ndarray
    squares: np.ndarray
    minimum: np.ndarray
    maximum: np.ndarray

    @classmethod
    def from_array(cls, values: np.ndarray) -> RunningStats:
        """Statistics of ``values``, (..., C, H, W): uint8, uint16, or float32 in which NaN is nodata.

        The result has the same bits for any number of threads, because NumPy sums in one thread.
        """
        columns = []
        for channel in np.moveaxis(values, -3, 0):
            channel = channel.reshape(-1)
            if cls._has_exact_sums(values) and channel.size:
                columns.append(_integer_stats(channel))
                continue
            # The minimum is NaN if any value is. Without nodata, the usual case, no copy is made.
            valid = channel[~np.isnan(channel)] if channel.size and np.isnan(channel.min()) else channel
            if len(valid) == 0:
                columns.append((0.0, math.nan, 0.0, math.nan, math.nan))
                continue
            mean = valid.mean(dtype=np.float64)
            squares = 0.0
            for start in range(0, len(valid), _BLOCK):
                deviations = valid[start : start + _BLOCK] - mean  # float64, like the mean
                squares += float(np.square(deviations, out=deviations).sum())
            mean = float(mean)
            columns.append((float(len(valid)), mean, squares, float(valid.min()), float(valid.max())))
        return cls(*np.array(columns, np.float64).reshape(-1, 5).T)

    @staticmethod
    def _has_exact_sums(values: np.ndarray) -> bool:
        """Whether sums of these values are exact: true for unsigned integers of 8 or 16 bits."""
        return values.dtype.kind == "u" and values.dtype.itemsize <= 2

    def merge(self, other: RunningStats) -> RunningStats:
        """Statistics of the union of both sets of values."""
        count = self.count + other.count
        fraction = other.count / np.maximum(count, 1.0)
        mean, difference = np.nan_to_num(self.mean), np.nan_to_num(other.mean) - np.nan_to_num(self.mean)
        # If one side has no values, take the mean of the other side unchanged.
        merged_mean = mean + difference * fraction
        mean = np.where(self.count == 0, other.mean, np.where(other.count == 0, self.mean, merged_mean))
        difference = np.where((self.count == 0) | (other.count == 0), 0.0, difference)
        return RunningStats(
            count=count,
            mean=mean,
            squares=self.squares + other.squares + difference**2 * self.count * fraction,
            minimum=np.fmin(self.minimum, other.minimum),
            maximum=np.fmax(self.maximum, other.maximum),
        )

    @property
    def std(self) -> np.ndarray:
        """Population standard deviation, (C,) float64; NaN without values."""
        return np.sqrt(np.divide(self.squares, self.count, out=np.full_like(self.mean, np.nan), where=self.count > 0))

    def to_json(self) -> dict[str, list[float | None]]:
        """JSON-serialisable form, which ``from_json`` reads back bit for bit. NaN becomes null."""
        return {
            name: [None if math.isnan(value) else value for value in getattr(self, name).tolist()]
            for name in ("count", "mean", "squares", "minimum", "maximum")
        }

    @classmethod
    def from_json(cls, description: dict[str, list[float | None]]) -> RunningStats:
        """Statistics from the output of ``to_json``."""
        return cls(
            **{
                name: np.array([math.nan if value is None else value for value in values], np.float64)
                for name, values in description.items()
            }
        )


def compute_stats(array: np.ndarray, modality: Modality) -> RunningStats:
    """Statistics of the representation of ``array``, a stored array (..., C, H, W) of ``modality``."""
    limits = (modality.nodata_below, modality.nodata_above)
    if modality.representation == "linear" and limits == (None, None) and RunningStats._has_exact_sums(array):
        return RunningStats.from_array(array)  # the linear representation equals the stored values
    # A nodata height may be so large that the subtraction overflows. The difference is nodata, so ignore the warning.
    with np.errstate(over="ignore"):
        return RunningStats.from_array(represent(array, modality.representation, *limits))


def _integer_stats(channel: np.ndarray) -> tuple[float, float, float, float, float]:
    """Statistics of integers, each rounded correctly to float64, in half the time of the float path."""
    count, total = channel.size, int(channel.sum(dtype=np.uint64))
    wide = channel.astype(np.uint32)
    squares = int(np.square(wide, out=wide).sum(dtype=np.uint64))
    # Python integers do not overflow, and their quotient is rounded once.
    squared_deviations = (squares * count - total * total) / count
    return float(count), total / count, squared_deviations, float(channel.min()), float(channel.max())


def merge_stats(parts: Iterable[RunningStats]) -> RunningStats | None:
    """Merge all parts from first to last; None without parts. The fixed order fixes the rounding."""
    total: RunningStats | None = None
    for part in parts:
        total = part if total is None else total.merge(part)
    return total
