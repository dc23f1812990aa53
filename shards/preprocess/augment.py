"""Random augmentation of samples on the training device, a function of the sample seed only."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from bocage.shards.counter_rng import uniform
from bocage.shards.modality import Representation

_DAYS_PER_YEAR = 365


@dataclass(frozen=True, kw_only=True)
class AugmentConfig:
    """Radiometric and temporal augmentation, in addition to random crops and orientation. 0 disables each.

    Attributes:
        gain: maximum relative change of standardised optical values. The factor, between 1 - gain and 1 + gain, is
            drawn per sample, sensor and channel, and shared by all dates of a series. Radar in decibels and heights
            are not scaled.
        offset: maximum shift of standardised optical and radar values, in standard deviations. Heights are not shifted.
        max_dates: maximum number of dates of a series; the dates to keep are drawn at random.
        date_jitter: maximum shift of each date of a series, in days.

    Raises:
        ValueError: ``gain`` is outside [0, 1), another value is negative, ``offset`` is infinite, or ``date_jitter``
            exceeds half a year.
    """

    gain: float = 0.0
    offset: float = 0.0
    max_dates: int = 0
    date_jitter: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.gain < 1:
            raise ValueError(f"augment.gain={self.gain} must be in [0, 1)")
        if not 0 <= self.offset < math.inf:
            raise ValueError(f"augment.offset={self.offset} must be a number of standard deviations, 0 or more")
        if self.max_dates < 0:
            raise ValueError(f"augment.max_dates={self.max_dates} must not be negative")
        half_year = _DAYS_PER_YEAR // 2
        if not 0 <= self.date_jitter <= half_year:
            raise ValueError(f"augment.date_jitter={self.date_jitter} must be between 0 and {half_year} days")


def jitter_radiometry(
    values: torch.Tensor, seeds: torch.Tensor, name: str, representation: Representation, config: AugmentConfig
) -> torch.Tensor:
    """Apply a random gain and offset to standardised values.

    Args:
        values: standardised values, (B, C, H, W) or (B, T, C, H, W).
        seeds: sample seeds, (B,) int64.
        name: name of the modality; each modality gets independent random numbers.
        representation: representation of the values. ``linear`` gets both, ``decibel`` an offset only, heights neither.
        config: maximum gain and offset.
    """
    if representation not in ("linear", "decibel"):
        return values
    channels = values.shape[-3]
    shape = (len(values), *[1] * (values.ndim - 4), channels, 1, 1)
    if config.gain and representation == "linear":
        values = values * (1 + config.gain * (2 * uniform(seeds, f"gain/{name}", channels).view(shape) - 1))
    if config.offset:
        values = values + config.offset * (2 * uniform(seeds, f"offset/{name}", channels).view(shape) - 1)
    return values


def subsample_dates(padding: torch.Tensor, seeds: torch.Tensor, name: str, max_dates: int) -> torch.Tensor:
    """Mark all but ``max_dates`` random dates of each sample as padding, in ``padding`` (B, T) bool; 0 keeps all."""
    if not max_dates or padding.shape[1] <= max_dates:
        return padding
    scores = uniform(seeds, f"dates/{name}", padding.shape[1]).masked_fill(padding, 2.0)
    rank = scores.argsort(dim=1, stable=True).argsort(dim=1)
    return padding | (rank >= max_dates)


def jitter_dates(dates: torch.Tensor, seeds: torch.Tensor, name: str, days: int) -> torch.Tensor:
    """Shift each of the ``dates`` (B, T) by a random whole number of days, at most ``days`` in either direction."""
    if not days:
        return dates
    shifts = uniform(seeds, f"jitter/{name}", dates.shape[1])
    return dates + ((2 * days + 1) * shifts).to(dates.dtype) - days


def orient(values: torch.Tensor, seeds: torch.Tensor) -> torch.Tensor:
    """Turn each sample into a random one of the eight orientations of the square.

    The orientation depends on the seed only, so all modalities and labels of a sample get the same one.

    Args:
        values: float or uint8 values, (B, ..., H, W) with H = W.
        seeds: sample seeds, (B,) int64.
    """
    bits = uniform(seeds, "orientation", 3) < 0.5
    shape = (-1, *[1] * (values.ndim - 1))
    flip_columns, flip_rows, transpose = (bits[:, index].view(shape) for index in range(3))
    values = torch.where(flip_columns, values.flip(-1), values)
    values = torch.where(flip_rows, values.flip(-2), values)
    return torch.where(transpose, values.transpose(-1, -2), values)
