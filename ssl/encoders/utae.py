"""U-TAE, an encoder of image time series: a U-Net with temporal attention at its bottleneck.

Garnot & Landrieu, "Panoptic Segmentation of Satellite Image Time Series with Convolutional Temporal Attention
Networks" (arXiv 2107.07933), in the variant of IGN's FLAIR-HUB code: stride 1 and kernel 3, because its series are
10 x 10 pixels. Constructor arguments and parameters have the official names, so official weights load strictly.
"""

from __future__ import annotations

import reprlib
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import nn
from torch.nn import functional

from bocage.shards.errors import InputError
from bocage.ssl.encoders.base import Encoder
from bocage.ssl.encoders.temporal import BatchNorm2d, PackedDates, TemporalEncoder

Aggregation = Literal["att_group", "att_mean", "mean"]
Normalization = Literal["group", "batch", "instance", "none"]
PaddingMode = Literal["zeros", "reflect", "replicate", "circular"]

_NORM_GROUPS = 4  # of the frame encoder's group normalisation, as in the official code
_NEIGHBOUR_SCALE = 0.1  # of the weights around the centre of a kernel, at initialisation
_MAX_VALUE = 1 << 20  # far above any argument of a network that works
_CHOICES = {"agg_mode": Aggregation, "encoder_norm": Normalization, "padding_mode": PaddingMode}
_MIN_COUNTS = {"input_dim": 1, "str_conv_k": 1, "str_conv_s": 1, "str_conv_p": 0, "n_head": 1, "d_model": 1, "d_k": 1}
_WIDTHS = ("encoder_widths", "decoder_widths", "out_conv")


class _Conv2d(nn.Conv2d):
    """Convolution that pads by replication where maps are too narrow for reflect or circular padding."""

    def forward(self, maps: torch.Tensor) -> torch.Tensor:
        padding = self.padding[0]
        assert isinstance(padding, int)
        min_side = {"reflect": padding + 1, "circular": padding}.get(self.padding_mode, 0)
        if min(maps.shape[-2:]) >= min_side:
            return super().forward(maps)
        maps = functional.pad(maps, (padding,) * 4, mode="replicate")
        return functional.conv2d(maps, self.weight, self.bias, self.stride)


class _InstanceNorm(nn.Module):
    """Normalise each channel of each frame to mean 0 and variance 1, without parameters; a single pixel becomes 0."""

    def forward(self, maps: torch.Tensor) -> torch.Tensor:
        return torch.group_norm(maps, maps.shape[1])


