"""Swin transformers of timm as image encoders, for any number of bands and any image size.

Liu et al., "Swin Transformer" (arXiv 2103.14030) and "Swin Transformer V2" (arXiv 2111.09883).
"""

from __future__ import annotations

import difflib
import math
import reprlib
from collections.abc import Mapping
from typing import Any

import timm
import torch
from timm.models.swin_transformer import SwinTransformer
from timm.models.swin_transformer_v2 import SwinTransformerV2
from torch import nn
from torch.nn import functional

from bocage.shards.errors import InputError
from bocage.ssl.encoders.base import Encoder, check_options
from bocage.ssl.encoders.timm_format import ANY_SIZE_ARGS, strip_tag

_RESERVED_OPTIONS = {*ANY_SIZE_ARGS, "in_chans", "num_classes", "global_pool", "dynamic_img_size", "device", "dtype"}

_MAX_WINDOW = 64  # published models have up to 24; the memory of timm's position buffers grows with the fourth power
_BIAS_TABLE = "relative_position_bias_table"


def list_swin_names() -> list[str]:
    """List the timm architectures that ``SwinEncoder`` accepts, without tags of pretrained weights."""
    return timm.list_models(["swin_*", "swinv2_*"], exclude_filters=["swinv2_cr_*"])


def _check_name_and_options(name: str, options: Mapping[str, Any]) -> None:
    known = list_swin_names()
    architecture = strip_tag(name)
    if architecture not in known:
        nearest = difflib.get_close_matches(architecture, known, n=1, cutoff=0.0)[0]
        raise InputError(f"encoder name {name!r} is not a timm Swin; did you mean {nearest!r}?")
    if name != architecture and name not in (tagged := timm.list_pretrained(architecture)):
        raise InputError(f"timm has no pretrained weights {name!r}; available: {', '.join(tagged)}")
    constructor = SwinTransformerV2 if architecture.startswith("swinv2_") else SwinTransformer
    check_options(options, constructor, reserved=_RESERVED_OPTIONS, model=name)
    window = options.get("window_size", 1)  # one side, one per stage, or height and width per stage
    per_stage = window if isinstance(window, list | tuple) else [window]
    for side in (side for stage in per_stage for side in (stage if isinstance(stage, list | tuple) else [stage])):
        if type(side) is not int or not 1 <= side <= _MAX_WINDOW:
            shown = reprlib.repr(window)
            raise InputError(f"encoder option window_size = {shown}: each side must be 1 to {_MAX_WINDOW} tokens")


