"""Swin transformers from timm as encoders of images of any band count and size.

Liu et al., "Swin Transformer" (arXiv 2103.14030) and "Swin Transformer V2" (arXiv 2111.09883).
"""

from __future__ import annotations

import difflib
import reprlib
from collections.abc import Mapping
from typing import Any

import timm
import torch
from timm.models.swin_transformer import SwinTransformer
from timm.models.swin_transformer_v2 import SwinTransformerV2
from torch import nn

from bocage.shards.errors import InputError
from bocage.ssl.encoders.base import Encoder
from bocage.ssl.encoders.options import check_options
from bocage.ssl.encoders.timm_format import ANY_SIZE, architecture_of

_OWN_OPTIONS = {*ANY_SIZE, "in_chans", "num_classes", "global_pool", "dynamic_img_size", "device", "dtype"}

_LARGEST_WINDOW = 64  # published ones have up to 24; what timm computes for each block grows with the fourth power


def swin_names() -> list[str]:
    """timm architectures that ``SwinEncoder`` takes; with a tag of published weights (``name.tag``) they go as well."""
    return timm.list_models(["swin_*", "swinv2_*"], exclude_filters=["swinv2_cr_*"])


def _check(name: str, options: Mapping[str, Any]) -> None:
    known = swin_names()
    architecture = architecture_of(name)
    if architecture not in known:
        nearest = difflib.get_close_matches(architecture, known, n=1, cutoff=0.0)[0]
        raise InputError(f"encoder name {name!r} is not a timm Swin; did you mean {nearest!r}?")
    if name != architecture and name not in (tagged := timm.list_pretrained(architecture)):
        raise InputError(f"timm has no weights of the name {name!r}; there are: {', '.join(tagged)}")
    constructor = SwinTransformerV2 if architecture.startswith("swinv2_") else SwinTransformer
    check_options(options, constructor, reserved=_OWN_OPTIONS, of=name)
    window = options.get("window_size", 1)  # one side, or one by stage, or height and width by stage
    by_stage = window if isinstance(window, list | tuple) else [window]
    for side in (side for stage in by_stage for side in (stage if isinstance(stage, list | tuple) else [stage])):
        if type(side) is not int or not 1 <= side <= _LARGEST_WINDOW:
            shown = reprlib.repr(window)
            raise InputError(f"encoder option window_size = {shown} has a side not from 1 to {_LARGEST_WINDOW} tokens")


class SwinEncoder(Encoder):
    """A timm Swin v1 or v2 with feature maps at strides 4, 8, 16 and 32.

    Height and width may be any multiple of the patch size (4); windows are padded where they do not fit, and the same
    weights serve all sizes. Parameters are named as in timm's ``features_only`` model, under ``model.``.

    Args:
        in_channels: bands of the image.
        name: one of ``swin_names()``, with or without a tag.
        options: further timm arguments (``embed_dim``, ``depths``, ``num_heads``, ``window_size``, ``img_size``, ...).
        mask_token: whether to build the learned token that ``features`` puts at masked places while pretraining.
        fixed_size: side of the only image size the encoder takes, pixels, as ``timm.create_model(name, img_size=N)``
            has it: windows larger than a map shrink to it, and v1's tables of position biases with them. For weights
            of models built so; ``resize_bias_tables`` converts between the two.

    Raises:
        InputError: an unknown name or option, or values timm cannot build a model from.
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
        _check(name, options)
        if fixed_size is not None and "img_size" in options:
            raise InputError(f"encoder {name}: give fixed_size or the option img_size, not both")
        sizes = ANY_SIZE if fixed_size is None else {"img_size": fixed_size}
        try:
            self.model: Any = timm.create_model(name, features_only=True, in_chans=in_channels, **{**options, **sizes})
        except Exception as error:  # name and keys are known by now: what is left are values that do not fit together
            reason = " ".join(str(error).split()) or type(error).__name__
            shown = reprlib.repr(options)
            raise InputError(f"encoder {name} cannot be built with options {shown}: {reason}") from error
        levels: Any = self.model.feature_info
        self.widths = tuple(levels.channels())
        self.strides = tuple(levels.reduction())
        self._fixed_size = fixed_size
        self.mask_token: nn.Parameter | None = None
        if mask_token:
            self.mask_token = nn.Parameter(torch.empty(self.widths[0]).normal_(0.0, 0.02))

    def set_gradient_checkpointing(self, enable: bool = True) -> None:
        """Recompute the blocks in the backward pass instead of keeping their activations."""
        for name, module in self.model.items():
            if name.startswith("layers_"):
                module.grad_checkpointing = enable

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Parameters by depth, as timm's Swins have it: the stem, then each block (``coarse``: each stage)."""
        blocks = [(r"^model\.layers_(\d+)\.downsample", (0,)), (r"^model\.layers_(\d+)\.\w+\.(\d+)", None)]
        return {"stem": r"^(?:model\.patch_embed|mask_token)", "blocks": r"^model\.layers_(\d+)" if coarse else blocks}

    def features(
        self,
        values: torch.Tensor,
        dates: torch.Tensor | None = None,
        padding: torch.Tensor | None = None,
        mask: torch.Tensor | None = None,
    ) -> list[torch.Tensor]:
        """See ``Encoder.features``. Maps are (B, C, H, W) in channels-last memory.

        Raises:
            InputError: the sides of the image are not multiples of the patch size, or not ``fixed_size``.
            TypeError: dates or padding, which images do not have; or a mask without ``mask_token``.
        """
        if dates is not None or padding is not None:
            raise TypeError("Swin reads images: it takes neither dates nor padding")
        patch = self.strides[0]
        size = " x ".join(str(side) for side in values.shape[-2:])
        if any(side % patch for side in values.shape[-2:]):
            raise InputError(f"an image of {size} px does not divide into Swin's {patch}-px patches; change the window")
        if self._fixed_size is not None and any(side != self._fixed_size for side in values.shape[-2:]):
            raise InputError(f"an image of {size} px does not fit an encoder built for {self._fixed_size} px alone")
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
        """Same as ``features``, of images (B, C, H, W)."""
        return self.features(values, mask=mask)
