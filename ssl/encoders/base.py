"""Base class and configuration of encoders: one sensor in, a pyramid of feature maps out."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import nn

from bocage.shards.errors import InputError
from bocage.shards.preprocess.normalize import InputSpec

__all__ = ["Architecture", "Encoder", "EncoderConfig"]

Architecture = Literal["swin", "utae"]


@dataclass(frozen=True, kw_only=True)
class EncoderConfig:
    """Architecture of an encoder.

    Attributes:
        architecture: ``swin`` for images, ``utae`` for time series.
        name: timm model name of a Swin, with or without the tag of timm's pretrained weights; unused by U-TAE.
        options: further constructor arguments: timm model arguments (``embed_dim``, ``depths``, ``num_heads``,
            ``window_size``, ...) or those of U-TAE (``encoder_widths``, ``n_head``, ...).
        fixed_size: side of the images in pixels, if a Swin is built for one image size as in the official FLAIR-HUB
            code. None: any size (see ``SwinEncoder``).
    """

    architecture: Architecture = "swin"
    name: str = "swin_tiny_patch4_window7_224"
    options: dict[str, Any] = field(default_factory=dict)
    fixed_size: int | None = None


class Encoder(nn.Module):
    """Base class of encoders.

    Attributes:
        spec: input that the encoder reads, with the statistics that ``normalize.standardize`` needs.
        config: architecture and its options.
        widths: channels of each feature map, finest map first.
        strides: input pixels per cell of each feature map, finest map first. All strides of a U-TAE are 1 when it is
            built without down-sampling, as FLAIR-HUB's 10 x 10 series need.
        run_without_samples: whether the encoder must also run on batches that lack its sensor (``empty_features``).
            FSDP sets it, because the other ranks wait in collectives for this rank's part of the weights.
    """

    spec: InputSpec
    config: EncoderConfig
    widths: tuple[int, ...]
    strides: tuple[int, ...]
    run_without_samples = False

    def features(
        self,
        values: torch.Tensor,
        dates: torch.Tensor | None = None,
        padding: torch.Tensor | None = None,
        mask: torch.Tensor | None = None,
    ) -> list[torch.Tensor]:
        """Compute the feature maps, finest first.

        Args:
            values: standardised input without NaN, (B, C, H, W) or (B, T, C, H, W) float.
            dates: days since 15 May, (B, T); series only.
            padding: True where a date is padded or masked and therefore ignored, (B, T) bool; series only.
            mask: True at masked patch-embedding tokens, (B, H // p, W // p) bool with p = 4; images only. The learned
                mask token replaces them before any attention (SimMIM, arXiv 2111.09886). Published encoders do not
                contain this token.

        Returns:
            (B, widths[i], H / strides[i], W / strides[i]) for each i; sizes round up.
        """
        raise NotImplementedError

    def empty_features(
        self,
        values: torch.Tensor,
        dates: torch.Tensor | None = None,
        padding: torch.Tensor | None = None,
        mask: torch.Tensor | None = None,
    ) -> list[torch.Tensor]:
        """Compute feature maps of an empty batch, (0, widths[i], ...), whose backward gives all weights zero gradients.

        The arguments are those of ``features`` for at least one sample. The sample does not change running statistics.
        """
        modes = {module: module.training for module in self.modules()}  # frozen parts stay in evaluation mode
        self.eval()
        try:
            if dates is not None and padding is not None:
                values, dates, padding = values[:, :1], dates[:, :1], torch.zeros_like(padding[:, :1])
            return [features[:0] for features in self.features(values, dates, padding, mask)]
        finally:
            for module, training in modes.items():
                module.training = training


def check_options(
    options: Iterable[str], constructor: Callable[..., Any], *, reserved: Iterable[str], model: str
) -> None:
    """Check that a constructor accepts the names of encoder options.

    Args:
        options: names of the options.
        constructor: class or function whose parameters are the valid names.
        reserved: parameters that users may not set.
        model: name of the model in the error message.

    Raises:
        InputError: an option is unknown; the message suggests the nearest valid name.
    """
    valid = [key for key in inspect.signature(constructor).parameters if key not in set(reserved)]
    for key in options:
        if key not in valid:
            near = difflib.get_close_matches(key, valid, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"valid ones: {', '.join(valid)}"
            raise InputError(f"encoder option {key!r} is unknown to {model}; {hint}")
