"""Edge cases of U-TAE: invariances, degenerate sizes, precisions, export, compilation and wrong options."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from utae_reference import SMALL, STRIDED, Reference, series, small_model

from bocage.shards.errors import InputError
from bocage.ssl.encoders.temporal import PackedDates, SinusoidalPositions
from bocage.ssl.encoders.utae import UTAE, Aggregation, UTAEOutput


@pytest.mark.parametrize("options", [{}, {"agg_mode": "att_mean"}, {"agg_mode": "mean"}, STRIDED])
@pytest.mark.parametrize("added", [1, 10, 40])
def test_padded_dates_change_nothing(added: int, options: dict[str, Any]) -> None:
    model = small_model(**options).eval()
    values, dates = series(2, 6)
    generator = torch.Generator().manual_seed(added)
    more = torch.cat((values, torch.randn(2, added, 3, 10, 10, generator=generator, dtype=torch.float64)), dim=1)
    days = torch.cat((dates, torch.full((2, added), 77.0)), dim=1)
    padding = torch.arange(6 + added).expand(2, -1) >= 6
    with torch.no_grad():
        for alone, padded in zip(model.features(values, dates), model.features(more, days, padding)):
            torch.testing.assert_close(padded, alone, rtol=0, atol=1e-12)


def test_order_of_dates_does_not_matter() -> None:
    model = small_model().eval()
    values, dates = series(2, 7)
    padding = torch.zeros(2, 7, dtype=torch.bool)
    padding[0, 5:] = True
    order = torch.tensor([6, 2, 0, 5, 1, 4, 3])
    with torch.no_grad():
        for straight, shuffled in zip(
            model.features(values, dates, padding),
            model.features(values[:, order], dates[:, order], padding[:, order]),
        ):
            torch.testing.assert_close(shuffled, straight, rtol=0, atol=1e-11)


def test_masked_dates_have_no_gradient_and_no_influence() -> None:
    """Masked pretraining relies on this, even for NaN."""
    model = small_model().eval()
    values, dates = series(1, 5)
    padding = torch.tensor([[False, True, False, True, False]])
    values[:, 1] = math.nan
    given = values.requires_grad_()
    maps = model.features(given, dates, padding)
    assert all(bool(m.isfinite().all()) for m in maps)
    sum(m.sum() for m in maps).backward()  # type: ignore[union-attr]
    assert given.grad is not None
    assert float(given.grad[:, padding[0]].abs().max()) == 0.0
    assert float(given.grad[:, ~padding[0]].abs().max()) > 0.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("hidden", ["none", "one series", "all"])
@pytest.mark.parametrize("length", [0, 1, 3])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"masked_norm": False, "agg_mode": "att_mean"},
        {"masked_norm": False, "agg_mode": "mean", "encoder_norm": "instance"},
        {"encoder_norm": "batch"},
        STRIDED,
    ],
)
def test_degenerate_series_stay_finite(options: dict[str, Any], length: int, hidden: str, dtype: torch.dtype) -> None:
    """No dates, one date, series without any valid date, half and double precision; forward and backward."""
    torch.manual_seed(0)
    model = UTAE(3, **{**SMALL, **options}).to(dtype)
    padding = torch.zeros(2, length, dtype=torch.bool)
    padding[: {"none": 0, "one series": 1, "all": 2}[hidden]] = True
    maps = model.features(torch.randn(2, length, 3, 10, 10, dtype=dtype), torch.arange(length).repeat(2, 1), padding)
    for m, width, stride in zip(maps, model.widths, model.strides, strict=True):
        assert m.dtype == dtype
        assert tuple(m.shape) == (2, width, 10 // stride, 10 // stride)
        assert bool(m.isfinite().all())
    sum(m.sum() for m in maps).backward()  # type: ignore[union-attr]
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name  # DistributedDataParallel waits for every gradient
        assert bool(parameter.grad.isfinite().all()), name


@pytest.mark.parametrize("length", [0, 3])
@pytest.mark.parametrize("options", [{}, {"encoder_norm": "batch", "masked_norm": False}, {"agg_mode": "mean"}])
def test_empty_batch_keeps_running_statistics_finite(options: dict[str, Any], length: int) -> None:
    model = UTAE(3, **{**SMALL, **options}, head=True)
    for padding in (None, torch.zeros(0, length, dtype=torch.bool)):
        output = model(torch.zeros(0, length, 3, 10, 10), torch.zeros(0, length), padding, attention=True)
        assert output.logits.shape == (0, 20, 10, 10)
        assert output.attention.shape == (8, 0, length, 10, 10)
    sum(m.sum() for m in output.maps).backward()
    assert all(bool(buffer.isfinite().all()) for buffer in model.buffers())


@pytest.mark.parametrize("options", [{}, {"encoder_norm": "batch"}, {"agg_mode": "mean"}])
def test_a_single_pixel_of_a_single_series_trains(options: dict[str, Any]) -> None:
    """A single value has no batch statistics: the running ones are used and do not change."""
    model = small_model(**options)
    values, dates = series(1, 1, (1, 1))
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    trained = model.train().features(values, dates)
    sum(m.sum() for m in trained).backward()  # type: ignore[union-attr]
    assert all(bool(parameter.grad.isfinite().all()) for parameter in model.parameters() if parameter.grad is not None)
    assert all(torch.equal(buffer, before[name]) for name, buffer in model.named_buffers())
    with torch.no_grad():
        for m, expected in zip(trained, model.eval().features(values, dates), strict=True):
            torch.testing.assert_close(m, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("pad_value", [0.0, -1.5])
@pytest.mark.parametrize("masked_norm", [False, True])
def test_series_without_dates_have_zero_attention(masked_norm: bool, pad_value: float, batch: int) -> None:
    """T = 0 gives zero attention, with and without a mask."""
    options = {"masked_norm": masked_norm, "pad_value": pad_value}
    model = small_model(**options).eval()
    values, dates = series(batch, 0)
    padding = torch.zeros(batch, 0, dtype=torch.bool)
    weights = dict(model.state_dict())
    heads = torch.zeros(batch * 100, 64, dtype=torch.float64)
    deepest = Reference(weights, model, options).embedding(heads).view(batch, 10, 10, 32).permute(0, 3, 1, 2)
    with torch.no_grad():
        unmasked, masked = model(values, dates).maps, model(values, dates, padding).maps
    torch.testing.assert_close(masked, unmasked, rtol=0, atol=0)
    torch.testing.assert_close(masked[0], deepest, rtol=0, atol=1e-12)


@pytest.mark.parametrize("size", [(1, 1), (5, 5), (7, 3), (16, 9)])
@pytest.mark.parametrize("padding_mode", ["reflect", "replicate", "circular", "zeros"])
@pytest.mark.parametrize("norm", ["group", "instance", "none"])
def test_any_size(norm: str, padding_mode: str, size: tuple[int, int]) -> None:
    model = small_model(encoder_norm=norm, padding_mode=padding_mode).eval()
    maps = model.features(*series(2, 3, size))
    assert [tuple(m.shape[-2:]) for m in maps] == [size] * 3
    assert all(bool(m.isfinite().all()) for m in maps)


def test_strides_restore_odd_sizes() -> None:
    maps = small_model(**STRIDED).eval().features(*series(1, 2, (13, 10)))
    assert [tuple(m.shape[-2:]) for m in maps] == [(13, 10), (6, 5), (3, 2)]


def test_padding_that_makes_maps_grow() -> None:
    """Attention larger than the skip is averaged, as in the official grouped aggregation."""
    model = small_model(str_conv_k=1, str_conv_s=1, str_conv_p=2, padding_mode="zeros").eval()
    output = model(*series(1, 2, (4, 4)), attention=True)
    assert [tuple(m.shape[-2:]) for m in output.maps] == [(12, 12), (8, 8), (4, 4)]


@pytest.mark.parametrize("size", [(1, 1), (3, 16)])
def test_window_too_small_for_the_strides_raises_input_error(size: tuple[int, int]) -> None:
    with pytest.raises(InputError, match=f"{size[0]} x {size[1]} px are too small"):
        small_model(**STRIDED).features(*series(1, 2, size))


@pytest.mark.parametrize("mode", ["att_group", "att_mean", "mean"])
def test_autocast(mode: Aggregation) -> None:
    torch.manual_seed(0)
    model = UTAE(3, **SMALL, agg_mode=mode, head=True)
    padding = torch.rand(2, 5) < 0.5
    with torch.autocast("cpu", torch.bfloat16):
        maps, logits, attention = model(torch.randn(2, 5, 3, 10, 10), torch.arange(5).repeat(2, 1), padding)
    assert attention is None
    (logits.float().sum() + sum(m.float().sum() for m in maps)).backward()
    for name, parameter in model.named_parameters():
        assert bool(parameter.grad.isfinite().all()), name  # type: ignore[union-attr]


@pytest.mark.parametrize("mode", ["att_group", "att_mean", "mean"])
def test_attention_is_a_distribution_over_the_valid_dates(mode: str) -> None:
    model = small_model(agg_mode=mode, **STRIDED).eval()
    padding = torch.tensor([[0, 1, 0, 0], [1, 1, 1, 1], [0, 0, 0, 0]], dtype=torch.bool)
    values, dates = series(3, 4, (12, 8))
    attention = model(values, dates, padding, attention=True).attention
    assert attention.shape == (8, 3, 4, 3, 2)
    assert not attention[:, padding].any()
    total = attention.sum(dim=2)
    torch.testing.assert_close(total[:, [0, 2]], torch.ones_like(total[:, [0, 2]]))
    alone = model(values[2:], dates[2:], attention=True).attention
    torch.testing.assert_close(attention[:, 2:], alone, rtol=0, atol=1e-12)


OFFICIAL_MEAN: dict[str, Any] = {**STRIDED, "masked_norm": False, "agg_mode": "mean"}


# Slow: tracing takes 4 to 10 s.
@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "masked", "strict"),
    [
        ({}, True, True),
        (OFFICIAL_MEAN, True, False),
        ({}, False, True),
        ({}, False, False),
        (OFFICIAL_MEAN, False, True),
    ],
)
def test_exported_program_accepts_other_batch_sizes_and_lengths(
    options: dict[str, Any], masked: bool, strict: bool
) -> None:
    """Trace with 3 series of 6 dates, run with other numbers of both, and with NaN at padded dates."""
    model = small_model(**options, head=True).eval()
    batch, length = torch.export.Dim("batch"), torch.export.Dim("length")
    given = dict(zip(("x", "dates"), series(3, 6)))
    if masked:
        given["pad_mask"] = torch.rand(3, 6) < 0.3
    program = torch.export.export(
        model,
        (),
        {**given, "attention": True},
        dynamic_shapes={**{name: {0: batch, 1: length} for name in given}, "attention": None},
        strict=strict,
    ).module()
    for count, dated in ((2, 9), (1, 1), (1, 4), (4, 1)):
        values, dates = series(count, dated)
        padding = torch.zeros(count, dated, dtype=torch.bool)
        padding[0, 3:7] = True
        for hidden in (padding, torch.zeros_like(padding), torch.ones_like(padding)) if masked else (None,):
            given = {"x": values, "dates": dates}
            if hidden is not None:
                nothing = hidden[:, :, None, None, None]
                given = {"x": values.masked_fill(nothing, math.nan), "dates": dates, "pad_mask": hidden}
            with torch.no_grad():
                output, expected = program(**given, attention=True), model(**given, attention=True)
            assert isinstance(output, UTAEOutput)
            torch.testing.assert_close(
                [*output.maps, output.logits, output.attention],
                [*expected.maps, expected.logits, expected.attention],
                rtol=0,
                atol=1e-10,
            )


# Graph capture takes 3 s ("eager"), compilation a minute ("inductor").
@pytest.mark.parametrize("backend", ["eager", pytest.param("inductor", marks=pytest.mark.slow(minutes=2))])
def test_compiled_model_equals_eager(backend: str) -> None:
    torch.compiler.reset()
    model = small_model(encoder_widths=(16, 32), decoder_widths=(16, 32)).eval()
    compiled = torch.compile(model, backend=backend)
    padding = torch.tensor([[0, 0, 0, 0], [0, 0, 1, 1]], dtype=torch.bool)
    for hidden in (None, padding, padding.flip(1)):
        values, dates = series(2, 4, (6, 6))
        with torch.no_grad():
            maps, expected = compiled(values, dates, hidden).maps, model(values, dates, hidden).maps
        torch.testing.assert_close(maps, expected, rtol=0, atol=1e-10)


def test_dates_are_encoded_in_float32_for_bfloat16_weights() -> None:
    """Wavelengths rounded to bfloat16 would shift late dates by days."""
    days = torch.arange(-200, 200)
    exact = SinusoidalPositions(16)(days.double())
    assert float((SinusoidalPositions(16).bfloat16()(days) - exact).abs().max()) < 1e-4


def test_running_statistics_are_updated_once_per_step() -> None:
    model = small_model().train()
    model(*series(2, 4))
    counters = [buffer for name, buffer in model.named_buffers() if name.endswith("num_batches_tracked")]
    assert counters
    assert {int(counter) for counter in counters} == {1}


def test_packing_round_trip() -> None:
    padding = torch.tensor([[False, True, False], [True, True, True], [True, False, False]])
    packed = PackedDates.from_dates(torch.arange(9).view(3, 3), padding)
    assert packed.days.tolist() == [0, 2, 7, 8]
    assert packed.length == 2
    rows = torch.randn(4, 5)
    torch.testing.assert_close(packed.pack(packed.unpack(rows)), rows)
    torch.testing.assert_close(packed.sum_over_dates(rows), packed.unpack(rows).sum(dim=1))


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"agg_mode": "max"}, "agg_mode"),
        ({"encoder_norm": "layer"}, "encoder_norm"),
        ({"decoder_widths": (16, 16, 16)}, "decoder_widths"),
        ({"n_head": 5}, "n_head"),
        ({"d_model": 60}, "d_model"),
        ({"encoder_widths": (), "decoder_widths": ()}, "encoder_widths"),
        ({"head": True, "out_conv": ()}, "out_conv"),
        ({"encoder_widths": (16, 18, 32), "agg_mode": "mean"}, "encoder_widths"),
        ({"input_dim": 0}, "input_dim"),
        ({"encoder_widths": (16, 16.0, 32)}, "encoder_widths"),
        ({"encoder_widths": 32}, "encoder_widths"),
        ({"decoder_widths": (0, 16, 32)}, "decoder_widths"),
        ({"decoder_widths": "abc"}, "decoder_widths"),
        ({"out_conv": (32, -1)}, "out_conv"),
        ({"str_conv_k": 0}, "str_conv_k"),
        ({"str_conv_s": 0}, "str_conv_s"),
        ({"str_conv_s": True}, "str_conv_s"),
        ({"str_conv_p": -1}, "str_conv_p"),
        ({"str_conv_p": [1, 1]}, "str_conv_p"),
        ({"agg_mode": ["mean"]}, "agg_mode"),
        ({"encoder_norm": None}, "encoder_norm"),
        ({"padding_mode": {}}, "padding_mode"),
        ({"n_head": 0}, "n_head"),
        ({"d_model": 10**30}, "d_model"),
        ({"d_k": 1.5}, "d_k"),
        ({"pad_value": "x"}, "pad_value"),
        ({"pad_value": math.nan}, "pad_value"),
        ({"pad_value": 10**400}, "pad_value"),
        ({"masked_norm": "no"}, "masked_norm"),
        ({"head": 1}, "head"),
    ],
)
def test_error_names_the_invalid_option(options: dict[str, Any], named: str) -> None:
    with pytest.raises(InputError, match=named):
        UTAE(**{"input_dim": 3, **SMALL, **options})
