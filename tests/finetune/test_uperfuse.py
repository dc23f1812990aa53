from dataclasses import replace

import pytest
import torch
from tiny_segmentation import AERIAL, DECODER, DEM, S1, S2, batch, encoders, task
from torch.nn.functional import conv2d, interpolate

from bocage.finetune.models.uperfuse import Fusion, UPerFuse
from bocage.finetune.models.upernet import UPerNetConfig
from bocage.shards.batch import Batch
from bocage.shards.errors import InputError
from bocage.shards.preprocess.inputs import EncoderInput, encoder_inputs

SIDE = 51.2


def model(*names: str, classes: int = 4) -> UPerFuse:
    torch.manual_seed(0)
    return UPerFuse(encoders(*names), {"land": classes}, DECODER).eval()


def inputs_of(net: UPerFuse, data: Batch) -> dict[str, EncoderInput]:
    specs = {name: net.encoder(name).spec for name in net.encoders if name in data.values}
    return encoder_inputs(data, specs, {}, random_orientation=False)


def with_random_tokens(net: UPerFuse) -> UPerFuse:
    for parameter in net.absent.parameters():
        torch.nn.init.normal_(parameter)
    return net


def test_fusion_equals_one_convolution_over_the_resized_concatenation() -> None:
    names = (AERIAL, DEM, S2, S1)
    net = model(*names).double()
    assert net.fusion is not None
    given = inputs_of(net, batch(names, names, inputs=names))
    given = {name: EncoderInput(**{**vars(item), "values": item.values.double()}) for name, item in given.items()}
    pyramid = net.pyramid(given, SIDE)
    for stage, fused in enumerate(pyramid):
        maps = []
        for name in names:
            item, encoder = given[name], net.encoder(name)
            features = encoder.features(item.values, item.dates, item.padding)
            # The three U-TAE maps go to four stages, deepest first; maps of images go one to one.
            values = features[stage] if not encoder.spec.series else features[[2, 1, 1, 0][stage]]
            maps.append(interpolate(values, size=fused.shape[-2:], mode="bilinear", align_corners=False))
        convolution = net.fusion.conv_f[stage]
        assert isinstance(convolution, torch.nn.Conv2d)
        expected = conv2d(torch.cat(maps, dim=1), convolution.weight, convolution.bias)
        torch.testing.assert_close(fused, expected, rtol=1e-10, atol=1e-10)


def test_series_finer_than_images_decide_the_grid() -> None:
    """A coarse image beside a series: the pyramid must not lose the pixels of the series."""
    built = encoders("SPOT_RGBI", S2)
    built["SPOT_RGBI"].spec = replace(built["SPOT_RGBI"].spec, gsd=25.6)
    net = UPerFuse(built, {"land": 4}, DECODER).eval()
    assert net.grids(SIDE) == [(5, 5)] * 3
    image, series = inputs_of(net, batch(("SPOT_RGBI", S2), inputs=("SPOT_RGBI", S2))).values()
    coarse = EncoderInput(image.values[..., :2, :2], image.valid[..., :2, :2], image.present)
    assert net({"SPOT_RGBI": coarse, S2: series}, SIDE, 16).logits["land"].shape == (1, 4, 16, 16)


def test_fusion_weights_have_the_official_layout() -> None:
    fusion = Fusion({"a": (4, 8), "b": (2, 3)}, (4, 8))
    shapes = {name: tuple(tensor.shape) for name, tensor in fusion.state_dict().items()}
    assert shapes == {
        "conv_f.0.weight": (4, 6, 1, 1),
        "conv_f.0.bias": (4,),
        "conv_f.1.weight": (8, 11, 1, 1),
        "conv_f.1.bias": (8,),
    }


@pytest.mark.parametrize(
    ("names", "grids"),
    [
        ((AERIAL,), [64, 32, 16, 8]),
        ((AERIAL, S2), [64, 32, 16, 8]),
        ((S2,), [5, 5, 5]),
        ((S2, S1), [5, 5, 5]),
        (("SPOT_RGBI", S1), [8, 4, 2, 1]),
        (("SPOT_RGBI", AERIAL), [64, 32, 16, 8]),  # the finest modality decides, in any order
    ],
)
def test_any_subset_gives_logits_at_label_size(names: tuple[str, ...], grids: list[int]) -> None:
    net = model(*names)
    assert net.grids(SIDE) == [(cells, cells) for cells in grids]
    given = inputs_of(net, batch(names, names, inputs=names))
    assert [tuple(values.shape[-2:]) for values in net.pyramid(given, SIDE)] == net.grids(SIDE)
    logits = net(given, SIDE, 256).logits["land"]
    assert logits.shape == (2, 4, 256, 256)
    assert logits.min() < 0, "logits must not end in a ReLU"
    assert (net.fusion is None) == (len(names) == 1)


def test_a_sample_does_not_affect_the_prediction_of_another() -> None:
    names = (AERIAL, S2)
    net = with_random_tokens(model(*names))
    held: list[tuple[str, ...]] = [names, (AERIAL,), (S2,), ()]
    together = net(inputs_of(net, batch(*held, inputs=names)), SIDE, 256).logits["land"]
    whole = batch(*held, inputs=names)
    for index in range(len(held)):
        one = Batch(
            keys=whole.keys[index : index + 1],
            rois=whole.rois[index : index + 1],
            **{
                field: {name: values[index : index + 1] for name, values in getattr(whole, field).items()}
                for field in ("values", "present", "dates", "padding")
            },
            seeds=whole.seeds[index : index + 1],
            sample_ids=whole.sample_ids[index : index + 1],
            windows=whole.windows[index : index + 1],
        )
        alone = net(inputs_of(net, one), SIDE, 256).logits["land"]
        torch.testing.assert_close(together[index : index + 1], alone, rtol=1e-4, atol=1e-4)


