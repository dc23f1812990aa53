"""timm's format of a Swin encoder, which ``timm.create_model("local-dir:FOLDER", ...)`` loads without bocage."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from bocage.ssl.encoders.base import Encoder

ANY_SIZE_ARGS: dict[str, Any] = {"always_partition": True, "strict_img_size": False}
"""timm arguments that keep full windows at every input size, so that one set of weights serves all sizes."""

FINAL_NORM = ("norm.weight", "norm.bias")
"""Parameters of the normalisation that ends timm's classifier. Feature maps do not pass through it."""


def strip_tag(name: str) -> str:
    """Return a timm model name without the tag of its pretrained weights: ``name.tag`` becomes ``name``."""
    return name.partition(".")[0]


def timm_parameter_name(name: str) -> str:
    """Convert a parameter name of ``SwinEncoder`` to timm's: ``model.layers_0.x`` becomes ``layers.0.x``."""
    return name.removeprefix("model.").replace("layers_", "layers.", 1)


def timm_weights(encoder: Encoder) -> dict[str, torch.Tensor]:
    """Return the tensors of a Swin encoder by timm's names, without the mask token; not copied, so of any shape."""
    return {timm_parameter_name(name): tensor for name, tensor in encoder.state_dict().items() if name != "mask_token"}


def add_final_norm(weights: Mapping[str, torch.Tensor], width: int) -> dict[str, torch.Tensor]:
    """Add timm's final normalisation at its initial value, the identity.

    Args:
        weights: tensors by timm's names, of any shape.
        width: channels of the last feature map; the two added tensors are (width,).
    """
    one = next(iter(weights.values())).new_ones(width)
    return {**weights, **dict(zip(FINAL_NORM, (one, torch.zeros_like(one)), strict=True))}


def timm_config(encoder: Encoder) -> dict[str, Any]:
    """Return timm's part of ``config.json`` with all relevant constructor arguments, because timm's defaults differ."""
    spec, config = encoder.spec, encoder.config
    channels = len(spec.channels)
    sizes = ANY_SIZE_ARGS if config.fixed_size is None else {"img_size": config.fixed_size}
    side = config.fixed_size or config.options.get("img_size", 224)
    return {
        "architecture": strip_tag(config.name),
        "num_classes": 0,
        "num_features": encoder.widths[-1],
        "model_args": {"in_chans": channels, **sizes, **config.options},
        "pretrained_cfg": {
            "num_classes": 0,
            "input_size": [channels, *([side, side] if isinstance(side, int) else side)],
            "fixed_input_size": config.fixed_size is not None,
            "mean": list(spec.mean),
            "std": list(spec.std),
            "first_conv": "patch_embed.proj",
            "classifier": "head.fc",
        },
    }
