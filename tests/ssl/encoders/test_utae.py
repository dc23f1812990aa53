"""Compare U-TAE with the official outputs and with a slow reference implementation."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch.nn import functional
from utae_reference import GOLDEN, STRIDED, Reference, load_fill, series, small_model

from bocage.ssl.encoders.utae import UTAE


def read_golden(name: str) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    with safe_open(GOLDEN / f"{name}.safetensors", framework="pt") as file:
        names = list(file.keys())
        return {key: file.get_tensor(key) for key in names}, file.metadata()


PADDINGS = {
    "none": torch.zeros(2, 5, dtype=torch.bool),
    "end": torch.tensor([[0, 0, 0, 1, 1], [0, 0, 0, 0, 0]], dtype=torch.bool),
    "scattered": torch.tensor([[1, 0, 1, 0, 0], [0, 1, 1, 1, 1]], dtype=torch.bool),
    "one series": torch.tensor([[0, 1, 0, 1, 0], [1, 1, 1, 1, 1]], dtype=torch.bool),
}
CASES: dict[str, tuple[dict[str, Any], tuple[int, int]]] = {
    "default": ({}, (10, 10)),
    "official-norm": ({"masked_norm": False}, (10, 10)),
    "official-norm-pad-value": ({"masked_norm": False, "pad_value": -1.5, "agg_mode": "mean"}, (6, 6)),
    "att_mean": ({"agg_mode": "att_mean"}, (10, 10)),
    "mean": ({"agg_mode": "mean"}, (10, 10)),
    "batch": ({"encoder_norm": "batch"}, (6, 6)),
    "instance": ({"encoder_norm": "instance"}, (6, 6)),
    "none": ({"encoder_norm": "none", "masked_norm": False}, (6, 6)),
    "strided": (STRIDED, (16, 16)),
    "strided-att_mean": ({**STRIDED, "agg_mode": "att_mean", "encoder_norm": "batch"}, (8, 12)),
    "strided-odd": (STRIDED, (13, 10)),
    "strided-tiny": (STRIDED, (4, 5)),
    "not-square": ({"encoder_norm": "batch"}, (7, 3)),
    "one-pixel": ({}, (1, 1)),
    "one-row": ({"encoder_norm": "instance"}, (1, 4)),
    "two-levels": ({"encoder_widths": (16, 32), "decoder_widths": (24, 32)}, (5, 6)),
    "four-levels": (
        {"encoder_widths": (8, 16, 24, 16), "decoder_widths": (8, 12, 20, 16), "d_k": 3, "n_head": 4},
        (5, 5),
    ),
    "odd-position-width": ({"d_model": 40}, (5, 5)),
}


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("padding", list(PADDINGS))
@pytest.mark.parametrize("case", list(CASES))
def test_equals_the_reference_implementation(case: str, padding: str, training: bool) -> None:
    """Maps and gradients in double precision."""
    options, size = CASES[case]
    model = small_model(**options).train(training)
    values, dates = series(2, 5, size)
    hidden = PADDINGS[padding]
    weights = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
    for name, _ in model.named_parameters():
        weights[name].requires_grad_()
    reference = Reference(weights, model, options)

    given, expected_given = values.clone().requires_grad_(), values.clone().requires_grad_()
    maps = model(given, dates, hidden).maps
    expected = reference(expected_given, dates, hidden)
    for mine, theirs in zip(maps, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-10)

    cotangents = [torch.randn(m.shape, dtype=m.dtype, generator=torch.Generator().manual_seed(1)) for m in maps]
    torch.autograd.backward(maps, cotangents)
    torch.autograd.backward(expected, cotangents)
    pairs = {"input": (given.grad, expected_given.grad)}
    pairs.update({name: (parameter.grad, weights[name].grad) for name, parameter in model.named_parameters()})
    for name, (gradient, other) in pairs.items():
        assert gradient is not None, name
        if other is None:  # an evenly pooled skip uses no attention, yet every parameter has a gradient
            other = torch.zeros_like(gradient)
        scale = float(other.abs().max().clamp_min(1.0))
        torch.testing.assert_close(gradient, other, rtol=0, atol=1e-10 * scale, msg=f"{name}: {{}}".format)


@pytest.mark.parametrize("name", ["utae_small_s1", "utae_small_padded", "utae_strided"])
def test_official_weights_give_the_official_outputs(name: str) -> None:
    tensors, metadata = read_golden(name)
    model = UTAE(**json.loads(metadata["config"]), masked_norm=False, head=True).eval()
    model.load_state_dict({key[7:]: value for key, value in tensors.items() if key.startswith("weight.")}, strict=True)
    padding = (tensors["x"] == 0).flatten(2).all(dim=2)
    with torch.no_grad():
        output = model(tensors["x"], tensors["dates"], padding)
    assert output.logits is not None
    torch.testing.assert_close(output.logits, tensors["logits"], rtol=0, atol=1e-5)
    for i, maps in enumerate(output.maps):  # the official output norm is ill-conditioned in single precision
        torch.testing.assert_close(maps, tensors[f"map.{i}"], rtol=0, atol=3e-4)


def test_full_size_official_model() -> None:
    """S2 alone for LPIS: the official model's logits are the U-TAE's own, resized to the labels."""
    tensors, metadata = read_golden("lpis_f")
    keys = json.loads((GOLDEN / "lpis_f.keys.json").read_text())
    model = UTAE(10, out_conv=json.loads(metadata["out_conv"]), masked_norm=False, head=True).eval()
    prefix = "encoders.SENTINEL2_TS."
    assert {prefix + name: list(tensor.shape) for name, tensor in model.state_dict().items()} == {
        name: shape for name, shape in keys.items() if name.startswith(prefix)
    }
    fill = load_fill()
    model.load_state_dict({name: fill.fill(prefix + name, value) for name, value in model.state_dict().items()})
    values = fill.make_input("SENTINEL2_TS", (2, 5, 10, 10, 10))
    dates = torch.tensor([-120.0, -40, 10, 90, 200]).repeat(2, 1)
    padding = torch.zeros(2, 5, dtype=torch.bool)
    padding[1, 4] = True
    with torch.no_grad():
        logits = model(values, dates, padding).logits
    assert logits is not None
    resized = functional.interpolate(logits, (128, 128), mode="bilinear", align_corners=False)[:, :, ::4, ::4]
    torch.testing.assert_close(resized, tensors["logits.ALL_LABEL-LPIS.every4th"], rtol=0, atol=1e-5)


def test_untrained_heads_attend_to_different_seasons_and_pixels_to_themselves() -> None:
    torch.manual_seed(0)
    model = UTAE(4).eval()
    days = torch.arange(-134.0, 231.0, 5.0)[None]
    frames = torch.randn(1, days.shape[1], 4, 9, 9, generator=torch.Generator().manual_seed(0))
    attention = model(frames, days, attention=True).attention
    assert attention is not None
    # Mean direction on the circle of the year that a head attends to, against the middle of its sixteenth of the year.
    circle = torch.polar(attention[:, 0, :, 4, 4], 2 * torch.pi * (days + 134) / 365).sum(dim=1)
    middles = 2 * torch.pi * (torch.arange(16) + 0.5) / 16
    distance = torch.polar(torch.ones(16), circle.angle() - middles).angle().abs() * 365 / (2 * torch.pi)
    assert distance.mean() < 10, distance
    assert circle.abs().min() > 0.5, circle

    changed = frames.clone()
    changed[..., 4, 4] += 1.0
    with torch.no_grad():
        for before, after in zip(model(frames, days).maps, model(changed, days).maps, strict=True):
            change = (after - before).square().sum(dim=1)[0]
            assert change[4, 4] > 10 * (change.sum() - change[4, 4]) / 80, change
