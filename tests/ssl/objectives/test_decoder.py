"""Fusion decoder: its lengths grow with the patch."""

from __future__ import annotations

import torch

from bocage.ssl.objectives.decoder import DecoderConfig, FusionDecoder, grid_centres

CONFIG = DecoderConfig(width=32, fusion_depth=1, heads=4)


def decoded(patch_size: float) -> torch.Tensor:
    """Decode a 5 x 5 grid from 3 x 3 tokens of a patch; tokens and weights do not depend on the side."""
    torch.manual_seed(0)
    decoder = FusionDecoder(["A"], CONFIG, patch_size)
    tokens = torch.randn(2, 9, 32)
    centres = grid_centres(3, patch_size, tokens.device).flatten(0, 1)[None]
    dropped = torch.zeros(2, dtype=torch.bool)
    context = decoder.encode_context({"A": tokens}, {"A": centres}, {"A": dropped}, patch_size)
    queries = grid_centres(5, patch_size, tokens.device).flatten(0, 1)
    return decoder.decode_queries({"A": queries}, context)["A"]


def test_patches_of_every_side_are_decoded_alike() -> None:
    expected = decoded(102.4)
    for side in (1.0, 16.896, 2560.0):
        torch.testing.assert_close(decoded(side), expected, rtol=1e-4, atol=1e-4)
