import importlib.util
import json
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file
from torch.nn.functional import interpolate

from bocage.finetune.models.upernet import UPerNet, UPerNetConfig, _smooth

GOLDEN = Path(__file__).parents[1] / "data" / "golden"
DECODER = "main_decoders.AERIAL_LABEL-COSIA.seg_model."
ENCODER = "encoders.AERIAL_RGBI.seg_model.model."
SWIN_TINY = (96, 192, 384, 768)


def golden_module():  # type: ignore[no-untyped-def]
    spec = importlib.util.spec_from_file_location("golden_fill", GOLDEN / "fill.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_names_and_shapes_are_those_of_the_official_weights() -> None:
    official = json.loads((GOLDEN / "lc_a.keys.json").read_text())
    ours = UPerNet(SWIN_TINY, 19, UPerNetConfig()).state_dict()
    expected = {name: shape for name, shape in official.items() if name.startswith(DECODER)}
    assert {DECODER + name: list(tensor.shape) for name, tensor in ours.items()} == expected


def test_logits_equal_those_of_the_official_code() -> None:
    golden = golden_module()
    encoder = timm.create_model("swin_tiny_patch4_window7_224", features_only=True, img_size=128).eval()
    encoder.load_state_dict({name: golden.fill(ENCODER + name, value) for name, value in encoder.state_dict().items()})
    decoder = UPerNet(SWIN_TINY, 19, UPerNetConfig()).eval()
    decoder.load_state_dict({name: golden.fill(DECODER + name, value) for name, value in decoder.state_dict().items()})
    with torch.no_grad():
        maps = encoder(golden.make_input("AERIAL_RGBI", (2, 3, 128, 128)))
        logits = decoder([values.permute(0, 3, 1, 2) for values in maps])
    # The official head aligns the corners of the image when it enlarges the logits.
    logits = interpolate(logits, size=(128, 128), mode="bilinear", align_corners=True)
    expected = load_file(GOLDEN / "lc_a.safetensors")["logits.AERIAL_LABEL-COSIA.every4th"]
    torch.testing.assert_close(logits[:, :, ::4, ::4], expected, rtol=0, atol=5e-5)


@pytest.mark.parametrize("size", [(4, 6), (5, 5), (1, 1)])
def test_smoothing_equals_upsampling_twofold_and_downsampling(size: tuple[int, int]) -> None:
    values = torch.randn(2, 3, *size, dtype=torch.float64)
    large = interpolate(values, scale_factor=2, mode="bilinear", align_corners=False)
    expected = interpolate(large, size=size, mode="bilinear", align_corners=False)
    torch.testing.assert_close(_smooth(values), expected)


@pytest.mark.parametrize("width", [16, 24, 64])
def test_group_norm_trains_with_one_sample_and_gives_pooled_maps_a_gradient(width: int) -> None:
    torch.manual_seed(0)
    decoder = UPerNet((32, width), 5, UPerNetConfig(pyramid_width=32, width=16, norm="group")).train()
    decoder([torch.randn(1, 32, 8, 8), torch.randn(1, width, 4, 4)]).square().mean().backward()
    gradient = decoder.get_parameter("decoder.psp.blocks.0.1.0.weight").grad
    assert gradient is not None and gradient.abs().max() > 0


def test_every_trainable_parameter_receives_a_gradient() -> None:
    decoder = UPerNet((8, 16, 32), 5, UPerNetConfig(pyramid_width=16, width=8))
    maps = [torch.randn(2, width, side, side) for width, side in ((8, 16), (16, 8), (32, 4))]
    logits = decoder(maps)
    assert logits.shape == (2, 5, 16, 16)
    logits.square().mean().backward()
    for name, parameter in decoder.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, name


@pytest.mark.parametrize("wrong", [{"pyramid_width": 0}, {"width": 0}])
def test_widths_must_be_positive(wrong: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="positive"):
        UPerNetConfig(**wrong)  # type: ignore[arg-type]
