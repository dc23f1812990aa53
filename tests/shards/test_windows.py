from dataclasses import replace

import numpy as np
import pytest

from bocage.shards.batch import GroundWindow
from bocage.shards.errors import InputError
from bocage.shards.format.codec import EncodedArray, encode
from bocage.shards.modality import FLAIR_HUB, Modality, Registry
from bocage.shards.read.windows import check_side, crop, draw_windows, lattice_step, pixel_slices
from bocage.shards.sample_seed import sample_seed

ALL = list(FLAIR_HUB.values())
IMAGES = list(FLAIR_HUB.by_role("image"))


def test_lattice_is_the_smallest_step_of_whole_pixels() -> None:
    assert lattice_step([FLAIR_HUB["AERIAL_RGBI"]]) == pytest.approx(0.2)
    assert lattice_step(IMAGES) == pytest.approx(1.6)
    assert lattice_step(ALL) == pytest.approx(51.2)


def test_a_side_of_fractional_pixels_is_refused_with_the_valid_sides() -> None:
    check_side(51.2, ALL)
    check_side(76.8, IMAGES)
    with pytest.raises(InputError, match=r"window=76\.8.*51\.2, 102\.4"):
        check_side(76.8, ALL)


def test_windows_cover_the_same_ground_in_every_modality() -> None:
    positions = set()
    for index in range(64):
        [window] = draw_windows([sample_seed(0, 0, str(index))], 51.2, ALL)
        positions.add((window.left, window.top))
        for modality in ALL:
            # The value of each pixel is the ground position of its centre.
            centres = (np.arange(modality.size) + 0.5) * modality.gsd
            ground = np.stack(np.meshgrid(centres, centres, indexing="xy"))
            cut = crop(ground, modality, window)
            assert cut.shape[1:] == (round(51.2 / modality.gsd),) * 2
            assert cut[0].min() - modality.gsd / 2 == pytest.approx(window.left)
            assert cut[1].max() + modality.gsd / 2 == pytest.approx(window.top + 51.2)
    assert positions == {(left, top) for left in (0.0, 51.2) for top in (0.0, 51.2)}


def test_the_whole_patch_is_one_window() -> None:
    assert draw_windows([1, 2], 102.4, ALL) == [GroundWindow(0.0, 0.0, 102.4)] * 2


@pytest.mark.parametrize("modality", ALL, ids=lambda modality: modality.name)
def test_decoding_a_window_equals_cropping_the_raster(modality: Modality) -> None:
    random = np.random.default_rng(0)
    leading = (3, len(modality.bands)) if modality.has_time_axis else (len(modality.bands),)
    values = random.integers(0, 200, (*leading, modality.size, modality.size)).astype(modality.dtype)
    member = EncodedArray(encode(values, modality.codec))
    for left, top in ((0.0, 0.0), (51.2, 0.0), (0.0, 51.2), (51.2, 51.2)):
        window = GroundWindow(left, top, 51.2)
        cropped = member.decode(pixel_slices(modality, window))
        assert cropped.dtype == values.dtype
        assert np.array_equal(cropped, crop(values, modality, window))
    whole = member.decode(pixel_slices(modality, GroundWindow(0.0, 0.0, 102.4)))
    assert np.array_equal(whole, values)


def test_pixels_of_any_size_give_windows_of_whole_pixels() -> None:
    side = 67.66
    fine, coarse = (replace(FLAIR_HUB["AERIAL_RGBI"], size=size, gsd=side / size, unit=8) for size in (512, 64))
    assert Registry((replace(fine, name="fine"), replace(coarse, name="coarse"))).patch_size == pytest.approx(side)
    assert lattice_step([fine, coarse]) == pytest.approx(side / 64)
    check_side(round(side / 2, 3), [fine, coarse])
    for seed in range(20):
        [window] = draw_windows([sample_seed(0, 0, str(seed))], side / 2, [fine, coarse])
        for modality in (fine, coarse):
            rows, columns = pixel_slices(modality, window)
            assert rows.stop - rows.start == columns.stop - columns.start == modality.size // 2
            assert 0 <= rows.start <= modality.size // 2
    with pytest.raises(ValueError, match=r"20\.3264 m"):
        Registry((fine, replace(fine, name="other", gsd=0.0397)))
