"""Conversion of official checkpoints to bocage's folders and back."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from small_series import write_series
from tiny_segmentation import batch

from bocage.finetune.models.segmentation import Segmentation, load_segmentation
from bocage.finetune.models.targets import Target
from bocage.finetune.models.upernet import UPerNetConfig
from bocage.finetune.official.convert import (
    extract_encoder,
    extract_segmentations,
    from_official,
    load_official,
    save_official,
    to_official,
)
from bocage.finetune.official.official_model import OfficialModel, baseline_input, build_official
from bocage.shards.batch import Batch
from bocage.shards.errors import InputError
from bocage.shards.modality import FLAIR_HUB
from bocage.shards.preprocess.normalize import InputSpec, standardize
from bocage.ssl.encoders.base import Encoder, EncoderConfig
from bocage.ssl.encoders.build import build_encoder
from bocage.ssl.encoders.export import load_encoder, save_encoder
from bocage.tools.main import main

AERIAL, SPOT, S2, S1 = "AERIAL_RGBI", "SPOT_RGBI", "SENTINEL2_TS", "SENTINEL1-ASC_TS"
COSIA, LPIS = "AERIAL_LABEL-COSIA", "ALL_LABEL-LPIS"
TINY = "swin_tiny_patch4_window7_224-upernet"
SIZES = {AERIAL: 256, SPOT: 64}


def official(*names: str, labels: Any = (COSIA,), auxiliary: tuple[str, ...] = (), **sizes: int) -> OfficialModel:
    torch.manual_seed(1)
    chosen = {name: sizes.get(name, SIZES[name]) for name in names if name in SIZES}
    model = build_official(names, labels, TINY, chosen, auxiliary=auxiliary)
    for name, buffer in model.named_buffers():
        if name.endswith("running_var"):
            buffer.uniform_(0.5, 1.5)
    return model.eval()


def same(one: torch.nn.Module, other: torch.nn.Module) -> bool:
    theirs = other.state_dict()
    return one.state_dict().keys() == theirs.keys() and all(
        torch.equal(value, theirs[name]) for name, value in one.state_dict().items()
    )


@pytest.mark.parametrize("prefix", ["", "model."])
@pytest.mark.parametrize("suffix", [".safetensors", ".pth", ".ckpt"])
def test_every_file_format_loads(tmp_path: Path, suffix: str, prefix: str) -> None:
    model = official(S2, S1, labels=(COSIA, LPIS), auxiliary=(S1,))
    weights = {prefix + name: tensor for name, tensor in model.state_dict().items()}
    path = tmp_path / f"official{suffix}"
    if suffix == ".safetensors":
        save_file(weights, path)
    elif suffix == ".pth":
        torch.save(weights, path)
    else:
        weights[f"criterion.{COSIA}.weight"] = torch.ones(19)
        torch.save({"epoch": 3, "state_dict": weights, "hyper_parameters": {"lr": 5e-5}}, path)
    loaded, report = load_official(path)
    assert same(model, loaded)
    assert not loaded.training
    assert len(report.loaded) == len(model.state_dict())
    assert report.dropped == ((f"criterion.{COSIA}.weight",) if suffix == ".ckpt" else ())
    assert str(report).startswith(f"{len(report.loaded)} loaded")


def test_a_checkpoint_in_half_precision_is_cast_and_reported(tmp_path: Path) -> None:
    model = official(S2)
    half = {
        name: tensor.half() if tensor.is_floating_point() else tensor for name, tensor in model.state_dict().items()
    }
    save_file(half, tmp_path / "half.safetensors")
    loaded, report = load_official(tmp_path / "half.safetensors")
    assert set(report.adapted.values()) == {"float16 to float32"}
    for name, tensor in loaded.state_dict().items():
        assert tensor.dtype == model.state_dict()[name].dtype
        assert torch.equal(tensor, half[name].to(tensor.dtype))


@pytest.mark.slow
def test_auxiliary_decoders_can_be_dropped(tmp_path: Path) -> None:
    model = official(SPOT, S2, auxiliary=(SPOT,))
    save_official(model, tmp_path / "a.safetensors")
    loaded, report = load_official(tmp_path / "a.safetensors", auxiliary=False)
    assert not loaded.aux_decoders
    assert set(report.dropped) == {name for name in model.state_dict() if name.startswith("aux_decoders.")}
    kept, _ = load_official(tmp_path / "a.safetensors")
    assert list(kept.aux_decoders) == [f"{SPOT}__{COSIA}"]


def test_files_written_carry_the_prefix_and_every_key(tmp_path: Path) -> None:
    model = official(SPOT, S2)
    save_official(model, tmp_path / "a.safetensors")
    stored = load_file(tmp_path / "a.safetensors")
    assert set(stored) == {f"model.{name}" for name in model.state_dict()}
    with pytest.raises(InputError, match="are written as"):
        save_official(model, tmp_path / "a.ckpt")


@pytest.mark.slow
def test_tables_are_resized_when_the_image_size_differs(tmp_path: Path) -> None:
    save_official(official(SPOT, S2), tmp_path / "a.safetensors")
    loaded, report = load_official(tmp_path / "a.safetensors", image_sizes={SPOT: 256})
    table = "encoders.SPOT_RGBI.seg_model.model.layers_3.blocks.0.attn.relative_position_bias_table"
    assert loaded.state_dict()[table].shape == (169, 24)
    assert table in report.adapted
    assert len(report.adapted) == 8  # the blocks of the last two stages, whose maps were smaller than the window


def test_an_extracted_encoder_computes_the_official_features(tmp_path: Path) -> None:
    model = official(AERIAL, S2)
    for name, shape in ((AERIAL, (2, 3, 256, 256)), (S2, (2, 3, 10, 10, 10))):
        folder = tmp_path / name
        save_encoder(extract_encoder(model, name), folder)
        encoder = load_encoder(folder)
        assert encoder.spec == baseline_input(FLAIR_HUB[name])
        values = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        moments = (torch.tensor([[0.0, 30, 60]] * 2), None) if name == S2 else ()
        with torch.no_grad():
            mine = encoder.features(values, *moments)
            theirs = model.uperfuse.encoder(name).features(values, *moments)
        for one, other in zip(mine, theirs, strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=1e-6)
    with pytest.raises(InputError, match="no encoder of SPOT_RGBI"):
        extract_encoder(model, SPOT)


@pytest.mark.slow
def test_each_task_becomes_a_model_with_the_official_logits(tmp_path: Path) -> None:
    model = official(AERIAL, S2, labels=(COSIA, LPIS))
    written = from_official(model, tmp_path / "out")
    assert [str(path.relative_to(tmp_path / "out")) for path in written] == [
        f"encoders/{AERIAL}",
        f"encoders/{S2}",
        COSIA,
        LPIS,
    ]
    data = batch((AERIAL, S2), (AERIAL, S2), inputs=(AERIAL, S2))  # 51.2 m: 256 px
    inputs = {}
    for name, chosen in ((AERIAL, [3, 0, 1]), (S2, list(range(10)))):
        spec = baseline_input(FLAIR_HUB[name])
        mean, std = (torch.tensor(numbers).view(-1, 1, 1) for numbers in (spec.mean, spec.std))
        inputs[name] = (data.values[name].float()[..., chosen, :, :] - mean) / std
    with torch.no_grad():
        padding = {S2: data.padding[S2]}
        expected = model(inputs, {S2: data.dates[S2]}, padding, 256)
        for label in (COSIA, LPIS):
            segmentation = load_segmentation(tmp_path / "out" / label / "model")
            torch.testing.assert_close(segmentation.logits(data)[label], expected[label], rtol=0, atol=1e-4)
    with pytest.raises(InputError, match="not an empty folder"):
        from_official(model, tmp_path / "out")


def test_tasks_with_unknown_classes_give_only_their_encoders(tmp_path: Path) -> None:
    model = official(SPOT, labels={COSIA: 13})
    assert extract_segmentations(model) == {}
    assert from_official(model, tmp_path / "out") == [tmp_path / "out" / "encoders" / SPOT]


@pytest.mark.parametrize("names", [(AERIAL, S2), (SPOT,), (S2, S1)])
def test_a_round_trip_keeps_every_weight(tmp_path: Path, names: tuple[str, ...]) -> None:
    first = official(*names, labels={LPIS: 31}, auxiliary=names[:1])
    again, report = to_official(extract_segmentations(first)[LPIS])
    read = {name for name, parameter in first.uperfuse.named_parameters()}
    assert not report.missing
    assert not report.dropped
    before, after = first.uperfuse.state_dict(), again.uperfuse.state_dict()
    assert read <= before.keys()
    assert before.keys() == after.keys()
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    assert {n: v.shape for n, v in first.state_dict().items()} == {n: v.shape for n, v in again.state_dict().items()}


def test_one_of_several_tasks_is_converted_without_the_shared_heads() -> None:
    first = official(SPOT, S2, labels=(COSIA, LPIS), auxiliary=(SPOT, S2))
    again, report = to_official(extract_segmentations(first)[LPIS])
    heads = {name for name in first.uperfuse.state_dict() if "out_conv.conv.conv" in name}
    assert heads < set(report.dropped)
    assert all(name.startswith((f"encoders.{S2}.out_conv.", f"auxiliary.{S2}.")) for name in report.dropped)
    assert list(again.aux_decoders) == [f"{SPOT}__{LPIS}"]
    alone = official(S2, labels=(COSIA, LPIS))
    with pytest.raises(InputError, match="head of SENTINEL2_TS also serves tasks"):
        to_official(extract_segmentations(alone)[COSIA])


def ours(
    *names: str,
    decoder: UPerNetConfig | None = None,
    mean: tuple[float, ...] = (0.0,) * 10,
    std: tuple[float, ...] = (1.0,) * 10,
    **options: Any,
) -> Segmentation:
    torch.manual_seed(2)
    encoders: dict[str, Encoder] = {}
    for name in names:
        spec = baseline_input(FLAIR_HUB[name], 4 if FLAIR_HUB[name].role == "image" else None)
        if spec.series:
            spec = InputSpec.from_modality(FLAIR_HUB[name], mean, std)
            widths = {"encoder_widths": [64, 64, 128, 128], "decoder_widths": [64, 64, 128, 128], **options}
            config = EncoderConfig(architecture="utae", options=widths)
        else:
            config = EncoderConfig(architecture="swin", name="swin_tiny_patch4_window7_224")
        encoders[name] = build_encoder(spec, config)
    return Segmentation(encoders, [Target(label=FLAIR_HUB[COSIA])], decoder or UPerNetConfig(), {}, auxiliary=names)


def test_a_bocage_model_gives_every_official_name_a_value() -> None:
    task = ours(SPOT, S2)
    model, report = to_official(task)
    channels = {SPOT: 4, S2: 10}
    assert {name: value.shape for name, value in model.state_dict().items()} == {
        name: value.shape
        for name, value in build_official(channels, (COSIA,), TINY, auxiliary=(SPOT,)).state_dict().items()
    }
    own = task.model.state_dict()
    assert {name.rsplit(".", 1)[1] for name in report.adapted} == {"relative_position_bias_table"}
    assert len(report.adapted) == 8  # the blocks of the last two stages, whose maps are smaller than the window
    assert set(report.dropped) == {n for n in own if n.startswith(("absent.", f"auxiliary.{S2}."))}
    assert all("out_conv" in name for name in report.missing)
    for name in report.loaded:
        assert torch.equal(model.uperfuse.state_dict()[name], own[name])


@pytest.mark.parametrize(
    ("task", "message"),
    [
        (lambda: ours(S2), "cannot be converted: .* add an image"),
        (lambda: ours(SPOT, decoder=UPerNetConfig(norm="group")), r"decoder\.norm=batch \(here group\)"),
        (lambda: ours(SPOT, S2, agg_mode="mean"), "agg_mode = mean, official att_group"),
        (lambda: ours(SPOT, S2, n_head=8), "n_head = 8, official 16"),
    ],
)
def test_models_that_the_official_architecture_cannot_express_raise(task: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        to_official(task())


class Payload:
    """Unpickling it would create a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.path,))


