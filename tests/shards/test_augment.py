"""Random changes of samples: bounded, of the right sensors, and a function of the sample's seed alone."""

from __future__ import annotations

import pytest
import torch

from bocage.shards.preprocess.augment import AugmentConfig, subsample_dates, jitter_dates, jitter_radiometry
from bocage.shards.sample_seed import sample_seed

SEEDS = torch.tensor([sample_seed(0, 3, str(index)) for index in range(200)])
BOTH = AugmentConfig(gain=0.2, offset=0.5)


def test_radiometry_is_a_gain_and_an_offset_of_each_sample_and_channel() -> None:
    values = torch.randn(200, 4, 6, 6, generator=torch.Generator().manual_seed(0))
    found = jitter_radiometry(values, SEEDS, "AERIAL_RGBI", "linear", BOTH)
    zero = jitter_radiometry(torch.zeros_like(values), SEEDS, "AERIAL_RGBI", "linear", BOTH)
    offsets, gains = zero[..., 0, 0], ((found - zero) / values)[..., 0, 0]
    assert torch.allclose(found, values * gains[..., None, None] + offsets[..., None, None], atol=1e-5)
    assert 0.8 <= gains.min() < 0.81 and 1.19 < gains.max() <= 1.2
    assert -0.5 <= offsets.min() < -0.49 and 0.49 < offsets.max() <= 0.5
    assert abs(torch.corrcoef(torch.stack([gains.flatten(), offsets.flatten()]))[0, 1]) < 0.1
    assert len(gains.unique()) == gains.numel()


def test_all_dates_of_a_series_have_the_same_light() -> None:
    found = jitter_radiometry(torch.ones(200, 5, 3, 2, 2), SEEDS, "SENTINEL2_TS", "linear", BOTH)
    assert (found == found[:, :1, :, :1, :1]).all()


def test_radar_has_no_gain_and_heights_stay() -> None:
    values = torch.randn(200, 2, 4, 4, generator=torch.Generator().manual_seed(0))
    shifted = jitter_radiometry(values, SEEDS, "SENTINEL1-ASC_TS", "decibel", BOTH)
    assert torch.allclose(shifted - values, (shifted - values)[..., :1, :1].expand_as(values), atol=1e-6)
    for representation in ("relief", "elevation"):
        assert jitter_radiometry(values, SEEDS, "DEM_ELEV", representation, BOTH) is values  # type: ignore[arg-type]
    assert jitter_radiometry(values, SEEDS, "AERIAL_RGBI", "linear", AugmentConfig()) is values


def test_a_sample_changes_alike_in_every_batch_but_not_in_every_epoch() -> None:
    values = torch.ones(200, 4, 1, 1)
    whole = jitter_radiometry(values, SEEDS, "SPOT_RGBI", "linear", BOTH)
    order = torch.randperm(200, generator=torch.Generator().manual_seed(1))[:50]
    assert torch.equal(jitter_radiometry(values[order], SEEDS[order], "SPOT_RGBI", "linear", BOTH), whole[order])
    next_epoch = torch.tensor([sample_seed(0, 4, str(index)) for index in range(200)])
    assert not (jitter_radiometry(values, next_epoch, "SPOT_RGBI", "linear", BOTH) == whole).any()
    assert not (jitter_radiometry(values, SEEDS, "AERIAL_RGBI", "linear", BOTH) == whole).any()


def test_dates_are_drawn_among_those_there_are() -> None:
    padding = torch.zeros(200, 9, dtype=torch.bool)
    padding[::2, 5:] = True  # four of every other sample are padded already
    padding[1, 1:] = True
    found = subsample_dates(padding, SEEDS, "SENTINEL2_TS", 3)
    assert (found | ~padding).all()  # what was padded stays padded
    kept = (~found).sum(dim=1)
    assert kept[1] == 1 and (kept[2:] == 3).all()
    shares = (~found)[3::2].float().mean(dim=0)
    assert (shares - 1 / 3).abs().max() < 0.15
    assert subsample_dates(padding, SEEDS, "SENTINEL2_TS", 0) is padding
    assert subsample_dates(padding, SEEDS, "SENTINEL2_TS", 9) is padding


def test_dates_move_by_whole_days_and_no_further() -> None:
    dates = torch.arange(9, dtype=torch.int32).expand(200, -1) * 10
    moved = jitter_dates(dates, SEEDS, "SENTINEL2_TS", 2) - dates
    assert moved.dtype == torch.int32
    assert sorted(moved.unique().tolist()) == [-2, -1, 0, 1, 2]
    assert (torch.bincount(moved.flatten() + 2) / moved.numel() - 0.2).abs().max() < 0.05
    assert jitter_dates(dates, SEEDS, "SENTINEL2_TS", 0) is dates


@pytest.mark.parametrize("keys", [{"gain": 1.0}, {"gain": -0.1}, {"offset": -1.0}, {"max_dates": -1}, {"date_jitter": -1}])
def test_wrong_values_name_their_key(keys: dict[str, float]) -> None:
    (key,) = keys
    with pytest.raises(ValueError, match=rf"augment\.{key}="):
        AugmentConfig(**keys)  # type: ignore[arg-type]
