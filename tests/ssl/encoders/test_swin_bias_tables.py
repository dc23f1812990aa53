"""Resize tables of position biases between encoders for any size and encoders of a fixed size."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from bocage.shards.errors import InputError
from bocage.ssl.encoders.swin import SwinEncoder, resize_bias_tables

TINY: dict[str, Any] = {"embed_dim": 16, "depths": [1, 1, 2, 1], "num_heads": [1, 2, 2, 4]}
V1, V2 = "swin_tiny_patch4_window7_224", "swinv2_tiny_window8_256"
LAST = "model.layers_3.blocks.0.attn.relative_position_bias_table"


def build(name: str = V1, fixed_size: int | None = None, **options: Any) -> SwinEncoder:
    return SwinEncoder(3, name, {**TINY, **options}, fixed_size=fixed_size).eval()


def tables(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor for name, tensor in weights.items() if name.endswith("relative_position_bias_table")}


@pytest.mark.parametrize(("source", "target"), [(None, 64), (64, None), (64, 128), (None, 32), (32, None)])
def test_tables_are_resized_in_both_directions(source: int | None, target: int | None) -> None:
    start, end = build(fixed_size=source), build(fixed_size=target)
    resized = resize_bias_tables(start.state_dict(), end)
    end.load_state_dict(resized, strict=True)
    untouched = [name for name in resized if torch.equal(resized[name], start.state_dict().get(name, resized[name]))]
    assert set(start.state_dict()) - set(untouched) <= set(tables(start.state_dict()))


def test_linear_table_keeps_its_slope() -> None:
    """Up to the error of torch's bicubic kernel on ramps, and without the border, where a resized map flattens."""
    encoder = build(window_size=12)
    ramp = torch.linspace(-1, 1, 13).view(13, 1).expand(13, 13).reshape(-1, 1)
    weights = resize_bias_tables({LAST: ramp.repeat(1, 4)}, encoder)
    grid = weights[LAST].view(23, 23, 4)
    rows = (torch.arange(23) + 0.5) * 13 / 23 - 0.5
    expected = (rows / 6 - 1)[4:-4]
    for column in (0, 11, 22):
        torch.testing.assert_close(grid[4:-4, column, 2], expected, atol=0.01, rtol=0)


def test_equal_windows_v2_and_other_names_pass_unchanged() -> None:
    for name in (V1, V2):
        weights = {**build(name).state_dict(), "head.fc.weight": torch.zeros(1)}
        resized = resize_bias_tables(weights, build(name))
        assert resized.keys() == weights.keys()
        assert all(resized[key] is weights[key] for key in weights)


def test_v2_weights_of_a_fixed_size_load_unchanged_at_any_size() -> None:
    small, whole = build(V2, fixed_size=64), build(V2)
    whole.load_state_dict(resize_bias_tables(small.state_dict(), whole), strict=True)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_dtype_is_kept(dtype: torch.dtype) -> None:
    weights = {LAST: torch.randn(9, 4).to(dtype)}
    assert resize_bias_tables(weights, build())[LAST].dtype == dtype


def test_tables_of_rectangular_windows_pass_only_unchanged() -> None:
    encoder = build(window_size=[[7, 5]] * 4)
    fitting = torch.randn(13 * 9, 4)
    assert resize_bias_tables({LAST: fitting}, encoder)[LAST] is fitting
    assert resize_bias_tables({LAST: torch.randn(49, 4)}, encoder)[LAST].shape == (13 * 9, 4)
    with pytest.raises(InputError, match="77 offsets, which do not fit a square window"):
        resize_bias_tables({LAST: torch.randn(77, 4)}, encoder)


@pytest.mark.parametrize("shape", [(64, 4), (169,), (0, 4)])
def test_other_tensors_raise_input_error(shape: tuple[int, ...]) -> None:
    with pytest.raises(InputError, match="relative_position_bias_table has"):
        resize_bias_tables({LAST: torch.zeros(shape)}, build())
