from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch

from bocage.shards.batch import Batch, GroundWindow, Sample
from bocage.shards.errors import InputError
from bocage.shards.modality import FLAIR_HUB
from bocage.shards.preprocess.inputs import EncoderInput, quality_masks
from bocage.shards.preprocess.normalize import InputSpec
from bocage.shards.read.collate import collate
from bocage.shards.sample_seed import sample_seed
from bocage.ssl.encoders.base import Encoder, EncoderConfig
from bocage.ssl.encoders.build import build_encoder
from bocage.ssl.objectives.decoder import DecoderConfig, Neck
from bocage.ssl.objectives.masked import MaskedConfig, MaskedReconstruction
from bocage.ssl.objectives.masking import MaskingConfig
from bocage.ssl.objectives.model import EncodedBatch, PretrainingModel
from bocage.ssl.objectives.pixel_targets import from_units
from bocage.ssl.objectives.tokens import georeferenced_tokens
from bocage.ssl.objectives.visible_blocks import pack_visible_blocks

SIDE = 51.2
NAMES = [modality.name for modality in FLAIR_HUB.inputs]
SWIN = EncoderConfig(
    options={
        "embed_dim": 16,
        "depths": [1, 1, 1, 1],
        "num_heads": [1, 2, 2, 4],
        "window_size": 4,
        "drop_path_rate": 0.0,
    }
)
UTAE = EncoderConfig(
    architecture="utae",
    options={"encoder_widths": [16, 16, 32], "decoder_widths": [16, 16, 32], "d_model": 32, "n_head": 4, "d_k": 4},
)


def make_batch(count: int, dates: int = 9, missing: tuple[str, ...] = (), side: float = SIDE) -> Batch:
    random = np.random.default_rng(0)
    modalities = [modality for modality in FLAIR_HUB.values() if modality.role != "label"]
    samples = []
    for index in range(count):
        arrays, days = {}, {}
        for modality in modalities:
            if modality.name in missing:
                continue
            pixels = round(side / modality.gsd)
            shape: tuple[int, ...] = (len(modality.bands), pixels, pixels)
            if modality.has_dates:
                shape = (dates, *shape)
                days[modality.name] = np.arange(dates, dtype=np.int32) * 30 - 130
            values = random.random(shape) * (0 if modality.role == "mask" else 200)
            arrays[modality.name] = values.astype(modality.dtype)
        seed = sample_seed(0, 0, str(index))
        samples.append(Sample(str(index), "D001-2020/AA", seed, GroundWindow(0, 0, side), arrays, days))
    return collate(samples, modalities)


def make_task(masking: MaskingConfig | None = None, names: list[str] = NAMES) -> PretrainingModel:
    torch.manual_seed(0)
    masking = masking or MaskingConfig()
    encoders: dict[str, Encoder] = {}
    for name in names:
        modality = FLAIR_HUB[name]
        channels = len(modality.channels)
        spec = InputSpec.of(modality, (100.0,) * channels, (50.0,) * channels)
        config = SWIN if modality.role == "image" else UTAE
        encoders[name] = build_encoder(spec, config, mask_token=masking.images == "mask_token")
    config_masked = MaskedConfig(decoder=DecoderConfig(width=32, fusion_depth=1, heads=4), dates=4)
    modalities = {name: FLAIR_HUB[name] for name in names}
    masked = MaskedReconstruction(encoders, modalities, config_masked)
    return PretrainingModel(
        encoders, modalities, quality_masks(FLAIR_HUB, names), masking, {"masked": masked}, {"masked": 1.0}
    )


def masked_term(task: PretrainingModel) -> MaskedReconstruction:
    term = task.terms["masked"]
    assert isinstance(term, MaskedReconstruction)
    return term


@pytest.mark.parametrize("images", ["packed", "mask_token"])
def test_every_encoder_learns_from_the_loss(images: str) -> None:
    task = make_task(MaskingConfig(images=images))  # type: ignore[arg-type]  # parametrised literal
    loss, logs = task(make_batch(4))
    loss.backward()
    assert torch.isfinite(loss)
    for name in NAMES:
        assert torch.isfinite(logs[f"masked/{name}"])
        for parameter_name, parameter in task.encoder(name).named_parameters():
            assert parameter.grad is not None, f"{name}: {parameter_name}"
        assert any(parameter.grad.abs().max() > 0 for parameter in task.encoder(name).parameters())  # type: ignore[union-attr]


