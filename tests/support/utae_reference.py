"""Slow reference implementation of U-TAE, and small models to compare with it."""

from __future__ import annotations

import importlib.util
import math
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch.nn import functional

from bocage.ssl.encoders.utae import UTAE

GOLDEN = Path(__file__).parents[1] / "data" / "golden"
SMALL: dict[str, Any] = {
    "encoder_widths": (16, 16, 32),
    "decoder_widths": (16, 24, 32),
    "n_head": 8,
    "d_model": 64,
}
STRIDED = {"str_conv_k": 4, "str_conv_s": 2, "str_conv_p": 1}


def load_fill() -> ModuleType:
    """Load ``fill.py`` of the golden outputs, which computes weights from their names."""
    location = importlib.util.spec_from_file_location("golden_fill", GOLDEN / "fill.py")
    assert location is not None
    assert location.loader is not None
    module = importlib.util.module_from_spec(location)
    location.loader.exec_module(module)
    return module


def small_model(**options: Any) -> UTAE:
    """Build a small float64 U-TAE without dropout, with all weights and statistics changed from their defaults."""
    model = UTAE(3, **{**SMALL, **options}).double()
    fill = load_fill()
    model.load_state_dict({name: fill.fill(name, value).to(value.dtype) for name, value in model.state_dict().items()})
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    return model


