"""Official FLAIR-HUB models with their original parameter names, built from bocage's modules.

The construction follows IGN's code (IGNF/FLAIR-HUB, Apache-2.0; Garioud et al. 2025, arXiv 2506.07080).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from bocage.finetune.models.uperfuse import EncodedModality, Fusion, Grid, Predictions, UPerFuse
from bocage.finetune.models.upernet import UPerNetConfig
from bocage.shards.errors import InputError
from bocage.shards.modality import FLAIR_HUB, Modality
from bocage.shards.preprocess.normalize import InputSpec
from bocage.ssl.encoders.base import Encoder, EncoderConfig
from bocage.ssl.encoders.build import build_encoder
from bocage.ssl.encoders.swin import list_swin_names

DEFAULT_ARCH = "swin_base_patch4_window12_384-upernet"
"""Encoder and decoder of the published models."""

# With an image among the inputs, the official code adapts the configured widths of the U-TAE to the stages of the Swin,
# twice. The result is the same for every Swin.
_WIDTHS_WITH_IMAGES = ([64, 64, 128, 128], [64, 64, 128, 128])
_WIDTHS_SERIES_ONLY = ([64, 64, 64, 128], [32, 32, 64, 128])
_HEAD = (32, 19)
_PATCH_SIZE = 4  # side of a Swin patch, in pixels

Channels = int | Sequence[str]


class _SegModel(nn.Module):
    """Wrapper that adds the level ``seg_model`` to parameter names, as official image encoders and decoders have."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.seg_model = module


class OfficialModel(nn.Module):
    """Official ``UPerFuse`` variant with the official parameter names.

    It shares its modules with ``uperfuse``: weights loaded into one are in the other. Some parameters exist only for
    their names, because the official code creates them without using them.

    Attributes:
        uperfuse: model that computes the outputs.
    """

    uperfuse: UPerFuse

    def __init__(self, uperfuse: UPerFuse) -> None:
        super().__init__()
        self.__dict__["uperfuse"] = uperfuse  # not a submodule: its parameters would appear twice
        encoders = {name: uperfuse.encoder(name) for name in uperfuse.encoders}
        self.encoders = nn.ModuleDict(
            {name: encoder if encoder.spec.series else _SegModel(encoder) for name, encoder in encoders.items()}
        )
        self.fusion_handler = uperfuse.fusion or self._unused_fusion()
        self.main_decoders = nn.ModuleDict(
            {task: self._decoder(task, decoder) for task, decoder in uperfuse.decoders.items()}
        )
        auxiliary: dict[str, nn.Module] = {}
        for task in uperfuse.decoders:
            for name, decoders in uperfuse.auxiliary.items():
                assert isinstance(decoders, nn.ModuleDict)
                decoder = decoders[task]
                auxiliary[f"{name}__{task}"] = decoder if isinstance(decoder, nn.Conv2d) else _SegModel(decoder)
        self.aux_decoders = nn.ModuleDict(auxiliary)

    def _unused_fusion(self) -> Fusion:
        name, first = next((name, self.uperfuse.encoder(name)) for name in self.uperfuse.encoders)
        widths = (1,) if self.uperfuse.series_only else first.widths
        return Fusion({name: widths}, widths).requires_grad_(False)

    def _decoder(self, task: str, decoder: nn.Module) -> nn.Module:
        if isinstance(decoder, nn.Identity):
            classes = self.uperfuse.tasks[task]
            return nn.Conv2d(classes, classes, 1).requires_grad_(False)
        return decoder if isinstance(decoder, nn.Conv2d) else _SegModel(decoder)

    def train(self, mode: bool = True) -> OfficialModel:
        """Set the training mode, of ``uperfuse`` too."""
        self.uperfuse.train(mode)
        return super().train(mode)

    def predictions(
        self,
        inputs: Mapping[str, torch.Tensor],
        dates: Mapping[str, torch.Tensor] | None,
        pad_masks: Mapping[str, torch.Tensor | None] | None,
        label_size: int,
    ) -> Predictions:
        """Compute logits (B, classes, label_size, label_size) of the tasks and, in any mode, of the auxiliary decoders.

        See ``forward`` for the arguments.

        Raises:
            InputError: see ``forward``.
        """
        encoded, grids = self._encode(inputs, dates or {}, pad_masks or {})
        predictions = self.uperfuse.decode(encoded, len(next(iter(inputs.values()))), grids, label_size)
        if self.training:
            return predictions
        return Predictions(predictions.logits, self.uperfuse.auxiliary_logits(encoded, label_size))

    def _encode(
        self,
        inputs: Mapping[str, torch.Tensor],
        dates: Mapping[str, torch.Tensor],
        pad_masks: Mapping[str, torch.Tensor | None],
    ) -> tuple[dict[str, EncodedModality], list[Grid]]:
        """Run all encoders; also return the grids of the first encoder's maps."""
        model = self.uperfuse
        encoded = {}
        for name in model.encoders:
            if name not in inputs:
                raise InputError(f"inputs lack {name}, which this official model needs")
            channels = model.encoder(name).spec.channels
            if inputs[name].ndim < len("CHW") or inputs[name].shape[-3] != len(channels):
                raise InputError(
                    f"inputs of {name} have the shape {list(inputs[name].shape)}; the channels must be "
                    f"{', '.join(channels)}"
                )
            days, padding = None, None
            if model.encoder(name).spec.series:
                if name not in dates:
                    raise InputError(f"dates lack {name}, a time series of this official model")
                days, padding = dates[name], pad_masks.get(name)
            encoded[name] = model.encode(name, inputs[name], days, padding, torch.arange(len(inputs[name])))
        first = next(iter(encoded.values()))
        return encoded, [(maps.shape[-2], maps.shape[-1]) for maps in first.maps]

    def forward(
        self,
        inputs: Mapping[str, torch.Tensor],
        dates: Mapping[str, torch.Tensor] | None,
        pad_masks: Mapping[str, torch.Tensor | None] | None,
        label_size: int,
    ) -> dict[str, torch.Tensor]:
        """Compute the logits of every task.

        Args:
            inputs: normalised images (B, C, H, W) or series (B, T, C, H, W) by modality.
            dates: days since 15 May, (B, T), by series; None without series.
            pad_masks: padding masks by series, (B, T) bool, True for a padded date. All dates of a series without a
                mask are valid. (The official code takes every all-zero frame for padding.)
            label_size: side of the logits, in pixels.

        Returns:
            (B, classes, label_size, label_size) logits by task.

        Raises:
            InputError: a modality or the dates of a series are missing, or an input has the wrong channels.
        """
        encoded, grids = self._encode(inputs, dates or {}, pad_masks or {})
        return self.uperfuse.decode(encoded, len(next(iter(inputs.values()))), grids, label_size).logits


