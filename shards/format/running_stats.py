"""Running statistics by channel: exact counts, mean and sum of squared deviations, merged in a fixed order.

Merging follows Chan, Golub & LeVeque (1979), so that nothing is lost to cancellation at billions of values.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from bocage.shards.modality import Modality
from bocage.shards.preprocess.normalize import represent

_BLOCK = 1 << 15  # values whose deviations are squared together: they stay in the cache


@dataclass(frozen=True)
class RunningStats:
    """Count, mean, sum of squared deviations, minimum and maximum of each channel, (C,) float64 each.

    A channel without values has mean NaN, minimum NaN and maximum NaN.
    """

    count: np.ndarray
    mean: np.ndarray
    squares: np.ndarray
    minimum: np.ndarray
    maximum: np.ndarray

    @classmethod
    def of(cls, values: np.ndarray) -> RunningStats:
        """Moments of ``values``, (..., C, H, W) float32, NaN being holes that do not count, or ``exact`` ones.

        The same bits whatever the number of threads: NumPy has one.
        """
        columns = []
        for channel in np.moveaxis(values, -3, 0):
            channel = channel.reshape(-1)
            if cls.exact(values) and channel.size:
                columns.append(_of_integers(channel))
                continue
            # A minimum shows whether there are holes; without, the usual case, selecting would copy for nothing.
            valid = channel[~np.isnan(channel)] if channel.size and np.isnan(channel.min()) else channel
            if len(valid) == 0:
                columns.append((0.0, math.nan, 0.0, math.nan, math.nan))
                continue
            mean = valid.mean(dtype=np.float64)
            squares = 0.0
            for start in range(0, len(valid), _BLOCK):
                apart = valid[start : start + _BLOCK] - mean  # float64, as the mean is
                squares += float(np.square(apart, out=apart).sum())
            mean = float(mean)
            columns.append((float(len(valid)), mean, squares, float(valid.min()), float(valid.max())))
        return cls(*np.array(columns, np.float64).reshape(-1, 5).T)

    @staticmethod
    def exact(values: np.ndarray) -> bool:
        """Whether these, of any shape, are integers of which sums are exact: unsigned ones of 8 or 16 bits."""
        return values.dtype.kind == "u" and values.dtype.itemsize <= 2

    def merged(self, other: RunningStats) -> RunningStats:
        """Moments of both sets of values together."""
        count = self.count + other.count
        share = other.count / np.maximum(count, 1.0)
        mean, apart = np.nan_to_num(self.mean), np.nan_to_num(other.mean) - np.nan_to_num(self.mean)
        # A side without values has no mean: the other's stands as it is.
        mean = np.where(self.count == 0, other.mean, np.where(other.count == 0, self.mean, mean + apart * share))
        apart = np.where((self.count == 0) | (other.count == 0), 0.0, apart)
        return RunningStats(
            count=count,
            mean=mean,
            squares=self.squares + other.squares + apart**2 * self.count * share,
            minimum=np.fmin(self.minimum, other.minimum),
            maximum=np.fmax(self.maximum, other.maximum),
        )

    @property
    def std(self) -> np.ndarray:
        """Population standard deviation, (C,) float64; NaN without values."""
        return np.sqrt(np.divide(self.squares, self.count, out=np.full_like(self.mean, np.nan), where=self.count > 0))

    def to_json(self) -> dict[str, list[float | None]]:
        """JSON-serialisable; ``from_json`` reads it back, bit for bit. NaN becomes null."""
        return {
            name: [None if math.isnan(value) else value for value in getattr(self, name).tolist()]
            for name in ("count", "mean", "squares", "minimum", "maximum")
        }

    @classmethod
    def from_json(cls, description: dict[str, list[float | None]]) -> RunningStats:
        """What ``to_json`` wrote."""
        return cls(
            **{
                name: np.array([math.nan if value is None else value for value in values], np.float64)
                for name, values in description.items()
            }
        )


def compute_stats(array: np.ndarray, modality: Modality) -> RunningStats:
    """Moments of the representation of a stored array of ``modality``, (..., C, H, W)."""
    if modality.representation == "linear" and modality.nodata_below is None and RunningStats.exact(array):
        return RunningStats.of(array)  # the representation holds the same numbers
    # Heights that are nodata may be too large to be subtracted: the difference is a hole.
    with np.errstate(over="ignore"):
        return RunningStats.of(represent(array, modality.representation, modality.nodata_below))


def _of_integers(channel: np.ndarray) -> tuple[float, float, float, float, float]:
    """A column of ``RunningStats``, each number the float next to the true one; half the time of floats."""
    count, total = channel.size, int(channel.sum(dtype=np.uint64))
    wide = channel.astype(np.uint32)
    squares = int(np.square(wide, out=wide).sum(dtype=np.uint64))
    # Python's integers do not overflow, and their quotient is rounded once.
    apart = (squares * count - total * total) / count
    return float(count), total / count, apart, float(channel.min()), float(channel.max())


def merge_stats(parts: Iterable[RunningStats]) -> RunningStats | None:
    """All parts together, merged from first to last; None when there is none."""
    total: RunningStats | None = None
    for part in parts:
        total = part if total is None else total.merged(part)
    return total
