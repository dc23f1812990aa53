"""UPerFuse: the maps of several sensors' encoders fused on one pyramid of grids, decoded by one UPerNet per task.

The architecture is that of the FLAIR-HUB baselines (Garioud et al. 2025, arXiv 2506.07080), with three differences:
fusion convolves before it resizes, which is the same by linearity and costs half; a learned token stands in for a
sensor that a sample lacks; and logits are resized without moving the corners, so that they stay on the ground.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import nn
from torch.nn.functional import conv2d

from bocage.finetune.upernet import DecoderConfig, UPerNet, resize
from bocage.shards.errors import InputError
from bocage.shards.inputs import EncoderInput
from bocage.ssl.encoders.base import Encoder

Grid = tuple[int, int]


def _maps_of_stages(encoder: Encoder, stages: int) -> list[int]:
    """For each stage, finest first, which of the encoder's maps (finest first) it receives.

    Images give their finest map to the finest stage; series go deepest first, the order of the official code. An
    encoder with another number of maps than there are stages is spread evenly over them.
    """
    last = len(encoder.widths) - 1
    order = [round(stage * last / max(1, stages - 1)) for stage in range(stages)]
    return [last - index for index in order] if encoder.spec.series else order


class Fusion(nn.Module):
    """Maps of all modalities to one pyramid.

    A 1 x 1 convolution a stage reads the concatenation of all maps, as the official one does, and its weight has
    that layout. It is applied in parts: each modality's part on the modality's own grid, before resizing.

    Args:
        widths: by modality, the channels it brings to each stage.
        outputs: channels of each stage of the fused pyramid.
    """

    def __init__(self, widths: Mapping[str, Sequence[int]], outputs: Sequence[int]) -> None:
        super().__init__()
        self._widths = {name: tuple(channels) for name, channels in widths.items()}
        self.conv_f = nn.ModuleList(
            nn.Conv2d(sum(channels[stage] for channels in self._widths.values()), output, 1)
            for stage, output in enumerate(outputs)
        )

    def part(self, stage: int, modality: str, values: torch.Tensor) -> torch.Tensor:
        """What one modality's map (B, widths[modality][stage], h, w) adds to a stage: (B, outputs[stage], h, w)."""
        start = 0
        for name, channels in self._widths.items():
            if name == modality:
                weight = self._convolution(stage).weight
                return conv2d(values, weight[:, start : start + channels[stage]])
            start += channels[stage]
        raise KeyError(modality)

    def bias(self, stage: int) -> torch.Tensor:
        """What a stage adds whatever the modalities: (outputs[stage],)."""
        bias = self._convolution(stage).bias
        assert bias is not None
        return bias

    def _convolution(self, stage: int) -> nn.Conv2d:
        convolution = self.conv_f[stage]
        assert isinstance(convolution, nn.Conv2d)
        return convolution


