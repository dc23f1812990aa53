"""A batch in native dtypes to what encoders read: standardised, oriented, clouds left out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from bocage.shards.batch import Batch
from bocage.shards.modality import Modality, Registry
from bocage.shards.preprocess.augment import AugmentConfig, fewer_dates, jittered, orient, radiometry
from bocage.shards.preprocess.normalize import InputSpec, fill_holes, standardize

_CLEAR_PERCENT = 1  # a pixel is clear when snow and cloud probability are at most this
_CLEAR_SHARE = 0.95  # a date is kept when this share of its pixels is clear


@dataclass
class EncoderInput:
    """Input of one encoder for B samples.

    Attributes:
        values: (B, C, H, W) or (B, T, C, H, W) float32, standardised; holes are 0, the mean.
        valid: bool, same shape as ``values``: False in holes, absent samples and padded dates.
        present: (B,) bool. What is nothing but holes is absent (``encoder_inputs``), and so is a series without a date
            to look at.
        dates: (B, T) days since 15 May, for series.
        padding: (B, T) bool, True where there is nothing to look at: padded or cloudy dates, and empty ones.
    """

    values: torch.Tensor
    valid: torch.Tensor
    present: torch.Tensor
    dates: torch.Tensor | None = None
    padding: torch.Tensor | None = None


def cloudy_dates(probabilities: torch.Tensor, padding: torch.Tensor) -> torch.Tensor:
    """Dates of a Sentinel-2 series to leave out, as the official FLAIR-HUB code chooses them.

    A date is kept when at least 95 % of its pixels have cloud and snow probability of at most 1 %. A sample with no
    such date keeps the dates free of snow; with none of these either, all its dates.

    Args:
        probabilities: (B, T, 2, H, W), snow then cloud, percent; NaN where unknown.
        padding: (B, T) bool.

    Returns:
        (B, T) bool, True for padded dates and dates to leave out.
    """
    chances = probabilities.to(torch.float32)
    known, clear = torch.isfinite(chances).all(dim=2), chances <= _CLEAR_PERCENT
    pixels = known.sum(dim=(-2, -1))

    def mostly(found: torch.Tensor) -> torch.Tensor:
        """(B, T): whether it is found in enough of the pixels that are known; in none, nothing speaks against it."""
        share = (found & known).sum(dim=(-2, -1)) / pixels.clamp_min(1)
        return (share >= _CLEAR_SHARE) | (pixels == 0)

    kept = mostly(clear.all(dim=2)) & ~padding
    snow_free = mostly(clear[:, :, 0]) & ~padding
    kept = torch.where(kept.any(dim=1, keepdim=True), kept, snow_free)
    kept = torch.where(kept.any(dim=1, keepdim=True), kept, ~padding)
    return ~kept


def quality_masks(registry: Registry, inputs: list[str]) -> dict[str, str]:
    """For each of the ``inputs`` that has one, the name of the mask that tells its quality."""
    return {
        modality.mask_of: modality.name
        for modality in registry.by_role("mask")
        if modality.mask_of is not None and modality.mask_of in inputs
    }


def wanted_modalities(registry: Registry, inputs: list[str], labels: list[str]) -> list[Modality]:
    """All rasters that training on these inputs and labels reads, quality masks included, in registry order.

    Raises:
        InputError: an unknown name.
    """
    names = [*inputs, *quality_masks(registry, inputs).values(), *labels]
    return list(registry.subset(names).values())


def encoder_inputs(
    batch: Batch,
    specs: Mapping[str, InputSpec],
    masks: Mapping[str, str],
    *,
    oriented: bool,
    augment: AugmentConfig | None = None,
    empty_is_absent: bool = True,
) -> dict[str, EncoderInput]:
    """What each encoder reads, on the batch's device.

    Args:
        batch: native dtypes.
        specs: the input of each encoder, by modality.
        masks: the name of the quality mask of a series (``quality_masks``).
        oriented: whether each sample is turned into its random orientation (training) or left as it is.
        augment: further random changes, of training.
        empty_is_absent: whether images and dates that are nothing but holes count as absent; otherwise they are seen
            as the mean everywhere, which the official architecture needs, that cannot do without a sensor.
    """
    inputs: dict[str, EncoderInput] = {}
    for name, spec in specs.items():
        values = standardize(batch.values[name], spec)
        if oriented:
            values = orient(values, batch.seeds)
        if augment is not None:
            values = radiometry(values, batch.seeds, name, spec.representation, augment)
        present, finite = batch.present[name], torch.isfinite(values)
        if not spec.series:
            valid = finite & present.view(-1, 1, 1, 1)
            seen = valid.flatten(1).any(dim=1) if empty_is_absent else present
            inputs[name] = EncoderInput(fill_holes(values), valid, seen)
            continue
        padding = batch.padding[name]
        if empty_is_absent:
            padding = padding | ~finite.flatten(2).any(dim=2)
        if masks.get(name) in batch.values:  # other shards than those of training may lack it
            # The mask may be missing for a sample that has the series: then every date is kept.
            unclear = cloudy_dates(_as_long(batch.values[masks[name]], padding), padding)
            padding = torch.where(batch.present[masks[name]][:, None], unclear, padding)
        dates = batch.dates[name]
        if augment is not None:
            padding = fewer_dates(padding, batch.seeds, name, augment.dates)
            dates = jittered(dates, batch.seeds, name, augment.jitter)
        valid = finite & ~padding[:, :, None, None, None]
        seen = present & ~padding.all(dim=1)
        inputs[name] = EncoderInput(fill_holes(values), valid, seen, dates, padding)
    return inputs


def _as_long(probabilities: torch.Tensor, padding: torch.Tensor) -> torch.Tensor:
    """The mask with as many dates as its series: they differ when no sample of the batch has the mask."""
    missing = padding.shape[1] - probabilities.shape[1]
    if missing <= 0:
        return probabilities[:, : padding.shape[1]]
    blank = probabilities.new_zeros((len(probabilities), missing, *probabilities.shape[2:]))
    return torch.cat([probabilities, blank], dim=1)