def test_the_standardisation_of_series_is_folded_into_the_first_convolution() -> None:
    """The official code does not standardise series."""
    task = ours(SPOT, S2, mean=tuple(range(100, 1100, 100)), std=tuple(range(10, 110, 10)))
    model, report = to_official(task)
    assert {what for name, what in report.adapted.items() if "in_conv" in name} == {"standardisation folded in"}
    theirs, own = model.uperfuse.encoder(S2), task.model.encoder(S2)
    stored = torch.randint(0, 3000, (2, 4, 10, 10, 10), generator=torch.Generator().manual_seed(0)).float()
    dates = torch.tensor([[0.0, 10, 20, 30]] * 2)
    with torch.no_grad():
        expected = own.eval().features(standardize(stored, own.spec), dates)
        for mine, other in zip(theirs.eval().features(stored, dates), expected, strict=True):
            torch.testing.assert_close(mine, other, rtol=1e-3, atol=1e-3)


def test_other_widths_and_relief_inputs_raise_an_error_that_names_the_difference(tmp_path: Path) -> None:
    """The README gives the widths that can be converted."""
    with pytest.raises(InputError, match=r"encoder_widths = .*, official \[64, 64, 128, 128\]"):
        to_official(ours(SPOT, S2, encoder_widths=[64, 64, 64, 128], decoder_widths=[32, 32, 64, 128]))
    dem = FLAIR_HUB["DEM_ELEV"]
    spec = InputSpec.from_modality(dem, (0.0, 0.0), (1.0, 1.0))
    swin = EncoderConfig(architecture="swin", name="swin_tiny_patch4_window7_224")
    task = Segmentation({"DEM_ELEV": build_encoder(spec, swin)}, [Target(label=FLAIR_HUB[COSIA])], UPerNetConfig(), {})
    with pytest.raises(InputError, match=r"DEM_ELEV reads relief values.* \(it computes elevation\)"):
        to_official(task)