def test_a_modality_missing_from_the_batch_is_absent_from_all_samples() -> None:
    names = (AERIAL, S2)
    net = with_random_tokens(model(*names))
    given = inputs_of(net, batch((S2,), (S2,), inputs=names))
    only = {S2: given[S2]}
    torch.testing.assert_close(net(given, SIDE, 256).logits["land"], net(only, SIDE, 256).logits["land"])
    with pytest.raises(InputError, match="none of the model's modalities"):
        net({}, SIDE, 256)


def test_absent_samples_do_not_reach_batch_statistics() -> None:
    net = model(AERIAL, S2).train()
    before = [buffer.clone() for name, buffer in net.encoder(S2).named_buffers() if "running" in name]
    net(inputs_of(net, batch((AERIAL,), (AERIAL,), inputs=(AERIAL, S2))), SIDE, 256)
    after = [buffer for name, buffer in net.encoder(S2).named_buffers() if "running" in name]
    assert before
    assert all(torch.equal(old, new) for old, new in zip(before, after, strict=True))


def test_tokens_replace_absent_modalities_and_always_have_a_gradient() -> None:
    names = (AERIAL, S2)
    net = model(*names)
    net(inputs_of(net, batch(names, names, inputs=names)), SIDE, 64).logits["land"].square().mean().backward()
    assert all(parameter.grad is not None and not parameter.grad.any() for parameter in net.absent.parameters())
    net.zero_grad()
    net(inputs_of(net, batch((AERIAL,), names, inputs=names)), SIDE, 64).logits["land"].square().mean().backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in net.absent[S2].parameters())
    unused = list(net.absent[AERIAL].parameters())
    assert all(parameter.grad is not None and not parameter.grad.any() for parameter in unused)


def test_fused_maps_are_aligned_with_the_ground() -> None:
    """Rotating the input by 180 degrees rotates the fused series maps by 180 degrees, although grids differ."""
    net = model("SPOT_RGBI", S2)
    assert net.fusion is not None
    given = inputs_of(net, batch((S2,), inputs=("SPOT_RGBI", S2)))
    series = {S2: given[S2]}
    values = net.encoder(S2).features(given[S2].values, given[S2].dates, given[S2].padding)
    for stage, fused in enumerate(net.pyramid(series, SIDE)):
        chosen = values[[2, 1, 1, 0][stage]].flip(-1, -2)
        part = net.fusion.convolve_subset(stage, [S2], chosen)
        turned = interpolate(part, size=fused.shape[-2:], mode="bilinear", align_corners=False)
        expected = turned + net.fusion.bias(stage).view(1, -1, 1, 1)
        torch.testing.assert_close(fused.flip(-1, -2), expected, rtol=1e-4, atol=1e-5)


def test_series_before_an_image_and_no_modality_are_refused() -> None:
    with pytest.raises(InputError, match="images come before series"):
        UPerFuse(encoders(S2, AERIAL), {"land": 3}, DECODER)
    with pytest.raises(InputError, match="at least one"):
        UPerFuse({}, {"land": 3}, DECODER)


def test_unused_official_parameters_are_frozen() -> None:
    names = [name for name, parameter in task(AERIAL).named_parameters() if not parameter.requires_grad]
    assert names
    assert all(".fpn_stages.4." in name for name in names)


def test_auxiliary_decoders_learn_from_the_samples_that_have_the_sensor() -> None:
    torch.manual_seed(0)
    names = (AERIAL, S2)
    net = UPerFuse(encoders(*names), {"land": 4}, DECODER, auxiliary=names).train()
    given = inputs_of(net, batch((AERIAL,), names, names, inputs=names))
    predictions = net(given, SIDE, 64)
    assert predictions.auxiliary.keys() == {"land"}
    shapes = {name: (rows.tolist(), logits.shape) for name, (rows, logits) in predictions.auxiliary["land"].items()}
    assert shapes == {AERIAL: ([0, 1, 2], (3, 4, 64, 64)), S2: ([1, 2], (2, 4, 64, 64))}
    for _, logits in predictions.auxiliary["land"].values():
        logits.square().mean().backward(retain_graph=True)
    for name, parameter in net.auxiliary.named_parameters():
        assert parameter.grad is not None or not parameter.requires_grad, name
    assert all(bool(p.grad.abs().max() > 0) for p in net.encoder(S2).parameters() if p.grad is not None)
    net.eval()
    assert net(given, SIDE, 64).auxiliary == {}
    with pytest.raises(InputError, match="auxiliary: DEM_ELEV not among"):
        UPerFuse(encoders(AERIAL), {"land": 4}, DECODER, auxiliary=(DEM,))


def test_an_auxiliary_decoder_with_batch_norm_skips_a_single_sample() -> None:
    names = (AERIAL, S2)
    net = UPerFuse(encoders(*names), {"land": 4}, UPerNetConfig(pyramid_width=32, width=16), auxiliary=names).train()
    given = inputs_of(net, batch((AERIAL,), names, inputs=names))
    assert net(given, SIDE, 64).auxiliary["land"].keys() == {AERIAL}


def test_the_official_model_refuses_samples_that_lack_a_sensor() -> None:
    names = (AERIAL, S2)
    net = UPerFuse(encoders(*names), {"land": 4}, DECODER, official=True).eval()
    assert not list(net.absent.parameters())
    with pytest.raises(InputError, match=f"lack {S2}, and an official model"):
        net(inputs_of(net, batch((AERIAL,), names, inputs=names)), SIDE, 64)
    with pytest.raises(InputError, match="build it with head=True"):
        UPerFuse(encoders(S2), {"land": 4}, DECODER, official=True)
