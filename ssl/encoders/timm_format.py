"""How a Swin encoder is written so that timm alone loads it: ``timm.create_model("local-dir:FOLDER", ...)``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from bocage.ssl.encoders.base import Encoder

ANY_SIZE: dict[str, Any] = {"always_partition": True, "strict_img_size": False}
"""timm arguments that keep the windows whole at every input size, so that one set of weights serves all of them."""

FINAL_NORM = ("norm.weight", "norm.bias")
"""timm's plain model ends in a normalisation that feature maps do not pass."""


def architecture_of(name: str) -> str:
    """A timm model name without the tag of its published weights."""
    return name.partition(".")[0]


def plain_name(name: str) -> str:
    """timm's name of a parameter of ``SwinEncoder``: ``model.layers_0.x`` is ``layers.0.x`` in the plain model."""
    return name.removeprefix("model.").replace("layers_", "layers.", 1)


def plain_weights(encoder: Encoder) -> dict[str, torch.Tensor]:
    """Weights of a Swin encoder by timm's plain names, the encoder's own tensors, of any shape, but its mask token."""
    return {plain_name(name): tensor for name, tensor in encoder.state_dict().items() if name != "mask_token"}


def with_final_norm(weights: Mapping[str, torch.Tensor], width: int) -> dict[str, torch.Tensor]:
    """The weights, of any shape, and the final normalisation, as the identity it starts as.

    ``width`` is that of the last map and of the normalisation's two tensors, (width,).
    """
    one = next(iter(weights.values())).new_ones(width)
    return {**weights, **dict(zip(FINAL_NORM, (one, torch.zeros_like(one)), strict=True))}


def timm_description(encoder: Encoder) -> dict[str, Any]:
    """What timm reads of ``config.json``. Every constructor argument that matters is there: timm's defaults differ."""
    spec, config = encoder.spec, encoder.config
    channels = len(spec.channels)
    sizes = ANY_SIZE if config.fixed_size is None else {"img_size": config.fixed_size}
    side = config.fixed_size or config.options.get("img_size", 224)
    return {
        "architecture": architecture_of(config.name),
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