def test_cloudy_dates_do_not_affect_an_official_model() -> None:
    """The official code removes cloudy dates before padding, so they must not become padded dates."""
    segmentation = extract_segmentations(official(SPOT, S2, SPOT_RGBI=32))[COSIA]
    data = batch((SPOT, S2), (SPOT, S2), inputs=(SPOT, S2))
    mask = segmentation.quality_masks[S2]
    moments, hidden = data.dates[S2], data.padding[S2]

    def with_dates(dates: list[int], cloudy: tuple[int, ...]) -> Batch:
        """The batch with these dates only, some of them cloudy."""
        chances = torch.zeros(2, len(dates), 2, 10, 10, dtype=torch.uint8)
        chances[:, list(cloudy)] = 100
        return replace(
            data,
            values={**data.values, S2: data.values[S2][:, dates], mask: chances},
            present={**data.present, mask: data.present[S2]},
            dates=dict.fromkeys((S2, mask), moments[:, dates]),
            padding=dict.fromkeys((S2, mask), hidden[:, dates]),
        )

    every = list(range(moments.shape[1]))
    cloudy, without = with_dates(every, (1,)), with_dates([0, *every[2:]], ())
    with torch.no_grad():
        found, expected, other = (segmentation.logits(b)[COSIA] for b in (cloudy, without, with_dates(every, ())))
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
        assert not torch.allclose(found, other, atol=1e-3)


