"""Reconstruction targets: mask units and their normalisation."""

from __future__ import annotations

from dataclasses import replace

import torch

from bocage.shards.modality import FLAIR_HUB
from bocage.ssl.objectives.targets import (
    cell_gradients,
    cell_statistics,
    cells_per_unit,
    from_units,
    group_statistics,
    to_units,
)


def test_units_round_trip_for_images_and_series() -> None:
    for shape in ((2, 4, 64, 32), (2, 3, 10, 10, 10)):
        values = torch.rand(shape)
        unit = 8 if len(shape) == 4 else 5
        units = to_units(values, unit)
        assert units.shape == (*shape[:-3], shape[-2] // unit, shape[-1] // unit, shape[-3], unit, unit)
        assert torch.equal(from_units(units), values)
    units = to_units(torch.arange(16.0).view(1, 1, 4, 4), 2)
    assert units[0, 0, 1, 0].tolist() == [[2.0, 3.0], [6.0, 7.0]]


def test_each_band_group_has_its_own_mean_and_std() -> None:
    modality = FLAIR_HUB["AERIAL_RGBI"]
    units = to_units(torch.rand(3, 4, 64, 64, generator=torch.Generator().manual_seed(0)) * 4 + 2, 32)
    valid = torch.ones_like(units, dtype=torch.bool)
    mean, std = group_statistics(units, valid, modality)
    normal = (units - mean) / std
    colours, infrared = normal[:, :, :, :3], normal[:, :, :, 3]
    for group in (colours.flatten(3), infrared.flatten(3)):
        assert group.mean(dim=-1).abs().max() < 1e-4
        assert (group.std(dim=-1) - 1).abs().max() < 1e-2
    # Differences between the bands of a group stay: the mean of a single band is not removed.
    brighter = units.clone()
    brighter[:, :, :, 0] += 3
    mean, std = group_statistics(brighter, valid, modality)
    shifted = (brighter - mean) / std
    assert (shifted[:, :, :, 0].mean() - shifted[:, :, :, 1].mean()) > 0.5
    assert torch.equal(shifted[:, :, :, 3], normal[:, :, :, 3])


def test_constant_units_with_holes_become_zeros() -> None:
    modality = FLAIR_HUB["DEM_ELEV"]
    units = torch.full((1, 1, 1, 2, 32, 32), 5.0)
    valid = torch.ones_like(units, dtype=torch.bool)
    valid[..., 0, :, :] = False
    mean, std = group_statistics(units, valid, modality)
    normal = (units - mean) / std
    assert torch.isfinite(normal).all()
    assert normal[..., 1, :, :].abs().max() == 0


def test_holes_do_not_change_the_statistics() -> None:
    modality = FLAIR_HUB["AERIAL-RLT_PAN"]
    units = torch.rand(1, 1, 1, 1, 16, 16)
    valid = torch.ones_like(units, dtype=torch.bool)
    valid[..., :8, :] = False
    polluted = torch.where(valid, units, 1e6)
    mean, _ = group_statistics(polluted, valid, modality)
    assert torch.allclose(mean.squeeze(), units[..., 8:, :].mean())


def test_units_of_few_values_keep_them() -> None:
    """One band of one pixel would become 0, and three bands would keep little more than their order."""
    modality = replace(FLAIR_HUB["SENTINEL2_TS"], unit=1)
    units = to_units(torch.rand(2, 3, 10, 4, 4), 1)
    mean, std = group_statistics(units, torch.ones_like(units, dtype=torch.bool), modality)
    assert torch.equal((units - mean) / std, units)
    larger = to_units(torch.rand(2, 3, 10, 4, 4), 2)
    mean, _ = group_statistics(larger, torch.ones_like(larger, dtype=torch.bool), modality)
    changed = (mean != 0).flatten(-2).any(dim=-1).flatten(0, -2).all(dim=0)
    assert changed.tolist() == [True] * 8 + [False] * 2  # 16 values in each group of four bands, 8 in the group of two


def test_statistics_are_means_and_log_stds_of_cells() -> None:
    units = torch.randn(2, 3, 3, 2, 16, 16)
    valid = torch.ones_like(units, dtype=torch.bool)
    valid[0, 0, 0, 0, :4, :4] = False
    target, is_valid = cell_statistics(units, valid)
    assert target.shape == is_valid.shape == (2, 3, 3, 4, 4, 4)
    cell = units[1, 2, 0, 1, 4:8, 12:16]
    torch.testing.assert_close(target[1, 2, 0, 1, 1, 3], cell.mean())
    torch.testing.assert_close(target[1, 2, 0, 3, 1, 3], 0.5 * (cell.var(correction=0) + 1e-3).log())
    assert is_valid.logical_not().nonzero().tolist() == [[0, 0, 0, 0, 0, 0], [0, 0, 0, 2, 0, 0]]
    assert [cells_per_unit(unit) for unit in (32, 16, 8, 6, 5, 4, 1)] == [4, 4, 4, 2, 1, 2, 1]


def test_gradients_have_the_direction_and_strength_of_edges() -> None:
    step = torch.arange(32.0)
    across, down = step[None].expand(32, 32), step[:, None].expand(32, 32)
    diagonal = (across + down) / 2**0.5
    values = torch.stack([across, down, diagonal, torch.zeros(32, 32)])[None] * 0.5
    target, is_valid = cell_gradients(values, torch.ones_like(values, dtype=torch.bool), 16)
    assert target.shape == (1, 2, 2, 12, 4, 4)
    cosine, sine, strength = target[0, 0, 0, :, 1, 1].view(
        3, 4
    )  # a gradient of 0.5 per pixel, twice that over 2 pixels
    torch.testing.assert_close(cosine, torch.tensor([1.0, -1.0, 0.0, 0.0]), atol=2e-3, rtol=0)
    torch.testing.assert_close(sine, torch.tensor([0.0, 0.0, 1.0, 0.0]), atol=2e-3, rtol=0)
    torch.testing.assert_close(strength[:3], torch.zeros(3), atol=2e-3, rtol=0)
    assert strength[3] < -3 and is_valid.all()


def test_holes_do_not_change_statistics_and_gradients() -> None:
    values = torch.randn(1, 1, 16, 16)
    valid = torch.ones_like(values, dtype=torch.bool)
    valid[..., 5, 5] = False
    polluted = torch.where(valid, values, 1e3)
    for target, again in (
        (
            cell_statistics(to_units(values, 16), to_units(valid, 16)),
            cell_statistics(to_units(polluted, 16), to_units(valid, 16)),
        ),
        (cell_gradients(values, valid, 16), cell_gradients(polluted, valid, 16)),
    ):
        torch.testing.assert_close(target[0], again[0])
