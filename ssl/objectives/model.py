"""Encoders and objective terms as one training task: one encoder pass per modality serves every term."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import nn

from bocage.shards.batch import Batch
from bocage.shards.modality import Modality
from bocage.shards.preprocess.augment import AugmentConfig
from bocage.shards.preprocess.inputs import EncoderInput, encoder_inputs
from bocage.shards.sample_seed import sample_seed
from bocage.ssl.encoders.base import Encoder
from bocage.ssl.engine.health.collapse import sample_vectors
from bocage.ssl.objectives.masking import Mask, MaskingConfig, blocks_of, draw_map_weights, draw_masks
from bocage.ssl.objectives.visible_blocks import pack_visible_blocks, recentred


@dataclass
class EncodedBatch:
    """What every objective term of a step works from.

    Attributes:
        inputs: standardised, oriented inputs by modality.
        masks: what was hidden from the encoders.
        maps: feature maps of the visible parts, finest first, by modality. Under ``packed`` an image's maps cover
            the packed canvas, whose visible blocks lie in the order of the 2 x 2 blocks they come from. Zeros for
            samples whose modality is hidden as a whole or absent.
        map_weights: by modality, (B, maps) float: what each map weighs in the tokens of a sample
            (``MaskingConfig.map_ratio``); without an entry all weigh 1.
        rows: indices of the samples that were encoded, by modality.
        present: indices of the samples that have it, hidden or not.
        seeds: (B,) int64, of this epoch.
        samples: (B,) int64, of the keys: the same in every epoch.
        side: side of the ground window, metres.
        packed: whether images were packed.
    """

    inputs: dict[str, EncoderInput]
    masks: dict[str, Mask]
    maps: dict[str, list[torch.Tensor]]
    rows: dict[str, torch.Tensor]
    present: dict[str, torch.Tensor]
    seeds: torch.Tensor
    samples: torch.Tensor
    side: float
    packed: bool
    map_weights: dict[str, torch.Tensor] = field(default_factory=dict)


class Objective(Protocol):
    """One objective: a module whose call gives a loss and figures to log."""

    def __call__(self, view: EncodedBatch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Loss (scalar) and scalars to log."""
        ...


