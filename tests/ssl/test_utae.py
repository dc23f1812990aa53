"""U-TAE against the official outputs, against its own equations written out slowly, and at its edges."""

from __future__ import annotations

import importlib.util
import json
import math
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch.nn import functional

from bocage.shards.errors import InputError
from bocage.ssl.encoders.temporal import PackedDates, SinusoidalPositions
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
    """``fill.py`` of the reference outputs: weights as a function of their names."""
    location = importlib.util.spec_from_file_location("golden_fill", GOLDEN / "fill.py")
    assert location is not None
    assert location.loader is not None
    module = importlib.util.module_from_spec(location)
    location.loader.exec_module(module)
    return module


def read_golden(name: str) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    with safe_open(GOLDEN / f"{name}.safetensors", framework="pt") as file:
        names = list(file.keys())
        return {key: file.get_tensor(key) for key in names}, file.metadata()


def small_model(**options: Any) -> UTAE:
    """A small double-precision U-TAE with every weight and statistic away from its initial value, without dropout."""
    model = UTAE(3, **{**SMALL, **options}).double()
    fill = load_fill()
    model.load_state_dict({name: fill.fill(name, value).to(value.dtype) for name, value in model.state_dict().items()})
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    return model


def series(batch: int, length: int, side: int = 10) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(length)
    values = torch.randn(batch, length, 3, side, side, generator=generator, dtype=torch.float64)
    days = torch.randint(-200, 200, (batch, length), generator=generator)
    return values, days.sort(dim=1).values.double()


