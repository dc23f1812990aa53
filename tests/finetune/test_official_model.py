"""Official models: names, shapes and outputs equal those of IGN's code for any modalities and tasks."""

import copy
import importlib.util
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch.nn.functional import interpolate

from bocage.finetune.official.official_model import OfficialModel, build_official
from bocage.shards.errors import InputError
from bocage.shards.modality import FLAIR_HUB
from bocage.ssl.encoders.base import Encoder

GOLDEN = Path(__file__).parents[1] / "data" / "golden"
CASES = ("lc_a", "lc_l", "lpis_f", "multitask_d")


def load_fill() -> ModuleType:
    spec = importlib.util.spec_from_file_location("golden_fill", GOLDEN / "fill.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


FILL = load_fill()


def read(case: str) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Metadata and expected logits by task."""
    with safe_open(GOLDEN / f"{case}.safetensors", framework="pt") as file:
        names = list(file.keys())
        metadata = file.metadata()
        facts = {key: json.loads(metadata[key]) for key in ("modalities", "labels", "shapes", "arch")}
        return facts, {name.split(".")[1]: file.get_tensor(name) for name in names}


def built(facts: dict[str, Any]) -> OfficialModel:
    sizes = {name: shape[-1] for name, shape in facts["shapes"].items() if len(shape) == 4}
    model = build_official(facts["modalities"], facts["labels"], facts["arch"], sizes).eval()
    model.load_state_dict(FILL.fill_state_dict(model.state_dict()))
    return model


def data(facts: dict[str, Any]) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Inputs, dates and padding: in sample 1 the last date is padding."""
    inputs = {name: FILL.make_input(name, tuple(shape)) for name, shape in facts["shapes"].items()}
    series = [name for name, shape in facts["shapes"].items() if len(shape) == 5]
    days = torch.tensor([[-120, -40, 10, 90, 200], [-120, -40, 10, 90, 0]]).float()
    padding = torch.tensor([[False] * 5, [False] * 4 + [True]])
    for name in series:
        inputs[name][1, -1] = 0
    return inputs, dict.fromkeys(series, days), dict.fromkeys(series, padding)


@pytest.mark.parametrize("case", CASES)
def test_names_shapes_and_logits_equal_those_of_the_official_code(case: str) -> None:
    facts, expected = read(case)
    model = built(facts)
    keys = json.loads((GOLDEN / f"{case}.keys.json").read_text())
    assert {name: list(tensor.shape) for name, tensor in model.state_dict().items()} == keys
    with torch.no_grad():
        logits = model(*data(facts), 128)
    assert logits.keys() == expected.keys()
    for task, values in logits.items():
        torch.testing.assert_close(values[:, :, ::4, ::4], expected[task], rtol=0, atol=1e-4)


def resized(values: torch.Tensor, size: int | tuple[int, ...]) -> torch.Tensor:
    return interpolate(values, size=size, mode="bilinear", align_corners=False)


def reference_logits(
    model: OfficialModel,
    inputs: dict[str, torch.Tensor],
    dates: dict[str, torch.Tensor],
    padding: dict[str, torch.Tensor],
    tasks: dict[str, int],
    size: int,
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Compute main and auxiliary logits like the official code, in its order: resize, concatenate, convolve."""
    order = [name for name in FLAIR_HUB if name in inputs]
    images = [name for name in order if inputs[name].ndim == 4]
    maps, logits = {}, {}
    for name in order:
        encoder = model.encoders[name]
        if name in images:
            image_encoder = encoder.get_submodule("seg_model")
            assert isinstance(image_encoder, Encoder)
            maps[name] = image_encoder.features(inputs[name])
        else:
            output = encoder(inputs[name], dates[name], padding[name])
            maps[name], logits[name] = output.maps, resized(output.logits, size)

    def decoded(decoder: torch.nn.Module, pyramid: list[torch.Tensor]) -> torch.Tensor:
        found = decoder.get_submodule("seg_model")(pyramid)
        found = interpolate(found, scale_factor=4, mode="bilinear", align_corners=True)
        return resized(found, size)

    main = {}
    if images:
        targets = maps[images[0]]
        fused = targets
        if len(order) > 1:
            stages = [
                torch.cat([resized(maps[name][i], targets[i].shape[-2:]) for name in order], dim=1) for i in range(4)
            ]
            fused = [conv(stage) for conv, stage in zip(model.fusion_handler.conv_f, stages, strict=True)]
        main = {task: decoded(model.main_decoders[task], fused) for task in tasks}
    else:
        mean = torch.stack(list(logits.values())).mean(dim=0)
        main = {task: model.main_decoders[task](mean) if len(tasks) > 1 else mean for task in tasks}
    auxiliary = {}
    for key, decoder in model.aux_decoders.items():
        name = key.partition("__")[0]
        auxiliary[key] = decoded(decoder, maps[name]) if name in images else decoder(logits[name])
    return main, auxiliary


COSIA, LPIS = "AERIAL_LABEL-COSIA", "ALL_LABEL-LPIS"
TINY = "swin_tiny_patch4_window7_224-upernet"


@pytest.mark.parametrize(
    ("images", "series", "tasks", "arch"),
    [
        ({"SPOT_RGBI": (3, 64)}, ("SENTINEL1-DESC_TS",), {COSIA: 19}, TINY),
        ({"AERIAL_RGBI": (4, 96), "AERIAL-RLT_PAN": (1, 64)}, (), {LPIS: 46}, TINY),
        ({"DEM_ELEV": (1, 64)}, (), {COSIA: 13, LPIS: 31}, "swin_small_patch4_window7_224-upernet"),
        ({"DEM_ELEV": (2, 100), "SPOT_RGBI": (4, 32)}, ("SENTINEL2_TS",), {LPIS: 23}, TINY),
        ({"AERIAL_RGBI": (3, 64)}, ("SENTINEL2_TS",), {COSIA: 19}, "swinv2_tiny_window8_256-upernet"),
        ({}, ("SENTINEL2_TS", "SENTINEL1-ASC_TS", "SENTINEL1-DESC_TS"), {COSIA: 19}, TINY),
        ({}, ("SENTINEL1-ASC_TS", "SENTINEL2_TS"), {COSIA: 19, LPIS: 23}, TINY),
        ({}, ("SENTINEL2_TS",), {COSIA: 19, LPIS: 31}, TINY),
    ],
)
def test_every_combination_follows_the_official_rules(
    images: dict[str, tuple[int, int]], series: tuple[str, ...], tasks: dict[str, int], arch: str
) -> None:
    channels = {name: count for name, (count, _) in images.items()}
    channels |= {name: len(FLAIR_HUB[name].bands) for name in series}
    sizes = {name: size for name, (_, size) in images.items()}
    model = build_official(channels, tasks, arch, sizes, auxiliary=list(channels)).eval()
    assert set(model.aux_decoders) == {f"{name}__{task}" for name in channels for task in tasks}
    model.load_state_dict(FILL.fill_state_dict(model.state_dict()))
    inputs = {name: FILL.make_input(name, (2, count, sizes[name], sizes[name])) for name, (count, _) in images.items()}
    inputs |= {name: FILL.make_input(name, (2, 4, channels[name], 10, 10)) for name in series}
    days = dict.fromkeys(series, torch.tensor([[-100.0, 0, 50, 120], [-90, -10, 20, 0]]))
    padding = dict.fromkeys(series, torch.tensor([[False] * 4, [False] * 3 + [True]]))
    with torch.no_grad():
        found = model.predictions(inputs, days, padding, 72)
        main, auxiliary = reference_logits(model, inputs, days, padding, tasks, 72)
    assert found.logits.keys() == tasks.keys()
    for task, classes in tasks.items():
        assert found.logits[task].shape == (2, classes, 72, 72)
        torch.testing.assert_close(found.logits[task], main[task], rtol=0, atol=1e-4)
        for name, (_, logits) in found.auxiliary[task].items():
            torch.testing.assert_close(logits, auxiliary[f"{name}__{task}"], rtol=0, atol=1e-4)
        assert found.auxiliary[task].keys() == channels.keys()


def test_the_order_of_modalities_does_not_matter() -> None:
    one = build_official(("SENTINEL2_TS", "AERIAL_RGBI"), (COSIA,), TINY, {"AERIAL_RGBI": 64}).state_dict()
    other = build_official(("AERIAL_RGBI", "SENTINEL2_TS"), (COSIA,), TINY, {"AERIAL_RGBI": 64}).state_dict()
    assert list(one) == list(other)


def test_head_widths_for_one_or_two_tasks() -> None:
    def heads(*labels: str) -> list[int]:
        state = build_official(("SENTINEL2_TS",), labels).state_dict()
        return [len(v) for name, v in state.items() if "out_conv.conv.conv" in name and v.ndim == 4]

    assert heads(COSIA) == [32, 19]
    assert heads(LPIS) == [32, 19, 23]
    assert heads(COSIA, LPIS) == [32, 19, 42]


def test_weights_loaded_after_moving_and_copying_reach_uperfuse() -> None:
    facts, expected = read("lpis_f")
    fresh = build_official(facts["modalities"], facts["labels"]).eval()
    model = copy.deepcopy(fresh).to(torch.float64).to(torch.float32).eval()
    model.load_state_dict(FILL.fill_state_dict(model.state_dict()))
    with torch.no_grad():
        logits = model(*data(facts), 128)["ALL_LABEL-LPIS"]
    torch.testing.assert_close(logits[:, :, ::4, ::4], expected["ALL_LABEL-LPIS"], rtol=0, atol=1e-4)
    model.train()
    assert model.uperfuse.training
    assert not fresh.uperfuse.training


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((("AERIAL",), (COSIA,)), "unknown modality 'AERIAL'"),
        ((("SENTINEL2_MSK-SC", "SENTINEL2_TS"), (COSIA,)), "SENTINEL2_MSK-SC are not inputs"),
        ((("AERIAL_RGBI",), ()), "labels: name at least one"),
        ((("AERIAL_RGBI",), ("SPOT_RGBI",)), "SPOT_RGBI is not a label"),
        ((("AERIAL_RGBI",), (COSIA,), "resnet34-unet"), "arch 'resnet34-unet' is not a timm Swin with UPerNet"),
        ((("AERIAL_RGBI",), (COSIA,), "swin_tiny_patch4_window7_224"), "is not a timm Swin with UPerNet"),
        ((("AERIAL_RGBI",), (COSIA,), TINY, {"SPOT_RGBI": 64}), "image_sizes: SPOT_RGBI not among"),
        (({"AERIAL_RGBI": 2}, (COSIA,), TINY), "AERIAL_RGBI: name the 2 channels"),
        (({"AERIAL_RGBI": ("R", "X")}, (COSIA,), TINY), "AERIAL_RGBI has no channel X"),
    ],
)
def test_wrong_arguments_raise(arguments: tuple[Any, ...], message: str) -> None:
    with pytest.raises(InputError, match=message):
        build_official(*arguments)


def test_missing_inputs_are_named() -> None:
    model = build_official(("SENTINEL2_TS",), (COSIA,)).eval()
    with pytest.raises(InputError, match=r"SENTINEL2_TS have the shape \[1, 2, 4, 10, 10\]; .* B2, B3"):
        model({"SENTINEL2_TS": torch.zeros(1, 2, 4, 10, 10)}, {}, {}, 64)
    with pytest.raises(InputError, match="inputs lack SENTINEL2_TS"):
        model({}, {}, {}, 64)
    with pytest.raises(InputError, match="dates lack SENTINEL2_TS"):
        model({"SENTINEL2_TS": torch.zeros(1, 2, 10, 10, 10)}, {}, {}, 64)


def test_a_training_step_runs_every_decoder_once() -> None:
    """The official code updates batch statistics twice a step."""
    model = build_official({"SPOT_RGBI": 3}, (COSIA,), TINY, {"SPOT_RGBI": 64}, auxiliary=("SPOT_RGBI",)).train()
    inputs = {"SPOT_RGBI": torch.randn(2, 3, 64, 64)}
    model.predictions(inputs, None, None, 64)
    steps = {int(b) for n, b in model.named_buffers() if n.endswith("num_batches_tracked") and "fpn_stages.4" not in n}
    assert steps == {1}
    found = model.eval().predictions(inputs, None, None, 64)
    assert found.auxiliary[COSIA].keys() == {"SPOT_RGBI"}


def test_unused_heads_are_frozen() -> None:
    with_image = build_official(("SPOT_RGBI", "SENTINEL2_TS"), (COSIA,), TINY)
    assert not any(p.requires_grad for n, p in with_image.named_parameters() if ".out_conv.conv.conv." in n)
    alone = build_official(("SENTINEL2_TS",), (COSIA,))
    assert all(p.requires_grad for n, p in alone.named_parameters() if ".out_conv.conv.conv." in n)
