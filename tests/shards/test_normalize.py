from dataclasses import replace

import numpy as np
import pytest
import torch

from bocage.shards.errors import InputError
from bocage.shards.modality import FLAIR_HUB
from bocage.shards.preprocess.normalize import InputSpec, represent, standardize


def test_zero_backscatter_has_finite_decibels() -> None:
    values = represent(torch.tensor([0.0, 1.0, 0.1]).view(1, 3, 1), "decibel")
    assert values.flatten().tolist() == [-40.0, 0.0, -10.0]


@pytest.mark.parametrize("name", [modality.name for modality in FLAIR_HUB.inputs])
@pytest.mark.parametrize("dates", [0, 3])
def test_numpy_and_torch_give_the_same_representation(name: str, dates: int) -> None:
    modality = FLAIR_HUB[name]
    shape = (dates, len(modality.bands), 8, 9) if modality.has_time_axis else (len(modality.bands), 8, 9)
    random = np.random.default_rng(5)
    stored = random.uniform(0, 200, shape).astype(modality.dtype)
    if modality.dtype == "float32":
        special = np.array([np.nan, np.inf, -np.inf, -9999.0, 0.0], np.float32)
        stored = np.where(random.random(shape) < 0.3, random.choice(special, shape), stored)
    expected = represent(torch.from_numpy(stored), modality.representation, modality.nodata_below)
    represented = represent(stored, modality.representation, modality.nodata_below)
    assert isinstance(represented, np.ndarray)
    assert represented.dtype == np.float32
    assert represented.shape == tuple(expected.shape)
    assert np.allclose(represented, expected.numpy(), rtol=1e-5, atol=1e-4, equal_nan=True)


def test_elevation_keeps_the_height_above_sea_level_and_relief_does_not() -> None:
    values = torch.tensor([[[100.0, 104.0]], [[100.0, 101.0]]]).unsqueeze(0)
    assert represent(values, "elevation").flatten().tolist() == [100.0, 104.0, 0.0, 3.0]
    assert represent(values, "relief").flatten().tolist() == [-2.0, 2.0, 0.0, 3.0]
    baseline = FLAIR_HUB["DEM_ELEV"].baseline
    assert baseline is not None
    assert baseline.mean == (311.06, 311.06)


def test_standardize_selects_and_reorders_channels() -> None:
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


def test_invalid_input_spec_json_is_refused() -> None:
    spec = InputSpec.from_modality(FLAIR_HUB["DEM_ELEV"], (0.0, 0.0), (1.0, 1.0))
    assert InputSpec.from_json(spec.to_json()) == spec
    for change in ({"mean": [0.0]}, {"std": None}, {"extra": 1}):
        with pytest.raises(InputError, match="cannot be read"):
            InputSpec.from_json({**spec.to_json(), **change})
