"""UPerFuse: the maps of several sensors' encoders fused on one pyramid of grids, decoded by one UPerNet per task.

The architecture is that of the FLAIR-HUB baselines (Garioud et al. 2025, arXiv 2506.07080). It has two faces: with
``official`` it computes what IGN's code computes, for weights trained by it; by default a learned token stands in for
a sensor that a sample lacks, logits are resized without moving the corners, so that they stay on the ground, and
series are decoded like images. Fusion convolves before it resizes in both, which is the same by linearity and costs
half.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import nn
from torch.nn.functional import conv2d, interpolate

from bocage.finetune.models.upernet import DecoderConfig, UPerNet, resize
from bocage.shards.errors import InputError
from bocage.shards.preprocess.inputs import EncoderInput
from bocage.ssl.encoders.base import Encoder
from bocage.ssl.encoders.utae import UTAE

Grid = tuple[int, int]
_HEAD_SCALE = 4  # the official head enlarges the logits so much before they are resized to the labels


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
    that layout. It is applied in parts, by resolution: maps of one grid together, on that grid, before resizing.

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

    def part(self, stage: int, modalities: Sequence[str], values: torch.Tensor) -> torch.Tensor:
        """What some modalities add to a stage.

        Args:
            stage: 0 for the finest.
            modalities: in the order of ``widths``.
            values: their maps side by side, (B, sum of widths[modality][stage], h, w).

        Returns:
            (B, outputs[stage], h, w).
        """
        weight = self._convolution(stage).weight
        slices = weight.split([channels[stage] for channels in self._widths.values()], dim=1)
        chosen = [part for name, part in zip(self._widths, slices, strict=True) if name in modalities]
        return conv2d(values, weight if len(chosen) == len(slices) else torch.cat(chosen, dim=1))

    def bias(self, stage: int) -> torch.Tensor:
        """What a stage adds whatever the modalities: (outputs[stage],)."""
        bias = self._convolution(stage).bias
        assert bias is not None
        return bias

    def _convolution(self, stage: int) -> nn.Conv2d:
        convolution = self.conv_f[stage]
        assert isinstance(convolution, nn.Conv2d)
        return convolution


class Encoded(NamedTuple):
    """What one encoder found in the R samples of a batch that have its modality.

    Attributes:
        rows: (R,) int64, which samples.
        maps: by stage of the pyramid, finest first, (R, widths[stage], H, W).
        logits: (R, classes, H, W) of the official series head, where an official model needs it.
    """

    rows: torch.Tensor
    maps: list[torch.Tensor]
    logits: torch.Tensor | None


class Predictions(NamedTuple):
    """Logits of a batch.

    Attributes:
        logits: by task, (B, classes, size, size).
        auxiliary: by task and modality, which samples the auxiliary decoder saw, (R,), and their logits
            (R, classes, size, size); R may be 0. Empty in evaluation mode.
    """

    logits: dict[str, torch.Tensor]
    auxiliary: dict[str, dict[str, tuple[torch.Tensor, torch.Tensor]]]


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
        auxiliary: modalities that get a decoder a task of their own, for deep supervision while training.
        official: compute as the official code does: every modality must be there for every sample; logits are
            enlarged fourfold with aligned corners before they are resized; series without an image give the mean of
            the logits of their own heads, through a convolution a task when the heads serve several tasks.

    Raises:
        InputError: no encoder, a series before an image, an auxiliary modality without encoder, or an official model
            of series alone whose encoders have no head.
    """

    def __init__(
        self,
        encoders: Mapping[str, Encoder],
        tasks: Mapping[str, int],
        decoder: DecoderConfig,
        *,
        auxiliary: Collection[str] = (),
        official: bool = False,
    ) -> None:
        super().__init__()
        if not encoders:
            raise InputError("modalities: name at least one")
        first_name, first = next(iter(encoders.items()))
        if first.spec.series and not all(encoder.spec.series for encoder in encoders.values()):
            raise InputError("modalities: images come before series")
        if unknown := set(auxiliary) - set(encoders):
            raise InputError(f"auxiliary: {', '.join(sorted(unknown))} not among the modalities {', '.join(encoders)}")
        self.official = official
        self.tasks = dict(tasks)
        stages = len(first.widths)
        self._maps_of_stages = {name: _maps_of_stages(encoder, stages) for name, encoder in encoders.items()}
        widths = {
            name: [encoders[name].widths[index] for index in indices] for name, indices in self._maps_of_stages.items()
        }
        outputs = widths[first_name]
        self.encoders = nn.ModuleDict(dict(encoders))
        self.series_alone = official and first.spec.series
        fused = len(encoders) > 1 and not self.series_alone
        self.fusion = Fusion(widths, outputs) if fused else None
        # What a stage receives in place of the features of an absent modality. Zero at first: no evidence.
        self.absent = nn.ModuleDict(
            {}
            if official
            else {name: nn.ParameterList(nn.Parameter(torch.zeros(width)) for width in outputs) for name in encoders}
        )

        def auxiliary_decoder(name: str, classes: int) -> nn.Module:
            if official and encoders[name].spec.series:
                return nn.Conv2d(self._head_classes(name), classes, 1)
            return UPerNet(widths[name], classes, decoder)

        if self.series_alone:
            heads = {self._head_classes(name) for name in encoders}
            if len(heads) > 1:
                raise InputError("an official model of series alone needs heads of one number of classes")
            alone = heads == set(tasks.values()) and len(tasks) == 1
            self.decoders = nn.ModuleDict(
                {
                    name: nn.Identity() if alone else nn.Conv2d(self._head_classes(first_name), classes, 1)
                    for name, classes in tasks.items()
                }
            )
        else:
            self.decoders = nn.ModuleDict({name: UPerNet(outputs, classes, decoder) for name, classes in tasks.items()})
        if official and not self.series_alone:
            for name, encoder in encoders.items():
                if isinstance(encoder, UTAE) and encoder.out_conv is not None and name not in auxiliary:
                    encoder.out_conv.requires_grad_(False)  # beside an image nothing reads it
        self.auxiliary = nn.ModuleDict(
            {
                name: nn.ModuleDict({task: auxiliary_decoder(name, classes) for task, classes in tasks.items()})
                for name in encoders
                if name in auxiliary
            }
        )
        # One 1 x 1 pooled value a channel has no batch statistics.
        self._least_rows = 2 if decoder.norm == "batch" else 1

    def encoder(self, name: str) -> Encoder:
        """The encoder of a modality."""
        encoder = self.encoders[name]
        assert isinstance(encoder, Encoder)
        return encoder

    def _head_classes(self, name: str) -> int:
        encoder = self.encoders[name]
        if not isinstance(encoder, UTAE) or encoder.head_classes is None:
            raise InputError(f"{name}: an official model needs the head of U-TAE here: build it with head=True")
        return encoder.head_classes

    def grids(self, side: float) -> list[Grid]:
        """Cells of each stage of the pyramid for a ground window of ``side`` metres, finest first."""
        first = self.encoder(next(iter(self.encoders)))
        pixels = round(side / first.spec.gsd)
        strides = [min(first.strides)] * len(first.strides) if first.spec.series else first.strides
        return [(cells, cells) for cells in (math.ceil(pixels / stride) for stride in strides)]

    def forward(self, inputs: Mapping[str, EncoderInput], side: float, size: int) -> Predictions:
        """Logits of every task.

        Args:
            inputs: standardised inputs of at least one modality of the model; modalities that are not there are
                absent for every sample.
            side: side of the ground window, metres.
            size: side of the logits, pixels.

        Raises:
            InputError: the batch holds none of the modalities; or an official model lacks one.
        """
        encoded, samples = self._encode(inputs)
        return self.decode(encoded, samples, self.grids(side), size)

    def pyramid(self, inputs: Mapping[str, EncoderInput], side: float) -> list[torch.Tensor]:
        """The fused maps (B, widths[i], H_i, W_i), finest first; arguments and errors are those of ``forward``."""
        encoded, samples = self._encode(inputs)
        return self.fuse(encoded, samples, self.grids(side))

    def decode(self, encoded: Mapping[str, Encoded], samples: int, grids: Sequence[Grid], size: int) -> Predictions:
        """Logits from what the encoders found; ``grids`` are those of the stages, finest first."""
        if self.series_alone:
            found = [resize(item.logits, (size, size)) for item in encoded.values() if item.logits is not None]
            mean = torch.stack(found).mean(dim=0)
            logits = {name: decoder(mean) for name, decoder in self.decoders.items()}
        else:
            pyramid = self.fuse(encoded, samples, grids)
            logits = {name: self._enlarged(decoder(pyramid), size) for name, decoder in self.decoders.items()}
        return Predictions(logits, self.supervise(encoded, size) if self.training else {})

    def supervise(
        self, encoded: Mapping[str, Encoded], size: int
    ) -> dict[str, dict[str, tuple[torch.Tensor, torch.Tensor]]]:
        """Logits (R, classes, size, size) of the auxiliary decoders, see ``Predictions.auxiliary``."""
        found: dict[str, dict[str, tuple[torch.Tensor, torch.Tensor]]] = {task: {} for task in self.decoders}
        for name, decoders in self.auxiliary.items():
            if name not in encoded:
                continue
            rows, maps, head = encoded[name]
            idle = self.training and len(rows) < self._least_rows
            if idle and not self.encoder(name).runs_always:
                continue
            if idle:  # other ranks wait for its weights
                maps = [features.new_zeros(1, *features.shape[1:]) for features in maps]
                decoders.eval()
            assert isinstance(decoders, nn.ModuleDict)
            for task, decoder in decoders.items():
                if isinstance(decoder, UPerNet):
                    logits = self._enlarged(decoder(maps), size)
                else:
                    assert head is not None
                    logits = decoder(resize(head, (size, size)))
                found[task][name] = (rows[:0], logits[:0]) if idle else (rows, logits)
            decoders.train(self.training)
        return found

    def _enlarged(self, logits: torch.Tensor, size: int) -> torch.Tensor:
        if self.official:
            logits = interpolate(logits, scale_factor=_HEAD_SCALE, mode="bilinear", align_corners=True)
        if self.training:  # the loss reads plane by plane; the likeliest class is found faster the other way
            logits = logits.contiguous()
        return resize(logits, (size, size))

    def _encode(self, inputs: Mapping[str, EncoderInput]) -> tuple[dict[str, Encoded], int]:
        """What each encoder finds, by modality that any sample has, and the number of samples."""
        given = {name: inputs[name] for name in self.encoders if name in inputs}
        if not given:
            raise InputError(f"a batch holds none of the model's modalities: {', '.join(self.encoders)}")
        # One transfer a batch tells which samples each encoder has to look at.
        present = torch.stack([item.present for item in given.values()]).cpu()
        if self.official and (len(given) < len(self.encoders) or not present.all()):
            lacking = [name for name in self.encoders if name not in given or not given[name].present.all()]
            raise InputError(
                f"samples lack {', '.join(lacking)}: the official architecture has no stand-in for a missing sensor; "
                "leave these samples out, or use a model of bocage's own architecture"
            )
        found = {}
        for (name, item), here in zip(given.items(), present, strict=True):
            rows = here.nonzero()[:, 0]
            if len(rows) or self.encoder(name).runs_always:
                found[name] = self._found(name, item, rows)
        return found, present.shape[1]

    def _found(self, name: str, given: EncoderInput, rows: torch.Tensor) -> Encoded:
        """What an encoder finds in the samples that have its modality: absent ones reach no batch statistics."""
        values, dates, padding = given.values, given.dates, given.padding
        if len(rows) < len(values):
            # With no row at all the encoder looks at one in vain (``Encoder.runs_always``).
            index = (rows if len(rows) else rows.new_zeros(1)).to(values.device)
            values = values[index]
            dates = None if dates is None else dates[index]
            padding = None if padding is None else padding[index]
        if dates is not None and padding is not None:
            values, dates, padding = _closed_up(values, dates, padding)
        return self.encode(name, values, dates, padding, rows)

    def encode(
        self,
        name: str,
        values: torch.Tensor,
        dates: torch.Tensor | None,
        padding: torch.Tensor | None,
        rows: torch.Tensor,
    ) -> Encoded:
        """What an encoder finds in the ``rows``, (R,) int64, of a batch; other arguments as in ``Encoder.features``."""
        encoder = self.encoder(name)
        logits = None
        if self.official and isinstance(encoder, UTAE) and (self.series_alone or name in self.auxiliary):
            assert dates is not None
            output = encoder(values, dates, padding)
            maps, logits = output.maps[::-1], output.logits
        else:
            maps = (encoder.features if len(rows) else encoder.features_of_none)(values, dates, padding)
        return Encoded(rows, [maps[index] for index in self._maps_of_stages[name]], logits)

    def fuse(self, encoded: Mapping[str, Encoded], samples: int, grids: Sequence[Grid]) -> list[torch.Tensor]:
        """The fused maps, (samples, widths[i], H_i, W_i) on ``grids[i]``, finest first, of what the encoders found."""
        return [self._stage(stage, grid, samples, encoded) for stage, grid in enumerate(grids)]

    def _stage(self, stage: int, grid: Grid, samples: int, encoded: Mapping[str, Encoded]) -> torch.Tensor:
        """One stage of the fused pyramid: (samples, width, *grid)."""
        by_grid: dict[Grid, list[str]] = {}
        for name, item in encoded.items():
            by_grid.setdefault((item.maps[stage].shape[-2], item.maps[stage].shape[-1]), []).append(name)
        constant = self._constant(stage, samples, encoded)
        total: torch.Tensor | None = None
        for names in by_grid.values():
            maps = [_spread(encoded[name].maps[stage], encoded[name].rows, samples) for name in names]
            values = maps[0] if len(maps) == 1 else torch.cat(maps, dim=1)
            if self.fusion is not None:
                values = self.fusion.part(stage, names, values)
            values = resize(values, grid)
            total = values if total is None else total + values
        if constant is None:
            assert total is not None
            return total
        return constant.expand(-1, -1, *grid) if total is None else total + constant.to(total.dtype)

    def _constant(self, stage: int, samples: int, encoded: Mapping[str, Encoded]) -> torch.Tensor | None:
        """What a stage receives at every place of a sample, (samples, width, 1, 1): the bias, and the tokens."""
        bias = None if self.fusion is None else self.fusion.bias(stage)
        if self.official:
            return None if bias is None else bias.view(1, -1, 1, 1)
        tokens = torch.stack([self._absent(name, stage) for name in self.encoders])
        absent = torch.ones(samples, len(self.encoders))
        for column, name in enumerate(self.encoders):
            if name in encoded:
                absent[encoded[name].rows, column] = 0.0
        # A product also when nobody is absent: every token then has a gradient, which is zero, not missing.
        constant = absent.to(tokens) @ tokens
        return (constant if bias is None else constant + bias).view(samples, -1, 1, 1)

    def _absent(self, name: str, stage: int) -> nn.Parameter:
        tokens = self.absent[name]
        assert isinstance(tokens, nn.ParameterList)
        return tokens[stage]


def _spread(maps: torch.Tensor, rows: torch.Tensor, samples: int) -> torch.Tensor:
    """Maps (R, ...) of some ``rows`` of a batch as maps of all its samples, zeros elsewhere."""
    if len(rows) == samples:
        return maps
    return maps.new_zeros(samples, *maps.shape[1:]).index_copy(0, rows.to(maps.device), maps)


def _closed_up(
    values: torch.Tensor, dates: torch.Tensor, padding: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Series cut to the longest one once their padded dates are gone: (B, T, ...), (B, T) and (B, T) to T' <= T.

    Where an encoder counts padded dates in its statistics, as the official one does, dates that clouds leave out must
    not be padding, or they would count.
    """
    longest = int((~padding).sum(dim=1).max())
    if longest == padding.shape[1]:
        return values, dates, padding
    order = padding.long().argsort(dim=1, stable=True)[:, :longest]
    rows = torch.arange(len(values), device=values.device)[:, None]
    return values[rows, order], dates[rows, order], padding[rows, order]
