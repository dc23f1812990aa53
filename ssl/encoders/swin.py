"""Swin transformers from timm as encoders of images of any band count and size.

Liu et al., "Swin Transformer" (arXiv 2103.14030) and "Swin Transformer V2" (arXiv 2111.09883).
"""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Mapping
from typing import Any

import timm
import torch
from timm.models.swin_transformer import SwinTransformer
from timm.models.swin_transformer_v2 import SwinTransformerV2
from torch import nn

from bocage.shards.errors import InputError
from bocage.ssl.encoders.base import Encoder

ANY_SIZE: dict[str, Any] = {"always_partition": True, "strict_img_size": False}
"""timm arguments that keep the windows whole at every input size, so that one set of weights serves all of them."""

_OWN_OPTIONS = {*ANY_SIZE, "in_chans", "num_classes", "global_pool", "dynamic_img_size", "device", "dtype"}


def swin_names() -> list[str]:
    """timm model names that ``SwinEncoder`` takes."""
    return timm.list_models(["swin_*", "swinv2_*"], exclude_filters=["swinv2_cr_*"])


def _check(name: str, options: Mapping[str, Any]) -> None:
    known = swin_names()
    if name not in known:
        nearest = difflib.get_close_matches(name, known, n=1, cutoff=0.0)[0]
        raise InputError(f"encoder name {name!r} is not a timm Swin; did you mean {nearest!r}?")
    architecture = SwinTransformerV2 if name.startswith("swinv2_") else SwinTransformer
    valid = [key for key in inspect.signature(architecture).parameters if key not in _OWN_OPTIONS]
    for key in options:
        if key not in valid:
            near = difflib.get_close_matches(key, valid, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"valid ones: {', '.join(valid)}"
            raise InputError(f"encoder option {key!r} is unknown to {name}; {hint}")


class SwinEncoder(Encoder):
    """A timm Swin v1 or v2 with feature maps at strides 4, 8, 16 and 32.

    Height and width may be any multiple of the patch size (4); windows are padded where they do not fit.
    Parameters are named as in timm's ``features_only`` model, under ``model.``.

    Args:
        in_channels: bands of the image.
        name: one of ``swin_names()``.
        options: further timm arguments (``embed_dim``, ``depths``, ``num_heads``, ``window_size``, ``img_size``, ...).
        mask_token: whether to build the learned token that ``features`` puts at masked places while pretraining.

    Raises:
        InputError: an unknown name or option, or values timm cannot build a model from.
    """

    def __init__(
        self, in_channels: int, name: str, options: Mapping[str, Any] | None = None, mask_token: bool = False
    ) -> None:
        super().__init__()
        options = dict(options or {})
        _check(name, options)
        try:
            self.model: Any = timm.create_model(name, features_only=True, in_chans=in_channels, **ANY_SIZE, **options)
        except Exception as error:  # name and keys are known by now: what is left are values that do not fit together
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise InputError(f"encoder {name} cannot be built with options {options}: {reason}") from error
        levels: Any = self.model.feature_info
        self.widths = tuple(levels.channels())
        self.strides = tuple(levels.reduction())
        self.mask_token: nn.Parameter | None = None
        if mask_token:
            self.mask_token = nn.Parameter(torch.empty(self.widths[0]).normal_(0.0, 0.02))

    def set_gradient_checkpointing(self, enable: bool = True) -> None:
        """Recompute the blocks in the backward pass instead of keeping their activations."""
        for name, module in self.model.items():
            if name.startswith("layers_"):
                module.grad_checkpointing = enable

    def features(
        self,
        values: torch.Tensor,
        dates: torch.Tensor | None = None,
        padding: torch.Tensor | None = None,
        mask: torch.Tensor | None = None,
    ) -> list[torch.Tensor]:
        """See ``Encoder.features``. Maps are (B, C, H, W) in channels-last memory.

        Raises:
            InputError: the sides of the image are not multiples of the patch size.
        """
        if dates is not None or padding is not None:
            raise TypeError("Swin reads images: it takes neither dates nor padding")
        patch = self.strides[0]
        if any(side % patch for side in values.shape[-2:]):
            size = " x ".join(str(side) for side in values.shape[-2:])
            raise InputError(f"an image of {size} px does not divide into Swin's {patch}-px patches; change the window")
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