class PretrainingModel(nn.Module):
    """The task the training loop sees while pretraining.

    Args:
        encoders: by modality name.
        modalities: their registry entries.
        quality_masks: name of the quality mask of a series (``shards.inputs.quality_masks``).
        masking: how much is hidden.
        terms: objective modules (``Objective``) by name.
        weights: weight of each term in the loss.
        augment: random changes while training.
    """

    def __init__(
        self,
        encoders: Mapping[str, Encoder],
        modalities: Mapping[str, Modality],
        quality_masks: Mapping[str, str],
        masking: MaskingConfig,
        terms: Mapping[str, nn.Module],
        weights: Mapping[str, float],
        augment: AugmentConfig | None = None,
    ) -> None:
        super().__init__()
        self.encoders = nn.ModuleDict(dict(encoders))
        self.terms = nn.ModuleDict(dict(terms))
        self.modalities = dict(modalities)
        self.quality_masks = dict(quality_masks)
        blocks_of(modalities, masking)  # refuses what does not fit
        self.masking = masking
        self.weights = dict(weights)
        self.augment = augment

    def encoder(self, name: str) -> Encoder:
        """The encoder of a modality."""
        encoder = self.encoders[name]
        assert isinstance(encoder, Encoder)
        return encoder

    def _encode(self, name: str, given: EncoderInput, mask: Mask, rows: torch.Tensor) -> list[torch.Tensor]:
        """Maps of the samples ``rows`` (indices), zeros elsewhere: what nobody may see is not encoded.

        Absent and hidden samples would otherwise enter the batch statistics of U-TAE's decoder, and cost as much.
        """
        encoder = self.encoder(name)
        values, dates, padding, tokens = given.values, given.dates, given.padding, None
        side = values.shape[-1]
        found = None
        seen = rows if len(rows) or not encoder.runs_always else rows.new_zeros(1)
        if len(seen):
            if mask.units is None:
                assert dates is not None and padding is not None and mask.dates is not None
                values, dates, padding = values[seen], dates[seen], (padding | mask.dates)[seen]
                if mask.cubes is not None:
                    values = values.masked_fill(mask.cubes[seen][:, :, None], 0.0)
            else:
                if encoder.spec.representation == "relief":
                    channel = encoder.spec.channels.index("relief")
                    centre = -encoder.spec.mean[channel] / encoder.spec.std[channel]
                    values = recentred(values, channel, centre, given.valid, mask)
                values, units, unit = values[seen], mask.units[seen], self.modalities[name].unit
                if self.masking.images == "packed":
                    values = pack_visible_blocks(values, units, mask.block)
                else:
                    repeats = unit // encoder.strides[0]
                    tokens = units.repeat_interleave(repeats, 1).repeat_interleave(repeats, 2)
            encode = encoder.features if len(rows) else encoder.features_of_none
            found = encode(values, dates, padding, tokens)
        if mask.units is not None and self.masking.images == "packed":
            side //= 2
        maps = []
        for index, (width, stride) in enumerate(zip(encoder.widths, encoder.strides, strict=True)):
            cells = math.ceil(side / stride)
            blank = given.values.new_zeros((len(given.values), width, cells, cells))
            maps.append(blank if found is None else blank.to(found[index].dtype).index_copy(0, rows, found[index]))
        return maps

    def view(self, batch: Batch, *, oriented: bool) -> EncodedBatch:
        """Masked encodings of a batch; ``oriented`` (training) turns and augments samples and draws maps at random."""
        specs = {name: self.encoder(name).spec for name in self.encoders}
        augment = self.augment if oriented else None
        inputs = encoder_inputs(batch, specs, self.quality_masks, oriented=oriented, augment=augment)
        masks = draw_masks(inputs, self.modalities, batch.seeds, self.masking)
        numbers = torch.tensor([sample_seed(0, 0, key) for key in batch.keys])
        view = self.encoded(inputs, masks, batch.seeds, numbers.to(batch.seeds.device, non_blocking=True))
        if oriented and self.masking.map_ratio:
            view.map_weights = {
                name: draw_map_weights(batch.seeds, name, len(maps), self.masking.map_ratio)
                for name, maps in view.maps.items()
            }
        return view

    def encoded(
        self, inputs: dict[str, EncoderInput], masks: dict[str, Mask], seeds: torch.Tensor, samples: torch.Tensor
    ) -> EncodedBatch:
        """The view of inputs under given masks.

        Args:
            inputs, masks: by modality.
            seeds: (B,) int64, of what is drawn for each sample.
            samples: (B,) int64, which sample each is.
        """
        # One transfer a step tells which samples each encoder has to look at.
        flags = torch.stack([~masks[name].whole for name in inputs] + [item.present for item in inputs.values()]).cpu()
        indices = [here.nonzero()[:, 0].to(seeds.device) for here in flags]
        rows = dict(zip(inputs, indices[: len(inputs)], strict=True))
        present = dict(zip(inputs, indices[len(inputs) :], strict=True))
        maps = {name: self._encode(name, inputs[name], masks[name], rows[name]) for name in inputs}
        first = next(iter(inputs))
        side = inputs[first].values.shape[-1] * self.modalities[first].gsd
        return EncodedBatch(inputs, masks, maps, rows, present, seeds, samples, side, self.masking.images == "packed")

    def forward(self, batch: Batch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Weighted sum of the terms, a scalar, and what to log: their losses and figures, features of each encoder."""
        view = self.view(batch, oriented=self.training)
        losses, logs = [], {}
        for name, term in self.terms.items():
            loss, figures = term(view)
            losses.append(self.weights[name] * loss)
            logs[name] = loss.detach()
            logs.update({f"{name}/{key}": value.detach() for key, value in figures.items()})
        for name, maps in view.maps.items():
            if len(view.rows[name]):
                logs[name] = sample_vectors(maps[-1][view.rows[name]])
        return torch.stack(losses).sum(), logs
