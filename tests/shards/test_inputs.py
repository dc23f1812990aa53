import json
from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
import torch

from bocage.shards.batch import Batch, Sample
from bocage.shards.errors import InputError
from bocage.shards.format.running_stats import RunningStats
from bocage.shards.modality import FLAIR_HUB, Modality
from bocage.shards.preprocess.augment import orient
from bocage.shards.preprocess.inputs import cloudy_dates, encoder_inputs, quality_masks, required_modalities
from bocage.shards.preprocess.normalize import InputSpec, represent, standardize
from bocage.shards.read.collate import collate
from bocage.shards.read.windows import WHOLE_PATCH

S2, CLOUDS = "SENTINEL2_TS", "SENTINEL2_MSK-SC"


def sample(key: str, seed: int, **arrays: np.ndarray) -> Sample:
    named = {name.replace("__", "-"): array for name, array in arrays.items()}
    dates = {
        name: np.arange(len(array), dtype=np.int32) * 5 - 20
        for name, array in named.items()
        if FLAIR_HUB[name].has_time_axis
    }
    return Sample(key, "D001-2020/AA", seed, WHOLE_PATCH, named, dates)


def series(length: int, fill: int = 7) -> np.ndarray:
    return np.full((length, 10, 10, 10), fill, np.uint16)


def spec(name: str) -> InputSpec:
    channels = len(FLAIR_HUB[name].channels)
    return InputSpec.from_modality(FLAIR_HUB[name], (0.0,) * channels, (1.0,) * channels)


def test_collate_pads_series_and_marks_what_is_missing() -> None:
    wanted = [FLAIR_HUB[name] for name in ("AERIAL_RGBI", S2, "SENTINEL1-ASC_TS")]
    aerial = np.random.default_rng(0).integers(0, 255, (4, 512, 512), dtype=np.uint8)
    batch = collate(
        [sample("a", 1, AERIAL_RGBI=aerial, SENTINEL2_TS=series(3)), sample("b", 2, SENTINEL2_TS=series(5))], wanted
    )
    assert batch.values[S2].dtype == torch.uint16
    assert batch.values[S2].shape == (2, 5, 10, 10, 10)
    assert batch.padding[S2].tolist() == [[False] * 3 + [True] * 2, [False] * 5]
    assert batch.dates[S2][0].tolist() == [-20, -15, -10, 0, 0]
    assert batch.present["AERIAL_RGBI"].tolist() == [True, False]
    assert np.array_equal(batch.values["AERIAL_RGBI"][0].numpy(), aerial)
    assert not batch.values["AERIAL_RGBI"][1].any()
    # A modality that nobody has still stands in the batch, empty.
    assert batch.values["SENTINEL1-ASC_TS"].shape == (2, 0, 2, 10, 10)
    assert not batch.present["SENTINEL1-ASC_TS"].any()


def test_cloudy_and_snowy_dates_are_left_out_with_the_official_fallbacks() -> None:
    probabilities = torch.zeros(3, 3, 2, 10, 10)
    probabilities[0, 0, 1, :2] = 60  # 20 % of the first date is cloudy
    probabilities[0, 1, 1, 0, :4] = 60  # 4 % is tolerated
    probabilities[1, :, 1] = 90  # all cloudy: the dates free of snow stay
    probabilities[1, 2, 0] = 90
    probabilities[2] = 90  # cloudy and snowy throughout: every date stays
    padding = torch.tensor([[False, False, True]] + [[False] * 3] * 2)
    assert cloudy_dates(probabilities, padding).tolist() == [
        [True, False, True],
        [False, False, True],
        [False, False, False],
    ]


def test_quality_masks_reach_the_series_they_belong_to() -> None:
    assert quality_masks(FLAIR_HUB, [S2]) == {S2: CLOUDS}
    names = [modality.name for modality in required_modalities(FLAIR_HUB, ["AERIAL_RGBI", S2], ["AERIAL_LABEL-COSIA"])]
    assert names == ["AERIAL_RGBI", S2, CLOUDS, "AERIAL_LABEL-COSIA"]
    cloudy = np.zeros((4, 2, 10, 10), np.uint16)
    cloudy[1, 1] = 100
    wanted = [FLAIR_HUB[S2], FLAIR_HUB[CLOUDS]]
    batch = collate(
        [sample("a", 1, SENTINEL2_TS=series(4), SENTINEL2_MSK__SC=cloudy), sample("b", 2, SENTINEL2_TS=series(6))],
        wanted,
    )
    given = encoder_inputs(batch, {S2: spec(S2)}, quality_masks(FLAIR_HUB, [S2]), random_orientation=False)[S2]
    assert given.padding is not None
    assert given.padding.tolist() == [[False, True, False, False, True, True], [False] * 6]


