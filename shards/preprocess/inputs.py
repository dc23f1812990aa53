"""Prepare encoder inputs from a batch: standardise, augment, and mask cloudy dates."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from bocage.shards.batch import Batch
from bocage.shards.modality import Modality, Registry
from bocage.shards.preprocess.augment import AugmentConfig, jitter_dates, jitter_radiometry, orient, subsample_dates
from bocage.shards.preprocess.normalize import InputSpec, fill_nodata, standardize

_MAX_CLEAR_PROBABILITY = 1  # percent; a pixel is clear if its snow and cloud probabilities are at most this
_MIN_CLEAR_FRACTION = 0.95  # a date is kept if at least this fraction of its pixels is clear


@dataclass
class EncoderInput:
    """Input of one encoder for B samples.

    Attributes:
        values: standardised values, (B, C, H, W) or (B, T, C, H, W) float32. Nodata is 0, the mean.
        valid: bool mask of the shape of ``values``; False for nodata, absent samples and padded dates.
        present: whether the sample has the modality, (B,) bool. Series without any unpadded date are absent, and by
            default so are inputs of nodata only (``encoder_inputs``).
        dates: days since 15 May, (B, T), for series.
        padding: mask of dates that the encoder ignores, (B, T) bool, for series. True for padding, for cloudy dates,
            for dates that augmentation drops, and by default for dates of nodata only.
    """

    values: torch.Tensor
    valid: torch.Tensor
    present: torch.Tensor
    dates: torch.Tensor | None = None
    padding: torch.Tensor | None = None


def cloudy_dates(probabilities: torch.Tensor, padding: torch.Tensor) -> torch.Tensor:
    """Select the dates of an optical series to ignore, by the rule of the official FLAIR-HUB code.

    A date is kept if at least 95 % of its pixels have cloud and snow probabilities of at most 1 %. A sample without
    such a date keeps its snow-free dates. A sample without snow-free dates keeps all its dates.

    Args:
        probabilities: snow and cloud probability in percent, (B, T, 2, H, W), or one of them, (B, T, 1, H, W); NaN
            where unknown.
        padding: padded dates, (B, T) bool.

    Returns:
        (B, T) bool, True for padded dates and dates to ignore.
    """
    probabilities = probabilities.to(torch.float32)
    known, clear = torch.isfinite(probabilities).all(dim=2), probabilities <= _MAX_CLEAR_PROBABILITY
    known_pixels = known.sum(dim=(-2, -1))

    def holds_mostly(condition: torch.Tensor) -> torch.Tensor:
        """(B, T): whether enough known pixels fulfil the condition; true for a date without known pixels."""
        fraction = (condition & known).sum(dim=(-2, -1)) / known_pixels.clamp_min(1)
        return (fraction >= _MIN_CLEAR_FRACTION) | (known_pixels == 0)

    keep = holds_mostly(clear.all(dim=2)) & ~padding
    snow_free = holds_mostly(clear[:, :, 0]) & ~padding
    keep = torch.where(keep.any(dim=1, keepdim=True), keep, snow_free)
    keep = torch.where(keep.any(dim=1, keepdim=True), keep, ~padding)
    return ~keep


def quality_masks(registry: Registry, inputs: list[str]) -> dict[str, str]:
    """Name of the quality mask of each series in ``inputs`` that has one."""
    return {
        modality.mask_of: modality.name
        for modality in registry.by_role("mask")
        if modality.mask_of is not None and modality.mask_of in inputs
    }


def required_modalities(registry: Registry, inputs: list[str], labels: list[str]) -> list[Modality]:
    """Modalities that training on these inputs and labels reads, including quality masks, in registry order.

    Raises:
        InputError: a name is unknown, or a mask is listed without its series.
    """
    names = [*inputs, *quality_masks(registry, inputs).values(), *labels]
    return list(registry.subset(names).values())


def encoder_inputs(
    batch: Batch,
    specs: Mapping[str, InputSpec],
    masks: Mapping[str, str],
    *,
    random_orientation: bool,
    augment: AugmentConfig | None = None,
    empty_is_absent: bool = True,
) -> dict[str, EncoderInput]:
    """Prepare the input of each encoder, on the batch's device.

    Args:
        batch: batch in native dtypes.
        specs: input description of each encoder, by modality.
        masks: name of the quality mask of each series (``quality_masks``).
        random_orientation: whether to turn each sample into its random orientation; for training.
        augment: further augmentation; for training.
        empty_is_absent: whether images and dates of nodata only count as absent. If False, encoders see them as the
            mean everywhere: the official architecture needs this, because it requires all sensors.
    """
    inputs: dict[str, EncoderInput] = {}
    for name, spec in specs.items():
        values = standardize(batch.values[name], spec)
        if random_orientation:
            values = orient(values, batch.seeds)
        if augment is not None:
            values = jitter_radiometry(values, batch.seeds, name, spec.representation, augment)
        present, finite = batch.present[name], torch.isfinite(values)
        if not spec.series:
            valid = finite & present.view(-1, 1, 1, 1)
            present = valid.flatten(1).any(dim=1) if empty_is_absent else present
            inputs[name] = EncoderInput(fill_nodata(values), valid, present)
            continue
        padding = batch.padding[name]
        if empty_is_absent:
            padding = padding | ~finite.flatten(2).any(dim=2)
        if masks.get(name) in batch.values:  # shards other than the training shards may lack the mask
            # A sample may have the series without the mask: it keeps every date.
            cloudy = cloudy_dates(_match_length(batch.values[masks[name]], padding), padding)
            padding = torch.where(batch.present[masks[name]][:, None], cloudy, padding)
        dates = batch.dates[name]
        if augment is not None:
            padding = subsample_dates(padding, batch.seeds, name, augment.max_dates)
            dates = jitter_dates(dates, batch.seeds, name, augment.date_jitter)
        valid = finite & ~padding[:, :, None, None, None]
        present = present & ~padding.all(dim=1)
        inputs[name] = EncoderInput(fill_nodata(values), valid, present, dates, padding)
    return inputs


def _match_length(probabilities: torch.Tensor, padding: torch.Tensor) -> torch.Tensor:
    """Pad or cut the mask to the length of its series. They differ if no sample of the batch has the mask."""
    missing = padding.shape[1] - probabilities.shape[1]
    if missing <= 0:
        return probabilities[:, : padding.shape[1]]
    blank = probabilities.new_zeros((len(probabilities), missing, *probabilities.shape[2:]))
    return torch.cat([probabilities, blank], dim=1)
