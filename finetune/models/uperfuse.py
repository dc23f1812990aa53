"""UPerFuse: fuse the feature maps of several encoders into one pyramid, and decode it with one UPerNet per task.

This is the architecture of the FLAIR-HUB baselines (Garioud et al. 2025, arXiv 2506.07080) in two variants.
``official=True`` computes what IGN's code computes, for weights trained with it. The default differs in three points:

- A learned token replaces the features of a sensor that a sample lacks.
- Logits are resized with ``align_corners=False``, so that they stay aligned with the ground.
- Time series are decoded by UPerNet, like images.

Both variants convolve before they resize in the fusion. Both operations are linear, so the result is the same at half
the cost.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import nn
from torch.nn.functional import conv2d, interpolate

from bocage.finetune.models.upernet import UPerNet, UPerNetConfig, resize
from bocage.shards.errors import InputError
from bocage.shards.preprocess.inputs import EncoderInput
from bocage.ssl.encoders.base import Encoder
from bocage.ssl.encoders.utae import UTAE

Grid = tuple[int, int]
_HEAD_SCALE = 4  # upsampling factor of the official head, before logits are resized to the label size


def _finest_cell(encoder: Encoder) -> float:
    """Side of a cell of the encoder's finest map on the ground, in metres."""
    return encoder.spec.gsd * min(encoder.strides)


def _map_indices(encoder: Encoder, stages: int) -> list[int]:
    """Return the index of the encoder's map (finest first) that each stage (finest first) receives.

    The finest map of an image goes to the finest stage. Maps of series are assigned in reverse, deepest map first, as
    in the official code. If there are more or fewer maps than stages, indices are spread evenly.
    """
    last = len(encoder.widths) - 1
    order = [round(stage * last / max(1, stages - 1)) for stage in range(stages)]
    return [last - index for index in order] if encoder.spec.series else order


class Fusion(nn.Module):
    """Fuse the maps of all modalities into one pyramid.

    Each stage has one 1 x 1 convolution over the concatenation of all maps, with the official weight layout. It is
    applied to one resolution at a time: maps on the same grid are convolved together on that grid, then resized.

    Args:
        widths: channels that each modality adds to each stage, by modality.
        outputs: channels of each stage of the fused pyramid.
    """

    def __init__(self, widths: Mapping[str, Sequence[int]], outputs: Sequence[int]) -> None:
        super().__init__()
        self._widths = {name: tuple(channels) for name, channels in widths.items()}
        self.conv_f = nn.ModuleList(
            nn.Conv2d(sum(channels[stage] for channels in self._widths.values()), output, 1)
            for stage, output in enumerate(outputs)
        )

    def convolve_subset(self, stage: int, modalities: Sequence[str], values: torch.Tensor) -> torch.Tensor:
        """Apply the slice of a stage's convolution that reads some modalities, without the bias.

        Args:
            stage: index of the stage, 0 for the finest.
            modalities: names of the modalities, in the order of ``widths``.
            values: concatenated maps of the modalities, (B, sum of widths[modality][stage], h, w).

        Returns:
            (B, outputs[stage], h, w) summand of the fused map.
        """
        weight = self._convolution(stage).weight
        slices = weight.split([channels[stage] for channels in self._widths.values()], dim=1)
        chosen = [piece for name, piece in zip(self._widths, slices, strict=True) if name in modalities]
        return conv2d(values, weight if len(chosen) == len(slices) else torch.cat(chosen, dim=1))

    def bias(self, stage: int) -> torch.Tensor:
        """Return the bias of a stage's convolution, (outputs[stage],)."""
        bias = self._convolution(stage).bias
        assert bias is not None
        return bias

    def _convolution(self, stage: int) -> nn.Conv2d:
        convolution = self.conv_f[stage]
        assert isinstance(convolution, nn.Conv2d)
        return convolution


class EncodedModality(NamedTuple):
    """Encoder output for the R samples of a batch that have the modality.

    Attributes:
        rows: (R,) int64 indices of the samples in the batch.
        maps: (R, widths[stage], H, W) feature maps by stage of the pyramid, finest first.
        logits: (R, classes, H, W) logits of the official series head; None where the model does not read them.
    """

    rows: torch.Tensor
    maps: list[torch.Tensor]
    logits: torch.Tensor | None


class Predictions(NamedTuple):
    """Logits of a batch.

    Attributes:
        logits: (B, classes, size, size) logits by task.
        auxiliary: indices (R,) of the samples that an auxiliary decoder processed and their logits (R, classes, size,
            size), by task and modality. R may be 0. Empty in evaluation mode.
    """

    logits: dict[str, torch.Tensor]
    auxiliary: dict[str, dict[str, tuple[torch.Tensor, torch.Tensor]]]