def check_official_input(modality: Modality) -> None:
    """Check that a modality of some dataset is an input of the official models.

    Raises:
        InputError: it is not FLAIR-HUB's modality of this name, or the models do not read it.
    """
    inputs = {item.name: item for item in FLAIR_HUB.inputs if item.baseline is not None}
    official = inputs.get(modality.name)
    if official is None or (modality.bands, modality.gsd) != (official.bands, official.gsd):
        raise InputError(
            f"official=true builds IGN's models of FLAIR-HUB, which read {', '.join(inputs)}: {modality.name} of these "
            "shards is none of them; use official=false"
        )


def baseline_input(modality: Modality, channels: Channels | None = None) -> InputSpec:
    """Return the input specification of a modality in the published baselines, or with other channels.

    Args:
        modality: input modality of the baselines.
        channels: channel names, or a number of channels. The number selects the baseline's channels, all bands as
            stored, or the single channel that a baseline can use, whichever has that many. None selects the baseline's
            channels. With other channels than the baseline's, the statistics are those of the bands.

    Raises:
        InputError: the modality has no baseline, or a channel is unknown.
    """
    baseline = modality.baseline
    if baseline is None:
        raise InputError(f"{modality.name} is not among the inputs of the official FLAIR-HUB models")
    mean = dict(zip(baseline.channels, baseline.mean, strict=True))
    std = dict(zip(baseline.channels, baseline.std, strict=True))
    bands = tuple(band.name for band in modality.bands)
    if isinstance(channels, int):
        candidates = [names for names in (baseline.channels, bands, baseline.alone) if len(names) == channels]
        if not candidates:
            known = ", ".join({**mean, **dict.fromkeys(bands)})
            raise InputError(f"{modality.name}: name the {channels} channels, out of {known}")
        channels = candidates[0]
    if channels is not None and tuple(channels) != baseline.channels and modality.mean is not None:
        assert modality.std is not None
        if baseline.representation == "linear":
            mean, std = dict(zip(bands, modality.mean, strict=True)), dict(zip(bands, modality.std, strict=True))
    chosen = baseline.channels if channels is None else tuple(channels)
    if unknown := [name for name in chosen if name not in mean]:
        raise InputError(f"{modality.name} has no channel {', '.join(unknown)}; its channels are {', '.join(mean)}")
    return InputSpec(
        modality=modality.name,
        bands=bands,
        quantities=tuple(band.quantity for band in modality.bands),
        wavelengths=tuple(band.wavelength for band in modality.bands),
        channels=chosen,
        representation=baseline.representation,
        mean=tuple(mean[name] for name in chosen),
        std=tuple(std[name] for name in chosen),
        gsd=modality.gsd,
        series=modality.role == "series",
        nodata_below=modality.nodata_below,
    )