def test_holes_become_the_mean_and_are_marked() -> None:
    heights = np.full((2, 512, 512), 120.0, np.float32)
    heights[0, :10] = -9999.0
    heights[1, 0, 0] = np.nan
    batch = collate([sample("a", 1, DEM_ELEV=heights)], [FLAIR_HUB["DEM_ELEV"]])
    given = encoder_inputs(batch, {"DEM_ELEV": spec("DEM_ELEV")}, {}, random_orientation=False)["DEM_ELEV"]
    assert torch.isfinite(given.values).all()
    assert not given.valid[0, 0, :10].any()
    assert given.valid[0, 0, 10:].all()
    assert (given.values[0, :, :10] == 0).all()


def test_decibels_of_zero_are_finite() -> None:
    values = represent(torch.tensor([0.0, 1.0, 0.1]).view(1, 3, 1), "decibel")
    assert values.flatten().tolist() == [-40.0, 0.0, -10.0]


@pytest.mark.parametrize("name", ["DEM_ELEV", "SENTINEL1-ASC_TS"])
@pytest.mark.parametrize("value", [np.inf, -np.inf, np.nan, 3e38])
def test_one_value_that_is_no_number_costs_no_more_than_its_place(name: str, value: float) -> None:
    modality = FLAIR_HUB[name]
    stored = torch.rand(1, 2, 8, 8)
    stored[0, 0, 2, 3] = value
    represented = represent(stored, modality.representation, modality.nodata_below)
    assert not represented.isinf().any()
    moments = RunningStats.from_array(represented.numpy())
    assert np.isfinite([moments.mean[1], moments.squares[1]]).all()
    if abs(value) != 3e38:
        assert moments.count[0] == 63
        assert np.isfinite([moments.mean, moments.squares, moments.minimum, moments.maximum]).all()
        assert represented.isnan().sum() == (2 if name == "DEM_ELEV" else 1)


@pytest.mark.parametrize("name", [modality.name for modality in FLAIR_HUB.inputs])
@pytest.mark.parametrize("dates", [0, 3])
def test_numpy_and_torch_represent_the_same(name: str, dates: int) -> None:
    modality = FLAIR_HUB[name]
    shape = (dates, len(modality.bands), 8, 9) if modality.has_time_axis else (len(modality.bands), 8, 9)
    random = np.random.default_rng(5)
    stored = random.uniform(0, 200, shape).astype(modality.dtype)
    if modality.dtype == "float32":
        special = np.array([np.nan, np.inf, -np.inf, -9999.0, 0.0], np.float32)
        stored = np.where(random.random(shape) < 0.3, random.choice(special, shape), stored)
    expected = represent(torch.from_numpy(stored), modality.representation, modality.nodata_below)
    found = represent(stored, modality.representation, modality.nodata_below)
    assert isinstance(found, np.ndarray)
    assert found.dtype == np.float32
    assert found.shape == tuple(expected.shape)
    assert np.allclose(found, expected.numpy(), rtol=1e-5, atol=1e-4, equal_nan=True)


def test_a_channel_of_holes_or_a_series_without_dates_has_no_mean() -> None:
    holed = np.stack([np.full((8, 8), np.nan, np.float32), np.arange(64, dtype=np.float32).reshape(8, 8)])
    moments = RunningStats.from_array(represent(holed, "linear"))
    assert moments.count.tolist() == [0, 64]
    assert moments.mean[1] == 31.5
    assert moments.squares.tolist() == [0.0, 64 * (64**2 - 1) / 12]
    assert np.isnan([moments.mean[0], moments.minimum[0], moments.maximum[0], moments.std[0]]).all()
    for representation in ("relief", "elevation"):
        assert RunningStats.from_array(represent(holed, representation)).count.tolist() == [0, 0]
    empty = RunningStats.from_array(represent(np.zeros((0, 2, 10, 10), np.float32), "decibel"))
    assert empty.count.tolist() == [0, 0]
    merged = empty.merge(moments)
    assert merged.to_json() == moments.to_json()
    assert moments.merge(empty).to_json() == moments.to_json()


