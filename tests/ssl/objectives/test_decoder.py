"""Fusion decoder: attention by offset in metres, and lengths that grow with the patch."""

from __future__ import annotations

import torch

from bocage.ssl.objectives.decoder import DecoderConfig, FusionDecoder, grid_centres, ground_rotation, rotate

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


def scores(query: torch.Tensor, key: torch.Tensor, query_at: list[float], key_at: list[float]) -> torch.Tensor:
    """Attention score of two vectors (1, 1, 1, channels) at ground positions."""

    def turned(values: torch.Tensor, position: list[float]) -> torch.Tensor:
        return rotate(values, ground_rotation(torch.tensor([[position]]), values.shape[-1], 102.4))

    return (turned(query, query_at) * turned(key, key_at)).sum()


def test_attention_depends_on_the_offset_alone() -> None:
    torch.manual_seed(0)
    query, key = torch.randn(2, 1, 1, 1, 16)
    offset = scores(query, key, [10.0, 20.0], [17.0, 8.0])
    torch.testing.assert_close(scores(query, key, [60.0, 90.0], [67.0, 78.0]), offset)


def test_attention_knows_direction() -> None:
    torch.manual_seed(0)
    query, key = torch.randn(2, 1, 1, 1, 16)
    east, west, south = (
        scores(query, key, [50.0, 50.0], position) for position in ([55.0, 50.0], [45.0, 50.0], [50.0, 55.0])
    )
    assert (east - west).abs() > 0.1
    assert (east - south).abs() > 0.1


def test_a_dropped_modality_changes_nothing() -> None:
    torch.manual_seed(0)
    decoder = FusionDecoder(["A", "B"], CONFIG, 102.4)
    centres = grid_centres(3, 102.4, torch.device("cpu")).flatten(0, 1)
    outputs = []
    for _ in range(2):
        tokens = {"A": torch.ones(1, 9, 32), "B": torch.randn(1, 9, 32)}
        dropped = {"A": torch.tensor([False]), "B": torch.tensor([True])}
        context = decoder.encode_context(tokens, dict.fromkeys("AB", centres[None]), dropped, 102.4)
        outputs.append(decoder.decode_queries({"A": centres}, context)["A"])
    torch.testing.assert_close(outputs[0], outputs[1])


def test_a_new_decoder_looks_at_near_tokens_first() -> None:
    torch.manual_seed(0)
    decoder = FusionDecoder(["A"], DecoderConfig(width=32, fusion_depth=0, query_depth=1, heads=4), 102.4)
    centres = torch.tensor([[20.0, 20.0], [80.0, 80.0]])
    dropped = {"A": torch.tensor([False])}

    def decoded_at_first(tokens: torch.Tensor) -> torch.Tensor:
        context = decoder.encode_context({"A": tokens}, {"A": centres[None]}, dropped, 102.4)
        return decoder.decode_queries({"A": centres[:1]}, context)["A"]

    tokens = torch.randn(1, 2, 32)
    before = decoded_at_first(tokens)
    changes = []
    for changed in range(2):
        other = tokens.clone()
        other[0, changed] = torch.randn(32)
        changes.append(float((decoded_at_first(other) - before).detach().norm()))
    assert changes[0] > 1.5 * changes[1]


def test_own_tokens_reach_their_query_alone() -> None:
    torch.manual_seed(0)
    decoder = FusionDecoder(["A", "B"], CONFIG, 102.4)
    centres = dict.fromkeys("AB", grid_centres(3, 102.4, torch.device("cpu")).flatten(0, 1))
    tokens = {name: torch.randn(2, 9, 32) for name in "AB"}
    dropped = {name: torch.zeros(2, dtype=torch.bool) for name in "AB"}
    context = decoder.encode_context(tokens, {name: values[None] for name, values in centres.items()}, dropped, 102.4)
    assert context.parts == {"A": slice(1, 10), "B": slice(10, 19)}
    own = torch.zeros(2, 9, 32)
    own[1, 4] = 1.0
    before, after = (decoder.decode_queries(centres, context, tokens) for tokens in (None, {"B": own}))
    changed = {name: (after[name] != before[name]).any(dim=-1).nonzero().tolist() for name in "AB"}
    assert changed == {"A": [], "B": [[1, 4]]}
