"""Latent prediction: predict a teacher's features of the full input from the visible tokens."""

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
from bocage.ssl.objectives.decoder import DecoderConfig, FusionDecoder
from bocage.ssl.objectives.masking import Mask
from bocage.ssl.objectives.model import EncodedBatch
from bocage.ssl.objectives.tokens import build_neck, decode_hidden


@dataclass(frozen=True, kw_only=True)
class LatentConfig:
    """Latent prediction.

    Attributes:
        decoder: size of the fusion decoder.
        momentum: EMA momentum of the teachers: the fraction of their weights that stays in each step.
        teachers: folder or ``hf:org/name`` of a pretrained encoder, by modality. It is frozen and replaces the moving
            average (SALT, arXiv 2509.24317).

    Raises:
        ValueError: ``momentum`` lies outside [0, 1).
    """

    decoder: DecoderConfig = field(default_factory=DecoderConfig)
    momentum: float = 0.996
    teachers: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not 0 <= self.momentum < 1:
            raise ValueError(f"latent.momentum={self.momentum} must be in [0, 1)")


class LatentPrediction(nn.Module):
    """Joint-embedding prediction (I-JEPA, arXiv 2301.08243; across sensors as in AnySat, arXiv 2412.14123).

    Teachers are exponential moving averages of the encoders, or frozen encoders of an earlier run. They see all units,
    dates and sensors. The targets are the teacher's deepest features, layer-normalised at each position. A fusion
    decoder, as in masked reconstruction, predicts them from the visible tokens of all sensors. The loss covers masked
    units of images and series pixels with a masked date. It is smooth L1, averaged over the positions of a sample;
    sensors and samples have equal weights.

    Args:
        encoders: encoders, by modality.
        modalities: registry entries, by modality.
        config: latent prediction.
        frozen_teachers: encoders of ``config.teachers``.
    """

    def __init__(
        self,
        encoders: Mapping[str, Encoder],
        modalities: Mapping[str, Modality],
        config: LatentConfig,
        frozen_teachers: Mapping[str, Encoder] | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        frozen_teachers = frozen_teachers or {}
        self._frozen = frozenset(frozen_teachers)
        self.teachers = nn.ModuleDict(
            {name: frozen_teachers.get(name) or copy.deepcopy(encoder) for name, encoder in encoders.items()}
        )
        self.teachers.requires_grad_(False).eval()
        # Stored outside the module registry, because the encoders are already submodules of the pretraining model.
        self.__dict__["_students"] = dict(encoders)
        width = config.decoder.width
        self.necks, self.heads = nn.ModuleDict(), nn.ModuleDict()
        for name, encoder in encoders.items():
            self.necks[name] = build_neck(encoder, modalities[name], width)
            teacher = self.teachers[name]
            assert isinstance(teacher, Encoder)
            self.heads[name] = nn.Linear(width, teacher.widths[-1])
        patch_size = next(iter(modalities.values())).patch_size
        self.decoder = FusionDecoder(list(encoders), config.decoder, patch_size)

    def train(self, mode: bool = True) -> LatentPrediction:
        """Set the training mode of all submodules except the teachers, which stay in evaluation mode."""
        super().train(mode)
        self.teachers.eval()
        return self

    @torch.no_grad()
    def after_step(self) -> None:
        """Update the moving averages; the trainer calls this hook after every optimizer step."""
        students: dict[str, Encoder] = self.__dict__["_students"]
        for name, teacher in self.teachers.items():
            if name in self._frozen:
                continue
            for weight, student_weight in zip(teacher.parameters(), students[name].parameters(), strict=True):
                weight.lerp_(student_weight, 1 - self.config.momentum)
            for buffer, student_buffer in zip(teacher.buffers(), students[name].buffers(), strict=True):
                buffer.copy_(student_buffer)

    @torch.no_grad()
    def targets(self, name: str, inputs: EncoderInput, rows: torch.Tensor, cells: int) -> torch.Tensor:
        """Compute the teacher's features of the full input.

        Args:
            name: modality.
            inputs: encoder input, not masked.
            rows: indices of the samples that have the modality.
            cells: positions along a side.

        Returns:
            (B, cells * cells, width) float32, layer-normalised at each position; zeros for other samples.
        """
        teacher = self.teachers[name]
        assert isinstance(teacher, Encoder)
        targets = inputs.values.new_zeros(len(inputs.values), cells * cells, teacher.widths[-1], dtype=torch.float32)
        encoded_rows = rows if len(rows) or not teacher.run_without_samples else rows.new_zeros(1)
        if not len(encoded_rows):
            return targets
        dates = None if inputs.dates is None else inputs.dates[encoded_rows]
        padding = None if inputs.padding is None else inputs.padding[encoded_rows]
        encode = teacher.features if len(rows) else teacher.empty_features
        deepest = encode(inputs.values[encoded_rows], dates, padding)[-1].float()
        if deepest.shape[-1] > cells:
            deepest = F.adaptive_avg_pool2d(deepest, cells)
        elif deepest.shape[-1] < cells:
            deepest = F.interpolate(deepest, size=(cells, cells), mode="bilinear", align_corners=False)
        vectors = deepest.flatten(2).transpose(1, 2)
        return targets.index_copy(0, rows, F.layer_norm(vectors, vectors.shape[-1:]))

    @staticmethod
    def loss_mask(inputs: EncoderInput, mask: Mask) -> torch.Tensor:
        """Positions that the loss counts, (B, cells * cells) bool: masked units, or pixels with a masked date."""
        if mask.units is not None:
            return (mask.units | mask.dropped[:, None, None]).flatten(1) & inputs.present[:, None]
        assert inputs.padding is not None
        masked = mask.pixel_mask(inputs.padding, inputs.values.shape[-1])
        return masked.any(dim=1).flatten(1) & inputs.present[:, None]

    def forward(self, encoded: EncodedBatch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Compute the mean of the losses over modalities and samples.

        Returns:
            The loss, a scalar, and the mean loss of each modality over samples with a non-empty loss mask.
        """
        outputs = decode_hidden(encoded, self.necks, self.decoder)
        total, metrics = torch.zeros((), device=encoded.seeds.device), {}
        for name, mask in encoded.masks.items():
            inputs = encoded.inputs[name]
            target = self.targets(name, inputs, encoded.present_rows[name], encoded.grid_size(name))
            loss_mask = self.loss_mask(inputs, mask)
            errors = F.smooth_l1_loss(self.heads[name](outputs[name]).float(), target, reduction="none").mean(dim=-1)
            losses = (errors * loss_mask).sum(dim=1) / loss_mask.sum(dim=1).clamp_min(1)
            total = total + losses.mean()
            metrics[name] = losses.sum() / loss_mask.any(dim=1).sum().clamp_min(1)
        return total / len(encoded.masks), metrics
