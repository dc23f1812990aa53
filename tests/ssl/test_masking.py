import pytest
import torch

from bocage.shards.errors import InputError
from bocage.shards.modality import FLAIR_HUB
from bocage.shards.preprocess.inputs import EncoderInput
from bocage.shards.sample_seed import sample_seed
from bocage.ssl.objectives.masking import (
    MaskingConfig,
    block_grid,
    blocks_of,
    check_window,
    draw_map_weights,
    draw_masks,
)
from bocage.ssl.objectives.visible_blocks import pack_visible_blocks

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
    packed = pack_visible_blocks(values, mask.units, 1)
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


def test_blocks_of_several_units_are_hidden_together() -> None:
    config = MaskingConfig(blocks={"AERIAL_RGBI": 12.8})
    inputs = {name: image(name) for name in ("AERIAL_RGBI", "SPOT_RGBI")}
    masks = draw_masks(inputs, FLAIR_HUB, SEEDS, config)
    aerial, spot = masks["AERIAL_RGBI"].units, masks["SPOT_RGBI"].units
    assert aerial is not None and spot is not None
    assert masks["AERIAL_RGBI"].block == 2 and masks["SPOT_RGBI"].block == 1
    coarse = aerial[:, ::2, ::2]
    assert torch.equal(coarse.repeat_interleave(2, 1).repeat_interleave(2, 2), aerial)
    assert ((~coarse).view(256, 4, 2, 4, 2).sum(dim=(2, 4)) == 1).all()
    assert not torch.equal(coarse, spot)
    # Packing keeps the pixels of a block together.
    values = torch.arange(512 * 512.0).view(1, 1, 512, 512)
    packed = pack_visible_blocks(values, aerial[:1], 2)
    row, column = (~coarse[0]).nonzero()[5].tolist()
    assert torch.equal(
        packed[0, 0, row // 2 * 64 : row // 2 * 64 + 64, column // 2 * 64 : column // 2 * 64 + 64],
        values[0, 0, row * 64 : row * 64 + 64, column * 64 : column * 64 + 64],
    )


@pytest.mark.parametrize("images", ["packed", "mask_token"])
def test_joint_masks_hide_the_same_ground(images: str) -> None:
    config = MaskingConfig(images=images, joint=True)  # type: ignore[arg-type]  # parametrised literal
    inputs = {name: image(name) for name in ("AERIAL_RGBI", "DEM_ELEV", "SPOT_RGBI")}
    masks = draw_masks(inputs, FLAIR_HUB, SEEDS, config)
    ground = {
        name: mask.units[:, :: mask.block, :: mask.block] for name, mask in masks.items() if mask.units is not None
    }
    for name in inputs:
        assert ground[name].shape == (256, 8, 8)
        assert torch.equal(ground[name], ground["SPOT_RGBI"])
    assert ground["SPOT_RGBI"].float().mean() == 0.75


def test_shares_can_differ_by_modality() -> None:
    padding = torch.zeros(256, 10, dtype=torch.bool)
    inputs = {"SPOT_RGBI": image("SPOT_RGBI"), "SENTINEL2_TS": series("SENTINEL2_TS", padding)}
    config = MaskingConfig(images="mask_token", ratios={"SPOT_RGBI": 0.5, "SENTINEL2_TS": 0.3})
    masks = draw_masks(inputs, FLAIR_HUB, SEEDS, config)
    units, dates = masks["SPOT_RGBI"].units, masks["SENTINEL2_TS"].dates
    assert units is not None and dates is not None
    assert (units.sum(dim=(1, 2)) == 32).all()
    assert (dates.sum(dim=1) == 3).all()
    everything = MaskingConfig(images="mask_token", ratio=1.0, date_ratio=1.0)
    masks = draw_masks(inputs, FLAIR_HUB, SEEDS, everything)
    units, dates = masks["SPOT_RGBI"].units, masks["SENTINEL2_TS"].dates
    assert units is not None and dates is not None
    assert (units.sum(dim=(1, 2)) == 63).all()  # something stays
    assert (dates.sum(dim=1) == 9).all()


def test_cubes_are_gaps_of_each_place() -> None:
    padding = torch.zeros(256, 20, dtype=torch.bool)
    padding[0] = True
    padding[1, 1:] = True
    padding[2, 10:] = True
    inputs = {"SENTINEL2_TS": series("SENTINEL2_TS", padding)}
    mask = draw_masks(inputs, FLAIR_HUB, SEEDS, MaskingConfig(cube_share=1.0))["SENTINEL2_TS"]
    assert mask.dates is not None and mask.cubes is not None
    hidden = mask.cubes | mask.dates[:, :, None, None]
    assert not hidden[:2].any()
    assert (hidden[2].sum(dim=0) == 6).all() and (hidden[3:].sum(dim=1) == 12).all()
    places = hidden[3:].permute(0, 2, 3, 1).flatten(0, 2)
    assert (runs(places) == 1).all()
    assert not mask.cubes.all(dim=-1).all(dim=-1).any()
    assert (places.float().mean(dim=0) - 0.6).abs().max() < 0.05
    # Four by four cells over ten pixels: neighbours share a cube, far corners have their own.
    assert torch.equal(hidden[:, :, 0, 0], hidden[:, :, 1, 2])
    assert (hidden[3:, :, 0, 0] != hidden[3:, :, 9, 9]).any(dim=1).float().mean() > 0.5
    some = draw_masks(inputs, FLAIR_HUB, SEEDS, MaskingConfig(cube_share=0.5))["SENTINEL2_TS"]
    assert some.cubes is not None
    assert 0.35 < some.cubes.flatten(1).any(dim=1).float().mean() < 0.65
    # What an unused share of cubes leaves alone is drawn as ever.
    none = draw_masks(inputs, FLAIR_HUB, SEEDS, MaskingConfig())["SENTINEL2_TS"]
    assert none.cubes is None and none.dates is not None and some.dates is not None
    plain = ~some.cubes.flatten(1).any(dim=1) & (some.dates.sum(dim=1) > 0)
    assert torch.equal(some.dates[plain], none.dates[plain])


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (MaskingConfig(ratios={"SPOT": 0.5}), r"masking\.ratios\.SPOT: not one of"),
        (MaskingConfig(ratios={"SPOT_RGBI": 0.5}), r"masking\.ratios\.SPOT_RGBI needs masking\.images=mask_token"),
        (MaskingConfig(images="mask_token", joint=True, ratios={"SPOT_RGBI": 0.5}), r"SPOT_RGBI: with masking\.joint"),
        (MaskingConfig(blocks={"SENTINEL2_TS": 20.48}), r"masking\.blocks\.SENTINEL2_TS: not one of"),
        (
            MaskingConfig(blocks={"AERIAL_RGBI": 9.6}),
            r"9\.6 m is not a multiple of the 6\.4-m mask unit",
        ),
    ],
)
def test_masks_that_do_not_fit_the_sensors_are_refused(config: MaskingConfig, message: str) -> None:
    names = ("AERIAL_RGBI", "SPOT_RGBI", "SENTINEL2_TS")
    with pytest.raises(InputError, match=message):
        blocks_of({name: FLAIR_HUB[name] for name in names}, config)


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
    """How many runs of hidden dates each sample has, in a year that begins again at its end."""
    return (hidden & ~hidden.roll(1, dims=1)).sum(dim=1)


