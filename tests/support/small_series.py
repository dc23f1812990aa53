"""Shards with a few simulated time series, and small encoders for them."""

from __future__ import annotations

from pathlib import Path

import torch

from bocage.shards.format.manifest import Manifest
from bocage.shards.modality import FLAIR_HUB
from bocage.shards.simulate.tree import write_tree
from bocage.shards.source.flair_hub.tree import FlairHubCatalogue
from bocage.shards.write.writer import write_shards
from bocage.ssl.encoders.base import EncoderConfig
from bocage.ssl.encoders.build import build_encoder
from bocage.ssl.encoders.utae import UTAE

OPTICAL, QUALITY, RADAR = "SENTINEL2_TS", "SENTINEL2_MSK-SC", "SENTINEL1-ASC_TS"
_OPTIONS = {"encoder_widths": [16, 16, 32], "decoder_widths": [16, 16, 32], "n_head": 4, "d_model": 32}


def write_series(folder: Path, *, missing: int | None = None, quality: bool = True) -> Manifest:
    """Write shards of four patches with series of different lengths; patch ``missing`` has no optical series."""
    registry = FLAIR_HUB.subset([OPTICAL, RADAR, *([QUALITY] if quality else [])])
    tree = folder / "tree"
    write_tree(tree, patches=4, seed=0, registry=registry, dates=(8, 14))
    if missing is not None:
        stem = sorted((tree).rglob(f"*_{OPTICAL}_*.tif"))[missing]
        stem.unlink()
        Path(str(stem).replace(OPTICAL, QUALITY)).unlink()
    return write_shards(FlairHubCatalogue.open(tree, registry), folder / "shards")


def series_encoder(manifest: Manifest, name: str) -> UTAE:
    """Build a small encoder with fixed weights whose attention heads differ."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        encoder = build_encoder(manifest.input_spec(name), EncoderConfig(architecture="utae", options=_OPTIONS))
    assert isinstance(encoder, UTAE)
    with torch.no_grad():
        encoder.temporal_encoder.attention_heads.Q.mul_(4)
    return encoder.eval()
