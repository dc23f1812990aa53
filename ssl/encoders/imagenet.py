"""ImageNet weights as the start of an image encoder of any bands.

timm's published Swins read standardised red, green and blue. Ours read other channels, so the first convolution is
mixed anew: filter of channel c = sum over colours of ``share[c, colour]`` x filter of the colour, by one rule.

- Each colour's filter is shared evenly among the channels whose centre wavelength is nearest to that colour; nobody
  being nearest, it goes to the channel that is least far away.
- A channel without a wavelength (elevation) is a grey image: it takes part in the sharing of all three.

So red, green and blue take their own filters; near infrared shares the red one; a panchromatic image takes the sum of
all three, and two channels of elevation half of it each. The shares of a colour always add up to one: on a grey image,
the same in all channels, the mixed convolution gives what ImageNet's gives, whatever the channels. That is the right
scale, because channels of one image are strongly correlated, and it keeps filters that respond to colour contrasts
blind to grey, which repeating the filters and scaling them by 3 / C does not (timm's ``adapt_input_conv``, which looks
at no wavelength; for one channel both take the sum). What is left of a difference in scale goes in the normalisation
that follows Swin's first convolution.
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
from bocage.ssl.encoders.bias_tables import resize_bias_tables
from bocage.ssl.encoders.hub import PREFIX, download
from bocage.ssl.encoders.key_report import PRECISIONS, KeyReport, compare
from bocage.ssl.encoders.swin import SwinEncoder
from bocage.ssl.encoders.timm_format import FINAL_NORM, plain_name, plain_weights
from bocage.ssl.encoders.weights import read_tensors

_COLOURS = (611.0, 549.0, 464.0)  # dominant wavelengths of the sRGB primaries red, green and blue, nm
_STEM = "patch_embed.proj.weight"
_SHAPE = ("embed_dim", "depths", "num_heads", "mlp_ratio", "patch_size")  # options that change the weights' shapes
_COMPUTED = ("relative_position_index", "relative_coords_table", "attn_mask")  # buffers that older files hold
_SMALL = {"embed_dim": 8, "depths": [1, 1, 1, 1], "num_heads": [1, 1, 1, 1]}  # a model that is only asked its windows
_FILES = ("model.safetensors", "pytorch_model.bin")


def channel_wavelengths(spec: InputSpec) -> tuple[float | None, ...]:
    """Centre wavelength of each channel an encoder reads, nm; None where it is not an optical band."""
    by_band = dict(zip(spec.bands, spec.wavelengths, strict=True))
    return tuple(by_band.get(channel) for channel in spec.channels)


def colour_shares(wavelengths: Sequence[float | None]) -> torch.Tensor:
    """(channels, 3) float32: how much each channel takes of the red, green and blue filters; columns add up to 1."""
    optical = {c: wavelength for c, wavelength in enumerate(wavelengths) if wavelength is not None}
    grey = [c for c, wavelength in enumerate(wavelengths) if wavelength is None]
    nearest = {c: min(_COLOURS, key=lambda colour: abs(colour - optical[c])) for c in optical}
    shares = torch.zeros(len(wavelengths), len(_COLOURS))
    for column, colour in enumerate(_COLOURS):
        takers = [c for c in optical if nearest[c] == colour]
        if not takers and optical:
            takers = [min(optical, key=lambda c: abs(optical[c] - colour))]
        takers += grey
        shares[takers, column] = 1 / len(takers)
    return shares


def load_imagenet(encoder: SwinEncoder, file: Path | None = None) -> KeyReport:
    """Copy ImageNet weights into an encoder of any bands, options of size and windows included.

    Args:
        encoder: made by ``build_encoder``, which tells its bands and its timm name. A mask token keeps its values.
        file: weights of the plain timm model of that name, or of the Swin authors: ``.safetensors``, ``.bin``,
            ``.pth``, or a folder that holds one as timm writes it. None: timm's published weights, from the hub or
            its local cache; of the tag in the encoder's name, or timm's default tag.

    Returns:
        What became of each tensor.

    Raises:
        InputError: the weights cannot be had, are not of the encoder's model, or would mean something else in it.
    """
    _check_offsets(encoder)
    changed = ", ".join(f"{key}={encoder.config.options[key]}" for key in _SHAPE if key in encoder.config.options)
    try:
        path = _published(encoder.config.name) if file is None else _file_in(file)
    except InputError as error:
        if file is None and changed and not _as_published(encoder):  # fetching the file would not help
            raise InputError(
                f"timm's published weights of {encoder.config.name} do not fit a Swin built with {changed}: leave "
                "these options out, or give a file of fitting weights as imagenet:FILE"
            ) from error
        raise
    stored = read_tensors(path)
    dropped = tuple(name for name in stored if name in FINAL_NORM or name.startswith("head.") or _is_computed(name))
    weights = _current_names({name: tensor for name, tensor in stored.items() if name not in dropped})
    adapted: dict[str, str] = {}
    if _STEM in weights and weights[_STEM].dtype in PRECISIONS:  # any other is refused below, by its dtype
        weights[_STEM] = _mixed_stem(path, weights[_STEM], encoder.spec)
        adapted[_STEM] = f"colours shared by {', '.join(encoder.spec.channels)}"
    own_names = {plain_name(name): name for name in encoder.state_dict()}
    try:
        tables = resize_bias_tables({own_names.get(name, name): tensor for name, tensor in weights.items()}, encoder)
    except InputError as error:
        raise InputError(f"{path}: {error}") from error
    resized = {name: tables[own_names.get(name, name)] for name in weights}
    for name, tensor in resized.items():
        if tensor.shape != weights[name].shape:
            adapted[name] = f"{len(weights[name])} to {len(tensor)} offsets"
    targets = plain_weights(encoder)
    report = compare(targets, resized, adapted=adapted, dropped=dropped, cast=True)
    if not report.complete:
        built = f"{encoder.config.name} with {changed}" if changed else encoder.config.name
        raise InputError(f"{path} does not hold the weights of {built}: {report}")
    with torch.no_grad():
        for name, tensor in targets.items():
            tensor.copy_(resized[name])
    return report


def _as_published(encoder: SwinEncoder) -> bool:
    """Whether its weights have the shapes of timm's model of that name, apart from stem and tables, which adapt."""
    with torch.device("meta"), torch.random.fork_rng(devices=[]):
        published = SwinEncoder(3, encoder.config.name, {})

    def shapes(model: SwinEncoder) -> dict[str, torch.Size]:
        names = (name for name in model.state_dict() if "relative_position" not in name and "patch_embed" not in name)
        return {name: model.state_dict()[name].shape for name in names if not name.endswith("mask_token")}

    return shapes(encoder) == shapes(published)