def swin_name(arch: str) -> str:
    """Return the timm name of the Swin in ``arch``, which has the form ``SWIN-upernet``.

    Raises:
        InputError: the encoder is not a timm Swin, or the decoder is not UPerNet.
    """
    encoder, _, decoder = arch.partition("-")
    if encoder not in list_swin_names() or decoder != "upernet":
        raise InputError(f"arch {arch!r} is not a timm Swin with UPerNet, such as {DEFAULT_ARCH}")
    return encoder


def build_official(
    modalities: Collection[str] | Mapping[str, Channels],
    labels: Collection[str] | Mapping[str, int],
    arch: str = DEFAULT_ARCH,
    image_sizes: Mapping[str, int] | None = None,
    *,
    auxiliary: Collection[str] = (),
) -> OfficialModel:
    """Build a model as the official code does, with random weights.

    Args:
        modalities: input modalities in any order, or a mapping from them to their channels (see ``baseline_input``).
        labels: tasks, or a mapping from them to their number of classes. Default number: the classes of the label's
            first band.
        arch: encoder and decoder, ``SWIN-upernet`` with the timm name of the Swin. Unused without images.
        image_sizes: image side in pixels that each Swin is built for, by modality. Where a feature map is smaller than
            the window, relative position bias tables are smaller. Default: the side of a FLAIR-HUB patch.
        auxiliary: modalities with an auxiliary decoder per task.

    Raises:
        InputError: the official models do not have such modalities, labels, sizes or channels.
    """
    channels: Mapping[str, Any] = modalities if isinstance(modalities, Mapping) else dict.fromkeys(modalities)
    sizes = dict(image_sizes or {})
    chosen = FLAIR_HUB.subset(list(channels)).inputs
    if len(chosen) != len(channels):
        inputs = {modality.name for modality in chosen}
        raise InputError(f"modalities: {', '.join(name for name in channels if name not in inputs)} are not inputs")
    if unknown := set(sizes) - {modality.name for modality in chosen if modality.role == "image"}:
        raise InputError(f"image_sizes: {', '.join(sorted(unknown))} not among the images of the model")
    if wrong := [f"{name} = {size}" for name, size in sizes.items() if size < _PATCH_SIZE or size % _PATCH_SIZE]:
        raise InputError(f"image_sizes: {', '.join(wrong)} px: sides are multiples of {_PATCH_SIZE}")
    tasks = {name: _classes(name, labels) for name in labels}
    if not tasks:
        raise InputError("labels: name at least one")
    has_images = any(modality.role == "image" for modality in chosen)
    total = sum(tasks.values())
    head = [*_HEAD] if total == _HEAD[-1] else [*_HEAD, total]
    encoder_widths, decoder_widths = _WIDTHS_WITH_IMAGES if has_images else _WIDTHS_SERIES_ONLY
    encoders: dict[str, Encoder] = {}
    for modality in chosen:
        spec = baseline_input(modality, channels[modality.name])
        if spec.series:
            options: dict[str, Any] = {
                "encoder_widths": encoder_widths,
                "decoder_widths": decoder_widths,
                "out_conv": head,
                "masked_norm": False,
                "head": True,
            }
            config = EncoderConfig(architecture="utae", options=options)
        else:
            size = sizes.get(modality.name, modality.size)
            config = EncoderConfig(architecture="swin", name=swin_name(arch), fixed_size=size)
        encoders[modality.name] = build_encoder(spec, config)
    return OfficialModel(UPerFuse(encoders, tasks, UPerNetConfig(), auxiliary=auxiliary, official=True))


def _classes(label: str, labels: Collection[str] | Mapping[str, int]) -> int:
    if isinstance(labels, Mapping):
        return labels[label]
    schemes = FLAIR_HUB[label].schemes
    if not schemes:
        raise InputError(f"{label} is not a label; labels: {', '.join(item.name for item in FLAIR_HUB.labels)}")
    return len(schemes[0])
