"""The masked objective: reconstruct hidden units, hidden dates and hidden modalities from all that is visible."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import nn

from bocage.shards.counter_rng import uniform
from bocage.shards.errors import InputError
from bocage.shards.modality import Modality
from bocage.shards.preprocess.inputs import EncoderInput
from bocage.ssl.encoders.base import Encoder
from bocage.ssl.objectives.decoder import DecoderConfig, FusionDecoder, Neck, date_encoding, grid_centres
from bocage.ssl.objectives.masking import Mask
from bocage.ssl.objectives.model import EncodedBatch
from bocage.ssl.objectives.pixel_targets import group_statistics, to_units
from bocage.ssl.objectives.tokens import build_neck, georeferenced_tokens


@dataclass(frozen=True, kw_only=True)
class MaskedConfig:
    """The masked objective.

    Attributes:
        decoder: size of the fusion decoder.
        normalize_targets: reconstruct values normalised in each unit by groups of bands (MAESTRO); otherwise the
            standardised values themselves.
        dates: hidden dates of a series reconstructed per sample and step.
        weights: weight of a modality's loss by name; those not named weigh 1.

    Raises:
        ValueError: ``dates`` below 1, or a negative weight.
    """

    decoder: DecoderConfig = field(default_factory=DecoderConfig)
    normalize_targets: bool = True
    dates: int = 8
    weights: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.dates < 1:
            raise ValueError(f"masked.dates={self.dates} must be at least 1")
        for name, weight in self.weights.items():
            if weight < 0:
                raise ValueError(f"masked.weights.{name}={weight} must not be negative")


@dataclass
class Reconstruction:
    """Prediction and target of one modality, in units: (B, U, U, C, u, u), or (B, K, U, U, C, u, u) for K dates.

    ``wanted`` has the same shape: what the loss counts. ``mean`` and ``std`` undo the target's normalisation:
    standardised value = value * std + mean. ``chosen`` gives the indices (B, K) of the dates of a series.
    """

    prediction: torch.Tensor
    target: torch.Tensor
    wanted: torch.Tensor
    mean: torch.Tensor
    std: torch.Tensor
    chosen: torch.Tensor | None = None

    def losses(self) -> torch.Tensor:
        """Mean absolute error of each sample over what is wanted of it, (B,); 0 where nothing is."""
        error = ((self.prediction.float() - self.target).abs() * self.wanted).flatten(1).sum(dim=1)
        return error / self.wanted.flatten(1).sum(dim=1).clamp_min(1)


class _DateHead(nn.Module):
    """Values of a cell at a date, from what the decoder says of the cell and an encoding of the date."""

    def __init__(self, width: int, outputs: int) -> None:
        super().__init__()
        self.width = width
        self.cell, self.date = nn.Linear(width, width), nn.Linear(width, 2 * width)
        self.norm = nn.LayerNorm(width)
        self.output = nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.Linear(width, outputs))

    def forward(self, cells: torch.Tensor, days: torch.Tensor) -> torch.Tensor:
        """(B, N, width) cells and (B, K) days to (B, K, N, outputs)."""
        # The date gates the cell's channels: a season is a way of looking at a parcel, not a term added to it.
        gain, shift = self.date(date_encoding(days, self.width).to(cells.dtype)).chunk(2, dim=-1)
        mixed = self.norm(self.cell(cells)[:, None] * (1 + gain[:, :, None]) + shift[:, :, None])
        return self.output(mixed)


class MaskedReconstruction(nn.Module):
    """Masked multimodal reconstruction with a joint fusion decoder (MultiMAE, arXiv 2204.01678, and MAESTRO).

    The loss of a modality is the mean absolute error over a sample's hidden values; modalities weigh the same by
    default, because weighing by tokens would let the aerial image rule.

    Args:
        encoders: by modality; only their widths and strides are used.
        modalities: registry entries.
        config: the objective.

    Raises:
        InputError: ``weights`` name another modality, or leave none a weight.
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
            raise InputError("masked.weights: at least one modality must weigh more than 0")
        width = config.decoder.width
        self.necks, self.heads = nn.ModuleDict(), nn.ModuleDict()
        for name, encoder in encoders.items():
            modality = self.modalities[name]
            channels = len(modality.channels)
            series = modality.role == "series"
            self.necks[name] = build_neck(encoder, modality, width)
            # A series has a token for each of its pixels, on which the date head predicts that pixel's values.
            outputs = channels if series else channels * modality.unit**2
            self.heads[name] = _DateHead(width, outputs) if series else nn.Linear(width, outputs)
        self.decoder = FusionDecoder(list(encoders), config.decoder)

    def _weight(self, name: str) -> float:
        return self.config.weights.get(name, 1.0)

    def _normalized(
        self, units: torch.Tensor, valid: torch.Tensor, name: str
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Target units with their mean and std."""
        if not self.config.normalize_targets:
            zero = units.new_zeros(()).expand(*units.shape[:-2], 1, 1)
            return units, zero, torch.ones_like(zero)
        mean, std = group_statistics(units, valid, self.modalities[name])
        return (units - mean) / std, mean, std

    def _image(self, name: str, answers: torch.Tensor, given: EncoderInput, mask: Mask) -> Reconstruction:
        unit = self.modalities[name].unit
        units, valid = to_units(given.values, unit), to_units(given.valid, unit)
        target, mean, std = self._normalized(units, valid, name)
        prediction = self.heads[name](answers).view(units.shape)
        assert mask.units is not None
        hidden = (mask.units | mask.whole[:, None, None])[..., None, None, None]
        return Reconstruction(prediction, target, hidden & valid, mean, std)

    def _series(
        self, name: str, answers: torch.Tensor, given: EncoderInput, mask: Mask, seeds: torch.Tensor
    ) -> Reconstruction:
        assert given.dates is not None and given.padding is not None
        unit = self.modalities[name].unit
        pixels = given.values.shape[-1]
        hidden = mask.places(given.padding, pixels)
        dates = hidden.any(dim=-1).any(dim=-1)
        draws = uniform(seeds, f"target dates/{name}", dates.shape[1]).masked_fill(~dates, -1.0)
        chosen = draws.argsort(dim=1, descending=True, stable=True)[:, : self.config.dates]
        at = (torch.arange(len(chosen), device=chosen.device)[:, None], chosen)
        units, valid = to_units(given.values[at], unit), to_units(given.valid[at], unit)
        target, mean, std = self._normalized(units, valid, name)
        values = self.heads[name](answers, given.dates[at])
        values = values.view(*values.shape[:2], pixels, pixels, units.shape[-3]).movedim(-1, 2)
        wanted = to_units(hidden[at][:, :, None], unit) & valid
        return Reconstruction(to_units(values, unit), target, wanted, mean, std, chosen)

    def reconstruct(self, view: EncodedBatch) -> dict[str, Reconstruction]:
        """Prediction and target of every modality."""
        tokens, centres = {}, {}
        for name in view.maps:
            neck = self.necks[name]
            assert isinstance(neck, Neck)
            tokens[name], centres[name], _ = georeferenced_tokens(view, name, neck)
        hidden = {name: view.masks[name].whole for name in tokens}
        memory = self.decoder.fuse(tokens, centres, hidden, view.side)
        places = {}
        for name, mask in view.masks.items():
            count = view.inputs[name].values.shape[-1] if mask.units is None else mask.units.shape[1]
            places[name] = grid_centres(count, view.side, memory.tokens.device).flatten(0, 1)
        answers = self.decoder.read(places, memory)
        return {
            name: self._image(name, answers[name], view.inputs[name], mask)
            if mask.units is not None
            else self._series(name, answers[name], view.inputs[name], mask, view.seeds)
            for name, mask in view.masks.items()
        }

    def forward(self, view: EncodedBatch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Weighted mean over modalities and samples, a scalar, and the mean of each modality where it is wanted.

        Every sample weighs the same whatever it lacks: given the encoders' features, the loss of a batch is exactly
        the mean over its parts, be they ranks or accumulated steps. (U-TAE's batch normalisation, as ever, takes its
        statistics from each part.)
        """
        total, whole, figures = torch.zeros((), device=view.seeds.device), 0.0, {}
        for name, item in self.reconstruct(view).items():
            losses = item.losses()
            weight = self._weight(name)
            total = total + weight * losses.mean()
            whole += weight
            figures[name] = losses.sum() / item.wanted.flatten(1).any(dim=1).sum().clamp_min(1)
        return total / whole, figures