def test_channels_and_image_sizes_can_be_named(tmp_path: Path) -> None:
    save_official(official(SPOT, S2), tmp_path / "a.safetensors")
    model, _ = load_official(tmp_path / "a.safetensors", channels={SPOT: ("R", "G", "B")})
    assert model.uperfuse.encoder(SPOT).spec.channels == ("R", "G", "B")
    assert model.uperfuse.encoder(SPOT).spec.mean == (433.26, 508.75, 467.77)
    for channels, message in (
        ({SPOT: ("R", "G")}, "SPOT_RGBI has 3 channels in the checkpoint, not R, G"),
        ({SPOT: ("R", "G", "X")}, "SPOT_RGBI has no channel X"),
        ({AERIAL: ("R",)}, "channels of AERIAL_RGBI: not among"),
    ):
        with pytest.raises(InputError, match=message):
            load_official(tmp_path / "a.safetensors", channels=channels)
    with pytest.raises(InputError, match="AERIAL_RGBI: name the 1 channels"):
        build_official({AERIAL: 1}, (COSIA,), TINY)


def test_an_extracted_swin_can_keep_its_image_size() -> None:
    model = official(SPOT)  # 64 px: the maps of the last two stages are smaller than the window
    values = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        theirs = model.uperfuse.encoder(SPOT).features(values)
        kept = extract_encoder(model, SPOT, any_size=False).features(values)
        free = extract_encoder(model, SPOT).features(values)
    assert all(torch.equal(one, other) for one, other in zip(kept, theirs, strict=True))
    torch.testing.assert_close(free[1], theirs[1])
    assert not torch.allclose(free[3], theirs[3], atol=1e-2)


