"""Augmentation is bounded, applies to the right sensors, and depends on the sample seed only."""

from __future__ import annotations

import pytest
import torch

from bocage.shards.preprocess.augment import AugmentConfig, jitter_dates, jitter_radiometry, orient, subsample_dates
from bocage.shards.sample_seed import sample_seed

SEEDS = torch.tensor([sample_seed(0, 3, str(index)) for index in range(200)])
GAIN_AND_OFFSET = AugmentConfig(gain=0.2, offset=0.5)


def test_radiometry_applies_a_gain_and_an_offset_per_sample_and_channel() -> None:
    values = torch.randn(200, 4, 6, 6, generator=torch.Generator().manual_seed(0))
    changed = jitter_radiometry(values, SEEDS, "AERIAL_RGBI", "linear", GAIN_AND_OFFSET)
    zero = jitter_radiometry(torch.zeros_like(values), SEEDS, "AERIAL_RGBI", "linear", GAIN_AND_OFFSET)
    offsets, gains = zero[..., 0, 0], ((changed - zero) / values)[..., 0, 0]
    assert torch.allclose(changed, values * gains[..., None, None] + offsets[..., None, None], atol=1e-5)
    assert 0.8 <= gains.min() < 0.81 and 1.19 < gains.max() <= 1.2
    assert -0.5 <= offsets.min() < -0.49 and 0.49 < offsets.max() <= 0.5
    assert abs(torch.corrcoef(torch.stack([gains.flatten(), offsets.flatten()]))[0, 1]) < 0.1
    assert len(gains.unique()) == gains.numel()


def test_all_dates_of_a_series_share_gain_and_offset() -> None:
    changed = jitter_radiometry(torch.ones(200, 5, 3, 2, 2), SEEDS, "SENTINEL2_TS", "linear", GAIN_AND_OFFSET)
    assert (changed == changed[:, :1, :, :1, :1]).all()


def test_radar_is_only_shifted_and_heights_are_unchanged() -> None:
    values = torch.randn(200, 2, 4, 4, generator=torch.Generator().manual_seed(0))
    shifted = jitter_radiometry(values, SEEDS, "SENTINEL1-ASC_TS", "decibel", GAIN_AND_OFFSET)
    assert torch.allclose(shifted - values, (shifted - values)[..., :1, :1].expand_as(values), atol=1e-6)
    for representation in ("relief", "elevation"):
        unchanged = jitter_radiometry(values, SEEDS, "DEM_ELEV", representation, GAIN_AND_OFFSET)
        assert unchanged is values
    assert jitter_radiometry(values, SEEDS, "AERIAL_RGBI", "linear", AugmentConfig()) is values


def test_radiometry_depends_on_seed_and_sensor_but_not_on_the_batch() -> None:
    values = torch.ones(200, 4, 1, 1)
    changed = jitter_radiometry(values, SEEDS, "SPOT_RGBI", "linear", GAIN_AND_OFFSET)
    rows = torch.randperm(200, generator=torch.Generator().manual_seed(1))[:50]
    in_other_batch = jitter_radiometry(values[rows], SEEDS[rows], "SPOT_RGBI", "linear", GAIN_AND_OFFSET)
    assert torch.equal(in_other_batch, changed[rows])
    next_epoch = torch.tensor([sample_seed(0, 4, str(index)) for index in range(200)])
    assert not (jitter_radiometry(values, next_epoch, "SPOT_RGBI", "linear", GAIN_AND_OFFSET) == changed).any()
    assert not (jitter_radiometry(values, SEEDS, "AERIAL_RGBI", "linear", GAIN_AND_OFFSET) == changed).any()


def test_subsample_dates_draws_among_unpadded_dates() -> None:
    padding = torch.zeros(200, 9, dtype=torch.bool)
    padding[::2, 5:] = True  # every other sample has four padded dates
    padding[1, 1:] = True
    subsampled = subsample_dates(padding, SEEDS, "SENTINEL2_TS", 3)
    assert (subsampled | ~padding).all()  # padded dates stay padded
    kept = (~subsampled).sum(dim=1)
    assert kept[1] == 1 and (kept[2:] == 3).all()
    frequencies = (~subsampled)[3::2].float().mean(dim=0)
    assert (frequencies - 1 / 3).abs().max() < 0.15
    assert subsample_dates(padding, SEEDS, "SENTINEL2_TS", 0) is padding
    assert subsample_dates(padding, SEEDS, "SENTINEL2_TS", 9) is padding


def test_date_jitter_is_in_whole_days_and_bounded() -> None:
    dates = torch.arange(9, dtype=torch.int32).expand(200, -1) * 10
    shifts = jitter_dates(dates, SEEDS, "SENTINEL2_TS", 2) - dates
    assert shifts.dtype == torch.int32
    assert sorted(shifts.unique().tolist()) == [-2, -1, 0, 1, 2]
    assert (torch.bincount(shifts.flatten() + 2) / shifts.numel() - 0.2).abs().max() < 0.05
    assert jitter_dates(dates, SEEDS, "SENTINEL2_TS", 0) is dates


def test_orientation_is_shared_by_modalities_and_takes_all_eight_values() -> None:
    seeds = torch.arange(200)
    fine = torch.arange(16.0).view(1, 1, 4, 4).expand(200, -1, -1, -1)
    coarse = fine.unfold(2, 2, 2).unfold(3, 2, 2).mean(dim=(-1, -2))
    turned = orient(fine, seeds)
    assert len({tuple(item.flatten().tolist()) for item in turned}) == 8
    assert torch.equal(orient(coarse, seeds), turned.unfold(2, 2, 2).unfold(3, 2, 2).mean(dim=(-1, -2)))
    assert torch.equal(orient(fine.to(torch.uint8), seeds).float(), turned)


@pytest.mark.parametrize(
    "values", [{"gain": 1.0}, {"gain": -0.1}, {"offset": -1.0}, {"max_dates": -1}, {"date_jitter": -1}]
)
def test_invalid_values_name_their_key(values: dict[str, float]) -> None:
    (key,) = values
    with pytest.raises(ValueError, match=rf"augment\.{key}="):
        AugmentConfig(**values)  # type: ignore[arg-type]