def _check_offsets(encoder: SwinEncoder) -> None:
    """Raises ``InputError`` when a Swin v2 scales the offsets between tokens otherwise than its published weights.

    It computes position biases from offsets in units of the window of each stage, which in the published models is
    smaller where their image left less; another window needs the option that keeps the old unit.
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
            f"position biases of {config.name} were trained in windows of {theirs} tokens, this encoder reads them in "
            f"windows of {ours}: give it the option pretrained_window_sizes={theirs}"
        )


def _offset_units(encoder: SwinEncoder) -> list[int]:
    """Side of the window that is the unit of offsets, by stage of a Swin v2."""
    attentions: list[Any] = [
        encoder.get_submodule(f"model.layers_{stage}.blocks.0.attn") for stage in range(len(encoder.widths))
    ]
    return [attention.pretrained_window_size[0] or attention.window_size[0] for attention in attentions]


def _published(name: str) -> Path:
    """timm's published weights of a model, fetched if need be."""
    try:
        return download(PREFIX + _published_cfg(name).hf_hub_id, _FILES[:1]) / _FILES[0]
    except InputError as error:
        raise InputError(f"ImageNet weights of {name}: {error}, as imagenet:FOLDER") from error


def _published_cfg(name: str) -> Any:
    """timm's description of published weights: those of the tag in the name, or of its default tag."""
    published = timm.models.get_pretrained_cfg(name)
    assert published is not None  # every name of swin_names() has some
    return published


def _file_in(place: Path) -> Path:
    """The file of weights that a path names itself, or that its folder holds."""
    if not os.path.isdir(place):
        return place
    for name in _FILES:
        if (place / name).exists():
            return place / name
    raise InputError(f"{place} holds neither {' nor '.join(_FILES)}")


def _is_computed(name: str) -> bool:
    return name.rpartition(".")[2] in _COMPUTED


def _current_names(weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """timm's names of today. The Swin authors' files merge patches at the end of a stage, timm at the next one's."""
    if "layers.0.downsample.reduction.weight" not in weights:
        return dict(weights)
    merge = re.compile(r"^layers\.(\d+)\.downsample\.")
    return {
        merge.sub(lambda found: f"layers.{int(found[1]) + 1}.downsample.", name): tensor
        for name, tensor in weights.items()
    }


def _mixed_stem(path: Path, stem: torch.Tensor, spec: InputSpec) -> torch.Tensor:
    """The first convolution of three colours, (E, 3, p, p), for the channels of ``spec``, (E, C, p, p)."""
    if stem.ndim != 4 or stem.shape[1] != len(_COLOURS):
        raise InputError(f"{path}: {_STEM} of shape {list(stem.shape)} does not read red, green and blue")
    shares = colour_shares(channel_wavelengths(spec)).to(stem.dtype)
    return torch.einsum("eaij,ca->ecij", stem, shares).contiguous()
