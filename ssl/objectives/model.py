"""Pretraining model: one masked encoder pass per modality, shared by all objectives."""

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
from bocage.ssl.encoders.base import Encoder
from bocage.ssl.engine.logging.metrics import sample_vectors
from bocage.ssl.objectives.masking import (
    Mask,
    MaskingConfig,
    block_sizes,
    draw_map_weights,
    draw_masks,
    is_single_unit,
)
from bocage.ssl.objectives.visible_blocks import pack_visible_blocks, recentre_relief


@dataclass
class EncodedBatch:
    """Masked encodings of a batch of B samples: the input of every objective.

    Attributes:
        inputs: standardised encoder inputs before masking, by modality.
        masks: masks, by modality.
        features: feature maps of the visible parts, finest first, by modality: (B, width, h, w) each. With
            ``Mask.packed`` they cover the packed image, whose visible blocks keep the order of the 2 x 2 blocks they
            come from. Zeros for samples whose modality is masked as a whole or absent.
        visible_rows: indices of the samples that were encoded, by modality.
        present_rows: indices of the samples that have the modality, masked or not, by modality.
        seeds: (B,) int64 sample seeds of this epoch.
        sample_ids: (B,) int64 identity of each sample, the same in every epoch (``Batch.sample_ids``).
        side: side of the ground window, in metres.
        map_weights: weight of each feature map in the tokens of a sample, (B, maps) float, by modality
            (``MaskingConfig.map_ratio``); 1 for modalities that are not listed.
    """

    inputs: dict[str, EncoderInput]
    masks: dict[str, Mask]
    features: dict[str, list[torch.Tensor]]
    visible_rows: dict[str, torch.Tensor]
    present_rows: dict[str, torch.Tensor]
    seeds: torch.Tensor
    sample_ids: torch.Tensor
    side: float
    map_weights: dict[str, torch.Tensor] = field(default_factory=dict)

    def grid_size(self, name: str) -> int:
        """Prediction targets along a side of the window: mask units of an image, pixels of a series."""
        units = self.masks[name].units
        return self.inputs[name].values.shape[-1] if units is None else units.shape[1]


