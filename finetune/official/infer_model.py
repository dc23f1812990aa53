"""Infer the architecture of an official FLAIR-HUB checkpoint from the names and shapes of its tensors."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from functools import cache

import torch

from bocage.finetune.official.official_model import DEFAULT_ARCH, Channels, OfficialModel, build_official, swin_name
from bocage.shards.errors import InputError
from bocage.shards.modality import FLAIR_HUB, Modality
from bocage.ssl.encoders.swin import SwinEncoder

_SWINS = (
    "swin_tiny_patch4_window7_224",
    "swin_small_patch4_window7_224",
    "swin_base_patch4_window7_224",
    "swin_base_patch4_window12_384",
    "swin_large_patch4_window7_224",
    "swin_large_patch4_window12_384",
)
"""Swins that differ from each other in width, number of blocks or window, so that a checkpoint identifies them."""

_MAX_IMAGE_SIZE = 2048  # pixels
_SERIES_STEM = "in_conv.conv.conv.0.weight"
_TABLE = re.compile(r"layers_(\d+)\.blocks\.0\.attn\.relative_position_bias_table$")


def infer_model(
    stored: Mapping[str, torch.Tensor],
    arch: str | None,
    image_sizes: Mapping[str, int] | None,
    channel_names: Mapping[str, Sequence[str]],
    auxiliary: bool,
) -> OfficialModel:
    """Build a model with random weights that has the names and shapes of an official checkpoint.

    Args:
        stored: tensors of the checkpoint by name, without the prefix ``model.``.
        arch: encoder and decoder, see ``build_official``; None to infer them from the shapes.
        image_sizes: image sides by modality, see ``build_official``; sizes that are not given are inferred.
        channel_names: names of the channels by modality; for other modalities they are inferred from the number of
            channels, see ``baseline_input``.
        auxiliary: whether to build the auxiliary decoders of the checkpoint.

    Raises:
        InputError: ``build_official`` cannot build a model with these names and shapes, or the shapes do not identify
            the Swin.
    """
    channels: dict[str, Channels] = {}
    for name in dict.fromkeys(key.split(".")[1] for key in stored if key.startswith("encoders.")):
        if name not in FLAIR_HUB or FLAIR_HUB[name].baseline is None:
            raise InputError(f"{name} is not an input of the official FLAIR-HUB models")
        image = FLAIR_HUB[name].role == "image"
        stem = f"encoders.{name}." + ("seg_model.model.patch_embed.proj.weight" if image else _SERIES_STEM)
        if stem not in stored or stored[stem].ndim != len("OIHW"):
            raise InputError(f"the encoder of {name} is not a {'Swin' if image else 'U-TAE'}: {stem} is missing")
        count = stored[stem].shape[1]
        channels[name] = channel_names.get(name, count)
        if len(channel_names.get(name, range(count))) != count:
            raise InputError(f"{name} has {count} channels in the checkpoint, not {', '.join(channel_names[name])}")
    if unknown := channel_names.keys() - channels.keys():
        raise InputError(f"channels of {', '.join(sorted(unknown))}: not among the inputs of the checkpoint")
    tasks = {}
    for task in dict.fromkeys(key.split(".")[1] for key in stored if key.startswith("main_decoders.")):
        prefix = f"main_decoders.{task}."
        heads = [key for key in (f"{prefix}seg_model.segmentation_head.0.weight", f"{prefix}weight") if key in stored]
        if task not in FLAIR_HUB or FLAIR_HUB[task].role != "label" or not heads:
            raise InputError(f"main_decoders.{task} is not a decoder of a FLAIR-HUB label")
        if heads[0] != f"{prefix}weight" and f"{prefix}seg_model.decoder.psp.out_conv.0.weight" not in stored:
            raise InputError(f"main_decoders.{task} is not a UPerNet, the only decoder that bocage can build")
        if stored[heads[0]].ndim != len("OIHW"):
            raise InputError(f"{heads[0]} is not the weight of a convolution")
        tasks[task] = len(stored[heads[0]])
    if not channels or not tasks:
        raise InputError("the checkpoint has no encoder or no main decoder")
    images = [FLAIR_HUB[name] for name in channels if FLAIR_HUB[name].role == "image"]
    if unknown := set(image_sizes or {}) - {modality.name for modality in images}:
        raise InputError(f"image sizes of {', '.join(sorted(unknown))}: not among the images of the checkpoint")
    if images and arch is None:
        arch = _infer_arch(stored, images)
    sizes = dict(image_sizes or {})
    if images:
        assert arch is not None
        expected, window = _swin_structure(swin_name(arch))
        if (actual := _width_and_depths(_encoder_tensors(stored, images[0].name))) != expected:
            raise InputError(
                f"arch {arch} has width and blocks {expected}, the checkpoint {actual}: leave arch out or correct it"
            )
        for modality in images:
            sizes.setdefault(modality.name, _infer_image_size(stored, modality, window))
    supervised = {key.split(".")[1].partition("__")[0] for key in stored if key.startswith("aux_decoders.")}
    with torch.random.fork_rng(devices=[]):
        return build_official(
            channels, tasks, arch or DEFAULT_ARCH, sizes, auxiliary=supervised & channels.keys() if auxiliary else ()
        )


def _window_sizes(tensors: Mapping[str, torch.Tensor]) -> list[int]:
    """Return the side of the attention window of each Swin stage, from the relative position bias tables."""
    tables = {int(match[1]): tensor for name, tensor in tensors.items() if (match := _TABLE.search(name))}
    if any(table.ndim != len(("offsets", "heads")) for table in tables.values()):
        raise InputError("a relative position bias table does not have the shape (offsets, heads)")
    return [(math.isqrt(len(tables[stage])) + 1) // 2 for stage in sorted(tables)]


def _width_and_depths(tensors: Mapping[str, torch.Tensor]) -> tuple[int, ...]:
    """Return the width of a Swin's first stage, followed by the number of blocks of each stage."""
    width = next((len(tensor) for name, tensor in tensors.items() if name.endswith("patch_embed.proj.weight")), 0)
    blocks = {match.groups() for name in tensors if (match := re.search(r"layers_(\d+)\.blocks\.(\d+)\.", name))}
    stages = sorted({int(stage) for stage, _ in blocks})
    return (width, *(sum(int(other) == stage for other, _ in blocks) for stage in stages))