def series(batch: int, length: int, size: tuple[int, int] = (10, 10)) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (B, T, 3, H, W) noise and (B, T) sorted days."""
    generator = torch.Generator().manual_seed(length)
    values = torch.randn(batch, length, 3, *size, generator=generator, dtype=torch.float64)
    days = torch.randint(-200, 200, (batch, length), generator=generator)
    return values, days.sort(dim=1).values.double()


class Reference:
    """The network of arXiv 2107.07933 and 2007.00586, equation by equation, one date and one head at a time.

    Args:
        weights: state dict of the model, with gradients enabled.
        model: model to imitate.
        options: constructor arguments that the model does not store.
    """

    def __init__(self, weights: dict[str, torch.Tensor], model: UTAE, options: dict[str, Any]) -> None:
        self.weights = weights
        self.training = model.training
        self.stride = options.get("str_conv_s", 1)
        self.norm = options.get("encoder_norm", "group")
        self.masked_norm = options.get("masked_norm", True)
        self.pad_value = options.get("pad_value", 0.0)
        self.levels = len(model.widths)
        self.aggregation = model.agg_mode

    def convolve(self, name: str, x: torch.Tensor, norm: str, stride: int = 1, step: int = 0) -> torch.Tensor:
        """Apply one step of a sequence: convolution with reflect padding, normalisation, ReLU."""
        first = step * (2 if norm == "none" else 3)
        weight, bias = self.weights[f"{name}.{first}.weight"], self.weights[f"{name}.{first}.bias"]
        border = "reflect" if min(x.shape[-2:]) > 1 else "replicate"
        x = functional.conv2d(functional.pad(x, (1, 1, 1, 1), mode=border), weight, bias, stride=stride)
        return self.normalize(f"{name}.{first + 1}", x, norm).clamp_min(0)

    def normalize(self, name: str, x: torch.Tensor, norm: str) -> torch.Tensor:
        if norm == "none":
            return x
        if norm == "instance":
            centred = x - x.mean(dim=(2, 3), keepdim=True)
            return centred / (centred.square().mean(dim=(2, 3), keepdim=True) + 1e-5).sqrt()
        weight, bias = self.weights[f"{name}.weight"], self.weights[f"{name}.bias"]
        if norm == "group":
            return functional.group_norm(x, 4, weight, bias)
        mean, variance = self.weights[f"{name}.running_mean"], self.weights[f"{name}.running_var"]
        return functional.batch_norm(x, mean.clone(), variance.clone(), weight, bias, training=self.training)

    def frames(self, x: torch.Tensor) -> list[torch.Tensor]:
        """Compute the maps of (N, C, H, W) dates at all levels."""
        x = self.convolve("in_conv.conv.conv", x, self.norm)
        maps = [self.convolve("in_conv.conv.conv", x, self.norm, step=1)]
        for level in range(self.levels - 1):
            block = f"down_blocks.{level}"
            x = self.convolve(f"{block}.down.conv", maps[-1], self.norm, self.stride)
            x = self.convolve(f"{block}.conv1.conv", x, self.norm)
            maps.append(x + self.convolve(f"{block}.conv2.conv", x, self.norm))
        return maps

    def attend(self, x: torch.Tensor, days: list[float], padded: list[float]) -> tuple[torch.Tensor, torch.Tensor]:
        """Pool the (dates, C, H, W) maps of a series: heads (pixels, d_model) and attention (heads, dates, H, W).

        The official code keeps padded dates, as maps of the padding value with a score of -1000.
        """
        name = "temporal_encoder"
        count, channels, height, width = x.shape
        if not self.masked_norm:
            x = torch.cat((x, x.new_full((len(padded), channels, height, width), self.pad_value)))
            days = days + padded
        query = self.weights[f"{name}.attention_heads.Q"]
        heads, d_k = query.shape
        tokens = x.permute(2, 3, 1, 0).flatten(0, 1)  # (pixels, C, dates)
        if len(x):
            tokens = functional.group_norm(
                tokens, heads, self.weights[f"{name}.in_norm.weight"], self.weights[f"{name}.in_norm.bias"]
            )
        tokens = self.weights[f"{name}.inconv.weight"][:, :, 0] @ tokens
        tokens = tokens + self.weights[f"{name}.inconv.bias"][:, None]
        size = tokens.shape[1] // heads
        position = [
            [(math.cos if i % 2 else math.sin)(day / 1000 ** (2 * (i // 2) / size)) for day in days]
            for i in range(size)
        ]
        tokens = tokens + torch.tensor(position, dtype=x.dtype).repeat(heads, 1)
        keys = self.weights[f"{name}.attention_heads.fc1_k.weight"] @ tokens
        keys = keys + self.weights[f"{name}.attention_heads.fc1_k.bias"][:, None]
        pooled, attentions = [], []
        for head in range(heads):
            key = keys[:, head * d_k : (head + 1) * d_k]
            score = (query[head][:, None] * key).sum(dim=1) / math.sqrt(d_k)
            score[:, count:] = -1e3
            attention = score.softmax(dim=1)
            value = tokens[:, head * size : (head + 1) * size]
            pooled.append((attention[:, None] * value).sum(dim=2))
            attentions.append(attention[:, :count].T.reshape(count, height, width))
        return torch.cat(pooled, dim=1), torch.stack(attentions)

    def skip(self, maps: torch.Tensor, attention: torch.Tensor) -> torch.Tensor:
        """Pool the (dates, C, H, W) maps of a level over dates, (1, C, H, W); zero without dates."""
        if not len(maps):
            return maps.sum(dim=0, keepdim=True)
        if self.aggregation == "mean":
            return maps.mean(dim=0, keepdim=True)
        if self.aggregation == "att_mean":
            attention = attention.mean(dim=0, keepdim=True)
        pooled = []
        for group, head in zip(maps.chunk(len(attention), dim=1), attention):
            resized = functional.interpolate(head[:, None], maps.shape[-2:], mode="bilinear", align_corners=False)
            pooled.append((resized * group).sum(dim=0, keepdim=True))
        return torch.cat(pooled, dim=1)

    def embedding(self, heads: torch.Tensor) -> torch.Tensor:
        """Map (B pixels, d_model) pooled heads to (B pixels, C)."""
        name = "temporal_encoder"
        x = functional.linear(heads, self.weights[f"{name}.mlp.0.weight"], self.weights[f"{name}.mlp.0.bias"])
        x = self.normalize(f"{name}.mlp.1", x, "batch").clamp_min(0)
        groups = len(self.weights[f"{name}.attention_heads.Q"])
        scale, shift = self.weights[f"{name}.out_norm.weight"], self.weights[f"{name}.out_norm.bias"]
        return functional.group_norm(x, groups, scale, shift)

    def up(self, block: str, x: torch.Tensor, skip: torch.Tensor) -> torch.Tensor:
        weight, bias = self.weights[f"{block}.skip_conv.0.weight"], self.weights[f"{block}.skip_conv.0.bias"]
        size = skip.shape[-2:]
        skip = self.normalize(f"{block}.skip_conv.1", functional.conv2d(skip, weight, bias), "batch").clamp_min(0)
        weight, bias = self.weights[f"{block}.up.0.weight"], self.weights[f"{block}.up.0.bias"]
        lost = [n - ((m - 1) * self.stride - 2 + weight.shape[-1]) for n, m in zip(size, x.shape[-2:])]
        x = functional.conv_transpose2d(x, weight, bias, stride=self.stride, padding=1, output_padding=lost)
        x = self.normalize(f"{block}.up.1", x, "batch").clamp_min(0)
        x = self.convolve(f"{block}.conv1.conv", torch.cat((x, skip), dim=1), "batch")
        return x + self.convolve(f"{block}.conv2.conv", x, "batch")

    def __call__(self, values: torch.Tensor, dates: torch.Tensor, padding: torch.Tensor) -> list[torch.Tensor]:
        """Compute the maps, deepest first."""
        if self.norm == "batch":  # its statistics cover all valid dates together
            levels = self.frames(values[~padding])
        else:
            frames = [self.frames(frame[None]) for frame in values[~padding]]
            levels = [torch.cat(level) for level in zip(*frames)]
        counts = (~padding).sum(dim=1).tolist()
        pooled, skips = [], []
        for sample, maps in enumerate(zip(*(level.split(counts) for level in levels))):
            days, hidden = dates[sample], padding[sample]
            heads, attention = self.attend(maps[-1], days[~hidden].tolist(), days[hidden].tolist())
            pooled.append(heads)
            skips.append([self.skip(level, attention) for level in maps[:-1]])
        size = levels[-1].shape[-2:]
        outputs = [self.embedding(torch.cat(pooled)).view(len(values), *size, -1).permute(0, 3, 1, 2)]
        for level in range(self.levels - 1):
            skip = torch.cat([levels[self.levels - 2 - level] for levels in skips])
            outputs.append(self.up(f"up_blocks.{level}", outputs[-1], skip))
        return outputs