class Reference:
    """The network of arXiv 2107.07933 and 2007.00586, equation by equation, one date and one head at a time."""

    def __init__(self, weights: dict[str, torch.Tensor], model: UTAE, stride: int, masked_norm: bool) -> None:
        self.weights = weights
        self.training = model.training
        self.stride = stride
        self.masked_norm = masked_norm
        self.levels = len(model.widths)
        self.aggregation = model.agg_mode

    def convolved(self, name: str, x: torch.Tensor, norm: str, stride: int = 1, first: int = 0) -> torch.Tensor:
        """Convolution with a reflecting border, normalisation, ReLU: entries ``first``, ... of a sequence."""
        weight, bias = self.weights[f"{name}.{first}.weight"], self.weights[f"{name}.{first}.bias"]
        x = functional.conv2d(functional.pad(x, (1, 1, 1, 1), mode="reflect"), weight, bias, stride=stride)
        return self.normalized(f"{name}.{first + 1}", x, norm).clamp_min(0)

    def normalized(self, name: str, x: torch.Tensor, norm: str) -> torch.Tensor:
        weight, bias = self.weights[f"{name}.weight"], self.weights[f"{name}.bias"]
        if norm == "group":
            return functional.group_norm(x, 4, weight, bias)
        mean, variance = self.weights[f"{name}.running_mean"], self.weights[f"{name}.running_var"]
        return functional.batch_norm(x, mean.clone(), variance.clone(), weight, bias, training=self.training)

    def frame(self, x: torch.Tensor) -> list[torch.Tensor]:
        """Maps of one (1, C, H, W) date at every level."""
        x = self.convolved("in_conv.conv.conv", x, "group")
        maps = [self.convolved("in_conv.conv.conv", x, "group", first=3)]
        for level in range(self.levels - 1):
            block = f"down_blocks.{level}"
            x = self.convolved(f"{block}.down.conv", maps[-1], "group", self.stride)
            x = self.convolved(f"{block}.conv1.conv", x, "group")
            maps.append(x + self.convolved(f"{block}.conv2.conv", x, "group"))
        return maps

    def attend(
        self, frames: list[torch.Tensor], days: list[float], padded: int
    ) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Pooled heads (pixels, d_model) and each head's attention (dates, H, W) of one series."""
        name = "temporal_encoder"
        x = torch.cat(frames)  # (dates, C, H, W)
        count, channels, height, width = x.shape
        if not self.masked_norm:
            x = torch.cat((x, x.new_zeros(padded, channels, height, width)))
            days = days + [0.0] * padded
        query = self.weights[f"{name}.attention_heads.Q"]
        heads, d_k = query.shape
        tokens = x.permute(2, 3, 1, 0).flatten(0, 1)  # (pixels, C, dates)
        tokens = functional.group_norm(
            tokens, heads, self.weights[f"{name}.in_norm.weight"], self.weights[f"{name}.in_norm.bias"]
        )
        tokens = functional.conv1d(tokens, self.weights[f"{name}.inconv.weight"], self.weights[f"{name}.inconv.bias"])
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
            score[:, count:] = -math.inf
            attention = score.softmax(dim=1)
            value = tokens[:, head * size : (head + 1) * size]
            pooled.append((attention[:, None] * value).sum(dim=2))
            attentions.append(attention[:, :count].T.reshape(count, height, width))
        return torch.cat(pooled, dim=1), attentions

    def skip(self, frames: list[torch.Tensor], attentions: list[torch.Tensor]) -> torch.Tensor:
        """One level's maps pooled over dates, (1, C, H, W)."""
        maps = torch.cat(frames)
        if self.aggregation == "mean":
            return maps.mean(dim=0, keepdim=True)
        if self.aggregation == "att_mean":
            attentions = [torch.stack(attentions).mean(dim=0)]
        groups = maps.chunk(len(attentions), dim=1)
        pooled = []
        for group, attention in zip(groups, attentions):
            resized = functional.interpolate(attention[:, None], maps.shape[-2:], mode="bilinear", align_corners=False)
            pooled.append((resized * group).sum(dim=0, keepdim=True))
        return torch.cat(pooled, dim=1)

    def __call__(self, values: torch.Tensor, dates: torch.Tensor, padding: torch.Tensor) -> list[torch.Tensor]:
        """Maps, deepest first."""
        pooled, skips = [], []
        for sample, days, hidden in zip(values, dates, padding):
            kept = [i for i in range(len(days)) if not hidden[i]]
            frames = [self.frame(sample[i : i + 1]) for i in kept]
            levels = list(zip(*frames))
            heads, attentions = self.attend(list(levels[-1]), [float(days[i]) for i in kept], int(hidden.sum()))
            pooled.append(heads)
            skips.append([self.skip(list(level), attentions) for level in levels[:-1]])
        name = "temporal_encoder"
        heads = torch.cat(pooled)
        embedding = functional.linear(heads, self.weights[f"{name}.mlp.0.weight"], self.weights[f"{name}.mlp.0.bias"])
        embedding = self.normalized(f"{name}.mlp.1", embedding, "batch").clamp_min(0)
        embedding = functional.group_norm(
            embedding,
            len(self.weights[f"{name}.attention_heads.Q"]),
            self.weights[f"{name}.out_norm.weight"],
            self.weights[f"{name}.out_norm.bias"],
        )
        side = values.shape[-1] // self.stride ** (self.levels - 1)
        maps = [embedding.view(len(values), side, side, -1).permute(0, 3, 1, 2)]
        for level in range(self.levels - 1):
            block = f"up_blocks.{level}"
            skip = torch.cat([levels[self.levels - 2 - level] for levels in skips])
            weight, bias = self.weights[f"{block}.skip_conv.0.weight"], self.weights[f"{block}.skip_conv.0.bias"]
            skip = self.normalized(f"{block}.skip_conv.1", functional.conv2d(skip, weight, bias), "batch").clamp_min(0)
            weight, bias = self.weights[f"{block}.up.0.weight"], self.weights[f"{block}.up.0.bias"]
            up = functional.conv_transpose2d(maps[-1], weight, bias, stride=self.stride, padding=1)
            up = self.normalized(f"{block}.up.1", up, "batch").clamp_min(0)
            x = self.convolved(f"{block}.conv1.conv", torch.cat((up, skip), dim=1), "batch")
            maps.append(x + self.convolved(f"{block}.conv2.conv", x, "batch"))
        return maps


