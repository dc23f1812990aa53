"""Load ImageNet weights into image encoders with any bands.

timm's pretrained Swins read standardised red, green and blue. Our images have other channels, so the filters of the
first convolution are remixed: filter of channel c = sum over colours of ``weight[c, colour]`` x filter of the colour.

- Each colour's filter is divided equally among the channels whose centre wavelength is nearest to this colour. If no
  channel is nearest to it, the filter goes to the channel at the smallest distance.
- A channel without a wavelength (elevation) counts as a grey image and gets an equal part of all three filters.

So red, green and blue keep their own filters, and near infrared shares the red one. A panchromatic image gets the sum
of all three, and two channels of elevation get half of the sum each.

The weights of each colour sum to 1. On a grey image, with equal channels, the remixed convolution therefore equals that
of ImageNet, for any channels. This is the right scale, because channels of an image are strongly correlated. It also
keeps filters of colour contrasts blind to grey. timm's ``adapt_input_conv`` does not: it repeats the filters, scales
them by 3 / C and ignores wavelengths (for one channel, both give the sum). The normalisation after Swin's first
convolution removes remaining differences in scale.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import timm
import torch

from bocage.shards.errors import InputError
from bocage.shards.preprocess.normalize import InputSpec
from bocage.ssl.encoders.hub import HUB_PREFIX, download
from bocage.ssl.encoders.swin import SwinEncoder, resize_bias_tables
from bocage.ssl.encoders.timm_format import FINAL_NORM, timm_parameter_name, timm_weights
from bocage.ssl.encoders.weights import FLOAT_DTYPES, KeyReport, compare_weights, read_tensors

_COLOURS = (611.0, 549.0, 464.0)  # dominant wavelengths of the sRGB primaries red, green and blue, nm
_STEM = "patch_embed.proj.weight"
_SHAPE_OPTIONS = (
    "embed_dim",
    "depths",
    "num_heads",
    "mlp_ratio",
    "patch_size",
)  # options that change the shapes of weights
_COMPUTED_BUFFERS = ("relative_position_index", "relative_coords_table", "attn_mask")  # stored in older files
_SMALL = {"embed_dim": 8, "depths": [1, 1, 1, 1], "num_heads": [1, 1, 1, 1]}  # of a model built for its windows only
_FILES = ("model.safetensors", "pytorch_model.bin")


def channel_wavelengths(spec: InputSpec) -> tuple[float | None, ...]:
    """Return the centre wavelength of each channel in nm; None for channels that are not optical bands."""
    by_band = dict(zip(spec.bands, spec.wavelengths, strict=True))
    return tuple(by_band.get(channel) for channel in spec.channels)


def colour_weights(wavelengths: Sequence[float | None]) -> torch.Tensor:
    """Return each channel's weight of the red, green and blue filters, (channels, 3) float32; columns sum to 1."""
    optical = {c: wavelength for c, wavelength in enumerate(wavelengths) if wavelength is not None}
    grey = [c for c, wavelength in enumerate(wavelengths) if wavelength is None]
    nearest = {c: min(_COLOURS, key=lambda colour: abs(colour - optical[c])) for c in optical}
    weights = torch.zeros(len(wavelengths), len(_COLOURS))
    for column, colour in enumerate(_COLOURS):
        channels = [c for c in optical if nearest[c] == colour]
        if not channels and optical:
            channels = [min(optical, key=lambda c: abs(optical[c] - colour))]
        channels += grey
        weights[channels, column] = 1 / len(channels)
    return weights


def load_imagenet(encoder: SwinEncoder, file: Path | None = None) -> KeyReport:
    """Load ImageNet weights into an encoder with any bands, image size and windows.

    Args:
        encoder: encoder from ``build_encoder``, which sets its bands and timm name. A mask token keeps its values.
        file: weights of the timm model of that name, or of the Swin authors: a ``.safetensors``, ``.bin`` or ``.pth``
            file, or a folder with a file as timm names it. None: timm's pretrained weights from the hub or its local
            cache, with the tag of the encoder's name or timm's default tag.

    Returns:
        Report of each tensor.

    Raises:
        InputError: the weights are unavailable, belong to another model, or would be misinterpreted by the encoder.
    """
    _check_offsets(encoder)
    changed = ", ".join(
        f"{key}={encoder.config.options[key]}" for key in _SHAPE_OPTIONS if key in encoder.config.options
    )
    try:
        path = _download_weights(encoder.config.name) if file is None else _find_file(file)
    except InputError as error:
        if file is None and changed and not _has_published_shapes(encoder):  # a download would not help
            raise InputError(
                f"timm's published weights of {encoder.config.name} do not fit a Swin built with {changed}: leave "
                "these options out, or give a file with matching weights as imagenet:FILE"
            ) from error
        raise
    stored = read_tensors(path)
    dropped = tuple(name for name in stored if name in FINAL_NORM or name.startswith("head.") or _is_computed(name))
    weights = _to_current_names({name: tensor for name, tensor in stored.items() if name not in dropped})
    adapted: dict[str, str] = {}
    if (
        _STEM in weights and weights[_STEM].dtype in FLOAT_DTYPES
    ):  # ``compare_weights`` reports other dtypes as mismatched
        weights[_STEM] = _remix_stem(path, weights[_STEM], encoder.spec)
        adapted[_STEM] = f"RGB filters remixed for {', '.join(encoder.spec.channels)}"
    encoder_names = {timm_parameter_name(name): name for name in encoder.state_dict()}
    try:
        tables = resize_bias_tables(
            {encoder_names.get(name, name): tensor for name, tensor in weights.items()}, encoder
        )
    except InputError as error:
        raise InputError(f"{path}: {error}") from error
    resized = {name: tables[encoder_names.get(name, name)] for name in weights}
    for name, tensor in resized.items():
        if tensor.shape != weights[name].shape:
            adapted[name] = f"{len(weights[name])} to {len(tensor)} offsets"
    targets = timm_weights(encoder)
    report = compare_weights(targets, resized, adapted=adapted, dropped=dropped, cast=True)
    if not report.complete:
        built = f"{encoder.config.name} with {changed}" if changed else encoder.config.name
        raise InputError(f"{path} does not hold the weights of {built}: {report}")
    with torch.no_grad():
        for name, tensor in targets.items():
            tensor.copy_(resized[name])
    return report