class UPerFuse(nn.Module):
    """Encoders of any set of modalities, their fusion, and one decoder per task.

    The stages of the pyramid have the grids and widths of the maps of one modality, the one with the finest map. If
    that is a series, all stages have its grid, because its maps share one resolution: a coarser grid would lose detail
    and a finer one would add none. With one modality there is no fusion, and its maps go straight to the decoder.

    Args:
        encoders: encoders by modality, images before series (the order of ``Registry.inputs``).
        tasks: number of classes of each task, by name.
        decoder: widths and norm of the decoders.
        auxiliary: modalities with an auxiliary decoder per task, for deep supervision during training.
        official: whether to compute what the official code computes. Every sample must then have every modality. The
            pyramid is that of the first modality. Logits are upsampled fourfold with aligned corners before they are
            resized. Without an image, the result is the mean of the logits of the series' heads; with several tasks a
            convolution per task follows.

    Raises:
        InputError: there is no encoder, a series comes before an image, an auxiliary modality has no encoder, or the
            encoders of an official model of series alone have no head.
    """

    def __init__(
        self,
        encoders: Mapping[str, Encoder],
        tasks: Mapping[str, int],
        decoder: UPerNetConfig,
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
        self._reference = first_name if official else min(encoders, key=lambda name: _finest_cell(encoders[name]))
        stages = len(encoders[self._reference].widths)
        self._map_indices = {name: _map_indices(encoder, stages) for name, encoder in encoders.items()}
        widths = {
            name: [encoders[name].widths[index] for index in indices] for name, indices in self._map_indices.items()
        }
        outputs = widths[self._reference]
        self.encoders = nn.ModuleDict(dict(encoders))
        self.series_only = official and first.spec.series
        fused = len(encoders) > 1 and not self.series_only
        self.fusion = Fusion(widths, outputs) if fused else None
        # Tokens that replace the features of an absent modality at each stage. They start at zero: no evidence.
        self.absent = nn.ModuleDict(
            {}
            if official
            else {name: nn.ParameterList(nn.Parameter(torch.zeros(width)) for width in outputs) for name in encoders}
        )

        def auxiliary_decoder(name: str, classes: int) -> nn.Module:
            if official and encoders[name].spec.series:
                return nn.Conv2d(self._head_classes(name), classes, 1)
            return UPerNet(widths[name], classes, decoder)

        if self.series_only:
            heads = {self._head_classes(name) for name in encoders}
            if len(heads) > 1:
                raise InputError("an official model of series alone needs heads with the same number of classes")
            same_classes = heads == set(tasks.values()) and len(tasks) == 1
            self.decoders = nn.ModuleDict(
                {
                    name: nn.Identity() if same_classes else nn.Conv2d(self._head_classes(first_name), classes, 1)
                    for name, classes in tasks.items()
                }
            )
        else:
            self.decoders = nn.ModuleDict({name: UPerNet(outputs, classes, decoder) for name, classes in tasks.items()})
        if official and not self.series_only:
            for name, encoder in encoders.items():
                if isinstance(encoder, UTAE) and encoder.out_conv is not None and name not in auxiliary:
                    encoder.out_conv.requires_grad_(False)  # unused next to an image
        self.auxiliary = nn.ModuleDict(
            {
                name: nn.ModuleDict({task: auxiliary_decoder(name, classes) for task, classes in tasks.items()})
                for name in encoders
                if name in auxiliary
            }
        )
        # BatchNorm cannot compute statistics of one sample's 1 x 1 pooled map.
        self._min_rows = 2 if decoder.norm == "batch" else 1

    def encoder(self, name: str) -> Encoder:
        """Return the encoder of a modality."""
        encoder = self.encoders[name]
        assert isinstance(encoder, Encoder)
        return encoder

    def _head_classes(self, name: str) -> int:
        encoder = self.encoders[name]
        if not isinstance(encoder, UTAE) or encoder.head_classes is None:
            raise InputError(f"{name}: this official model needs the head of the U-TAE: build it with head=True")
        return encoder.head_classes

    def grids(self, side: float) -> list[Grid]:
        """Return the grid (rows, columns) of each stage, finest first, for a ground window of ``side`` metres."""
        reference = self.encoder(self._reference)
        pixels = round(side / reference.spec.gsd)
        strides = [min(reference.strides)] * len(reference.strides) if reference.spec.series else reference.strides
        return [(cells, cells) for cells in (math.ceil(pixels / stride) for stride in strides)]

    def forward(self, inputs: Mapping[str, EncoderInput], side: float, size: int) -> Predictions:
        """Compute the logits of every task.

        Args:
            inputs: standardised inputs of at least one modality of the model. A modality that is not in ``inputs`` is
                absent from every sample.
            side: side of the ground window, in metres.
            size: side of the logits, in pixels.

        Raises:
            InputError: the batch has none of the modalities, or a sample of an official model lacks one.
        """
        encoded, samples = self._encode(inputs)
        return self.decode(encoded, samples, self.grids(side), size)

    def pyramid(self, inputs: Mapping[str, EncoderInput], side: float) -> list[torch.Tensor]:
        """Compute the fused maps (B, widths[i], H_i, W_i), finest first; see ``forward`` for arguments and errors."""
        encoded, samples = self._encode(inputs)
        return self.fuse(encoded, samples, self.grids(side))

    def decode(
        self, encoded: Mapping[str, EncodedModality], samples: int, grids: Sequence[Grid], size: int
    ) -> Predictions:
        """Compute logits of side ``size`` from encoder outputs; ``grids`` are those of the stages, finest first."""
        if self.series_only:
            heads = [resize(item.logits, (size, size)) for item in encoded.values() if item.logits is not None]
            mean = torch.stack(heads).mean(dim=0)
            logits = {name: decoder(mean) for name, decoder in self.decoders.items()}
        else:
            pyramid = self.fuse(encoded, samples, grids)
            logits = {name: self._upsample(decoder(pyramid), size) for name, decoder in self.decoders.items()}
        return Predictions(logits, self.auxiliary_logits(encoded, size) if self.training else {})

    def auxiliary_logits(
        self, encoded: Mapping[str, EncodedModality], size: int
    ) -> dict[str, dict[str, tuple[torch.Tensor, torch.Tensor]]]:
        """Compute the logits of the auxiliary decoders, see ``Predictions.auxiliary``."""
        outputs: dict[str, dict[str, tuple[torch.Tensor, torch.Tensor]]] = {task: {} for task in self.decoders}
        for name, decoders in self.auxiliary.items():
            if name not in encoded:
                continue
            rows, maps, head = encoded[name]
            too_few = self.training and len(rows) < self._min_rows
            if too_few and not self.encoder(name).run_without_samples:
                continue
            if too_few:  # under FSDP the decoder must run all the same: other ranks wait in collectives
                maps = [features.new_zeros(1, *features.shape[1:]) for features in maps]
                decoders.eval()
            assert isinstance(decoders, nn.ModuleDict)
            for task, decoder in decoders.items():
                if isinstance(decoder, UPerNet):
                    logits = self._upsample(decoder(maps), size)
                else:
                    assert head is not None
                    logits = decoder(resize(head, (size, size)))
                outputs[task][name] = (rows[:0], logits[:0]) if too_few else (rows, logits)
            decoders.train(self.training)
        return outputs

    def _upsample(self, logits: torch.Tensor, size: int) -> torch.Tensor:
        if self.official:
            logits = interpolate(logits, scale_factor=_HEAD_SCALE, mode="bilinear", align_corners=True)
        if self.training:  # the loss is faster on channels-first memory, argmax on channels-last
            logits = logits.contiguous()
        return resize(logits, (size, size))

    def _encode(self, inputs: Mapping[str, EncoderInput]) -> tuple[dict[str, EncodedModality], int]:
        """Run the encoders of the modalities that any sample has; also return the number of samples."""
        available = {name: inputs[name] for name in self.encoders if name in inputs}
        if not available:
            raise InputError(f"a batch has none of the model's modalities: {', '.join(self.encoders)}")
        # A single device-to-host copy per batch gives the rows of all encoders.
        present = torch.stack([item.present for item in available.values()]).cpu()
        if self.official and (len(available) < len(self.encoders) or not present.all()):
            missing = [name for name in self.encoders if name not in available or not available[name].present.all()]
            raise InputError(
                f"samples lack {', '.join(missing)}, and an official model cannot process a sample without one of its "
                "sensors: leave these samples out, or fine-tune with official=false"
            )
        encoded = {}
        for (name, item), has_modality in zip(available.items(), present, strict=True):
            rows = has_modality.nonzero()[:, 0]
            if len(rows) or self.encoder(name).run_without_samples:
                encoded[name] = self._encode_rows(name, item, rows)
        return encoded, present.shape[1]

    def _encode_rows(self, name: str, item: EncoderInput, rows: torch.Tensor) -> EncodedModality:
        """Run an encoder on the samples that have its modality, so that the others do not reach batch statistics."""
        values, dates, padding = item.values, item.dates, item.padding
        if len(rows) < len(values):
            # Without any such sample the encoder still runs on one row (``Encoder.run_without_samples``).
            index = (rows if len(rows) else rows.new_zeros(1)).to(values.device)
            values = values[index]
            dates = None if dates is None else dates[index]
            padding = None if padding is None else padding[index]
        if dates is not None and padding is not None:
            values, dates, padding = _drop_shared_padding(values, dates, padding)
        return self.encode(name, values, dates, padding, rows)

    def encode(
        self,
        name: str,
        values: torch.Tensor,
        dates: torch.Tensor | None,
        padding: torch.Tensor | None,
        rows: torch.Tensor,
    ) -> EncodedModality:
        """Run an encoder on the samples at ``rows``, (R,) int64; see ``Encoder.features`` for the other arguments."""
        encoder = self.encoder(name)
        logits = None
        if self.official and isinstance(encoder, UTAE) and (self.series_only or name in self.auxiliary):
            assert dates is not None
            output = encoder(values, dates, padding)
            maps, logits = output.maps[::-1], output.logits
        else:
            maps = (encoder.features if len(rows) else encoder.empty_features)(values, dates, padding)
        return EncodedModality(rows, [maps[index] for index in self._map_indices[name]], logits)

    def fuse(self, encoded: Mapping[str, EncodedModality], samples: int, grids: Sequence[Grid]) -> list[torch.Tensor]:
        """Fuse encoder outputs into maps (samples, widths[i], H_i, W_i) on ``grids[i]``, finest first."""
        return [self._fuse_stage(stage, grid, samples, encoded) for stage, grid in enumerate(grids)]

    def _fuse_stage(self, stage: int, grid: Grid, samples: int, encoded: Mapping[str, EncodedModality]) -> torch.Tensor:
        """Compute one stage of the fused pyramid, (samples, width, *grid)."""
        by_grid: dict[Grid, list[str]] = {}
        for name, item in encoded.items():
            by_grid.setdefault((item.maps[stage].shape[-2], item.maps[stage].shape[-1]), []).append(name)
        constant = self._bias_and_tokens(stage, samples, encoded)
        total: torch.Tensor | None = None
        for names in by_grid.values():
            maps = [_scatter_rows(encoded[name].maps[stage], encoded[name].rows, samples) for name in names]
            values = maps[0] if len(maps) == 1 else torch.cat(maps, dim=1)
            if self.fusion is not None:
                values = self.fusion.convolve_subset(stage, names, values)
            values = resize(values, grid)
            total = values if total is None else total + values
        if constant is None:
            assert total is not None
            return total
        return constant.expand(-1, -1, *grid) if total is None else total + constant.to(total.dtype)

    def _bias_and_tokens(self, stage: int, samples: int, encoded: Mapping[str, EncodedModality]) -> torch.Tensor | None:
        """Sum the fusion bias and the tokens of absent modalities at a stage: (samples, width, 1, 1).

        An official model has no tokens: the bias is (1, width, 1, 1), or None if the model has no fusion either.
        """
        bias = None if self.fusion is None else self.fusion.bias(stage)
        if self.official:
            return None if bias is None else bias.view(1, -1, 1, 1)
        tokens = torch.stack([self._absent_token(name, stage) for name in self.encoders])
        absent = torch.ones(samples, len(self.encoders))
        for column, name in enumerate(self.encoders):
            if name in encoded:
                absent[encoded[name].rows, column] = 0.0
        # A product even if no modality is absent, so that every token has a zero gradient rather than none.
        constant = absent.to(tokens) @ tokens
        return (constant if bias is None else constant + bias).view(samples, -1, 1, 1)

    def _absent_token(self, name: str, stage: int) -> nn.Parameter:
        tokens = self.absent[name]
        assert isinstance(tokens, nn.ParameterList)
        return tokens[stage]


def _scatter_rows(maps: torch.Tensor, rows: torch.Tensor, samples: int) -> torch.Tensor:
    """Scatter maps (R, ...) of the samples at ``rows`` into maps of all samples, with zeros elsewhere."""
    if len(rows) == samples:
        return maps
    return maps.new_zeros(samples, *maps.shape[1:]).index_copy(0, rows.to(maps.device), maps)


def _drop_shared_padding(
    values: torch.Tensor, dates: torch.Tensor, padding: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Shorten (B, T, ...), (B, T) and (B, T) to the longest series without its padded dates, T' <= T.

    Valid dates move to the front. The official U-TAE includes padded dates in its batch statistics, so cloudy dates,
    which are masked as padding, must be removed.
    """
    longest = int((~padding).sum(dim=1).max())
    if longest == padding.shape[1]:
        return values, dates, padding
    order = padding.long().argsort(dim=1, stable=True)[:, :longest]
    rows = torch.arange(len(values), device=values.device)[:, None]
    return values[rows, order], dates[rows, order], padding[rows, order]