def test_orientation_is_shared_by_modalities_and_covers_the_square() -> None:
    seeds = torch.arange(200)
    fine = torch.arange(16.0).view(1, 1, 4, 4).expand(200, -1, -1, -1)
    coarse = fine.unfold(2, 2, 2).unfold(3, 2, 2).mean(dim=(-1, -2))
    turned = orient(fine, seeds)
    assert len({tuple(item.flatten().tolist()) for item in turned}) == 8
    assert torch.equal(orient(coarse, seeds), turned.unfold(2, 2, 2).unfold(3, 2, 2).mean(dim=(-1, -2)))
    assert torch.equal(orient(fine.to(torch.uint8), seeds).float(), turned)


def test_a_mask_is_of_no_use_without_its_series() -> None:
    with pytest.raises(InputError, match=r"SENTINEL2_MSK-SC.*SENTINEL2_TS.*name both"):
        required_modalities(FLAIR_HUB, ["AERIAL_RGBI"], [CLOUDS])
    assert list(FLAIR_HUB.subset([CLOUDS, S2])) == [S2, CLOUDS]


def test_descriptions_of_inputs_are_checked() -> None:
    good = spec("DEM_ELEV").to_json()
    assert InputSpec.from_json(good) == spec("DEM_ELEV")
    for change in ({"mean": [0.0]}, {"std": None}, {"extra": 1}):
        with pytest.raises(InputError, match="cannot be read"):
            InputSpec.from_json({**good, **change})
    with pytest.raises(InputError, match="'DEM_ELEV' cannot be read"):
        Modality.from_json({**FLAIR_HUB["DEM_ELEV"].to_json(), "size": 3})


def test_a_batch_moves_as_one() -> None:
    batch = collate([sample("a", 1, SENTINEL2_TS=series(2))], [FLAIR_HUB[S2]])
    moved: Batch = batch.to("meta")
    assert moved.values[S2].device.type == moved.padding[S2].device.type == moved.seeds.device.type == "meta"


def test_an_encoder_may_read_some_channels_in_its_own_order() -> None:
    """The published baselines read near infrared, red and green of the aerial images, in that order."""
    modality = FLAIR_HUB["AERIAL_RGBI"]
    baseline = modality.baseline
    assert baseline is not None
    spec = replace(
        InputSpec.from_modality(modality, (0.0,) * 4, (1.0,) * 4),
        channels=baseline.channels,
        mean=(1.0, 2.0, 3.0),
        std=(1.0, 2.0, 4.0),
    )
    values = torch.arange(4, dtype=torch.uint8).mul(10).view(1, 4, 1, 1)
    assert standardize(values, spec).flatten().tolist() == [29.0, -1.0, 1.75]
    with pytest.raises(ValueError, match="channels SWIR are not among R, G, B, NIR"):
        replace(spec, channels=("NIR", "R", "SWIR"))


def test_elevation_keeps_the_height_above_sea_and_relief_does_not() -> None:
    values = torch.tensor([[[100.0, 104.0]], [[100.0, 101.0]]]).unsqueeze(0)
    assert represent(values, "elevation").flatten().tolist() == [100.0, 104.0, 0.0, 3.0]
    assert represent(values, "relief").flatten().tolist() == [-2.0, 2.0, 0.0, 3.0]
    baseline = FLAIR_HUB["DEM_ELEV"].baseline
    assert baseline is not None
    assert baseline.mean == (311.06, 311.06)


def test_a_registry_keeps_its_baselines_in_a_file() -> None:
    for modality in FLAIR_HUB.values():
        assert Modality.from_json(json.loads(json.dumps(modality.to_json()))) == modality


@pytest.mark.parametrize("dtype", ["uint8", "uint16"])
def test_statistics_of_integers_are_the_numbers_next_to_the_true_ones(dtype: str) -> None:
    largest = np.iinfo(dtype).max
    values = np.full((3, 2, 500, 500), largest, dtype)
    values[0, 0, 0, :3] = 0, 1, 2
    values[:, 1] = np.random.default_rng(0).integers(0, largest, (3, 500, 500), endpoint=True)
    moments = RunningStats.from_array(values)
    for channel in range(2):
        numbers = values[:, channel].reshape(-1).tolist()
        mean = Fraction(sum(numbers), len(numbers))
        assert moments.mean[channel] == float(mean)
        assert moments.squares[channel] == float(sum(number**2 for number in numbers) - mean**2 * len(numbers))
        assert (moments.minimum[channel], moments.maximum[channel]) == (min(numbers), max(numbers))