def test_a_gap_is_one_run_of_dates() -> None:
    padding = torch.zeros(256, 20, dtype=torch.bool)
    config = MaskingConfig(gap_share=1.0)
    mask = draw_masks({"SENTINEL2_TS": series("SENTINEL2_TS", padding)}, FLAIR_HUB, SEEDS, config)["SENTINEL2_TS"]
    assert mask.dates is not None
    assert (runs(mask.dates) == 1).all()
    assert (mask.dates.sum(dim=1) == 12).all()
    assert (mask.dates.float().mean(dim=0) - 0.6).abs().max() < 0.12  # each date as often as any other


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


def test_maps_are_hidden_but_never_all() -> None:
    weights = draw_map_weights(SEEDS, "SPOT_RGBI", 4, 0.5)
    kept = (weights > 0).sum(dim=1)
    assert torch.allclose(weights.sum(dim=1), torch.tensor(4.0))
    assert kept.min() == 1 and kept.max() == 4
    assert ((weights > 0).float().mean(dim=0) - 8.25 / 16).abs().max() < 0.1  # half, and one of those without any
    assert torch.equal(draw_map_weights(SEEDS.flip(0), "SPOT_RGBI", 4, 0.5), weights.flip(0))
    assert (draw_map_weights(SEEDS, "SPOT_RGBI", 4, 1.0) > 0).sum(dim=1).eq(1).all()