@cache
def _swin_structure(name: str) -> tuple[tuple[int, ...], int]:
    """Return ``_width_and_depths`` of a timm Swin and the side of its full window; 0 for v2, which has no tables."""
    with torch.device("meta"):
        tensors = SwinEncoder(3, name).state_dict()
    return _width_and_depths(tensors), max(_window_sizes(tensors), default=0)


def _encoder_tensors(stored: Mapping[str, torch.Tensor], name: str) -> dict[str, torch.Tensor]:
    """Return the tensors of one encoder, without its prefix."""
    prefix = f"encoders.{name}."
    return {key.removeprefix(prefix): tensor for key, tensor in stored.items() if key.startswith(prefix)}


def _infer_arch(stored: Mapping[str, torch.Tensor], images: list[Modality]) -> str:
    """Infer ``arch`` of ``build_official`` from the encoders of the images."""
    tensors = _encoder_tensors(stored, images[0].name)
    structure = _width_and_depths(tensors)
    window = max((side for image in images for side in _window_sizes(_encoder_tensors(stored, image.name))), default=0)
    candidates = [name for name in _SWINS if _swin_structure(name) == (structure, window)]
    if len(candidates) != 1:
        raise InputError(
            f"the checkpoint does not identify its Swin (width and blocks {structure}, window {window}): give arch, "
            f"e.g. {DEFAULT_ARCH}"
        )
    return f"{candidates[0]}-upernet"


def _infer_image_size(stored: Mapping[str, torch.Tensor], modality: Modality, window: int) -> int:
    """Return an image size for which a Swin with this window has the checkpoint's tables; a whole patch if possible."""
    sides = _window_sizes(_encoder_tensors(stored, modality.name))
    candidates = sorted(
        range(4, _MAX_IMAGE_SIZE + 1, 4), key=lambda size: (size != modality.size, size % 32 != 0, size)
    )
    for size in candidates:
        if all(side == min(window, size // 4 // 2**stage) for stage, side in enumerate(sides)):
            return size
    raise InputError(f"the bias tables of {modality.name} fit no image size: their windows are {sides}")
