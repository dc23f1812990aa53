"""Reference implementations for ``models.py``: U-TAE and the fusion from the papers, and wrappers of the official code.

They follow the equations of arXiv 2107.07933 and 2007.00586 with torch's layers, optimised neither for speed nor
against it. They use no code of ``bocage``, so the comparison shows what bocage's implementation gains.
"""

from __future__ import annotations

import importlib
import importlib.util
import math
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional

_PADDED_SCORE = -1e3  # attention score of a padded date in the official code
_GROUPS = 4


def _convolutions(widths: tuple[int, ...], norm: str) -> nn.Module:
    """Build 3 x 3 convolution, norm and ReLU for each pair of successive ``widths``; parameter names are official."""
    layers: list[nn.Module] = []
    for d_in, d_out in pairwise(widths):
        layers.append(nn.Conv2d(d_in, d_out, 3, padding=1, padding_mode="reflect"))
        layers.append(nn.GroupNorm(_GROUPS, d_out) if norm == "group" else nn.BatchNorm2d(d_out))
        layers.append(nn.ReLU())
    block = nn.Module()
    block.conv = nn.Sequential(*layers)
    return block


class ReferenceUTAE(nn.Module):
    """U-TAE with FLAIR-HUB's defaults: stride 1, group normalisation, grouped attention, official parameter names.

    The convolutions process all dates, padded ones included. Keys and values are built for every pixel and date.

    Args:
        input_dim: channels of a frame.
        classes: output classes of the head.
        official_like: also do the additional work of the official code. It runs every block shared by the dates a
            second time on zeros to find its output shape, compares each block's input with the padding value to find
            padded frames, gathers the other frames and scatters them back, and encodes the date of every pixel.
    """

    def __init__(self, input_dim: int, classes: int, official_like: bool) -> None:
        super().__init__()
        encoder, decoder, d_model, d_k = (64, 64, 64, 128), (32, 32, 64, 128), 256, 4
        self.official_like = official_like
        self.n_head = 16
        self.in_conv = nn.Module()
        self.in_conv.conv = _convolutions((input_dim, encoder[0], encoder[0]), "group")
        self.down_blocks = nn.ModuleList()
        for d_in, d_out in pairwise(encoder):
            block = nn.Module()
            block.down = _convolutions((d_in, d_in), "group")
            block.conv1 = _convolutions((d_in, d_out), "group")
            block.conv2 = _convolutions((d_out, d_out), "group")
            self.down_blocks.append(block)
        temporal: Any = nn.Module()
        temporal.in_norm = nn.GroupNorm(self.n_head, encoder[-1])
        temporal.inconv = nn.Conv1d(encoder[-1], d_model, 1)
        temporal.attention_heads = nn.Module()
        temporal.attention_heads.Q = nn.Parameter(torch.zeros(self.n_head, d_k))
        temporal.attention_heads.fc1_k = nn.Linear(d_model, self.n_head * d_k)
        temporal.mlp = nn.Sequential(nn.Linear(d_model, encoder[-1]), nn.BatchNorm1d(encoder[-1]), nn.ReLU())
        temporal.out_norm = nn.GroupNorm(self.n_head, encoder[-1])
        self.temporal_encoder = temporal
        self.up_blocks = nn.ModuleList()
        for i in range(len(encoder) - 1, 0, -1):
            block = nn.Module()
            d_skip, d_out = encoder[i - 1], decoder[i - 1]
            block.skip_conv = nn.Sequential(nn.Conv2d(d_skip, d_skip, 1), nn.BatchNorm2d(d_skip), nn.ReLU())
            transposed = nn.ConvTranspose2d(decoder[i], d_out, 3, padding=1)
            block.up = nn.Sequential(transposed, nn.BatchNorm2d(d_out), nn.ReLU())
            block.conv1 = _convolutions((d_out + d_skip, d_out), "batch")
            block.conv2 = _convolutions((d_out, d_out), "batch")
            self.up_blocks.append(block)
        self.out_conv: Any = nn.Module()
        self.out_conv.conv = _convolutions((decoder[0], 32, classes), "batch")

    def _block(self, index: int, frames: torch.Tensor) -> torch.Tensor:
        """Apply block ``index`` to (N, C, H, W) frames; 0 is ``in_conv``, the down blocks follow."""
        if index == 0:
            return self.in_conv.conv.conv(frames)  # type: ignore[union-attr,operator]
        block: Any = self.down_blocks[index - 1]
        maps = block.conv1.conv(block.down.conv(frames))
        return maps + block.conv2.conv(maps)

    def _shared(self, index: int, maps: torch.Tensor, padding: torch.Tensor) -> torch.Tensor:
        """Apply a block to every date of (B, T, C, H, W) maps; the output is 0 for padded dates."""
        frames = maps.flatten(0, 1)
        if not self.official_like:
            frames = self._block(index, frames).unflatten(0, maps.shape[:2])
            return frames.masked_fill(padding[:, :, None, None, None], 0.0)
        shape = self._block(index, torch.zeros_like(frames)).shape
        padded = (frames == 0).all(dim=-1).all(dim=-1).all(dim=-1)
        if padded.any():
            encoded = torch.ones(shape) * 0.0
            encoded[~padded] = self._block(index, frames[~padded])
        else:
            encoded = self._block(index, frames)
        return encoded.unflatten(0, maps.shape[:2])

    def _normalized(self, sequence: torch.Tensor, padded: torch.Tensor) -> torch.Tensor:
        """Apply ``in_norm`` to (N, T, C) tokens; its statistics exclude the tokens of the (N, T) mask ``padded``."""
        norm: Any = self.temporal_encoder.in_norm
        groups = sequence.unflatten(2, (self.n_head, -1))
        weight = (~padded)[:, :, None, None].to(groups.dtype)
        count = weight.sum(dim=1, keepdim=True) * groups.shape[-1]
        mean = (groups * weight).sum(dim=(1, 3), keepdim=True) / count
        variance = ((groups - mean).square() * weight).sum(dim=(1, 3), keepdim=True) / count
        return ((groups - mean) * (variance + norm.eps).rsqrt()).flatten(2) * norm.weight + norm.bias

    def _positions(self, days: torch.Tensor, width: int) -> torch.Tensor:
        """Encode (N, T) days as (N, T, n_head * width): alternating sine and cosine columns, equal for all heads."""
        angles = days[..., None] / 1000 ** (torch.arange(width, device=days.device) // 2 * 2 / width)
        table = torch.stack((angles[..., 0::2].sin(), angles[..., 1::2].cos()), dim=-1).flatten(-2)
        return torch.cat([table] * self.n_head, dim=-1)

    def _temporal(
        self, maps: torch.Tensor, dates: torch.Tensor, padding: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Pool (B, T, C, H, W) maps to a (B, C, H, W) embedding; also return the (n_head, B, T, H, W) attention."""
        encoder: Any = self.temporal_encoder
        batch, length, channels, height, width = maps.shape
        sequence = maps.permute(0, 3, 4, 1, 2).contiguous().view(-1, length, channels)
        padded = padding[:, None].expand(-1, height * width, -1).reshape(-1, length)
        if self.official_like or not bool(padding.any()):
            sequence = encoder.in_norm(sequence.mT).mT
        else:
            sequence = self._normalized(sequence, padded)
        tokens = encoder.inconv(sequence.mT).mT
        size = tokens.shape[-1] // self.n_head
        if self.official_like:
            days = dates[:, None].expand(-1, height * width, -1).reshape(-1, length)
            tokens = tokens + self._positions(days, size)
        else:
            tokens = tokens + self._positions(dates, size).repeat_interleave(height * width, dim=0)
        query = encoder.attention_heads.Q
        d_k = query.shape[1]
        keys = encoder.attention_heads.fc1_k(tokens).unflatten(2, query.shape).permute(2, 0, 1, 3).contiguous()
        scores = torch.matmul(query[:, None, None], keys.mT)[:, :, 0] / math.sqrt(d_k)
        attention = scores.masked_fill(padded, _PADDED_SCORE).softmax(dim=-1)
        attention = functional.dropout(attention, 0.1, self.training)
        values = torch.stack(tokens.split(size, dim=-1))
        pooled = torch.matmul(attention[:, :, None], values)[:, :, 0].permute(1, 0, 2).flatten(1)
        embedding = encoder.out_norm(functional.dropout(encoder.mlp(pooled), 0.2, self.training))
        embedding = embedding.view(batch, height, width, -1).permute(0, 3, 1, 2)
        return embedding, attention.view(-1, batch, height, width, length).permute(0, 1, 4, 2, 3)

    def forward(
        self, x: torch.Tensor, dates: torch.Tensor, pad_mask: torch.Tensor | None
    ) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Compute logits and maps, deepest first, of a (B, T, C, H, W) series with (B, T) days and padding mask."""
        padding = torch.zeros(x.shape[:2], dtype=torch.bool) if pad_mask is None else pad_mask
        if self.official_like:
            padding = (x == 0).all(dim=-1).all(dim=-1).all(dim=-1)
        skips = [self._shared(0, x, padding)]
        for index in range(len(self.down_blocks)):
            skips.append(self._shared(index + 1, skips[-1], padding))
        embedding, attention = self._temporal(skips.pop(), dates, padding)
        if bool(padding.any()):
            attention = attention * (~padding).to(attention.dtype)[None, :, :, None, None]
        maps = [embedding]
        for module, skip in zip(self.up_blocks, reversed(skips)):
            block: Any = module
            grouped = torch.stack(skip.chunk(self.n_head, dim=2))
            pooled = torch.cat(list((grouped * attention[:, :, :, None]).sum(dim=2)), dim=1)
            joined = torch.cat((block.up(maps[-1]), block.skip_conv(pooled)), dim=1)
            up = block.conv1.conv(joined)
            maps.append(up + block.conv2.conv(up))
        return self.out_conv.conv.conv(maps[-1]), maps


class OfficialUTAE(nn.Module):
    """The official U-TAE, from a checkout of IGNF/FLAIR-HUB, with the defaults of its configuration.

    Args:
        checkout: folder of the checkout. Only one file is imported, by path, because the package imports its trainer.
        input_dim, classes: see ``ReferenceUTAE``.
    """

    FILE = "src/flair_hub/models/multitemp_model.py"

    def __init__(self, checkout: Path, input_dim: int, classes: int) -> None:
        super().__init__()
        location = importlib.util.spec_from_file_location("official_utae", checkout / self.FILE)
        if location is None or location.loader is None:
            raise FileNotFoundError(checkout / self.FILE)
        module = importlib.util.module_from_spec(location)
        location.loader.exec_module(module)
        self.model = module.UTAE(
            input_dim=input_dim,
            encoder_widths=[64, 64, 64, 128],
            decoder_widths=[32, 32, 64, 128],
            out_conv=[32, classes],
            str_conv_k=3,
            str_conv_s=1,
            str_conv_p=1,
            agg_mode="att_group",
            encoder_norm="group",
            n_head=16,
            d_model=256,
            d_k=4,
            encoder=False,
            return_maps=True,
            pad_value=0,
            padding_mode="reflect",
        )

    def load_state_dict(self, state_dict: Any, strict: bool = True, assign: bool = False) -> Any:
        """Load weights into the wrapped model, under their official names."""
        return self.model.load_state_dict(state_dict, strict=strict, assign=assign)

    def forward(
        self, x: torch.Tensor, dates: torch.Tensor, pad_mask: torch.Tensor | None
    ) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """See ``ReferenceUTAE``; the official code recognises padded frames by their zeros."""
        return self.model(x, batch_positions=dates)


class ReferenceFusion(nn.Module):
    """Fusion of the FLAIR-HUB paper: resize every map to the grid of the first image, concatenate, convolve.

    Args:
        convolutions: 1 x 1 convolution of each stage.
    """

    def __init__(self, convolutions: nn.ModuleList) -> None:
        super().__init__()
        self.conv_f = convolutions

    def forward(self, maps: dict[str, list[torch.Tensor]]) -> list[torch.Tensor]:
        """Fuse the maps of the modalities; images come first, and the maps of a modality are finest first."""
        fused = []
        for stage, convolution in enumerate(self.conv_f):
            targets = next(iter(maps.values()))[stage].shape[-2:]
            resized = []
            for pyramid in maps.values():
                values = pyramid[stage]
                if values.shape[-2:] != targets:
                    values = functional.interpolate(values, size=targets, mode="bilinear", align_corners=False)
                resized.append(values)
            fused.append(convolution(torch.cat(resized, dim=1)))
        return fused


class OfficialFusion(nn.Module):
    """The official fusion, from a checkout of IGNF/FLAIR-HUB, whose requirements must be installed.

    Args:
        checkout: folder of the checkout.
        convolutions: see ``ReferenceFusion``.
        images, series: names of the modalities of each kind.
    """

    def __init__(self, checkout: Path, convolutions: nn.ModuleList, images: list[str], series: list[str]) -> None:
        super().__init__()
        sys.path.insert(0, str(checkout / "src"))
        module = importlib.import_module("flair_hub.models.flair_model")
        layers: list[Any] = list(convolutions)
        self.handler = module.FusionHandler(
            [layer.in_channels for layer in layers], [layer.out_channels for layer in layers], images, series
        )
        self.handler.conv_f.load_state_dict(convolutions.state_dict())

    def forward(self, maps: dict[str, list[torch.Tensor]]) -> list[torch.Tensor]:
        """See ``ReferenceFusion``."""
        return self.handler(dict(maps), next(iter(maps.values())))
