"""Random views of a sample, drawn from its seed alone and applied on the training device."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from bocage.shards.counter_rng import uniform
from bocage.shards.modality import Representation

_YEAR = 365


@dataclass(frozen=True, kw_only=True)
class AugmentConfig:
    """Random changes of a sample beside crops and orientation, which all sensors share. 0 leaves things as they are.

    Attributes:
        gain: standardised values of optical sensors are multiplied by a factor between 1 - gain and 1 + gain, drawn for
            each sample, sensor and channel; all dates of a series have one. Radar in decibels and heights have none.
        offset: what is added to them and to radar, at most, in standard deviations.
        dates: most dates that are kept of a series, drawn at random.
        jitter: days by which each date of a series is moved at most.

    Raises:
        ValueError: ``gain`` outside [0, 1), another one negative, ``offset`` infinite, or ``jitter`` over half a year.
    """

    gain: float = 0.0
    offset: float = 0.0
    dates: int = 0
    jitter: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.gain < 1:
            raise ValueError(f"augment.gain={self.gain} must be in [0, 1)")
        if not 0 <= self.offset < math.inf:
            raise ValueError(f"augment.offset={self.offset} must be a number of standard deviations, 0 or more")
        if self.dates < 0:
            raise ValueError(f"augment.dates={self.dates} must not be negative")
        if not 0 <= self.jitter <= _YEAR // 2:
            raise ValueError(f"augment.jitter={self.jitter} must be between 0 and {_YEAR // 2} days, half a year")


def radiometry(
    values: torch.Tensor, seeds: torch.Tensor, name: str, representation: Representation, config: AugmentConfig
) -> torch.Tensor:
    """Standardised values (B, C, H, W) or (B, T, C, H, W) under another light, as the seeds of the samples (B,) say."""
    if representation not in ("linear", "decibel"):
        return values
    channels = values.shape[-3]
    shape = (len(values), *[1] * (values.ndim - 4), channels, 1, 1)
    if config.gain and representation == "linear":
        values = values * (1 + config.gain * (2 * uniform(seeds, f"gain/{name}", channels).view(shape) - 1))
    if config.offset:
        values = values + config.offset * (2 * uniform(seeds, f"offset/{name}", channels).view(shape) - 1)
    return values


def fewer_dates(padding: torch.Tensor, seeds: torch.Tensor, name: str, most: int) -> torch.Tensor:
    """``padding`` (B, T) bool with all but ``most`` of the dates of a sample padded, drawn at random; 0 keeps all."""
    if not most or padding.shape[1] <= most:
        return padding
    draws = uniform(seeds, f"dates/{name}", padding.shape[1]).masked_fill(padding, 2.0)
    rank = draws.argsort(dim=1, stable=True).argsort(dim=1)
    return padding | (rank >= most)


def jittered(dates: torch.Tensor, seeds: torch.Tensor, name: str, days: int) -> torch.Tensor:
    """``dates`` (B, T) each moved by up to so many days."""
    if not days:
        return dates
    draws = uniform(seeds, f"jitter/{name}", dates.shape[1])
    return dates + ((2 * days + 1) * draws).to(dates.dtype) - days


def orient(values: torch.Tensor, seeds: torch.Tensor) -> torch.Tensor:
    """Each sample in one of the eight orientations of the square.

    The orientation depends on the seed only, so that all modalities and labels of a sample turn together.

    Args:
        values: (B, ..., H, W) with H = W, float or uint8.
        seeds: (B,) int64.
    """
    bits = uniform(seeds, "orientation", 3) < 0.5
    shape = (-1, *[1] * (values.ndim - 1))
    flip_columns, flip_rows, transpose = (bits[:, index].view(shape) for index in range(3))
    values = torch.where(flip_columns, values.flip(-1), values)
    values = torch.where(flip_rows, values.flip(-2), values)
    return torch.where(transpose, values.transpose(-1, -2), values)
