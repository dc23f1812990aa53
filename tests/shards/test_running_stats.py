from fractions import Fraction

import numpy as np
import pytest
import torch

from bocage.shards.format.running_stats import RunningStats
from bocage.shards.modality import FLAIR_HUB
from bocage.shards.preprocess.normalize import represent


@pytest.mark.parametrize("name", ["DEM_ELEV", "SENTINEL1-ASC_TS"])
@pytest.mark.parametrize("value", [np.inf, -np.inf, np.nan, 3e38])
def test_one_invalid_value_invalidates_only_its_pixel(name: str, value: float) -> None:
    modality = FLAIR_HUB[name]
    stored = torch.rand(1, 2, 8, 8)
    stored[0, 0, 2, 3] = value
    represented = represent(stored, modality.representation, modality.nodata_below)
    assert not represented.isinf().any()
    stats = RunningStats.from_array(represented.numpy())
    assert np.isfinite([stats.mean[1], stats.squares[1]]).all()
    if abs(value) != 3e38:
        assert stats.count[0] == 63
        assert np.isfinite([stats.mean, stats.squares, stats.minimum, stats.maximum]).all()
        assert represented.isnan().sum() == (2 if name == "DEM_ELEV" else 1)


def test_channels_without_valid_values_have_nan_statistics() -> None:
    nodata_channel = np.stack([np.full((8, 8), np.nan, np.float32), np.arange(64, dtype=np.float32).reshape(8, 8)])
    stats = RunningStats.from_array(represent(nodata_channel, "linear"))
    assert stats.count.tolist() == [0, 64]
    assert stats.mean[1] == 31.5
    assert stats.squares.tolist() == [0.0, 64 * (64**2 - 1) / 12]
    assert np.isnan([stats.mean[0], stats.minimum[0], stats.maximum[0], stats.std[0]]).all()
    for representation in ("relief", "elevation"):
        assert RunningStats.from_array(represent(nodata_channel, representation)).count.tolist() == [0, 0]
    empty = RunningStats.from_array(represent(np.zeros((0, 2, 10, 10), np.float32), "decibel"))
    assert empty.count.tolist() == [0, 0]
    assert empty.merge(stats).to_json() == stats.to_json()
    assert stats.merge(empty).to_json() == stats.to_json()


@pytest.mark.parametrize("dtype", ["uint8", "uint16"])
def test_integer_statistics_are_correctly_rounded(dtype: str) -> None:
    largest = np.iinfo(dtype).max
    values = np.full((3, 2, 500, 500), largest, dtype)
    values[0, 0, 0, :3] = 0, 1, 2
    values[:, 1] = np.random.default_rng(0).integers(0, largest, (3, 500, 500), endpoint=True)
    stats = RunningStats.from_array(values)
    for channel in range(2):
        numbers = values[:, channel].reshape(-1).tolist()
        mean = Fraction(sum(numbers), len(numbers))
        assert stats.mean[channel] == float(mean)
        assert stats.squares[channel] == float(sum(number**2 for number in numbers) - mean**2 * len(numbers))
        assert (stats.minimum[channel], stats.maximum[channel]) == (min(numbers), max(numbers))