def damaged(kind: str, path: Path, weights: dict[str, torch.Tensor]) -> Path:
    """A damaged or strange checkpoint."""
    name = "model.main_decoders.AERIAL_LABEL-COSIA.bias"
    if kind == "payload":
        target = path.with_suffix(".ckpt")
        torch.save({"state_dict": {**weights, "x": Payload(path.parent / "executed")}}, target)
        return target
    if kind == "payload under another name":
        torch.save({"x": Payload(path.parent / "executed")}, path)
        return path
    if kind == "renamed":
        weights["model.surprise"] = weights.pop(name)
    elif kind == "extra":
        weights["model.surprise"] = torch.zeros(3)
    elif kind == "shape":
        weights[name] = torch.zeros(7)
    elif kind == "not a number":
        weights[name] = torch.full_like(weights[name], torch.nan)
    elif kind == "missing stem":
        del weights["model.encoders.SENTINEL2_TS.in_conv.conv.conv.0.weight"]
    elif kind == "table":
        key = "model.encoders.SPOT_RGBI.seg_model.model.layers_0.blocks.0.attn.relative_position_bias_table"
        weights[key] = weights[key][:50].clone()
    elif kind == "scalar table":
        key = "model.encoders.SPOT_RGBI.seg_model.model.layers_0.blocks.0.attn.relative_position_bias_table"
        weights[key] = torch.tensor(1.0)
    elif kind == "scalar":
        weights["model.main_decoders.AERIAL_LABEL-COSIA.weight"] = torch.tensor(1.0)
    elif kind == "sensor":
        weights = {key.replace("SENTINEL2_TS", "PLANET"): value for key, value in weights.items()}
    elif kind == "decoder":
        weights = {key.replace("decoder.psp", "decoder.blocks"): value for key, value in weights.items()}
    elif kind == "mixed prefix":
        weights[name.removeprefix("model.")] = weights.pop(name)
    elif kind == "encoders alone":
        weights = {key: value for key, value in weights.items() if "main_decoders" not in key}
    elif kind == "something else":
        weights = {"conv.weight": torch.zeros(3, 3)}
    save_file({key: value.contiguous() for key, value in weights.items()}, path)
    if kind == "truncated":
        path.write_bytes(path.read_bytes()[:-1000])
    return path


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("truncated", "truncated or not a safetensors file"),
        ("renamed", "1 missing .main_decoders.AERIAL_LABEL-COSIA.bias.*surprise"),
        ("extra", "1 unexpected .surprise"),
        ("shape", "shape .7. instead of .19."),
        ("not a number", "holds NaN"),
        ("missing stem", "SENTINEL2_TS is not a U-TAE: encoders.* is missing"),
        ("table", "SPOT_RGBI"),
        ("scalar table", "shape .offsets, heads."),
        ("scalar", "is not the weight of a convolution"),
        ("sensor", "PLANET is not an input of the official FLAIR-HUB models"),
        ("decoder", "is not a UPerNet"),
        ("mixed prefix", "mixes names with and without the prefix"),
        ("encoders alone", "no main decoder"),
        ("something else", "has no parameter of an official FLAIR-HUB model"),
        ("payload", "holds more than tensors"),
        ("payload under another name", "truncated or not a safetensors file"),
    ],
)
def test_a_damaged_checkpoint_gives_a_one_line_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str, message: str
) -> None:
    source = official(SPOT if kind in ("table", "scalar table", "decoder") else S2)
    weights = {f"model.{name}": tensor for name, tensor in source.state_dict().items()}
    path = damaged(kind, tmp_path / "official.safetensors", weights)
    with pytest.raises(InputError, match=message):
        load_official(path)
    assert main(["convert", str(path), str(tmp_path / "out")]) == 2
    printed = capsys.readouterr().err
    assert printed.startswith("bocage: error:")
    assert printed.count("\n") == 1
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "executed").exists()


