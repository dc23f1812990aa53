"""What model an official FLAIR-HUB checkpoint is of, read off the names and shapes of its tensors."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from functools import cache

import torch

from bocage.finetune.official.model import DEFAULT_ARCH, Channels, OfficialModel, build_official, swin_of
from bocage.shards.errors import InputError
from bocage.shards.modality import FLAIR_HUB, Modality
from bocage.ssl.encoders.swin import SwinEncoder

_ARCHITECTURES = (
    "swin_tiny_patch4_window7_224",
    "swin_small_patch4_window7_224",
    "swin_base_patch4_window7_224",
    "swin_base_patch4_window12_384",
    "swin_large_patch4_window7_224",
    "swin_large_patch4_window12_384",
)
"""Swins whose width, blocks and window tell them apart."""

_LARGEST = 2048  # side of an image, pixels
_SERIES_STEM = "in_conv.conv.conv.0.weight"
_TABLE = re.compile(r"layers_(\d+)\.blocks\.0\.attn\.relative_position_bias_table$")


def model_of(
    stored: Mapping[str, torch.Tensor],
    arch: str | None,
    image_sizes: Mapping[str, int] | None,
    named: Mapping[str, Sequence[str]],
    auxiliary: bool,
) -> OfficialModel:
    """A model with random weights for the names and shapes of an official checkpoint.

    Args:
        stored: tensors by name, of any shape, without the prefix of checkpoints.
        arch, image_sizes: see ``build_official``; None: those that the shapes tell.
        named: channels of some modalities; the others are taken by their number.
        auxiliary: whether to build the auxiliary decoders that the checkpoint has.

    Raises:
        InputError: names or shapes that no model of ``build_official`` has, or a Swin that the shapes do not tell.
    """
    channels: dict[str, Channels] = {}
    for name in dict.fromkeys(key.split(".")[1] for key in stored if key.startswith("encoders.")):
        if name not in FLAIR_HUB or FLAIR_HUB[name].baseline is None:
            raise InputError(f"{name} is not an input of FLAIR-HUB's models")
        image = FLAIR_HUB[name].role == "image"
        stem = f"encoders.{name}." + ("seg_model.model.patch_embed.proj.weight" if image else _SERIES_STEM)
        if stem not in stored or stored[stem].ndim != len("OIHW"):
            raise InputError(f"the encoder of {name} is not a {'Swin' if image else 'U-TAE'}: there is no {stem}")
        count = stored[stem].shape[1]
        channels[name] = named.get(name, count)
        if len(named.get(name, range(count))) != count:
            raise InputError(f"{name} has {count} channels in the checkpoint, not {', '.join(named[name])}")
    if unknown := named.keys() - channels.keys():
        raise InputError(f"channels of {', '.join(sorted(unknown))}: not among the inputs of the checkpoint")
    tasks = {}
    for task in dict.fromkeys(key.split(".")[1] for key in stored if key.startswith("main_decoders.")):
        prefix = f"main_decoders.{task}."
        heads = [key for key in (f"{prefix}seg_model.segmentation_head.0.weight", f"{prefix}weight") if key in stored]
        if task not in FLAIR_HUB or FLAIR_HUB[task].role != "label" or not heads:
            raise InputError(f"main_decoders.{task} is not a decoder of one of FLAIR-HUB's labels")
        if heads[0] != f"{prefix}weight" and f"{prefix}seg_model.decoder.psp.out_conv.0.weight" not in stored:
            raise InputError(f"main_decoders.{task} is not a UPerNet; other decoders cannot be built here")
        if stored[heads[0]].ndim != len("OIHW"):
            raise InputError(f"{heads[0]} is not the weight of a convolution")
        tasks[task] = len(stored[heads[0]])
    if not channels or not tasks:
        raise InputError("there is no encoder, or no main decoder")
    images = [FLAIR_HUB[name] for name in channels if FLAIR_HUB[name].role == "image"]
    if unknown := set(image_sizes or {}) - {modality.name for modality in images}:
        raise InputError(f"image sizes of {', '.join(sorted(unknown))}: not among the images of the checkpoint")
    if images and arch is None:
        arch = _arch(stored, images)
    sizes = dict(image_sizes or {})
    if images:
        assert arch is not None
        shape, window = _structure(swin_of(arch))
        if (found := _shape(_own(stored, images[0].name))) != shape:
            raise InputError(
                f"arch {arch} has width and blocks {shape}, the checkpoint {found}: leave it out or correct it"
            )
        for modality in images:
            sizes.setdefault(modality.name, _image_size(stored, modality, window))
    has = {key.split(".")[1].partition("__")[0] for key in stored if key.startswith("aux_decoders.")}
    with torch.random.fork_rng(devices=[]):
        return build_official(
            channels, tasks, arch or DEFAULT_ARCH, sizes, auxiliary=has & channels.keys() if auxiliary else ()
        )


def _sides(tensors: Mapping[str, torch.Tensor]) -> list[int]:
    """Side of the window of each stage of a Swin, by its tables."""
    tables = {int(found[1]): tensor for name, tensor in tensors.items() if (found := _TABLE.search(name))}
    if any(table.ndim != len(("offsets", "heads")) for table in tables.values()):
        raise InputError("a table of relative positions is not (offsets, heads)")
    return [(math.isqrt(len(tables[stage])) + 1) // 2 for stage in sorted(tables)]


def _shape(tensors: Mapping[str, torch.Tensor]) -> tuple[int, ...]:
    """Width of a Swin's first stage and number of blocks of each."""
    width = next((len(tensor) for name, tensor in tensors.items() if name.endswith("patch_embed.proj.weight")), 0)
    blocks = {found.groups() for name in tensors if (found := re.search(r"layers_(\d+)\.blocks\.(\d+)\.", name))}
    stages = sorted({int(stage) for stage, _ in blocks})
    return (width, *(sum(int(other) == stage for other, _ in blocks) for stage in stages))


