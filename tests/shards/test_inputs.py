import numpy as np
import pytest
import torch

from bocage.shards.batch import Batch, Sample
from bocage.shards.errors import InputError
from bocage.shards.modality import FLAIR_HUB
from bocage.shards.preprocess.inputs import cloudy_dates, encoder_inputs, quality_masks, required_modalities
from bocage.shards.preprocess.normalize import InputSpec
from bocage.shards.read.collate import collate
from bocage.shards.read.windows import whole_patch

S2, S2_MASK = "SENTINEL2_TS", "SENTINEL2_MSK-SC"


def sample(key: str, seed: int, **arrays: np.ndarray) -> Sample:
    by_name = {name.replace("__", "-"): array for name, array in arrays.items()}
    dates = {
        name: np.arange(len(array), dtype=np.int32) * 5 - 20
        for name, array in by_name.items()
        if FLAIR_HUB[name].has_time_axis
    }
    return Sample(key, "D001-2020/AA", seed, whole_patch(FLAIR_HUB["AERIAL_RGBI"]), by_name, dates)


def series(length: int, fill: int = 7) -> np.ndarray:
    return np.full((length, 10, 10, 10), fill, np.uint16)


def identity_spec(name: str) -> InputSpec:
    channels = len(FLAIR_HUB[name].channels)
    return InputSpec.from_modality(FLAIR_HUB[name], (0.0,) * channels, (1.0,) * channels)


def test_collate_pads_series_and_marks_absent_modalities() -> None:
    modalities = [FLAIR_HUB[name] for name in ("AERIAL_RGBI", S2, "SENTINEL1-ASC_TS")]
    aerial = np.random.default_rng(0).integers(0, 255, (4, 512, 512), dtype=np.uint8)
    samples = [sample("a", 1, AERIAL_RGBI=aerial, SENTINEL2_TS=series(3)), sample("b", 2, SENTINEL2_TS=series(5))]
    batch = collate(samples, modalities)
    assert batch.values[S2].dtype == torch.uint16
    assert batch.values[S2].shape == (2, 5, 10, 10, 10)
    assert batch.padding[S2].tolist() == [[False] * 3 + [True] * 2, [False] * 5]
    assert batch.dates[S2][0].tolist() == [-20, -15, -10, 0, 0]
    assert batch.present["AERIAL_RGBI"].tolist() == [True, False]
    assert np.array_equal(batch.values["AERIAL_RGBI"][0].numpy(), aerial)
    assert not batch.values["AERIAL_RGBI"][1].any()
    # A modality that no sample has is in the batch with zero dates.
    assert batch.values["SENTINEL1-ASC_TS"].shape == (2, 0, 2, 10, 10)
    assert not batch.present["SENTINEL1-ASC_TS"].any()


def test_batch_to_moves_all_tensors() -> None:
    batch = collate([sample("a", 1, SENTINEL2_TS=series(2))], [FLAIR_HUB[S2]])
    moved: Batch = batch.to("meta")
    assert moved.values[S2].device.type == moved.padding[S2].device.type == moved.seeds.device.type == "meta"


def test_cloudy_dates_follow_the_official_fallbacks() -> None:
    probabilities = torch.zeros(3, 3, 2, 10, 10)
    probabilities[0, 0, 1, :2] = 60  # clouds on 20 % of the first date
    probabilities[0, 1, 1, 0, :4] = 60  # clouds on 4 % are tolerated
    probabilities[1, :, 1] = 90  # all dates cloudy: snow-free dates are kept
    probabilities[1, 2, 0] = 90
    probabilities[2] = 90  # all dates cloudy and snowy: all dates are kept
    padding = torch.tensor([[False, False, True]] + [[False] * 3] * 2)
    assert cloudy_dates(probabilities, padding).tolist() == [
        [True, False, True],
        [False, False, True],
        [False, False, False],
    ]


def test_a_mask_may_have_one_probability_only() -> None:
    clouds = torch.zeros(2, 3, 1, 1, 1)
    clouds[0, 1] = 40  # one cloudy date
    clouds[1] = 90  # no clear date: all are kept
    padding = torch.zeros(2, 3, dtype=torch.bool)
    assert cloudy_dates(clouds, padding).tolist() == [[False, True, False], [False, False, False]]


def test_quality_masks_apply_to_their_series() -> None:
    assert quality_masks(FLAIR_HUB, [S2]) == {S2: S2_MASK}
    names = [modality.name for modality in required_modalities(FLAIR_HUB, ["AERIAL_RGBI", S2], ["AERIAL_LABEL-COSIA"])]
    assert names == ["AERIAL_RGBI", S2, S2_MASK, "AERIAL_LABEL-COSIA"]
    cloudy = np.zeros((4, 2, 10, 10), np.uint16)
    cloudy[1, 1] = 100
    samples = [sample("a", 1, SENTINEL2_TS=series(4), SENTINEL2_MSK__SC=cloudy), sample("b", 2, SENTINEL2_TS=series(6))]
    batch = collate(samples, [FLAIR_HUB[S2], FLAIR_HUB[S2_MASK]])
    masks = quality_masks(FLAIR_HUB, [S2])
    encoder_input = encoder_inputs(batch, {S2: identity_spec(S2)}, masks, random_orientation=False)[S2]
    assert encoder_input.padding is not None
    assert encoder_input.padding.tolist() == [[False, True, False, False, True, True], [False] * 6]


def test_required_modalities_refuse_a_mask_without_its_series() -> None:
    with pytest.raises(InputError, match=rf"{S2_MASK}.*{S2}.*name both"):
        required_modalities(FLAIR_HUB, ["AERIAL_RGBI"], [S2_MASK])


def test_nodata_becomes_the_mean_and_is_marked_invalid() -> None:
    heights = np.full((2, 512, 512), 120.0, np.float32)
    heights[0, :10] = -9999.0
    heights[1, 0, 0] = np.nan
    batch = collate([sample("a", 1, DEM_ELEV=heights)], [FLAIR_HUB["DEM_ELEV"]])
    specs = {"DEM_ELEV": identity_spec("DEM_ELEV")}
    encoder_input = encoder_inputs(batch, specs, {}, random_orientation=False)["DEM_ELEV"]
    assert torch.isfinite(encoder_input.values).all()
    assert not encoder_input.valid[0, 0, :10].any()
    assert encoder_input.valid[0, 0, 10:].all()
    assert (encoder_input.values[0, :, :10] == 0).all()