PADDINGS = {
    "none": torch.zeros(2, 5, dtype=torch.bool),
    "end": torch.tensor([[0, 0, 0, 1, 1], [0, 0, 0, 0, 0]], dtype=torch.bool),
    "scattered": torch.tensor([[1, 0, 1, 0, 0], [0, 1, 1, 1, 1]], dtype=torch.bool),
}


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("padding", list(PADDINGS))
@pytest.mark.parametrize(
    "options",
    [{}, {"masked_norm": False}, {"agg_mode": "att_mean"}, {"agg_mode": "mean"}, STRIDED],
    ids=["default", "official-norm", "att_mean", "mean", "strided"],
)
def test_equals_the_equations_written_out(options: dict[str, Any], padding: str, training: bool) -> None:
    """Maps and gradients in double precision."""
    model = small_model(**options).train(training)
    values, dates = series(2, 5, 16 if options == STRIDED else 10)
    hidden = PADDINGS[padding]
    weights = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
    for name, _ in model.named_parameters():
        weights[name].requires_grad_()
    reference = Reference(weights, model, options.get("str_conv_s", 1), options.get("masked_norm", True))

    given, expected_given = values.clone().requires_grad_(), values.clone().requires_grad_()
    maps = model.encode(given, dates, hidden).maps
    expected = reference(expected_given, dates, hidden)
    for mine, theirs in zip(maps, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-10)

    cotangents = [torch.randn(m.shape, dtype=m.dtype, generator=torch.Generator().manual_seed(1)) for m in maps]
    torch.autograd.backward(maps, cotangents)
    torch.autograd.backward(expected, cotangents)
    torch.testing.assert_close(given.grad, expected_given.grad, rtol=1e-10, atol=1e-10)
    for name, parameter in model.named_parameters():
        theirs = weights[name].grad
        if theirs is None:  # the mean aggregation uses no attention in its skips, but every parameter has a gradient
            theirs = torch.zeros_like(parameter)
        scale = float(theirs.abs().max().clamp_min(1.0))
        torch.testing.assert_close(
            parameter.grad, theirs, rtol=0, atol=1e-10 * scale, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize("name", ["utae_small_s1", "utae_small_padded", "utae_strided"])
def test_official_weights_give_the_official_outputs(name: str) -> None:
    tensors, metadata = read_golden(name)
    model = UTAE(**json.loads(metadata["config"]), masked_norm=False, head=True).eval()
    model.load_state_dict({key[7:]: value for key, value in tensors.items() if key.startswith("weight.")}, strict=True)
    padding = (tensors["x"] == 0).flatten(2).all(dim=2)
    with torch.no_grad():
        output = model.encode(tensors["x"], tensors["dates"], padding)
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
        logits = model.encode(values, dates, padding).logits
    assert logits is not None
    resized = functional.interpolate(logits, (128, 128), mode="bilinear", align_corners=False)[:, :, ::4, ::4]
    torch.testing.assert_close(resized, tensors["logits.ALL_LABEL-LPIS.every4th"], rtol=0, atol=1e-5)


@pytest.mark.parametrize("added", [1, 10, 40])
def test_padded_dates_change_nothing(added: int) -> None:
    model = small_model().eval()
    values, dates = series(2, 6)
    generator = torch.Generator().manual_seed(added)
    more = torch.cat((values, torch.randn(2, added, 3, 10, 10, generator=generator, dtype=torch.float64)), dim=1)
    days = torch.cat((dates, torch.full((2, added), 77.0)), dim=1)
    padding = torch.arange(6 + added).expand(2, -1) >= 6
    with torch.no_grad():
        for alone, padded in zip(model(values, dates), model(more, days, padding)):
            torch.testing.assert_close(padded, alone, rtol=0, atol=1e-12)


def test_order_of_dates_does_not_matter() -> None:
    model = small_model().eval()
    values, dates = series(2, 7)
    padding = torch.zeros(2, 7, dtype=torch.bool)
    padding[0, 5:] = True
    order = torch.tensor([6, 2, 0, 5, 1, 4, 3])
    with torch.no_grad():
        for straight, shuffled in zip(
            model(values, dates, padding), model(values[:, order], dates[:, order], padding[:, order])
        ):
            torch.testing.assert_close(shuffled, straight, rtol=0, atol=1e-11)


def test_hidden_dates_have_no_gradient_and_no_influence() -> None:
    """What masked pretraining relies on: not even NaN passes."""
    model = small_model().eval()
    values, dates = series(1, 5)
    padding = torch.tensor([[False, True, False, True, False]])
    values[:, 1] = math.nan
    given = values.requires_grad_()
    maps = model(given, dates, padding)
    assert all(bool(m.isfinite().all()) for m in maps)
    sum(m.sum() for m in maps).backward()  # type: ignore[union-attr]
    assert given.grad is not None
    assert float(given.grad[:, padding[0]].abs().max()) == 0.0
    assert float(given.grad[:, ~padding[0]].abs().max()) > 0.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("hidden", ["none", "one series", "all"])
@pytest.mark.parametrize("length", [0, 1, 3])
@pytest.mark.parametrize("options", [{}, {"masked_norm": False}, {"agg_mode": "mean"}, STRIDED])
def test_edges_stay_finite(options: dict[str, Any], length: int, hidden: str, dtype: torch.dtype) -> None:
    """No dates, one date, series without any valid date, half and double precision; forward and backward."""
    torch.manual_seed(0)
    model = UTAE(3, **{**SMALL, **options}).to(dtype)
    padding = torch.zeros(2, length, dtype=torch.bool)
    padding[: {"none": 0, "one series": 1, "all": 2}[hidden]] = True
    maps = model(torch.randn(2, length, 3, 10, 10, dtype=dtype), torch.arange(length).repeat(2, 1), padding)
    for m, width, stride in zip(maps, model.widths, model.strides, strict=True):
        assert m.dtype == dtype
        assert tuple(m.shape) == (2, width, 10 // stride, 10 // stride)
        assert bool(m.isfinite().all())
    sum(m.sum() for m in maps).backward()  # type: ignore[union-attr]
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name  # DistributedDataParallel waits for every gradient
        assert bool(parameter.grad.isfinite().all()), name


@pytest.mark.parametrize("size", [(1, 1), (5, 5), (7, 3), (16, 9)])
def test_any_size(size: tuple[int, int]) -> None:
    maps = small_model().eval()(torch.randn(2, 3, 3, *size, dtype=torch.float64), torch.arange(3).repeat(2, 1))
    assert [tuple(m.shape[-2:]) for m in maps] == [size] * 3


def test_odd_sizes_come_back_from_strides() -> None:
    model = small_model(**STRIDED).eval()
    maps = model(torch.randn(1, 2, 3, 13, 10, dtype=torch.float64), torch.arange(2).repeat(1, 1))
    assert [tuple(m.shape[-2:]) for m in maps] == [(13, 10), (6, 5), (3, 2)]


def test_autocast() -> None:
    torch.manual_seed(0)
    model = UTAE(3, **SMALL)
    padding = torch.rand(2, 5) < 0.5
    with torch.autocast("cpu", torch.bfloat16):
        maps = model(torch.randn(2, 5, 3, 10, 10), torch.arange(5).repeat(2, 1), padding)
    sum(m.float().sum() for m in maps).backward()  # type: ignore[union-attr]
    assert all(bool(parameter.grad.isfinite().all()) for parameter in model.parameters() if parameter.grad is not None)


def test_days_are_encoded_in_full_precision_whatever_the_weights() -> None:
    """Wavelengths rounded to bfloat16 would move late dates by days."""
    days = torch.arange(-200, 200)
    exact = SinusoidalPositions(16)(days.double())
    assert float((SinusoidalPositions(16).bfloat16()(days) - exact).abs().max()) < 1e-4


def test_statistics_are_updated_once_a_step() -> None:
    model = small_model().train()
    model(*series(2, 4))
    counters = [buffer for name, buffer in model.named_buffers() if name.endswith("num_batches_tracked")]
    assert counters
    assert {int(counter) for counter in counters} == {1}


def test_packing_round_trip() -> None:
    padding = torch.tensor([[False, True, False], [True, True, True], [True, False, False]])
    packed = PackedDates.of(torch.arange(9).view(3, 3), padding)
    assert packed.days.tolist() == [0, 2, 7, 8]
    assert packed.length == 2
    rows = torch.randn(4, 5)
    torch.testing.assert_close(packed.pack(packed.unpack(rows)), rows)
    torch.testing.assert_close(packed.total(rows), packed.unpack(rows).sum(dim=1))


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"agg_mode": "max"}, "agg_mode"),
        ({"encoder_norm": "layer"}, "encoder_norm"),
        ({"decoder_widths": (16, 16, 16)}, "decoder_widths"),
        ({"n_head": 5}, "n_head"),
        ({"d_model": 60}, "d_model"),
        ({"encoder_widths": (16, 18, 32), "agg_mode": "mean"}, "encoder_widths"),
    ],
)
def test_impossible_options_are_named(options: dict[str, Any], named: str) -> None:
    with pytest.raises(InputError, match=named):
        UTAE(3, **{**SMALL, **options})