def _has_published_shapes(encoder: SwinEncoder) -> bool:
    """Whether the weights have the shapes of timm's model of that name, except stem and bias tables, which adapt."""
    with torch.device("meta"), torch.random.fork_rng(devices=[]):
        published = SwinEncoder(3, encoder.config.name, {})

    def shapes(model: SwinEncoder) -> dict[str, torch.Size]:
        names = (name for name in model.state_dict() if "relative_position" not in name and "patch_embed" not in name)
        return {name: model.state_dict()[name].shape for name in names if not name.endswith("mask_token")}

    return shapes(encoder) == shapes(published)


def _check_offsets(encoder: SwinEncoder) -> None:
    """Raise ``InputError`` if a Swin v2 scales offsets between tokens differently from its pretrained weights.

    Swin v2 computes position biases from offsets, in units of the window of each stage. Published models have smaller
    windows in stages where the map is smaller. Other windows need the option ``pretrained_window_sizes``, which keeps
    the unit of the weights.
    """
    config = encoder.config
    if not config.name.startswith("swinv2_"):
        return
    side = _published_cfg(config.name).input_size[-1]
    with torch.random.fork_rng(devices=[]):
        published = SwinEncoder(3, config.name, _SMALL, fixed_size=side)
    theirs, ours = _offset_units(published), _offset_units(encoder)
    if theirs != ours:
        raise InputError(
            f"position biases of {config.name} were trained with windows of {theirs} tokens, but this encoder has "
            f"windows of {ours}: set the encoder option pretrained_window_sizes={theirs}"
        )


def _offset_units(encoder: SwinEncoder) -> list[int]:
    """Return the window side that is the unit of offsets, for each stage of a Swin v2."""
    attentions: list[Any] = [
        encoder.get_submodule(f"model.layers_{stage}.blocks.0.attn") for stage in range(len(encoder.widths))
    ]
    return [attention.pretrained_window_size[0] or attention.window_size[0] for attention in attentions]


def _download_weights(name: str) -> Path:
    """Return the path of timm's pretrained weights of a model in the local cache, after a download if needed."""
    try:
        return download(HUB_PREFIX + _published_cfg(name).hf_hub_id, _FILES[:1]) / _FILES[0]
    except InputError as error:
        raise InputError(f"ImageNet weights of {name}: {error}, as imagenet:FOLDER") from error


def _published_cfg(name: str) -> Any:
    """Return timm's configuration of pretrained weights, for the tag in the name or timm's default tag."""
    published = timm.models.get_pretrained_cfg(name)
    assert published is not None  # every name of list_swin_names() has one
    return published


def _find_file(path: Path) -> Path:
    """Return the path itself if it is not a folder, else the weight file in the folder."""
    if not os.path.isdir(path):
        return path
    for name in _FILES:
        if (path / name).exists():
            return path / name
    raise InputError(f"{path} holds neither {' nor '.join(_FILES)}")


def _is_computed(name: str) -> bool:
    return name.rpartition(".")[2] in _COMPUTED_BUFFERS


def _to_current_names(weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Convert names of the Swin authors' files, with patch merging at the end of a stage; timm has it in the next."""
    if "layers.0.downsample.reduction.weight" not in weights:
        return dict(weights)
    merge = re.compile(r"^layers\.(\d+)\.downsample\.")
    return {
        merge.sub(lambda match: f"layers.{int(match[1]) + 1}.downsample.", name): tensor
        for name, tensor in weights.items()
    }


def _remix_stem(path: Path, stem: torch.Tensor, spec: InputSpec) -> torch.Tensor:
    """Convert the first convolution from three colours, (E, 3, p, p), to the channels of ``spec``, (E, C, p, p)."""
    if stem.ndim != 4 or stem.shape[1] != len(_COLOURS):
        raise InputError(f"{path}: {_STEM} of shape {list(stem.shape)} does not read red, green and blue")
    weights = colour_weights(channel_wavelengths(spec)).to(stem.dtype)
    return torch.einsum("eaij,ca->ecij", stem, weights).contiguous()