@pytest.mark.slow
def test_the_command_converts_both_ways(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = official(SPOT, S2, labels=(COSIA,))
    save_official(first, tmp_path / "official.safetensors")
    account = tmp_path / "keys.txt"
    assert (
        main(["convert", str(tmp_path / "official.safetensors"), str(tmp_path / "out"), "--key-report", str(account)])
        == 0
    )
    assert f"{len(first.state_dict())} loaded" in capsys.readouterr().out
    assert len(account.read_text().splitlines()) == len(first.state_dict())
    assert json.loads((tmp_path / "out" / COSIA / "model" / "config.json").read_text())["official"] is True
    assert main(["convert", str(tmp_path / "out" / COSIA), str(tmp_path / "back.safetensors")]) == 0
    printed = capsys.readouterr().out
    assert "SPOT_RGBI: NIR, R, G (linear); mean 433.26" in printed
    assert "B12 as stored" in printed
    back, _ = load_official(tmp_path / "back.safetensors")
    before, after = first.uperfuse.state_dict(), back.uperfuse.state_dict()
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    assert main(["convert", str(tmp_path / "out" / COSIA), str(tmp_path / "x.safetensors"), "--drop-auxiliary"]) == 2
    assert main(["convert", str(tmp_path / "nothing.ckpt"), str(tmp_path / "y")]) == 2


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["out", "--key-report", "."], "exists: choose another name"),
        (["taken/out"], "taken/out cannot be written"),
        (["full"], "not an empty folder"),
        (["out", "--channels", "SPOT_RGBI"], "expected MODALITY=VALUE"),
        (["out", "--image-size", "SPOT_RGBI=big"], "'big' is not a number of pixels"),
        (["out", "--image-size", "SPOT_RGBI=63"], "sides are multiples of 4"),
        (["out", "--arch", "swin_base_patch4_window7_224-upernet"], "leave arch out or correct it"),
    ],
)
def test_wrong_options_fail_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    save_official(official(SPOT), tmp_path / "a.safetensors")
    (tmp_path / "taken").write_text("a file")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").write_text("")
    assert main(["convert", "a.safetensors", *words]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_converting_back_does_not_overwrite_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from_official(official(S2), tmp_path / "out")
    (tmp_path / "mine.safetensors").write_text("precious")
    assert main(["convert", str(tmp_path / "out" / COSIA), str(tmp_path / "mine.safetensors")]) == 2
    assert (tmp_path / "mine.safetensors").read_text() == "precious"
    assert main(["convert", str(tmp_path / "out" / "encoders" / S2), str(tmp_path / "x.safetensors")]) == 2
    assert "does not describe a segmentation model" in capsys.readouterr().err


@pytest.mark.slow
def test_predicting_leaves_out_patches_that_lack_a_sensor(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    manifest = write_series(tmp_path, missing=1)
    from_official(official(S2, S1), tmp_path / "both")
    words = [str(manifest.path), str(tmp_path / "maps")]
    assert main(["predict", str(tmp_path / "both"), *words]) == 2
    assert f"the runs in {tmp_path / 'both'} are {COSIA}" in capsys.readouterr().err
    assert main(["predict", str(tmp_path / "both" / COSIA), *words]) == 0
    printed = capsys.readouterr()
    assert "1 of 4 patches left out: they lack a sensor" in printed.err
    assert "3 maps in" in printed.out
    assert len(list((tmp_path / "maps").glob("*.tif"))) == 3
    from_official(official(SPOT, S2), tmp_path / "other")
    assert main(["predict", str(tmp_path / "other" / COSIA), *words]) == 2
    assert "has no SPOT_RGBI, and the official architecture cannot replace" in capsys.readouterr().err