class UPerFuse(nn.Module):
    """Encoders of any set of modalities, their fusion, and a decoder a task.

    The stages of the pyramid lie on the grids of the first image's maps and have its widths. Without an image they
    all lie on the grid of the first series, whose maps share one resolution, and logits are resized from there: a
    coarser grid would lose cells and a finer one would add none. With one modality there is nothing to fuse: its
    maps go to the decoder as they are.

    Args:
        encoders: by modality, images before series (``Registry.inputs`` has that order).
        tasks: number of classes of each task, by name.
        decoder: widths and norm of the decoders.

    Raises:
        InputError: no encoder, or a series before an image.
    """

    def __init__(self, encoders: Mapping[str, Encoder], tasks: Mapping[str, int], decoder: DecoderConfig) -> None:
        super().__init__()
        if not encoders:
            raise InputError("modalities: name at least one")
        first_name, first = next(iter(encoders.items()))
        if first.spec.series and not all(encoder.spec.series for encoder in encoders.values()):
            raise InputError("modalities: images come before series")
        stages = len(first.widths)
        self._maps_of_stages = {name: _maps_of_stages(encoder, stages) for name, encoder in encoders.items()}
        widths = {
            name: [encoders[name].widths[index] for index in indices] for name, indices in self._maps_of_stages.items()
        }
        outputs = widths[first_name]
        self.encoders = nn.ModuleDict(dict(encoders))
        self.fusion = Fusion(widths, outputs) if len(encoders) > 1 else None
        # What a stage receives in place of the features of an absent modality. Zero at first: no evidence.
        self.absent = nn.ModuleDict(
            {name: nn.ParameterList(nn.Parameter(torch.zeros(width)) for width in outputs) for name in encoders}
        )
        self.decoders = nn.ModuleDict({name: UPerNet(outputs, classes, decoder) for name, classes in tasks.items()})

    def encoder(self, name: str) -> Encoder:
        """The encoder of a modality."""
        encoder = self.encoders[name]
        assert isinstance(encoder, Encoder)
        return encoder

    def grids(self, side: float) -> list[Grid]:
        """Cells of each stage of the pyramid for a ground window of ``side`` metres, finest first."""
        first = self.encoder(next(iter(self.encoders)))
        pixels = round(side / first.spec.gsd)
        strides = [min(first.strides)] * len(first.strides) if first.spec.series else first.strides
        return [(cells, cells) for cells in (math.ceil(pixels / stride) for stride in strides)]

    def forward(self, inputs: Mapping[str, EncoderInput], side: float, size: int) -> dict[str, torch.Tensor]:
        """Logits of every task.

        Args:
            inputs: standardised inputs of at least one modality of the model; modalities that are not there are
                absent for every sample.
            side: side of the ground window, metres.
            size: side of the logits, pixels.

        Returns:
            By task, (B, classes, size, size).
        """
        pyramid = self.pyramid(inputs, side)
        return {name: resize(decoder(pyramid), (size, size)) for name, decoder in self.decoders.items()}

    def pyramid(self, inputs: Mapping[str, EncoderInput], side: float) -> list[torch.Tensor]:
        """The fused maps (B, widths[i], H_i, W_i), finest first."""
        given = {name: inputs[name] for name in self.encoders if name in inputs}
        if not given:
            raise InputError(f"a batch holds none of the model's modalities: {', '.join(self.encoders)}")
        # One transfer a batch tells which samples each encoder has to look at.
        present = torch.stack([item.present for item in given.values()]).cpu()
        samples = present.shape[1]
        rows = {name: here.nonzero()[:, 0] for name, here in zip(given, present, strict=True)}
        maps = {name: self._maps(name, given[name], rows[name]) for name in given if len(rows[name])}
        return [
            self._stage(stage, grid, samples, {name: (rows[name], maps[name][stage]) for name in maps})
            for stage, grid in enumerate(self.grids(side))
        ]

    def _maps(self, name: str, given: EncoderInput, rows: torch.Tensor) -> list[torch.Tensor]:
        """Maps by stage of the samples that have the modality: absent ones reach no batch statistics."""
        encoder = self.encoder(name)
        values, dates, padding = given.values, given.dates, given.padding
        if len(rows) < len(values):
            index = rows.to(values.device)
            values = values[index]
            dates = None if dates is None else dates[index]
            padding = None if padding is None else padding[index]
        maps = encoder.features(values, dates, padding)
        return [maps[index] for index in self._maps_of_stages[name]]

    def _stage(
        self, stage: int, grid: Grid, samples: int, maps: Mapping[str, tuple[torch.Tensor, torch.Tensor]]
    ) -> torch.Tensor:
        """One stage of the fused pyramid: (samples, width, *grid)."""
        sums: dict[Grid, torch.Tensor] = {}  # by resolution, so that each is resized once
        everywhere = torch.zeros_like(self._absent(next(iter(self.encoders)), stage))
        if self.fusion is not None:
            everywhere = everywhere + self.fusion.bias(stage)
        for name in self.encoders:
            token = self._absent(name, stage)
            if name not in maps:
                everywhere = everywhere + token
                continue
            rows, values = maps[name]
            part = values if self.fusion is None else self.fusion.part(stage, name, values)
            own: Grid = (part.shape[-2], part.shape[-1])
            # Always through the token, though every sample be present: its gradient is then zero, not missing.
            tokens = token.to(part.dtype).view(1, -1, 1, 1).expand(samples, -1, *own)
            filled = tokens.index_copy(0, rows.to(part.device), part)
            sums[own] = sums[own] + filled if own in sums else filled
        total = everywhere.view(1, -1, 1, 1).expand(samples, -1, *grid)
        for values in sums.values():
            total = total + resize(values, grid)
        return total

    def _absent(self, name: str, stage: int) -> nn.Parameter:
        tokens = self.absent[name]
        assert isinstance(tokens, nn.ParameterList)
        return tokens[stage]