class SwinEncoder(Encoder):
    """timm Swin v1 or v2 with feature maps at strides 4, 8, 16 and 32.

    Images may have any size. Sides that are not multiples of the patch size (4) are enlarged bilinearly to the next
    multiple, so that feature maps cover the image exactly. Windows are padded where they do not fit, so one set of
    weights serves all sizes. Parameters are named as in timm's ``features_only`` model, under ``model.``.

    Args:
        in_channels: bands of the image.
        name: one of ``list_swin_names()``, with or without the tag of pretrained weights (``name.tag``).
        options: further timm arguments (``embed_dim``, ``depths``, ``num_heads``, ``window_size``, ``img_size``, ...).
        mask_token: whether to build the learned token that ``features`` puts at masked tokens during pretraining.
        fixed_size: side of the only image size that the encoder accepts, in pixels, as in ``timm.create_model(name,
            img_size=N)``. Windows larger than a map shrink to it, and so do v1's tables of position biases.
            Weights of models built this way need it; ``resize_bias_tables`` converts between the two forms.

    Raises:
        InputError: an unknown name or option, or values that timm cannot build a model from.
    """

    def __init__(
        self,
        in_channels: int,
        name: str,
        options: Mapping[str, Any] | None = None,
        mask_token: bool = False,
        *,
        fixed_size: int | None = None,
    ) -> None:
        super().__init__()
        options = dict(options or {})
        _check_name_and_options(name, options)
        if fixed_size is not None and "img_size" in options:
            raise InputError(f"encoder {name}: give fixed_size or the option img_size, not both")
        sizes = ANY_SIZE_ARGS if fixed_size is None else {"img_size": fixed_size}
        try:
            self.model: Any = timm.create_model(name, features_only=True, in_chans=in_channels, **{**options, **sizes})
        except Exception as error:  # name and keys are checked above, so the values do not fit together
            reason = " ".join(str(error).split()) or type(error).__name__
            shown = reprlib.repr(options)
            raise InputError(f"encoder {name} cannot be built with options {shown}: {reason}") from error
        feature_info: Any = self.model.feature_info
        self.widths = tuple(feature_info.channels())
        self.strides = tuple(feature_info.reduction())
        self._fixed_size = fixed_size
        self.mask_token: nn.Parameter | None = None
        if mask_token:
            self.mask_token = nn.Parameter(torch.empty(self.widths[0]).normal_(0.0, 0.02))

    def set_gradient_checkpointing(self, enable: bool = True) -> None:
        """Recompute each block in the backward pass instead of storing its activations."""
        for name, module in self.model.items():
            if name.startswith("layers_"):
                module.grad_checkpointing = enable

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Group parameters by depth, as timm's Swins do: the stem, then each block, or each stage if ``coarse``."""
        blocks = [(r"^model\.layers_(\d+)\.downsample", (0,)), (r"^model\.layers_(\d+)\.\w+\.(\d+)", None)]
        return {"stem": r"^(?:model\.patch_embed|mask_token)", "blocks": r"^model\.layers_(\d+)" if coarse else blocks}

    def features(
        self,
        values: torch.Tensor,
        dates: torch.Tensor | None = None,
        padding: torch.Tensor | None = None,
        mask: torch.Tensor | None = None,
    ) -> list[torch.Tensor]:
        """Compute the feature maps, see ``Encoder.features``: (B, C, H, W) in channels-last memory.

        Raises:
            InputError: a side of the image is not ``fixed_size``, or not a multiple of the patch size although there
                is a mask.
            TypeError: dates or padding are given, or a mask for an encoder without ``mask_token``.
        """
        if dates is not None or padding is not None:
            raise TypeError("Swin reads images: it accepts neither dates nor padding")
        patch = self.strides[0]
        size = " x ".join(str(side) for side in values.shape[-2:])
        if any(side % patch for side in values.shape[-2:]):
            if mask is not None:
                raise InputError(f"an image of {size} px does not divide into Swin's {patch}-px patches, as masks need")
            whole = tuple(-(-side // patch) * patch for side in values.shape[-2:])
            values = functional.interpolate(values, size=whole, mode="bilinear", align_corners=False)
        if self._fixed_size is not None and any(side != self._fixed_size for side in values.shape[-2:]):
            raise InputError(f"an image of {size} px does not fit an encoder built for {self._fixed_size} px only")
        maps = []
        tokens = values
        for name, module in self.model.items():
            tokens = module(tokens)
            if name == "patch_embed" and mask is not None:
                if self.mask_token is None:
                    raise TypeError("a mask needs an encoder built with mask_token=True")
                tokens = torch.where(mask[..., None], self.mask_token.to(tokens.dtype), tokens)
            if name in self.model.return_layers:
                maps.append(tokens.permute(0, 3, 1, 2))
        return maps

    def forward(self, values: torch.Tensor, mask: torch.Tensor | None = None) -> list[torch.Tensor]:
        """Compute the feature maps of images (B, C, H, W), as ``features`` does."""
        return self.features(values, mask=mask)


def resize_bias_tables(weights: Mapping[str, torch.Tensor], encoder: SwinEncoder) -> dict[str, torch.Tensor]:
    """Resize Swin v1's tables of relative position biases to the windows of ``encoder``; other tensors pass unchanged.

    A table, (N, heads), holds one bias per head and per offset between two tokens of an h x w window, with
    N = (2h - 1) x (2w - 1). A table of another window is resized bicubically, as in the code of the Swin paper (Liu et
    al. 2021, arXiv 2103.14030). Encoders for any size keep full windows; encoders with a ``fixed_size`` have smaller
    windows wherever the map is smaller.

    Swin v2 has no tables and passes unchanged: it computes the biases from the offsets, for any window.

    Args:
        weights: tensors by the names of ``encoder.state_dict()``; other names are passed on.
        encoder: encoder that the weights are for.

    Raises:
        InputError: a table fits neither a square window nor the encoder's window.
    """
    resized = dict(weights)
    for name, module in encoder.named_modules():
        key = f"{name}.{_BIAS_TABLE}"
        if key in resized and hasattr(module, _BIAS_TABLE):
            height, width = module.window_size
            resized[key] = _resize_table(key, resized[key], 2 * height - 1, 2 * width - 1)
    return resized


def _resize_table(name: str, table: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Resize an (offsets, heads) table to ``height`` x ``width`` offsets."""
    if table.ndim != 2 or not table.shape[1]:
        raise InputError(f"{name} has the shape {list(table.shape)}, not (offsets, heads)")
    side = math.isqrt(len(table))
    if side == height == width or (side * side != len(table) and len(table) == height * width):
        return table
    if side % 2 == 0 or side * side != len(table):
        raise InputError(f"{name} has {len(table)} offsets, which do not fit a square window")
    grid = table.T.reshape(1, -1, side, side)
    # In float32 at least, because CPUs have no bicubic kernel for half precision.
    wide = grid if grid.dtype == torch.float64 else grid.float()
    grid = functional.interpolate(wide, (height, width), mode="bicubic", align_corners=False)
    return grid.reshape(-1, height * width).T.to(table.dtype).contiguous()
