"""Masked reconstruction: predict the pixels of masked units, dates and modalities from all visible tokens."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import nn
from torch.nn import functional

from bocage.shards.counter_rng import uniform
from bocage.shards.errors import InputError
from bocage.shards.modality import Modality
from bocage.shards.preprocess.inputs import EncoderInput
from bocage.ssl.encoders.base import Encoder
from bocage.ssl.objectives.decoder import DecoderConfig, FusionDecoder, date_encoding
from bocage.ssl.objectives.masking import Mask
from bocage.ssl.objectives.model import EncodedBatch
from bocage.ssl.objectives.targets import (
    CHANNELS,
    PROJECTION_WIDTH,
    TARGETS,
    RandomProjection,
    cell_gradients,
    cell_statistics,
    cells_per_unit,
    group_statistics,
    to_units,
)
from bocage.ssl.objectives.tokens import build_neck, decode_hidden

_CONSTANT_SIDE = 8  # rows and columns of a unit, at least, from which the loss of the best constant is computed
_MAX_MEDIAN_VALUES = 4096  # values of a channel from which the best constant is computed
_TEMPERATURE = 0.1  # of ``discrimination``


@dataclass(frozen=True, kw_only=True)
class MaskedConfig:
    """Masked reconstruction.

    Attributes:
        decoder: size of the fusion decoder.
        targets: weight of each target of images (``targets``): ``pixels``, ``statistics``, ``gradients``,
            ``discrimination``; 0 leaves one out. The target of series is ``pixels``.
        normalize_pixels: whether pixels are normalised in each unit by groups of bands (MAESTRO, arXiv 2508.10894),
            those of a series over all dates together; otherwise they are the standardised values.
        dates_per_sample: masked dates of a series that are reconstructed per sample and step.
        weights: weight of a modality's loss, by name; 1 for modalities that are not listed.

    Raises:
        ValueError: a target is unknown or none has a positive weight, ``dates_per_sample`` is below 1, or a weight is
            negative.
    """

    decoder: DecoderConfig = field(default_factory=DecoderConfig)
    targets: dict[str, float] = field(default_factory=lambda: {"pixels": 1.0, "statistics": 1.0})
    normalize_pixels: bool = True
    dates_per_sample: int = 8
    weights: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if unknown := sorted(set(self.targets) - set(TARGETS)):
            raise ValueError(f"masked.targets.{unknown[0]}: not a target; targets: {', '.join(TARGETS)}")
        if not any(self.targets.values()) or min(self.targets.values()) < 0:
            raise ValueError("masked.targets: weights must not be negative, and one must be above 0")
        if self.dates_per_sample < 1:
            raise ValueError(f"masked.dates_per_sample={self.dates_per_sample} must be at least 1")
        for name, weight in self.weights.items():
            if weight < 0:
                raise ValueError(f"masked.weights.{name}={weight} must not be negative")


@dataclass
class Reconstruction:
    """Prediction of one target of one modality, by mask unit, in G channels of k x k values.

    Attributes:
        prediction: (B, U, U, G, k, k) for an image, (B, K, U, U, G, k, k) for K dates of a series.
        target: target, same shape.
        loss_mask: bool, same shape: True where the loss counts a value.
        mean, std: normalisation of the target: standardised value = target * std + mean.
        date_indices: (B, K) indices of the dates of a series; None for an image.
    """

    prediction: torch.Tensor
    target: torch.Tensor
    loss_mask: torch.Tensor
    mean: torch.Tensor
    std: torch.Tensor
    date_indices: torch.Tensor | None = None

    def visible_mean_and_std(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Average the normalisation of the units outside the loss mask, by sample: same shapes as ``mean`` and ``std``.

        Samples without such units get the average over the whole batch.
        """
        visible = ~self.loss_mask.flatten(-2).any(dim=-1)[..., None, None]
        lead = tuple(range(1, visible.ndim - 3))
        averages = []
        for values in (self.mean, self.std):
            count = visible.sum(dim=lead, keepdim=True)
            overall = (values * visible).sum(dim=(0, *lead), keepdim=True) / count.sum(dim=0, keepdim=True).clamp_min(1)
            own = (values * visible).sum(dim=lead, keepdim=True) / count.clamp_min(1)
            averages.append(torch.where(count > 0, own, overall))
        return averages[0], averages[1]

    def losses(self) -> torch.Tensor:
        """Mean absolute error of each sample over its loss mask, (B,); 0 where the mask is empty."""
        return _mean_error(self.prediction.float(), self.target, self.loss_mask)

    @torch.no_grad()
    def constant_losses(self) -> torch.Tensor:
        """Losses of the best constant prediction, (B,): the median of each channel over the batch.

        Of large units, every k-th row and column counts, because all values would take a tenth of a step.
        """
        step = max(1, self.target.shape[-1] // _CONSTANT_SIDE)
        target, loss_mask = (values[..., ::step, ::step] for values in (self.target, self.loss_mask))
        masked = torch.where(loss_mask, target, torch.nan).movedim(-3, 0).flatten(1)
        if not masked.shape[1]:  # series without any date
            return target.new_zeros(len(target))
        stride = max(1, masked.shape[1] // _MAX_MEDIAN_VALUES)
        median = masked[:, ::stride].nanmedian(dim=1).values.nan_to_num(0.0)
        return _mean_error(median[:, None, None], target, loss_mask)


class Discrimination(Reconstruction):
    """Prediction of the random projection of each unit, in 1 x 1 values.

    Its loss is InfoNCE (arXiv 1807.03748) of cosine similarities: each masked unit of a sample against all of them.
    """

    def losses(self) -> torch.Tensor:
        """Mean cross-entropy of each sample over its masked units, (B,)."""
        prediction, target = (
            functional.normalize(values.float().flatten(1, 2).flatten(2), dim=-1)
            for values in (self.prediction, self.target)
        )
        counted = self._counted()
        scores = prediction @ target.mT / _TEMPERATURE
        scores = scores.masked_fill(~counted[:, None], torch.finfo(scores.dtype).min)
        loss = scores.logsumexp(dim=-1) - scores.diagonal(dim1=-2, dim2=-1)
        return (loss * counted).sum(dim=1) / counted.sum(dim=1).clamp_min(1)

    @torch.no_grad()
    def constant_losses(self) -> torch.Tensor:
        """Losses of predictions that resemble all units equally, (B,)."""
        return self._counted().sum(dim=1).clamp_min(1).log()

    def _counted(self) -> torch.Tensor:
        """Units that the loss counts, (B, U * U) bool."""
        return self.loss_mask.flatten(1, 2).flatten(2).any(dim=-1)


def _mean_error(prediction: torch.Tensor, target: torch.Tensor, loss_mask: torch.Tensor) -> torch.Tensor:
    """Mean absolute error of each sample over its loss mask, (B,); 0 where the mask is empty."""
    error = ((prediction - target).abs() * loss_mask).flatten(1).sum(dim=1)
    return error / loss_mask.flatten(1).sum(dim=1).clamp_min(1)


class _DateHead(nn.Module):
    """Predict the values of a pixel at a date from the pixel's decoded feature and the date's encoding."""

    def __init__(self, width: int, outputs: int) -> None:
        super().__init__()
        self.width = width
        self.cell, self.date = nn.Linear(width, width), nn.Linear(width, 2 * width)
        self.norm = nn.LayerNorm(width)
        self.output = nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.Linear(width, outputs))

    def forward(self, cells: torch.Tensor, days: torch.Tensor) -> torch.Tensor:
        """Map (B, N, width) cells and (B, K) days to (B, K, N, outputs)."""
        # The date scales the channels of a cell as well as shifting them: the season decides which ones matter.
        gain, shift = self.date(date_encoding(days, self.width).to(cells.dtype)).chunk(2, dim=-1)
        mixed = self.norm(self.cell(cells)[:, None] * (1 + gain[:, :, None]) + shift[:, :, None])
        return self.output(mixed)


class MaskedReconstruction(nn.Module):
    """Masked multimodal reconstruction with a joint fusion decoder (MultiMAE, arXiv 2204.01678, and MAESTRO).

    The loss of a modality is the mean absolute error over the masked values of a sample. Modalities have equal weights
    by default; weights by number of tokens would let the aerial image dominate.

    Args:
        encoders: encoders, by modality; only their widths and strides are used.
        modalities: registry entries, by modality.
        config: masked reconstruction.

    Raises:
        InputError: ``config.weights`` names another modality, or no modality has a positive weight.
    """

    def __init__(
        self, encoders: Mapping[str, Encoder], modalities: Mapping[str, Modality], config: MaskedConfig
    ) -> None:
        super().__init__()
        self.config = config
        self.modalities = {name: modalities[name] for name in encoders}
        if unknown := sorted(set(config.weights) - set(encoders)):
            raise InputError(f"masked.weights.{unknown[0]}: not a modality of this run ({', '.join(encoders)})")
        if not any(self._weight(name) for name in encoders):
            raise InputError("masked.weights: at least one modality must have a weight above 0")
        width = config.decoder.width
        self.targets = {target: weight for target, weight in config.targets.items() if weight > 0}
        self.necks, self.heads, self.projections = nn.ModuleDict(), nn.ModuleDict(), nn.ModuleDict()
        for name, encoder in encoders.items():
            modality = self.modalities[name]
            channels = len(modality.channels)
            self.necks[name] = build_neck(encoder, modality, width)
            # A series has one token per pixel, from which the date head predicts the values of that pixel.
            if modality.role == "series":
                self.heads[name] = _DateHead(width, channels)
            else:
                cells = cells_per_unit(modality.unit)
                outputs = {
                    target: factor * channels * (modality.unit if target == "pixels" else cells) ** 2
                    for target, factor in CHANNELS.items()
                } | {"discrimination": PROJECTION_WIDTH}
                self.heads[name] = nn.ModuleDict({target: nn.Linear(width, outputs[target]) for target in self.targets})
                if "discrimination" in self.targets:
                    self.projections[name] = RandomProjection(channels, modality.unit)
        patch_size = next(iter(self.modalities.values())).patch_size
        self.decoder = FusionDecoder(list(encoders), config.decoder, patch_size)

    def _weight(self, name: str) -> float:
        return self.config.weights.get(name, 1.0)

    def _normalization(self, units: torch.Tensor, valid: torch.Tensor, name: str) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the mean and standard deviation by which units (..., C, height, width) are normalised."""
        if self.config.normalize_pixels:
            return group_statistics(units, valid, self.modalities[name])
        zero = units.new_zeros(()).expand(*units.shape[:-2], 1, 1)
        return zero, torch.ones_like(zero)

    def _reconstruct_image(
        self, name: str, outputs: torch.Tensor, image: EncoderInput, mask: Mask
    ) -> dict[str, Reconstruction]:
        assert mask.units is not None
        unit = self.modalities[name].unit
        units, valid = to_units(image.values, unit), to_units(image.valid, unit)
        masked = (mask.units | mask.dropped[:, None, None])[..., None, None, None]
        heads, reconstructions = self.heads[name], {}
        assert isinstance(heads, nn.ModuleDict)
        for target_name, head in heads.items():
            mean, std = units.new_zeros(()), units.new_ones(())
            if target_name == "pixels":
                mean, std = self._normalization(units, valid, name)
                target, is_valid = (units - mean) / std, valid
            elif target_name == "statistics":
                target, is_valid = cell_statistics(units, valid)
            elif target_name == "gradients":
                target, is_valid = cell_gradients(image.values, image.valid, unit)
            else:
                target, is_valid = self.projections[name](units, valid)
            prediction = head(outputs).view(target.shape)
            kind = Discrimination if target_name == "discrimination" else Reconstruction
            reconstructions[target_name] = kind(prediction, target, masked & is_valid, mean, std)
        return reconstructions

    def _reconstruct_series(
        self, name: str, outputs: torch.Tensor, series: EncoderInput, mask: Mask, seeds: torch.Tensor
    ) -> dict[str, Reconstruction]:
        assert series.dates is not None and series.padding is not None
        unit = self.modalities[name].unit
        pixels = series.values.shape[-1]
        masked = mask.pixel_mask(series.padding, pixels)
        masked_dates = masked.any(dim=-1).any(dim=-1)
        scores = uniform(seeds, f"target dates/{name}", masked_dates.shape[1]).masked_fill(~masked_dates, -1.0)
        chosen = scores.argsort(dim=1, descending=True, stable=True)[:, : self.config.dates_per_sample]
        index = (torch.arange(len(chosen), device=chosen.device)[:, None], chosen)
        units, valid = to_units(series.values[index], unit), to_units(series.valid[index], unit)
        # All dates of a unit in one column of its pixels: (B, U, U, C, T * unit, unit).
        column, column_valid = (
            to_units(part, unit).movedim(1, 4).flatten(4, 5) for part in (series.values, series.valid)
        )
        normalization = self._normalization(column, column_valid, name)
        mean, std = (part[:, None].expand(*units.shape[:-2], 1, 1) for part in normalization)
        target = (units - mean) / std
        values = self.heads[name](outputs, series.dates[index])
        values = values.view(*values.shape[:2], pixels, pixels, units.shape[-3]).movedim(-1, 2)
        loss_mask = to_units(masked[index][:, :, None], unit) & valid
        return {"pixels": Reconstruction(to_units(values, unit), target, loss_mask, mean, std, chosen)}

    def reconstruct(self, encoded: EncodedBatch) -> dict[str, dict[str, Reconstruction]]:
        """Reconstruct every target of every modality."""
        outputs = decode_hidden(encoded, self.necks, self.decoder)
        return {
            name: self._reconstruct_image(name, outputs[name], encoded.inputs[name], mask)
            if mask.units is not None
            else self._reconstruct_series(name, outputs[name], encoded.inputs[name], mask, encoded.seeds)
            for name, mask in encoded.masks.items()
        }

    def forward(self, encoded: EncodedBatch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Compute the weighted mean of the losses over modalities and samples.

        All samples have the same weight, whichever modalities they lack. For given features, the loss of a batch
        therefore equals the mean over its parts, such as ranks or accumulated micro-batches. (U-TAE's batch
        normalisation still computes its statistics per part.)

        Returns:
            The loss, a scalar; and by modality its mean loss over samples with a non-empty loss mask, ``NAME``, and
            ``explained/NAME``: 1 - loss / loss of the best constant, as its numerator and denominator, (2,). With
            several targets, also ``explained/NAME/TARGET``.
        """
        total, total_weight, metrics = torch.zeros((), device=encoded.seeds.device), 0.0, {}
        for name, items in self.reconstruct(encoded).items():
            weights = self.targets if encoded.masks[name].units is not None else {"pixels": 1.0}
            scale = 1 / sum(weights.values())
            by_target = {target: scale * weights[target] * item.losses() for target, item in items.items()}
            losses = torch.stack(list(by_target.values())).sum(dim=0)
            constants = {
                target: scale * weights[target] * item.constant_losses().sum() for target, item in items.items()
            }
            weight = self._weight(name)
            total = total + weight * losses.mean()
            total_weight += weight
            has_target = torch.stack([item.loss_mask.flatten(1).any(dim=1) for item in items.values()]).any(dim=0)
            metrics[name] = losses.sum() / has_target.sum().clamp_min(1)
            constant = torch.stack(list(constants.values())).sum()
            metrics[f"explained/{name}"] = torch.stack([constant - losses.detach().sum(), constant])
            if len(items) > 1:
                for target, value in constants.items():
                    explained = value - by_target[target].detach().sum()
                    metrics[f"explained/{name}/{target}"] = torch.stack([explained, value])
        return total / total_weight, metrics