def perturbed(view: EncodedBatch) -> dict[str, EncoderInput]:
    """The inputs of a view with noise wherever something is hidden."""
    inputs = {}
    generator = torch.Generator().manual_seed(1)
    for name, given in view.inputs.items():
        mask = view.masks[name]
        noise = torch.randn(given.values.shape, generator=generator) * 10
        if mask.units is not None:
            unit = FLAIR_HUB[name].unit
            hidden = (mask.units | mask.whole[:, None, None]).repeat_interleave(unit, 1).repeat_interleave(unit, 2)
            hidden = hidden[:, None]
        else:
            assert mask.dates is not None
            hidden = (mask.dates | mask.whole[:, None])[:, :, None, None, None]
            if mask.cubes is not None:
                hidden = hidden | mask.cubes[:, :, None]
        inputs[name] = replace(given, values=torch.where(hidden, noise, given.values))
    return inputs


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize(
    "masking",
    [
        MaskingConfig(modality_ratio=0.4),
        MaskingConfig(modality_ratio=0.4, images="mask_token", ratio=0.6),
        MaskingConfig(modality_ratio=0.4, cube_share=0.7, cube=12.8, joint=True),
    ],
    ids=["packed", "mask_token", "cubes, joint"],
)
def test_what_is_hidden_reaches_no_feature_and_no_prediction(masking: MaskingConfig, training: bool) -> None:
    """Replace everything hidden by noise, hidden modalities as a whole: all that is computed from the visible stays
    equal to the bit, also through batch statistics."""
    task = make_task(masking).train(training)
    with torch.no_grad():
        torch.manual_seed(5)
        view = task.view(make_batch(6), oriented=False)
        before = masked_term(task).reconstruct(view)
        torch.manual_seed(5)
        other = task.encoded(perturbed(view), view.masks, view.seeds, view.samples)
        after = masked_term(task).reconstruct(other)
    for name in NAMES:
        for one, two in zip(view.maps[name], other.maps[name], strict=True):
            assert torch.equal(one, two), name
        assert torch.equal(before[name].prediction, after[name].prediction), name
        assert not torch.equal(before[name].target, after[name].target), name


@pytest.mark.parametrize("name", ["SPOT_RGBI", "SENTINEL2_TS"])
def test_hidden_maps_say_nothing(name: str) -> None:
    task = make_task(names=[name]).eval()
    neck = masked_term(task).necks[name]
    assert isinstance(neck, Neck)
    with torch.no_grad():
        view = task.view(make_batch(6), oriented=True)
        before = georeferenced_tokens(view, name, neck).values
        weights = view.map_weights[name]
        assert (weights == 0).any()
        for index, features in enumerate(view.maps[name]):
            noise = torch.randn(features.shape)
            view.maps[name][index] = torch.where(weights[:, index, None, None, None] == 0, noise, features)
        assert torch.equal(georeferenced_tokens(view, name, neck).values, before)
        assert not task.view(make_batch(6), oriented=False).map_weights


def test_what_is_stored_at_hidden_places_reaches_no_feature() -> None:
    """Noise in the rasters themselves. Relief is first taken from the mean of the window, hence up to rounding."""
    task = make_task(MaskingConfig(modality_ratio=0.0, cube_share=0.5)).eval()
    batch = make_batch(6)
    with torch.no_grad():
        view = task.view(batch, oriented=False)
        generator = torch.Generator().manual_seed(1)
        values = dict(batch.values)
        for name, mask in view.masks.items():
            if mask.units is not None:
                unit = FLAIR_HUB[name].unit
                hidden = mask.units.repeat_interleave(unit, 1).repeat_interleave(unit, 2)[:, None]
            else:
                hidden = mask.places(batch.padding[name], values[name].shape[-1])[:, :, None]
            noise = torch.randint(1, 200, values[name].shape, generator=generator).to(values[name].dtype)
            values[name] = torch.where(hidden, noise, values[name])
        other = task.view(replace(batch, values=values), oriented=False)
    for name in NAMES:
        exact = FLAIR_HUB[name].representation != "relief"
        for one, two in zip(view.maps[name], other.maps[name], strict=True):
            assert torch.equal(one, two) if exact else torch.allclose(one, two, atol=1e-4), name


def test_cubes_are_reconstructed_where_they_are() -> None:
    name = next(item.name for item in FLAIR_HUB.inputs if item.role == "series")
    task = make_task(MaskingConfig(cube_share=1.0, modality_ratio=0.0), names=[name]).eval()
    with torch.no_grad():
        view = task.view(make_batch(6), oriented=False)
        item = masked_term(task).reconstruct(view)[name]
    mask = view.masks[name]
    assert item.chosen is not None and mask.cubes is not None and mask.dates is not None
    wanted = from_units(item.wanted)[:, :, 0]
    hidden = mask.cubes | mask.dates[:, :, None, None]
    for sample in range(6):
        assert torch.equal(wanted[sample], hidden[sample, item.chosen[sample]])
    assert 0 < wanted.float().mean() < 1


def test_the_loss_counts_hidden_places_only() -> None:
    task = make_task().eval()
    with torch.no_grad():
        view = task.view(make_batch(6), oriented=False)
        items = masked_term(task).reconstruct(view)
    for name, item in items.items():
        mask = view.masks[name]
        share = item.wanted.flatten(1).float().mean(dim=1)
        if mask.units is not None:
            expected = torch.where(mask.whole, 1.0, 0.75)
            assert torch.allclose(share, expected)
        else:
            assert mask.dates is not None
            available = torch.where(mask.whole, 9, mask.dates.sum(dim=1)).clamp(max=4)
            assert torch.allclose(share, available / 4)


