"""The official FLAIR-HUB models under their own parameter names, computed by bocage's modules.

The rules of construction are those of IGN's code (IGNF/FLAIR-HUB, Apache-2.0; Garioud et al. 2025, arXiv 2506.07080).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from bocage.finetune.models.uperfuse import Encoded, Fusion, Grid, Predictions, UPerFuse
from bocage.finetune.models.upernet import DecoderConfig
from bocage.shards.errors import InputError
from bocage.shards.modality import FLAIR_HUB, Modality
from bocage.shards.preprocess.normalize import InputSpec
from bocage.ssl.encoders.base import Encoder, EncoderConfig
from bocage.ssl.encoders.build import build_encoder
from bocage.ssl.encoders.swin import swin_names

DEFAULT_ARCH = "swin_base_patch4_window12_384-upernet"
"""Encoder and decoder of the published models."""

# With an image among the inputs the official code spreads the widths of its configuration, twice, over the stages of
# Swin. The result is the same for every Swin.
_WIDTHS_BESIDE_IMAGES = ([64, 64, 128, 128], [64, 64, 128, 128])
_WIDTHS_ALONE = ([64, 64, 64, 128], [32, 32, 64, 128])
_HEAD = (32, 19)
_PATCH = 4  # pixels along a side of Swin's patches

Channels = int | Sequence[str]


class _Named(nn.Module):
    """One level of names: the official images and decoders stand under ``seg_model``."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.seg_model = module


class OfficialModel(nn.Module):
    """A ``UPerFuse`` of the official face under the official parameter names.

    The two share their modules: what is loaded into one is in the other. Some parameters exist for their names alone,
    because the official code builds them without ever reading them.

    Attributes:
        uperfuse: the model that computes.
    """

    uperfuse: UPerFuse

    def __init__(self, uperfuse: UPerFuse) -> None:
        super().__init__()
        self.__dict__["uperfuse"] = uperfuse  # not a child: its parameters would have two names
        encoders = {name: uperfuse.encoder(name) for name in uperfuse.encoders}
        self.encoders = nn.ModuleDict(
            {name: encoder if encoder.spec.series else _Named(encoder) for name, encoder in encoders.items()}
        )
        self.fusion_handler = uperfuse.fusion or self._unread_fusion()
        self.main_decoders = nn.ModuleDict(
            {task: self._decoder(task, decoder) for task, decoder in uperfuse.decoders.items()}
        )
        auxiliary: dict[str, nn.Module] = {}
        for task in uperfuse.decoders:
            for name, decoders in uperfuse.auxiliary.items():
                assert isinstance(decoders, nn.ModuleDict)
                decoder = decoders[task]
                auxiliary[f"{name}__{task}"] = decoder if isinstance(decoder, nn.Conv2d) else _Named(decoder)
        self.aux_decoders = nn.ModuleDict(auxiliary)

    def _unread_fusion(self) -> Fusion:
        name, first = next((name, self.uperfuse.encoder(name)) for name in self.uperfuse.encoders)
        widths = (1,) if self.uperfuse.series_alone else first.widths
        return Fusion({name: widths}, widths).requires_grad_(False)

    def _decoder(self, task: str, decoder: nn.Module) -> nn.Module:
        if isinstance(decoder, nn.Identity):
            classes = self.uperfuse.tasks[task]
            return nn.Conv2d(classes, classes, 1).requires_grad_(False)
        return decoder if isinstance(decoder, nn.Conv2d) else _Named(decoder)

    def train(self, mode: bool = True) -> OfficialModel:
        """Training mode for ``uperfuse`` as well."""
        self.uperfuse.train(mode)
        return super().train(mode)

    def predictions(
        self,
        inputs: Mapping[str, torch.Tensor],
        dates: Mapping[str, torch.Tensor] | None,
        pad_masks: Mapping[str, torch.Tensor | None] | None,
        label_size: int,
    ) -> Predictions:
        """Logits of the tasks, and of the auxiliary decoders in either mode: (B, classes, label_size, label_size).

        Arguments are those of ``forward``.

        Raises:
            InputError: see ``forward``.
        """
        encoded, grids = self._encoded(inputs, dates or {}, pad_masks or {})
        found = self.uperfuse.decode(encoded, len(next(iter(inputs.values()))), grids, label_size)
        return found if self.training else Predictions(found.logits, self.uperfuse.supervise(encoded, label_size))

    def _encoded(
        self,
        inputs: Mapping[str, torch.Tensor],
        dates: Mapping[str, torch.Tensor],
        pad_masks: Mapping[str, torch.Tensor | None],
    ) -> tuple[dict[str, Encoded], list[Grid]]:
        """What each encoder finds, and the grids of the first one's maps."""
        model = self.uperfuse
        encoded = {}
        for name in model.encoders:
            if name not in inputs:
                raise InputError(f"inputs lack {name}, which this official model reads")
            channels = model.encoder(name).spec.channels
            if inputs[name].ndim < len("CHW") or inputs[name].shape[-3] != len(channels):
                raise InputError(
                    f"inputs of {name} have the shape {list(inputs[name].shape)}; channels are {', '.join(channels)}"
                )
            days, padding = None, None
            if model.encoder(name).spec.series:
                if name not in dates:
                    raise InputError(f"dates lack {name}, a series of this official model")
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
        """Logits of every task.

        Args:
            inputs: by modality, normalised images (B, C, H, W) or series (B, T, C, H, W).
            dates: by series, (B, T) days since 15 May; None without series.
            pad_masks: by series, (B, T) bool, True where a date is padding; without one every date is valid. The
                official code takes for padding every frame that is zero throughout.
            label_size: side of the logits, pixels.

        Returns:
            By task, (B, classes, label_size, label_size).

        Raises:
            InputError: a modality of the model or the dates of a series are not there, or channels are others.
        """
        encoded, grids = self._encoded(inputs, dates or {}, pad_masks or {})
        return self.uperfuse.decode(encoded, len(next(iter(inputs.values()))), grids, label_size).logits