@cache
def _structure(name: str) -> tuple[tuple[int, ...], int]:
    """``_shape`` of a timm Swin and the side of its whole window, 0 for v2, which has no tables."""
    with torch.device("meta"):
        tensors = SwinEncoder(3, name).state_dict()
    return _shape(tensors), max(_sides(tensors), default=0)


def _own(stored: Mapping[str, torch.Tensor], name: str) -> dict[str, torch.Tensor]:
    prefix = f"encoders.{name}."
    return {key.removeprefix(prefix): tensor for key, tensor in stored.items() if key.startswith(prefix)}


def _arch(stored: Mapping[str, torch.Tensor], images: list[Modality]) -> str:
    """The architecture that the images' encoders have."""
    tensors = _own(stored, images[0].name)
    shape = _shape(tensors)
    window = max((side for image in images for side in _sides(_own(stored, image.name))), default=0)
    found = [name for name in _ARCHITECTURES if _structure(name) == (shape, window)]
    if len(found) != 1:
        raise InputError(
            f"the Swin cannot be told from the checkpoint (width and blocks {shape}, window {window}): name it, "
            f"as in {DEFAULT_ARCH}"
        )
    return f"{found[0]}-upernet"


def _image_size(stored: Mapping[str, torch.Tensor], modality: Modality, window: int) -> int:
    """An image size for which a Swin of this window has the checkpoint's tables: a whole patch if it fits."""
    sides = _sides(_own(stored, modality.name))
    likely = sorted(range(4, _LARGEST + 1, 4), key=lambda size: (size != modality.size, size % 32 != 0, size))
    for size in likely:
        if all(side == min(window, size // 4 // 2**stage) for stage, side in enumerate(sides)):
            return size
    raise InputError(f"the tables of {modality.name} fit no image size: windows of {sides}")