def test_tokens_stand_where_their_units_lie() -> None:
    """A neck that averages units, fed an image of its own coordinates, must answer with the token's centre."""
    task = make_task(names=["SPOT_RGBI"])
    view = task.view(make_batch(3), oriented=False)
    neck = masked_term(task).necks["SPOT_RGBI"]
    assert isinstance(neck, Neck)
    centres = georeferenced_tokens(view, "SPOT_RGBI", neck).centres
    modality, units = FLAIR_HUB["SPOT_RGBI"], view.masks["SPOT_RGBI"].units
    assert units is not None
    pixels = round(SIDE / modality.gsd)
    ground = (torch.arange(pixels) + 0.5) * modality.gsd
    rows, columns = torch.meshgrid(ground, ground, indexing="ij")
    place = pack_visible_blocks(torch.stack([columns, rows]).expand(3, -1, -1, -1), units, 1)
    averages = torch.nn.functional.avg_pool2d(place, modality.unit).flatten(2).transpose(1, 2)
    assert torch.allclose(centres, averages, atol=1e-4)


def test_a_batch_is_the_mean_of_its_parts() -> None:
    """What makes several ranks and accumulated steps equal to one large batch."""
    task = make_task().eval()
    with torch.no_grad():
        whole, _ = task(make_batch(4))
        parts = [task(_one(make_batch(4), index))[0] for index in range(4)]
    assert torch.allclose(whole, torch.stack(parts).mean(), atol=1e-6)


def _one(batch: Batch, index: int) -> Batch:
    part = batch._mapped(lambda tensor: tensor[index : index + 1])
    return replace(part, keys=[batch.keys[index]], rois=[batch.rois[index]])


@pytest.mark.parametrize("missing", [("SENTINEL2_TS", "SENTINEL2_MSK-SC"), ("AERIAL_RGBI",), tuple(NAMES[1:])])
def test_missing_modalities_leave_the_rest_at_work(missing: tuple[str, ...]) -> None:
    task = make_task()
    loss, logs = task(make_batch(2, missing=missing))
    loss.backward()
    assert torch.isfinite(loss)
    for name in missing:
        if name in NAMES:
            assert logs[f"masked/{name}"] == 0


def test_one_date_one_sample() -> None:
    loss, _ = make_task()(make_batch(1, dates=1))
    assert torch.isfinite(loss)


def test_heights_of_hidden_units_do_not_move_visible_ones() -> None:
    """Relief is a height above the window's mean: hidden units may not speak through it."""
    name = next(item.name for item in FLAIR_HUB.inputs if item.representation == "relief")
    task = make_task(MaskingConfig(modality_ratio=0.0), names=[name]).eval()
    with torch.no_grad():
        batch = make_batch(3)
        view = task.view(batch, oriented=False)
        units = view.masks[name].units
        assert units is not None
        unit = FLAIR_HUB[name].unit
        hidden = units.repeat_interleave(unit, 1).repeat_interleave(unit, 2)
        raised = batch.values[name].clone()
        raised[:, 0] += 50.0 * hidden
        again = task.view(replace(batch, values={**batch.values, name: raised}), oriented=False)
    for one, other in zip(view.maps[name], again.maps[name], strict=True):
        assert torch.allclose(one, other, atol=1e-4)


def test_samples_that_nobody_may_see_reach_no_batch_statistics() -> None:
    name = next(item.name for item in FLAIR_HUB.inputs if item.role == "series")
    task = make_task(MaskingConfig(modality_ratio=0.0), names=[name])
    full = make_batch(4)
    present = {**full.present, name: torch.tensor([True, False, True, False])}
    both = replace(full, present=present)
    torch.manual_seed(0)
    view = task.view(both, oriented=False)
    assert view.rows[name].tolist() == [0, 2]
    assert not view.maps[name][0][[1, 3]].any()
    changed = full.values[name][[0, 0, 2, 2]]
    torch.manual_seed(0)
    again = task.view(replace(both, values={**full.values, name: changed}), oriented=False)
    assert torch.equal(view.maps[name][0], again.maps[name][0])


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (lambda: MaskedConfig(dates=0), r"masked\.dates"),
        (lambda: MaskedConfig(weights={"SPOT_RGBI": -1.0}), r"masked\.weights\.SPOT_RGBI"),
        (lambda: DecoderConfig(heads=0), r"decoder\.heads"),
        (lambda: DecoderConfig(fusion_depth=-1), r"decoder\.fusion_depth"),
    ],
)
def test_impossible_sizes_are_refused(config: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config()


@pytest.mark.parametrize("weights", [{"SPOT_RGB": 2.0}, {"SPOT_RGBI": 0.0}])
def test_weights_must_name_modalities_of_the_run(weights: dict[str, float]) -> None:
    task = make_task(names=["SPOT_RGBI"])
    with pytest.raises(InputError, match=r"masked\.weights"):
        MaskedReconstruction({"SPOT_RGBI": task.encoder("SPOT_RGBI")}, FLAIR_HUB, MaskedConfig(weights=weights))
