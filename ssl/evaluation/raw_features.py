"""Raw inputs as features of ground cells: the control that features of encoders must beat in a probe.

Images give the mean, standard deviation, minimum and maximum of each channel in a cell. Series give the mean of each
channel in a cell, interpolated linearly to the same days of the year for all samples. Masked and cloudy dates are left
out. Logistic regression on such series is a strong baseline for crops.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F

from bocage.shards.preprocess.inputs import EncoderInput

_DAYS = 24  # dates that a series is interpolated to, evenly over the year
_FIRST_DAY, _LAST_DAY = -134.0, 230.0  # 1 January and 31 December, in days since 15 May


def raw_cell_features(inputs: EncoderInput, cells: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute the raw features of the samples that have the sensor.

    Args:
        inputs: encoder input of a batch, not masked.
        cells: cells along a side.

    Returns:
        Indices of these samples, (R,) int64, and their features, (R, C, cells, cells) float32.
    """
    rows = inputs.present.nonzero()[:, 0]
    values, valid = inputs.values[rows].float(), inputs.valid[rows]
    if inputs.dates is None or inputs.padding is None:
        return rows, _image_features(values, valid, cells)
    return rows, _series_features(values, valid, inputs.dates[rows].float(), inputs.padding[rows], cells)


def _image_features(values: torch.Tensor, valid: torch.Tensor, cells: int) -> torch.Tensor:
    """Mean, standard deviation, minimum and maximum of valid pixels, (R, 4 * C, cells, cells)."""
    mean, square = _cell_mean(values, valid, cells), _cell_mean(values.square(), valid, cells)
    std = (square - mean.square()).clamp_min(0).sqrt()
    highest, lowest = (
        sign * _resize(torch.where(valid, sign * values, -torch.inf), cells, F.adaptive_max_pool2d) for sign in (1, -1)
    )
    features = torch.cat([mean, std, lowest, highest], dim=1)
    return torch.where(torch.isfinite(features), features, 0.0)


def _series_features(
    values: torch.Tensor, valid: torch.Tensor, dates: torch.Tensor, padding: torch.Tensor, cells: int
) -> torch.Tensor:
    """Cell means at ``_DAYS`` days, (R, _DAYS * C, cells, cells)."""
    batch, length, channels = values.shape[:3]
    frames = _cell_mean(values.flatten(0, 1), valid.flatten(0, 1), cells).view(batch, length, channels, cells, cells)
    days = torch.linspace(_FIRST_DAY, _LAST_DAY, _DAYS, device=values.device)
    features = frames.new_zeros(batch, _DAYS, channels, cells, cells)
    for sample in range(batch):
        known = (~padding[sample]).nonzero()[:, 0]
        known = known[dates[sample, known].argsort(stable=True)]
        if not len(known):
            continue
        known_days = dates[sample, known].contiguous()
        after = torch.searchsorted(known_days, days).clamp(1 if len(known) > 1 else 0, len(known) - 1)
        before = (after - 1).clamp_min(0)
        gap = (known_days[after] - known_days[before]).clamp_min(1e-6)
        # Before the first and after the last date, the nearest date counts.
        weight = ((days - known_days[before]) / gap).clamp(0, 1)[:, None, None, None]
        features[sample] = torch.lerp(frames[sample, known[before]], frames[sample, known[after]], weight)
    return features.flatten(1, 2)


def _cell_mean(values: torch.Tensor, valid: torch.Tensor, cells: int) -> torch.Tensor:
    """Mean of the valid pixels of each cell; 0 where there is none."""
    weight = valid.to(values.dtype)
    total = _resize(weight, cells, F.adaptive_avg_pool2d)
    return _resize(values * weight, cells, F.adaptive_avg_pool2d) / total.clamp_min(1e-6)


def _resize(values: torch.Tensor, cells: int, pool: Callable[..., torch.Tensor]) -> torch.Tensor:
    """Pool (N, C, H, W) to cells, or repeat pixels that are larger than cells."""
    if values.shape[-1] < cells:
        return F.interpolate(values, size=(cells, cells), mode="nearest")
    return pool(values, cells)
