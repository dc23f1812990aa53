import pytest
import torch

from bocage.shards.errors import InputError
from bocage.shards.inputs import EncoderInput
from bocage.shards.modality import FLAIR_HUB
from bocage.shards.seeds import sample_seed
from bocage.ssl.masking import MaskingConfig, draw_masks, pack, unit_grid

SEEDS = torch.tensor([sample_seed(0, 0, str(index)) for index in range(256)])


def image(name: str, present: torch.Tensor | None = None, pixels: int | None = None) -> EncoderInput:
    modality = FLAIR_HUB[name]
    size = pixels or modality.size
    values = torch.zeros(len(SEEDS), len(modality.channels), 1, 1).expand(-1, -1, size, size)
    here = torch.ones(len(SEEDS), dtype=torch.bool) if present is None else present
    return EncoderInput(values, torch.ones_like(values, dtype=torch.bool), here)


def series(name: str, padding: torch.Tensor) -> EncoderInput:
    modality = FLAIR_HUB[name]
    values = torch.zeros(len(SEEDS), padding.shape[1], len(modality.channels), 10, 10)
    return EncoderInput(values, values == 0, ~padding.all(dim=1), torch.zeros(padding.shape), padding)


def test_packing_keeps_one_unit_of_every_four_and_moves_no_pixel() -> None:
    inputs = {"SPOT_RGBI": image("SPOT_RGBI")}
    mask = draw_masks(inputs, FLAIR_HUB, SEEDS, MaskingConfig())["SPOT_RGBI"]
    assert mask.units is not None
    assert mask.units.shape == (256, 8, 8)
    visible = (~mask.units).view(256, 4, 2, 4, 2).sum(dim=(2, 4))
    assert (visible == 1).all()
    # Pixels that name their own place: what is packed comes from the visible units, in the order of the blocks.
    values = torch.arange(64 * 64.0).view(1, 1, 64, 64).expand(256, 1, 64, 64)
    packed = pack(values, mask.units, 8)
    assert packed.shape == (256, 1, 32, 32)
    for index in (0, 100):
        for row, column in (~mask.units[index]).nonzero().tolist():
            source = values[index, 0, row * 8 : row * 8 + 8, column * 8 : column * 8 + 8]
            there = packed[index, 0, row // 2 * 8 : row // 2 * 8 + 8, column // 2 * 8 : column // 2 * 8 + 8]
            assert torch.equal(source, there)


def test_scattered_units_hide_the_asked_share() -> None:
    config = MaskingConfig(images="mask_token", ratio=0.6)
    mask = draw_masks({"AERIAL_RGBI": image("AERIAL_RGBI")}, FLAIR_HUB, SEEDS, config)["AERIAL_RGBI"]
    assert mask.units is not None
    assert (mask.units.sum(dim=(1, 2)) == round(0.6 * 256)).all()


def test_dates_keep_one_and_hide_one() -> None:
    padding = torch.zeros(256, 12, dtype=torch.bool)
    padding[0] = True  # no date
    padding[1, 1:] = True  # one date
    padding[2, 2:] = True  # two
    padding[3:100, 9:] = True
    masks = draw_masks({"SENTINEL2_TS": series("SENTINEL2_TS", padding)}, FLAIR_HUB, SEEDS, MaskingConfig())
    mask = masks["SENTINEL2_TS"]
    assert mask.dates is not None
    assert not (mask.dates & padding).any()
    assert mask.whole[0]
    hidden = mask.dates.sum(dim=1)
    assert hidden[:3].tolist() == [0, 0, 1]
    assert (hidden[3:100] == round(0.6 * 9)).all()
    assert (hidden[100:] == round(0.6 * 12)).all()
    assert 0.15 < (runs(mask.dates[100:]) == 1).float().mean() < 0.5


def runs(hidden: torch.Tensor) -> torch.Tensor:
    """How many contiguous runs of hidden dates each sample has."""
    starts = hidden & ~torch.nn.functional.pad(hidden, (1, 0))[:, :-1]
    return starts.sum(dim=1)


def test_a_gap_is_one_run_of_dates() -> None:
    padding = torch.zeros(256, 20, dtype=torch.bool)
    config = MaskingConfig(gap_share=1.0)
    mask = draw_masks({"SENTINEL2_TS": series("SENTINEL2_TS", padding)}, FLAIR_HUB, SEEDS, config)["SENTINEL2_TS"]
    assert mask.dates is not None
    assert (runs(mask.dates) == 1).all()
    assert (mask.dates.sum(dim=1) == 12).all()
    assert mask.dates.float().mean(dim=0).min() > 0.05


def test_whole_modalities_are_hidden_but_never_all() -> None:
    here = torch.rand(256, generator=torch.Generator().manual_seed(0)) < 0.5
    inputs = {"AERIAL_RGBI": image("AERIAL_RGBI", present=~here), "SPOT_RGBI": image("SPOT_RGBI")}
    masks = draw_masks(inputs, FLAIR_HUB, SEEDS, MaskingConfig(modality_ratio=0.9))
    whole = torch.stack([masks[name].whole for name in inputs], dim=1)
    assert not whole.all(dim=1).any()
    assert whole[here, 0].all()
    assert whole[~here].float().mean() > 0.4
    none = draw_masks(inputs, FLAIR_HUB, SEEDS, MaskingConfig(modality_ratio=0.0))
    assert torch.equal(none["AERIAL_RGBI"].whole, here)


def test_a_mask_depends_on_the_sample_alone() -> None:
    inputs = {"SPOT_RGBI": image("SPOT_RGBI")}
    together = draw_masks(inputs, FLAIR_HUB, SEEDS, MaskingConfig())["SPOT_RGBI"].units
    backwards = draw_masks(inputs, FLAIR_HUB, SEEDS.flip(0), MaskingConfig())["SPOT_RGBI"].units
    assert together is not None
    assert backwards is not None
    assert torch.equal(together, backwards.flip(0))


def test_windows_that_do_not_hold_whole_units_are_refused() -> None:
    assert unit_grid(FLAIR_HUB["AERIAL_RGBI"], 256, "packed") == 8
    with pytest.raises(InputError, match="AERIAL_RGBI is 96 px"):
        unit_grid(FLAIR_HUB["AERIAL_RGBI"], 96, "packed")


def test_configuration_is_checked() -> None:
    with pytest.raises(ValueError, match=r"masking\.ratio"):
        MaskingConfig(ratio=0.6)
    with pytest.raises(ValueError, match=r"masking\.date_ratio"):
        MaskingConfig(date_ratio=1.5)