def baseline_input(modality: Modality, channels: Channels | None = None) -> InputSpec:
    """How the published baselines read a modality, or how they would with other channels.

    Args:
        modality: one that the baselines know.
        channels: names, or how many: as many as the baseline has, or all bands as they are stored, or the one channel
            that a baseline can do with. With other channels than the baseline's, statistics are those of the bands.

    Raises:
        InputError: a modality without baseline, or channels that it does not have.
    """
    baseline = modality.baseline
    if baseline is None:
        raise InputError(f"{modality.name} is not among the inputs of the official FLAIR-HUB models")
    mean = dict(zip(baseline.channels, baseline.mean, strict=True))
    std = dict(zip(baseline.channels, baseline.std, strict=True))
    bands = tuple(band.name for band in modality.bands)
    if isinstance(channels, int):
        counted = [names for names in (baseline.channels, bands, baseline.alone) if len(names) == channels]
        if not counted:
            known = ", ".join({**mean, **dict.fromkeys(bands)})
            raise InputError(f"{modality.name}: which {channels} channels? Name them; there are {known}")
        channels = counted[0]
    if channels is not None and tuple(channels) != baseline.channels and modality.mean is not None:
        assert modality.std is not None
        if baseline.representation == "linear":
            mean, std = dict(zip(bands, modality.mean, strict=True)), dict(zip(bands, modality.std, strict=True))
    chosen = baseline.channels if channels is None else tuple(channels)
    if unknown := [name for name in chosen if name not in mean]:
        raise InputError(f"{modality.name} has no channel {', '.join(unknown)}; there are {', '.join(mean)}")
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


def swin_of(arch: str) -> str:
    """The timm name in ``arch``, ``SWIN-upernet``.

    Raises:
        InputError: another encoder or decoder than can be built here.
    """
    encoder, _, decoder = arch.partition("-")
    if encoder not in swin_names() or decoder != "upernet":
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
    """A model as the official code builds it, with random weights.

    Args:
        modalities: inputs, in any order; with a mapping, their channels (see ``baseline_input``).
        labels: tasks; with a mapping, their number of classes, else those of the label's first band.
        arch: timm name of the Swin, a dash, ``upernet``. Unused without images.
        image_sizes: by image, the side in pixels that its Swin is built for: tables of relative positions shrink where
            the map is smaller than the window. Default: whole patches of FLAIR-HUB.
        auxiliary: modalities with an auxiliary decoder a task.

    Raises:
        InputError: names, sizes or channels that the official models do not have.
    """
    channels: Mapping[str, Any] = modalities if isinstance(modalities, Mapping) else dict.fromkeys(modalities)
    sizes = dict(image_sizes or {})
    chosen = FLAIR_HUB.subset(list(channels)).inputs
    if len(chosen) != len(channels):
        inputs = {modality.name for modality in chosen}
        raise InputError(f"modalities: {', '.join(name for name in channels if name not in inputs)} are not inputs")
    if unknown := set(sizes) - {modality.name for modality in chosen if modality.role == "image"}:
        raise InputError(f"image_sizes: {', '.join(sorted(unknown))} not among the images of the model")
    if wrong := [f"{name} = {size}" for name, size in sizes.items() if size < _PATCH or size % _PATCH]:
        raise InputError(f"image_sizes: {', '.join(wrong)} px: sides are multiples of {_PATCH}")
    tasks = {name: _classes(name, labels) for name in labels}
    if not tasks:
        raise InputError("labels: name at least one")
    beside_images = any(modality.role == "image" for modality in chosen)
    total = sum(tasks.values())
    head = [*_HEAD] if total == _HEAD[-1] else [*_HEAD, total]
    encoder_widths, decoder_widths = _WIDTHS_BESIDE_IMAGES if beside_images else _WIDTHS_ALONE
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
            config = EncoderConfig(architecture="swin", name=swin_of(arch), fixed_size=size)
        encoders[modality.name] = build_encoder(spec, config)
    return OfficialModel(UPerFuse(encoders, tasks, DecoderConfig(), auxiliary=auxiliary, official=True))


def _classes(label: str, labels: Collection[str] | Mapping[str, int]) -> int:
    if isinstance(labels, Mapping):
        return labels[label]
    schemes = FLAIR_HUB[label].schemes
    if not schemes:
        raise InputError(f"{label} is not a label; labels: {', '.join(item.name for item in FLAIR_HUB.labels)}")
    return len(schemes[0])