class Objective(Protocol):
    """Module that computes one loss from the encodings of a batch."""

    def __call__(self, encoded: EncodedBatch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Return the loss, a scalar, and scalar metrics to log, by name."""
        ...


class PretrainingModel(nn.Module):
    """Encoders and weighted objectives: the module that the trainer trains.

    Args:
        encoders: encoders, by modality.
        modalities: registry entries, by modality.
        quality_masks: quality mask of each series, by modality (``shards.preprocess.inputs.quality_masks``).
        masking: masking configuration.
        objectives: objective modules (``Objective``), by name.
        weights: weight of each objective in the loss, by name.
        augment: random changes of samples in training.

    Raises:
        InputError: ``masking`` does not fit the modalities.
    """

    def __init__(
        self,
        encoders: Mapping[str, Encoder],
        modalities: Mapping[str, Modality],
        quality_masks: Mapping[str, str],
        masking: MaskingConfig,
        objectives: Mapping[str, nn.Module],
        weights: Mapping[str, float],
        augment: AugmentConfig | None = None,
    ) -> None:
        super().__init__()
        self.encoders = nn.ModuleDict(dict(encoders))
        self.objectives = nn.ModuleDict(dict(objectives))
        self.modalities = dict(modalities)
        self.quality_masks = dict(quality_masks)
        self.masking = masking
        self.blocks = block_sizes(modalities, masking)
        self.weights = dict(weights)
        self.augment = augment

    def encoder(self, name: str) -> Encoder:
        """Return the encoder of a modality."""
        encoder = self.encoders[name]
        assert isinstance(encoder, Encoder)
        return encoder

    def _encode(self, name: str, inputs: EncoderInput, mask: Mask, rows: torch.Tensor) -> list[torch.Tensor]:
        """Encode the visible samples ``rows`` (indices) of a modality; the maps of other samples are zeros.

        Absent and masked samples are left out because they would enter the batch statistics of U-TAE's decoder, and
        cost as much as visible ones.
        """
        encoder = self.encoder(name)
        values, dates, padding, masked_tokens = inputs.values, inputs.dates, inputs.padding, None
        side = values.shape[-1]
        encoded = None
        encoded_rows = rows if len(rows) or not encoder.run_without_samples else rows.new_zeros(1)
        if len(encoded_rows):
            if mask.units is None:
                assert dates is not None and padding is not None and mask.dates is not None
                values, dates, padding = (item[encoded_rows] for item in (values, dates, padding | mask.dates))
                if mask.cubes is not None:
                    values = values.masked_fill(mask.cubes[encoded_rows][:, :, None], 0.0)
            else:
                if encoder.spec.representation == "relief":
                    channel = encoder.spec.channels.index("relief")
                    centre = -encoder.spec.mean[channel] / encoder.spec.std[channel]
                    values = recentre_relief(values, channel, centre, inputs.valid, mask)
                values, units = values[encoded_rows], mask.units[encoded_rows]
                if mask.packed:
                    values = pack_visible_blocks(values, units, mask.block)
                elif not is_single_unit(self.modalities[name]):
                    repeats = self.modalities[name].unit // encoder.strides[0]
                    masked_tokens = units.repeat_interleave(repeats, 1).repeat_interleave(repeats, 2)
            encode = encoder.features if len(rows) else encoder.empty_features
            encoded = encode(values, dates, padding, masked_tokens)
        if mask.packed:
            side //= 2
        maps = []
        for index, (width, stride) in enumerate(zip(encoder.widths, encoder.strides, strict=True)):
            cells = math.ceil(side / stride)
            zeros = inputs.values.new_zeros((len(inputs.values), width, cells, cells))
            maps.append(
                zeros if encoded is None else zeros.to(encoded[index].dtype).index_copy(0, rows, encoded[index])
            )
        return maps

    def encode_batch(self, batch: Batch, *, augment: bool) -> EncodedBatch:
        """Draw masks and encode the visible parts of a batch.

        Args:
            batch: samples in native dtypes, on the device of the model.
            augment: whether to orient and augment samples at random and drop feature maps, as in training.
        """
        specs = {name: self.encoder(name).spec for name in self.encoders}
        inputs = encoder_inputs(
            batch, specs, self.quality_masks, random_orientation=augment, augment=self.augment if augment else None
        )
        masks = draw_masks(inputs, self.modalities, self.blocks, batch.seeds, self.masking)
        encoded = self.encode_inputs(inputs, masks, batch.seeds, batch.sample_ids)
        if augment and self.masking.map_ratio:
            encoded.map_weights = {
                name: draw_map_weights(batch.seeds, name, len(maps), self.masking.map_ratio)
                for name, maps in encoded.features.items()
            }
        return encoded

    def encode_inputs(
        self, inputs: dict[str, EncoderInput], masks: dict[str, Mask], seeds: torch.Tensor, sample_ids: torch.Tensor
    ) -> EncodedBatch:
        """Encode inputs under the given masks.

        Args:
            inputs: encoder inputs, by modality.
            masks: masks, by modality.
            seeds: (B,) int64 sample seeds.
            sample_ids: (B,) int64 sample identities.
        """
        # One device-to-host transfer per step gives the rows of all encoders.
        flags = [~masks[name].dropped for name in inputs] + [item.present for item in inputs.values()]
        rows = [flag.nonzero()[:, 0].to(seeds.device) for flag in torch.stack(flags).cpu()]
        visible_rows = dict(zip(inputs, rows[: len(inputs)], strict=True))
        present_rows = dict(zip(inputs, rows[len(inputs) :], strict=True))
        features = {name: self._encode(name, inputs[name], masks[name], visible_rows[name]) for name in inputs}
        first = next(iter(inputs))
        side = inputs[first].values.shape[-1] * self.modalities[first].gsd
        return EncodedBatch(inputs, masks, features, visible_rows, present_rows, seeds, sample_ids, side)

    def forward(self, batch: Batch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Compute the weighted sum of the losses.

        Returns:
            The loss, a scalar, and a dict to log: each objective's loss and metrics, and (B, width) features of each
            encoder.
        """
        encoded = self.encode_batch(batch, augment=self.training)
        losses, logs = [], {}
        for name, objective in self.objectives.items():
            loss, metrics = objective(encoded)
            losses.append(self.weights[name] * loss)
            logs[name] = loss.detach()
            logs.update({f"{name}/{key}": value.detach() for key, value in metrics.items()})
        for name, maps in encoded.features.items():
            if len(encoded.visible_rows[name]):
                logs[name] = sample_vectors(maps[-1][encoded.visible_rows[name]])
        return torch.stack(losses).sum(), logs