def _emphasize_centre(convolution: nn.Conv2d | nn.ConvTranspose2d) -> None:
    """Scale the weights around the centre of an odd kernel down, and all of them up to the same sum of squares.

    With equal weights, the many 3 x 3 layers of an untrained network average pixels over the whole window.
    Delta-orthogonal initialisation (arXiv 1806.05393) keeps nothing but the centre.
    """
    side = convolution.kernel_size[0]
    if side % 2 == 0 or side == 1 or convolution.stride[0] > 1:
        return
    factor = convolution.weight.new_full((side, side), _NEIGHBOUR_SCALE)
    factor[side // 2, side // 2] = 1.0
    with torch.no_grad():
        convolution.weight.mul_(factor * side / factor.square().sum().sqrt())


def _normalization(kind: Normalization, channels: int) -> list[nn.Module]:
    if kind == "group":
        return [nn.GroupNorm(_NORM_GROUPS, channels)]
    if kind == "batch":
        return [BatchNorm2d(channels)]
    return [_InstanceNorm()] if kind == "instance" else []


class _ConvLayers(nn.Module):
    """Convolution, normalisation and ReLU for each step of ``widths``; parameters ``conv.<i>``."""

    def __init__(
        self,
        widths: Sequence[int],
        norm: Normalization,
        padding_mode: PaddingMode,
        kernel: int = 3,
        stride: int = 1,
        padding: int = 1,
    ) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for i in range(len(widths) - 1):
            convolution = _Conv2d(
                widths[i], widths[i + 1], kernel, stride=stride, padding=padding, padding_mode=padding_mode
            )
            layers += [convolution, *_normalization(norm, widths[i + 1]), nn.ReLU(inplace=True)]
        self.conv = nn.Sequential(*layers)

    def forward(self, maps: torch.Tensor) -> torch.Tensor:
        return self.conv(maps)


class _ConvBlock(nn.Module):
    """``_ConvLayers`` under the official parameter names, one level deeper: ``conv.conv.<i>``."""

    def __init__(self, widths: Sequence[int], norm: Normalization, padding_mode: PaddingMode) -> None:
        super().__init__()
        self.conv = _ConvLayers(widths, norm, padding_mode)

    def forward(self, maps: torch.Tensor) -> torch.Tensor:
        return self.conv(maps)


class _DownBlock(nn.Module):
    """Strided convolution, followed by a plain and a residual convolution."""

    def __init__(
        self,
        d_in: int,
        d_out: int,
        norm: Normalization,
        padding_mode: PaddingMode,
        kernel: int,
        stride: int,
        padding: int,
    ) -> None:
        super().__init__()
        self.down = _ConvLayers((d_in, d_in), norm, padding_mode, kernel, stride, padding)
        self.conv1 = _ConvLayers((d_in, d_out), norm, padding_mode)
        self.conv2 = _ConvLayers((d_out, d_out), norm, padding_mode)

    def forward(self, maps: torch.Tensor) -> torch.Tensor:
        maps = self.conv1(self.down(maps))
        return maps + self.conv2(maps)


class _UpBlock(nn.Module):
    """Transposed convolution, concatenated with the pooled skip, followed by a plain and a residual convolution."""

    def __init__(
        self,
        d_in: int,
        d_out: int,
        d_skip: int,
        padding_mode: PaddingMode,
        kernel: int,
        stride: int,
        padding: int,
    ) -> None:
        super().__init__()
        self.skip_conv = nn.Sequential(nn.Conv2d(d_skip, d_skip, 1), BatchNorm2d(d_skip), nn.ReLU(inplace=True))
        transposed = nn.ConvTranspose2d(d_in, d_out, kernel, stride=stride, padding=padding)
        self.up = nn.Sequential(transposed, BatchNorm2d(d_out), nn.ReLU(inplace=True))
        self.conv1 = _ConvLayers((d_out + d_skip, d_out), "batch", padding_mode)
        self.conv2 = _ConvLayers((d_out, d_out), "batch", padding_mode)

    def forward(self, maps: torch.Tensor, skip: torch.Tensor) -> torch.Tensor:
        transposed, *rest = self.up
        # Strided convolutions drop the last row of odd sizes; the skip has the original size.
        maps = transposed(maps, output_size=skip.shape[-2:])
        for layer in rest:
            maps = layer(maps)
        maps = self.conv1(torch.cat((maps, self.skip_conv(skip)), dim=1))
        return maps + self.conv2(maps)


class UTAEOutput(NamedTuple):
    """Output of U-TAE.

    Attributes:
        maps: feature maps, deepest first as in the official code, (B, decoder_widths[-1 - i], H_i, W_i).
        logits: output of the official head, (B, out_conv[-1], H, W); None without a head.
        attention: weight of each date in each head at the deepest level, (n_head, B, T, h, w), zero at padded dates;
            None unless requested. In training mode, dropout has been applied to it.
    """

    maps: list[torch.Tensor]
    logits: torch.Tensor | None
    attention: torch.Tensor | None


class UTAE(Encoder):
    """U-TAE with packed dates: padded and masked dates cost no computation and have no influence.

    Unlike in the official code, kernels are initialised with most of their weight at the centre, and attention heads
    with a preference for one season each, so that an untrained encoder distinguishes pixels and dates.

    Shared convolutions encode each date alone. Group normalisation shares no statistics between dates, so a masked
    date cannot leak. ``TemporalEncoder`` pools the deepest maps over dates, and its attention pools the skips.

    Args:
        input_dim: channels of a frame.
        encoder_widths, decoder_widths: channels of each level, finest first; the last values must be equal.
        out_conv: widths of the official head, ending in the number of classes; used with ``head``.
        str_conv_k, str_conv_s, str_conv_p: kernel, stride and padding of the convolutions between levels.
        agg_mode: pooling of the skips over dates: ``att_group`` weights each group of channels by the attention of one
            head, ``att_mean`` weights all channels by the mean attention, ``mean`` weights all dates equally.
        encoder_norm: normalisation of the frame encoder. ``batch`` mixes dates and samples. ``none`` stands for all
            other values of the official code, which then omits the layer.
        n_head, d_model, d_k: see ``TemporalEncoder``.
        pad_value: value of padded frames in the official code, used when ``masked_norm`` is off. Padding itself is
            given by a mask.
        padding_mode: padding mode of the convolutions.
        masked_norm: see ``TemporalEncoder``; off for official weights.
        head: whether to build the official head, whose logits end in a ReLU.

    Raises:
        InputError: an argument has a wrong type or value; the message names it.
    """

    def __init__(
        self,
        input_dim: int,
        encoder_widths: Sequence[int] = (64, 64, 64, 128),
        decoder_widths: Sequence[int] = (32, 32, 64, 128),
        out_conv: Sequence[int] = (32, 20),
        str_conv_k: int = 3,
        str_conv_s: int = 1,
        str_conv_p: int = 1,
        agg_mode: Aggregation = "att_group",
        encoder_norm: Normalization = "group",
        n_head: int = 16,
        d_model: int = 256,
        d_k: int = 4,
        pad_value: float = 0.0,
        padding_mode: PaddingMode = "reflect",
        masked_norm: bool = True,
        head: bool = False,
    ) -> None:
        # Must be the first line, while the arguments are the only local variables.
        _check_arguments({key: value for key, value in locals().items() if key not in ("self", "__class__")})
        super().__init__()
        levels = len(encoder_widths)
        self.agg_mode = agg_mode
        self.widths = tuple(decoder_widths)
        self.strides = tuple(str_conv_s**level for level in range(levels))

        self._level_conv = level_conv = (str_conv_k, str_conv_s, str_conv_p)
        self.in_conv = _ConvBlock((input_dim, encoder_widths[0], encoder_widths[0]), encoder_norm, padding_mode)
        self.down_blocks = nn.ModuleList(
            _DownBlock(encoder_widths[i], encoder_widths[i + 1], encoder_norm, padding_mode, *level_conv)
            for i in range(levels - 1)
        )
        self.temporal_encoder = TemporalEncoder(
            encoder_widths[-1], n_head, d_model, d_k, encoder_widths[-1], masked_norm, pad_value
        )
        self.up_blocks = nn.ModuleList(
            _UpBlock(decoder_widths[i], decoder_widths[i - 1], encoder_widths[i - 1], padding_mode, *level_conv)
            for i in range(levels - 1, 0, -1)
        )
        self.out_conv = _ConvBlock((decoder_widths[0], *out_conv), "batch", padding_mode) if head else None
        self.head_classes = out_conv[-1] if head else None
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
                _emphasize_centre(module)

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Group parameters by depth, for timm's ``group_parameters``: down blocks, temporal encoder, up blocks."""
        return {
            "stem": r"^(?:in_conv|mask_token)",
            "down": r"^down_blocks" if coarse else r"^down_blocks\.(\d+)",
            "time": r"^temporal_encoder",
            "up": r"^up_blocks" if coarse else r"^up_blocks\.(\d+)",
            "head": r"^out_conv",
        }

    def _resize_attention(self, attention: torch.Tensor, size: torch.Size) -> torch.Tensor:
        """Resize attention to a skip; wide padding can make maps grow with depth, and ``att_group`` then averages."""
        if self.agg_mode == "att_group" and attention.shape[-1] > size[-1] and attention.shape[-2] > size[-2]:
            return functional.interpolate(attention, size, mode="area")
        return functional.interpolate(attention, size, mode="bilinear", align_corners=False)

    def _pool_skip(self, maps: torch.Tensor, attention: torch.Tensor, series: PackedDates) -> torch.Tensor:
        """Pool (V, C, H, W) maps over dates to (B, C, H, W), with the (V, n_head, h, w) attention of the last level."""
        channels = maps.shape[1]
        tokens = maps.permute(0, 2, 3, 1)
        if self.agg_mode == "mean":
            pooled = series.sum_over_dates(tokens) / series.counts.clamp_min(1).to(tokens.dtype).view(-1, 1, 1, 1)
        else:
            if self.agg_mode == "att_mean":
                attention = attention.mean(dim=1, keepdim=True)
            size = maps.shape[-2:]
            if not maps.shape[0]:  # torch cannot interpolate an empty batch
                attention = attention.new_zeros(0, attention.shape[1], *size)
            elif attention.shape[-2:] != size:
                attention = self._resize_attention(attention, size)
            # A product with a 0/1 matrix repeats each head over its channels, faster than broadcasting 4 channels.
            heads = attention.shape[1]
            repeat = torch.eye(heads, dtype=tokens.dtype, device=tokens.device).repeat_interleave(channels // heads, 1)
            pooled = series.sum_over_dates((attention.permute(0, 2, 3, 1) @ repeat).to(tokens.dtype) * tokens)
        return pooled.permute(0, 3, 1, 2)

    def _check_size(self, height: int, width: int) -> None:
        kernel, stride, padding = self._level_conv
        side = min(height, width)
        for _ in self.down_blocks:
            side = (side + 2 * padding - kernel) // stride + 1
            if side < 1:
                raise InputError(
                    f"U-TAE: series of {height} x {width} px are too small for {len(self.down_blocks)} convolutions "
                    f"with str_conv_k = {kernel}, str_conv_s = {stride}, str_conv_p = {padding}; use larger windows or "
                    "fewer levels"
                )

    def _encode(self, values: torch.Tensor, series: PackedDates) -> tuple[list[torch.Tensor], torch.Tensor]:
        """Compute the maps, deepest first, and the (V, n_head, h, w) attention of the valid dates."""
        self._check_size(values.shape[-2], values.shape[-1])
        skips = [self.in_conv(series.gather(values).contiguous(memory_format=torch.channels_last))]
        for block in self.down_blocks:
            skips.append(block(skips[-1]))
        embedding, attention = self.temporal_encoder(skips.pop(), series)
        maps = [embedding]
        for block, skip in zip(self.up_blocks, reversed(skips)):
            maps.append(block(maps[-1], self._pool_skip(skip, attention, series)))
        return maps, attention

    def forward(
        self, x: torch.Tensor, dates: torch.Tensor, pad_mask: torch.Tensor | None = None, *, attention: bool = False
    ) -> UTAEOutput:
        """Compute feature maps, logits if there is a head, and the attention on request.

        Args:
            x: frames, (B, T, C, H, W) float; values at padded dates are never read.
            dates: days since 15 May, (B, T).
            pad_mask: True at padded dates, (B, T) bool; None equals all False. T = 0 and series without valid dates
                are allowed: their maps depend on the weights only.
            attention: whether to return the attention.

        Raises:
            InputError: the frames are too small for the convolutions between levels.
        """
        series = PackedDates.from_dates(dates, pad_mask)
        maps, weights = self._encode(x, series)
        logits = None if self.out_conv is None else self.out_conv(maps[-1])
        return UTAEOutput(maps, logits, series.scatter(weights).permute(2, 0, 1, 3, 4) if attention else None)

    def features(
        self,
        values: torch.Tensor,
        dates: torch.Tensor | None = None,
        padding: torch.Tensor | None = None,
        mask: torch.Tensor | None = None,
    ) -> list[torch.Tensor]:
        """Compute the feature maps, see ``Encoder.features``; ``padding`` is also True at masked dates.

        Raises:
            InputError: see ``forward``.
            TypeError: dates are missing, or a mask is given, which only images have.
        """
        if dates is None:
            raise TypeError("U-TAE needs dates")
        if mask is not None:
            raise TypeError("U-TAE accepts masked dates in `padding`, not in `mask`")
        return self._encode(values, PackedDates.from_dates(dates, padding))[0][::-1]


def _check_arguments(arguments: Mapping[str, Any]) -> None:
    """Check the arguments of ``UTAE`` one by one and against each other; raises ``InputError`` on the first error."""
    for key, choices in _CHOICES.items():
        _require(arguments, key, arguments[key] in get_args(choices), f"one of {', '.join(get_args(choices))}")
    for key, minimum in _MIN_COUNTS.items():
        _require(arguments, key, _is_count(arguments[key], minimum), f"an integer from {minimum} to {_MAX_VALUE}")
    for key in _WIDTHS:
        valid = isinstance(arguments[key], Sequence) and all(_is_count(width, 1) for width in arguments[key])
        _require(arguments, key, valid, f"a list of integers from 1 to {_MAX_VALUE}")
    for key in ("masked_norm", "head"):
        _require(arguments, key, isinstance(arguments[key], bool), "true or false")
    valid = type(arguments["pad_value"]) in (int, float) and abs(arguments["pad_value"]) <= _MAX_VALUE
    _require(arguments, "pad_value", valid, f"a number from -{_MAX_VALUE} to {_MAX_VALUE}")
    _check_combinations(arguments)


def _is_count(value: object, minimum: int) -> bool:
    return type(value) is int and minimum <= value <= _MAX_VALUE  # not isinstance, because True is an int too


def _require(arguments: Mapping[str, Any], key: str, valid: bool, expected: str) -> None:
    if not valid:
        raise InputError(f"U-TAE: {key} = {reprlib.repr(arguments[key])} is not {expected}")


def _check_combinations(arguments: Mapping[str, Any]) -> None:
    encoder_widths, decoder_widths = list(arguments["encoder_widths"]), list(arguments["decoder_widths"])
    if not encoder_widths or len(encoder_widths) != len(decoder_widths) or encoder_widths[-1] != decoder_widths[-1]:
        raise InputError(
            f"U-TAE: encoder_widths {reprlib.repr(encoder_widths)} and decoder_widths {reprlib.repr(decoder_widths)} "
            "must have the same length and the same last value"
        )
    if arguments["head"] and not arguments["out_conv"]:
        raise InputError("U-TAE: out_conv is empty; its last value must be the number of classes")
    n_head = arguments["n_head"]
    for divisor, used, reason in (
        (n_head, arguments["agg_mode"] == "att_group", f"n_head = {n_head} with agg_mode att_group"),
        (_NORM_GROUPS, arguments["encoder_norm"] == "group", f"{_NORM_GROUPS} with encoder_norm group"),
    ):
        for width in encoder_widths if used else ():
            if width % divisor:
                raise InputError(f"U-TAE: encoder_widths holds {width}, which must be a multiple of {reason}")
    for key, width in (("encoder_widths[-1]", encoder_widths[-1]), ("d_model", arguments["d_model"])):
        if width % n_head:
            raise InputError(f"U-TAE: {key} = {width} is not a multiple of n_head = {n_head}")
