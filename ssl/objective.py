"""Encoders and objective terms as one training task: one encoder pass per modality serves every term."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import nn

from bocage.shards.batch import Batch
from bocage.shards.inputs import EncoderInput, encoder_inputs
from bocage.shards.modality import Modality
from bocage.ssl.encoders.base import Encoder
from bocage.ssl.masking import Mask, MaskingConfig, draw_masks, pack

_TOKEN = 4  # side of a Swin patch-embedding token, pixels


@dataclass
class View:
    """What every objective term of a step works from.

    Attributes:
        inputs: standardised, oriented inputs by modality.
        masks: what was hidden from the encoders.
        maps: feature maps of the visible parts, finest first, by modality. Under ``packed`` an image's maps cover
            the packed canvas, whose mask units lie in the order of the 2 x 2 blocks they come from.
        seeds: (B,) int64.
        side: side of the ground window, metres.
        packed: whether images were packed.
    """

    inputs: dict[str, EncoderInput]
    masks: dict[str, Mask]
    maps: dict[str, list[torch.Tensor]]
    seeds: torch.Tensor
    side: float
    packed: bool


class Term(Protocol):
    """One objective: a module whose call gives a loss and figures to log."""

    def __call__(self, view: View) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Loss (scalar) and scalars to log."""
        ...


class Pretraining(nn.Module):
    """The task the training loop sees while pretraining.

    Args:
        encoders: by modality name.
        modalities: their registry entries.
        quality_masks: name of the quality mask of a series (``shards.inputs.quality_masks``).
        masking: how much is hidden.
        terms: objective modules (``Term``) by name.
        weights: weight of each term in the loss.
    """

    def __init__(
        self,
        encoders: Mapping[str, Encoder],
        modalities: Mapping[str, Modality],
        quality_masks: Mapping[str, str],
        masking: MaskingConfig,
        terms: Mapping[str, nn.Module],
        weights: Mapping[str, float],
    ) -> None:
        super().__init__()
        self.encoders = nn.ModuleDict(dict(encoders))
        self.terms = nn.ModuleDict(dict(terms))
        self.modalities = dict(modalities)
        self.quality_masks = dict(quality_masks)
        self.masking = masking
        self.weights = dict(weights)

    def encoder(self, name: str) -> Encoder:
        """The encoder of a modality."""
        encoder = self.encoders[name]
        assert isinstance(encoder, Encoder)
        return encoder

    def _encode(self, name: str, given: EncoderInput, mask: Mask) -> list[torch.Tensor]:
        encoder = self.encoder(name)
        if mask.dates is not None:
            assert given.padding is not None
            return encoder.features(given.values, given.dates, given.padding | mask.dates)
        assert mask.units is not None
        unit = self.modalities[name].unit
        if self.masking.images == "packed":
            return encoder.features(pack(given.values, mask.units, unit))
        tokens = mask.units.repeat_interleave(unit // _TOKEN, 1).repeat_interleave(unit // _TOKEN, 2)
        return encoder.features(given.values, mask=tokens)

    def view(self, batch: Batch, *, oriented: bool) -> View:
        """Masked encodings of a batch; ``oriented`` turns samples at random (training)."""
        specs = {name: self.encoder(name).spec for name in self.encoders}
        inputs = encoder_inputs(batch, specs, self.quality_masks, oriented=oriented)
        masks = draw_masks(inputs, self.modalities, batch.seeds, self.masking)
        maps = {name: self._encode(name, inputs[name], masks[name]) for name in inputs}
        first = next(iter(inputs))
        side = inputs[first].values.shape[-1] * self.modalities[first].gsd
        return View(inputs, masks, maps, batch.seeds, side, self.masking.images == "packed")

    def forward(self, batch: Batch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Weighted sum of the terms, and what to log: each term's loss and figures, each encoder's feature spread."""
        view = self.view(batch, oriented=self.training)
        losses, logs = [], {}
        for name, term in self.terms.items():
            loss, figures = term(view)
            losses.append(self.weights[name] * loss)
            logs[name] = loss.detach()
            logs.update({f"{name}/{key}": value.detach() for key, value in figures.items()})
        for name, maps in view.maps.items():
            logs[f"feature_std/{name}"] = feature_std(maps[-1].detach())
        return torch.stack(losses).sum(), logs


def feature_std(features: torch.Tensor) -> torch.Tensor:
    """Standard deviation over samples and places of L2-normalised features (B, C, H, W), averaged over channels.

    Near 0 the encoder says the same everywhere (collapse); 1 / sqrt(C) when directions are spread evenly.
    """
    vectors = torch.nn.functional.normalize(features.float().permute(0, 2, 3, 1).reshape(-1, features.shape[1]), dim=1)
    return vectors.std(dim=0, correction=0).mean()
