"""Latent prediction: what a slowly following teacher sees of the whole is foretold from what is visible."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import nn

from bocage.shards.modality import Modality
from bocage.shards.preprocess.inputs import EncoderInput
from bocage.ssl.encoders.base import Encoder
from bocage.ssl.objectives.decoder import DecoderConfig, FusionDecoder, Neck, grid_centres
from bocage.ssl.objectives.masking import Mask
from bocage.ssl.objectives.model import EncodedBatch
from bocage.ssl.objectives.tokens import build_neck, georeferenced_tokens


@dataclass(frozen=True, kw_only=True)
class LatentConfig:
    """Latent prediction.

    Attributes:
        decoder: size of the fusion decoder.
        momentum: share of a teacher's weights that stays in a step.

    Raises:
        ValueError: ``momentum`` outside [0, 1).
    """

    decoder: DecoderConfig = field(default_factory=DecoderConfig)
    momentum: float = 0.996

    def __post_init__(self) -> None:
        if not 0 <= self.momentum < 1:
            raise ValueError(f"latent.momentum={self.momentum} must be in [0, 1)")


class LatentPrediction(nn.Module):
    """Joint-embedding prediction on the ground (I-JEPA, arXiv 2301.08243; between sensors as AnySat, arXiv 2412.14123).

    Teachers are moving averages of the encoders and see all units, dates and sensors. At hidden units of images, and at
    every pixel of series, of which dates are hidden, the deepest features of the teacher, normalised at each place, are
    predicted from the visible tokens of all sensors, by a fusion decoder as in the masked objective. The loss is smooth
    L1, as the mean over each sample's places; sensors and samples weigh the same.

    Args:
        encoders: by modality.
        modalities: registry entries.
        config: the objective.
    """

    def __init__(
        self, encoders: Mapping[str, Encoder], modalities: Mapping[str, Modality], config: LatentConfig
    ) -> None:
        super().__init__()
        self.config = config
        self.teachers = nn.ModuleDict({name: copy.deepcopy(encoder) for name, encoder in encoders.items()})
        self.teachers.requires_grad_(False).eval()
        # Not registered: they are parts of the task already.
        self.__dict__["_students"] = dict(encoders)
        width = config.decoder.width
        self.necks, self.heads = nn.ModuleDict(), nn.ModuleDict()
        for name, encoder in encoders.items():
            self.necks[name] = build_neck(encoder, modalities[name], width)
            self.heads[name] = nn.Linear(width, encoder.widths[-1])
        self.decoder = FusionDecoder(list(encoders), config.decoder)

    def train(self, mode: bool = True) -> LatentPrediction:
        """Training mode for everything but teachers."""
        super().train(mode)
        self.teachers.eval()
        return self

    @torch.no_grad()
    def after_step(self) -> None:
        """Let the teachers follow; the loop calls it after every update."""
        students: dict[str, Encoder] = self.__dict__["_students"]
        for name, teacher in self.teachers.items():
            for weight, followed in zip(teacher.parameters(), students[name].parameters(), strict=True):
                weight.lerp_(followed, 1 - self.config.momentum)
            for buffer, followed_buffer in zip(teacher.buffers(), students[name].buffers(), strict=True):
                buffer.copy_(followed_buffer)

    @torch.no_grad()
    def targets(self, name: str, given: EncoderInput, rows: torch.Tensor, cells: int) -> torch.Tensor:
        """What the teacher sees of the samples ``rows`` that have the sensor; zeros for the others.

        Returns:
            (B, cells * cells, width) float32, normalised at each place.
        """
        teacher = self.teachers[name]
        assert isinstance(teacher, Encoder)
        seen = rows if len(rows) or not teacher.runs_always else rows.new_zeros(1)
        found = given.values.new_zeros(len(given.values), cells * cells, teacher.widths[-1], dtype=torch.float32)
        if not len(seen):
            return found
        dates = None if given.dates is None else given.dates[seen]
        padding = None if given.padding is None else given.padding[seen]
        encode = teacher.features if len(rows) else teacher.features_of_none
        deepest = encode(given.values[seen], dates, padding)[-1].float()
        if deepest.shape[-1] > cells:
            deepest = F.adaptive_avg_pool2d(deepest, cells)
        elif deepest.shape[-1] < cells:
            deepest = F.interpolate(deepest, size=(cells, cells), mode="bilinear", align_corners=False)
        vectors = deepest.flatten(2).transpose(1, 2)
        return found.index_copy(0, rows, F.layer_norm(vectors, vectors.shape[-1:]))

    @staticmethod
    def wanted(given: EncoderInput, mask: Mask) -> torch.Tensor:
        """(B, cells * cells) bool: where the loss looks."""
        if mask.units is not None:
            return (mask.units | mask.whole[:, None, None]).flatten(1) & given.present[:, None]
        assert given.padding is not None
        hidden = mask.places(given.padding, given.values.shape[-1])
        return hidden.any(dim=1).flatten(1) & given.present[:, None]

    def forward(self, view: EncodedBatch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Mean over modalities and samples, a scalar, and the mean of each modality where it is wanted."""
        tokens, centres = {}, {}
        for name, neck in self.necks.items():
            assert isinstance(neck, Neck)
            tokens[name], centres[name], _ = georeferenced_tokens(view, name, neck)
        hidden = {name: view.masks[name].whole for name in tokens}
        memory = self.decoder.fuse(tokens, centres, hidden, view.side)
        counts = {
            name: view.inputs[name].values.shape[-1] if mask.units is None else mask.units.shape[1]
            for name, mask in view.masks.items()
        }
        places = {
            name: grid_centres(count, view.side, memory.tokens.device).flatten(0, 1) for name, count in counts.items()
        }
        answers = self.decoder.read(places, memory)
        total, figures = torch.zeros((), device=view.seeds.device), {}
        for name, count in counts.items():
            target = self.targets(name, view.inputs[name], view.present[name], count)
            wanted = self.wanted(view.inputs[name], view.masks[name])
            errors = F.smooth_l1_loss(self.heads[name](answers[name]).float(), target, reduction="none").mean(dim=-1)
            losses = (errors * wanted).sum(dim=1) / wanted.sum(dim=1).clamp_min(1)
            total = total + losses.mean()
            figures[name] = losses.sum() / wanted.any(dim=1).sum().clamp_min(1)
        return total / len(counts), figures