def test_a_mask_depends_on_the_sample_alone() -> None:
    inputs = {"SPOT_RGBI": image("SPOT_RGBI")}
    together = draw_masks(inputs, FLAIR_HUB, SEEDS, MaskingConfig())["SPOT_RGBI"].units
    backwards = draw_masks(inputs, FLAIR_HUB, SEEDS.flip(0), MaskingConfig())["SPOT_RGBI"].units
    assert together is not None
    assert backwards is not None
    assert torch.equal(together, backwards.flip(0))


def test_windows_that_do_not_hold_whole_units_are_refused() -> None:
    assert block_grid(FLAIR_HUB["AERIAL_RGBI"], 256, 1, "packed") == 8
    with pytest.raises(InputError, match=r"AERIAL_RGBI is 19.2 m wide there and is masked in pairs of blocks of 6.4 m"):
        block_grid(FLAIR_HUB["AERIAL_RGBI"], 96, 1, "packed")
    with pytest.raises(InputError, match=r"one block of 12.8 m there, of which nothing could be hidden"):
        block_grid(FLAIR_HUB["AERIAL_RGBI"], 64, 2, "mask_token")


@pytest.mark.parametrize(
    ("names", "side", "settings", "sentence"),
    [
        (["SENTINEL2_TS"], 20.48, {}, r"SENTINEL2_TS is 20.48 m wide .* in units of 51.2 m; .* are 51.2, 102.4 m wide"),
        (["SENTINEL2_TS"], 10.0, {}, r"not whole pixels in every modality; windows that fit are 51.2, 102.4 m"),
        (["AERIAL_RGBI"], 50.0, {}, r"pairs of blocks of 6.4 m .*; windows that fit are 12.8, 25.6, 38.4, ... 102.4 m"),
        (["AERIAL_RGBI"], 204.8, {}, r"window=204.8: wider than a patch of 102.4 m; windows that fit are 12.8"),
        (
            ["AERIAL_RGBI", "SPOT_RGBI"],
            38.4,
            {},
            r"SPOT_RGBI .* blocks of 12.8 m.*that fit are 25.6, 51.2, 76.8",
        ),
        (["AERIAL_RGBI"], 51.2, {"blocks": {"AERIAL_RGBI": 51.2}}, r"pairs of blocks of 51.2 m .* are 102.4 m wide"),
        (
            ["AERIAL_RGBI"],
            51.2,
            {"blocks": {"AERIAL_RGBI": 64.0}},
            r"no window fits, .*; change masking.blocks.AERIAL",
        ),
        (
            ["AERIAL_RGBI"],
            51.2,
            {"blocks": {"AERIAL_RGBI": 19.0}},
            r"blocks.AERIAL_RGBI: 19 m is not a multiple",
        ),
        (["SENTINEL2_TS"], 51.2, {"blocks": {"SPOT_RGBI": 12.8}}, r"masking.blocks.SPOT_RGBI: it is for images"),
    ],
)
def test_a_window_that_does_not_fit_is_refused_with_those_that_do(
    names: list[str], side: float, settings: dict, sentence: str
) -> None:
    modalities = {name: FLAIR_HUB[name] for name in names}
    with pytest.raises(InputError, match=sentence):
        check_window(modalities, side, MaskingConfig(**settings), reconstructed=True)


def test_windows_that_fit_are_taken() -> None:
    series, image = {"SENTINEL2_TS": FLAIR_HUB["SENTINEL2_TS"]}, {"AERIAL_RGBI": FLAIR_HUB["AERIAL_RGBI"]}
    check_window(series, 51.2, MaskingConfig(), reconstructed=True)
    check_window(series, 20.48, MaskingConfig(), reconstructed=False)
    for side in (12.8, 38.4, 102.4):
        check_window(image, side, MaskingConfig(), reconstructed=True)


def test_configuration_is_checked() -> None:
    with pytest.raises(ValueError, match=r"masking\.ratio"):
        MaskingConfig(ratio=0.6)
    with pytest.raises(ValueError, match=r"masking\.date_ratio"):
        MaskingConfig(date_ratio=1.5)
    with pytest.raises(ValueError, match=r"masking\.ratios\.SPOT_RGBI"):
        MaskingConfig(ratios={"SPOT_RGBI": -0.1})
    with pytest.raises(ValueError, match=r"masking\.cube"):
        MaskingConfig(cube=0.0)
    with pytest.raises(ValueError, match=r"masking\.blocks\.SPOT_RGBI"):
        MaskingConfig(blocks={"SPOT_RGBI": float("inf")})
