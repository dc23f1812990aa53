"""What every encoder is: one sensor in, a pyramid of feature maps out."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import nn

from bocage.shards.preprocess.normalize import InputSpec

Architecture = Literal["swin", "utae"]


@dataclass(frozen=True, kw_only=True)
class EncoderConfig:
    """How to build an encoder.

    Attributes:
        architecture: ``swin`` for images, ``utae`` for series.
        name: the timm model name of a Swin, with or without the tag of timm's published weights; unused by U-TAE.
        options: further constructor arguments: timm model arguments (``embed_dim``, ``depths``, ``num_heads``,
            ``window_size``, ...) or U-TAE's (``encoder_widths``, ``n_head``, ...).
        fixed_size: the only image side a Swin shall take, pixels, as the official FLAIR-HUB code builds its encoders;
            None: any size (see ``SwinEncoder``).
    """

    architecture: Architecture = "swin"
    name: str = "swin_tiny_patch4_window7_224"
    options: dict[str, Any] = field(default_factory=dict)
    fixed_size: int | None = None


class Encoder(nn.Module):
    """Base of the encoders.

    Attributes:
        spec: the input it was built for, with the statistics that ``normalize.standardize`` needs.
        config: how it was built.
        widths: channels of each feature map, finest map first.
        strides: input pixels per feature cell of each map, finest map first. U-TAE's maps all have stride 1 when it
            is built without down-sampling, as FLAIR-HUB's 10 x 10 series need.
        runs_always: a batch without the sensor shall involve it all the same (``features_of_none``), because other
            ranks wait for its weights.
    """

    spec: InputSpec
    config: EncoderConfig
    widths: tuple[int, ...]
    strides: tuple[int, ...]
    runs_always = False

    def features(
        self,
        values: torch.Tensor,
        dates: torch.Tensor | None = None,
        padding: torch.Tensor | None = None,
        mask: torch.Tensor | None = None,
    ) -> list[torch.Tensor]:
        """Feature maps, finest first.

        Args:
            values: standardised input without NaN, (B, C, H, W) or (B, T, C, H, W) float.
            dates: for series, (B, T) days since 15 May.
            padding: for series, (B, T) bool, True where there is no date to look at: padded or masked.
            mask: for images, (B, H // p, W // p) bool over patch-embedding tokens (p = 4): True tokens are replaced
                by the learned mask token before any attention (SimMIM, arXiv 2111.09886). Its parameter is not part
                of a published encoder.

        Returns:
            (B, widths[i], H / strides[i], W / strides[i]) for each i; sizes round up.
        """
        raise NotImplementedError

    def features_of_none(
        self,
        values: torch.Tensor,
        dates: torch.Tensor | None = None,
        padding: torch.Tensor | None = None,
        mask: torch.Tensor | None = None,
    ) -> list[torch.Tensor]:
        """Feature maps of no sample, (0, widths[i], ...), whose backward pass gives every weight a gradient of zero.

        Arguments as for ``features``, of at least one sample, which leaves no trace in running statistics.
        """
        modes = {module: module.training for module in self.modules()}  # a frozen part does not train with the rest
        self.eval()
        try:
            if dates is not None and padding is not None:
                values, dates, padding = values[:, :1], dates[:, :1], torch.zeros_like(padding[:, :1])
            return [features[:0] for features in self.features(values, dates, padding, mask)]
        finally:
            for module, training in modes.items():
                module.training = training
