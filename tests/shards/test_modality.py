import json

import pytest

from bocage.shards.errors import InputError
from bocage.shards.modality import FLAIR_HUB, Modality


def test_modalities_survive_a_json_round_trip() -> None:
    for modality in FLAIR_HUB.values():
        assert Modality.from_json(json.loads(json.dumps(modality.to_json()))) == modality


def test_invalid_modality_json_is_refused() -> None:
    with pytest.raises(InputError, match="'DEM_ELEV' cannot be read"):
        Modality.from_json({**FLAIR_HUB["DEM_ELEV"].to_json(), "size": 3})


def test_a_subset_with_a_mask_needs_its_series() -> None:
    mask, series = "SENTINEL2_MSK-SC", "SENTINEL2_TS"
    with pytest.raises(InputError, match=rf"{mask}.*{series}.*name both"):
        FLAIR_HUB.subset(["AERIAL_RGBI", mask])
    assert list(FLAIR_HUB.subset([mask, series])) == [series, mask]
