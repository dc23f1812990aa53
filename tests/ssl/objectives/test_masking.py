"""Masks: blocks, joint masks, dates, cubes, modalities, feature maps, and windows that fit them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from bocage.shards.errors import InputError
from bocage.shards.modality import FLAIR_HUB
from bocage.shards.preprocess.inputs import EncoderInput
from bocage.shards.sample_seed import sample_seed
from bocage.ssl.objectives.masking import Mask, MaskingConfig, block_sizes, check_window, draw_map_weights, draw_masks
from bocage.ssl.objectives.visible_blocks import pack_visible_blocks

SEEDS = torch.tensor([sample_seed(0, 0, str(index)) for index in range(256)])


def image(name: str, present: torch.Tensor | None = None, pixels: int | None = None) -> EncoderInput:
    modality = FLAIR_HUB[name]
    size = pixels or modality.size
    values = torch.zeros(len(SEEDS), len(modality.channels), 1, 1).expand(-1, -1, size, size)
    present = torch.ones(len(SEEDS), dtype=torch.bool) if present is None else present
    return EncoderInput(values, torch.ones_like(values, dtype=torch.bool), present)


def series(name: str, padding: torch.Tensor) -> EncoderInput:
    modality = FLAIR_HUB[name]
    values = torch.zeros(len(SEEDS), padding.shape[1], len(modality.channels), 10, 10)
    return EncoderInput(values, values == 0, ~padding.all(dim=1), torch.zeros(padding.shape), padding)


def masks_of(inputs: dict[str, EncoderInput], config: MaskingConfig, seeds: torch.Tensor = SEEDS) -> dict[str, Mask]:
    modalities = {name: FLAIR_HUB[name] for name in inputs}
    return draw_masks(inputs, modalities, block_sizes(modalities, config), seeds, config)


def test_packing_keeps_one_unit_of_every_2_x_2_in_order() -> None:
    inputs = {"SPOT_RGBI": image("SPOT_RGBI")}
    mask = masks_of(inputs, MaskingConfig())["SPOT_RGBI"]
    assert mask.units is not None
    assert mask.units.shape == (256, 8, 8)
    visible = (~mask.units).view(256, 4, 2, 4, 2).sum(dim=(2, 4))
    assert (visible == 1).all()
    # Each pixel has the value of its own index, so the packed image shows where its pixels come from.
    values = torch.arange(64 * 64.0).view(1, 1, 64, 64).expand(256, 1, 64, 64)
    packed = pack_visible_blocks(values, mask.units, 1)
    assert packed.shape == (256, 1, 32, 32)
    for index in (0, 100):
        for row, column in (~mask.units[index]).nonzero().tolist():
            source = values[index, 0, row * 8 : row * 8 + 8, column * 8 : column * 8 + 8]
            target = packed[index, 0, row // 2 * 8 : row // 2 * 8 + 8, column // 2 * 8 : column // 2 * 8 + 8]
            assert torch.equal(source, target)


def test_mask_token_masks_the_configured_fraction() -> None:
    config = MaskingConfig(images="mask_token", ratio=0.6)
    mask = masks_of({"AERIAL_RGBI": image("AERIAL_RGBI")}, config)["AERIAL_RGBI"]
    assert mask.units is not None
    assert (mask.units.sum(dim=(1, 2)) == round(0.6 * 256)).all()


def test_units_of_a_block_are_masked_together() -> None:
    config = MaskingConfig(blocks={"AERIAL_RGBI": 12.8})
    inputs = {name: image(name) for name in ("AERIAL_RGBI", "SPOT_RGBI")}
    masks = masks_of(inputs, config)
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
def test_joint_masks_cover_the_same_ground(images: str) -> None:
    config = MaskingConfig(images=images, joint=True)  # type: ignore[arg-type]  # parametrised literal
    inputs = {name: image(name) for name in ("AERIAL_RGBI", "DEM_ELEV", "SPOT_RGBI")}
    masks = masks_of(inputs, config)
    ground = {
        name: mask.units[:, :: mask.block, :: mask.block] for name, mask in masks.items() if mask.units is not None
    }
    for name in inputs:
        assert ground[name].shape == (256, 8, 8)
        assert torch.equal(ground[name], ground["SPOT_RGBI"])
    assert ground["SPOT_RGBI"].float().mean() == 0.75


def test_ratios_of_single_modalities() -> None:
    padding = torch.zeros(256, 10, dtype=torch.bool)
    inputs = {"SPOT_RGBI": image("SPOT_RGBI"), "SENTINEL2_TS": series("SENTINEL2_TS", padding)}
    config = MaskingConfig(images="mask_token", ratios={"SPOT_RGBI": 0.5, "SENTINEL2_TS": 0.3})
    masks = masks_of(inputs, config)
    units, dates = masks["SPOT_RGBI"].units, masks["SENTINEL2_TS"].dates
    assert units is not None and dates is not None
    assert (units.sum(dim=(1, 2)) == 32).all()
    assert (dates.sum(dim=1) == 3).all()
    everything = MaskingConfig(images="mask_token", ratio=1.0, date_ratio=1.0)
    masks = masks_of(inputs, everything)
    units, dates = masks["SPOT_RGBI"].units, masks["SENTINEL2_TS"].dates
    assert units is not None and dates is not None
    assert (units.sum(dim=(1, 2)) == 63).all()  # one unit stays visible
    assert (dates.sum(dim=1) == 9).all()


def test_cubes_are_an_independent_gap_in_each_ground_cell() -> None:
    padding = torch.zeros(256, 20, dtype=torch.bool)
    padding[0] = True
    padding[1, 1:] = True
    padding[2, 10:] = True
    inputs = {"SENTINEL2_TS": series("SENTINEL2_TS", padding)}
    mask = masks_of(inputs, MaskingConfig(cube_probability=1.0))["SENTINEL2_TS"]
    assert mask.dates is not None and mask.cubes is not None
    masked = mask.cubes | mask.dates[:, :, None, None]
    assert not masked[:2].any()
    assert (masked[2].sum(dim=0) == 6).all() and (masked[3:].sum(dim=1) == 12).all()
    pixels = masked[3:].permute(0, 2, 3, 1).flatten(0, 2)
    assert (gap_count(pixels) == 1).all()
    assert not mask.cubes.all(dim=-1).all(dim=-1).any()
    assert (pixels.float().mean(dim=0) - 0.6).abs().max() < 0.05
    # 4 x 4 cells cover 10 x 10 pixels: neighbours share a cube, opposite corners do not.
    assert torch.equal(masked[:, :, 0, 0], masked[:, :, 1, 2])
    assert (masked[3:, :, 0, 0] != masked[3:, :, 9, 9]).any(dim=1).float().mean() > 0.5
    some = masks_of(inputs, MaskingConfig(cube_probability=0.5))["SENTINEL2_TS"]
    assert some.cubes is not None
    assert 0.35 < some.cubes.flatten(1).any(dim=1).float().mean() < 0.65
    # Samples without cubes have the same masked dates as with cube_probability=0.
    none = masks_of(inputs, MaskingConfig())["SENTINEL2_TS"]
    assert none.cubes is None and none.dates is not None and some.dates is not None
    without = ~some.cubes.flatten(1).any(dim=1) & (some.dates.sum(dim=1) > 0)
    assert torch.equal(some.dates[without], none.dates[without])


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (MaskingConfig(ratios={"SPOT": 0.5}), r"masking\.ratios\.SPOT: not one of"),
        (MaskingConfig(ratios={"SPOT_RGBI": 0.5}), r"masking\.ratios\.SPOT_RGBI needs masking\.images=mask_token"),
        (MaskingConfig(images="mask_token", joint=True, ratios={"SPOT_RGBI": 0.5}), r"SPOT_RGBI: with masking\.joint"),
        (MaskingConfig(blocks={"SENTINEL2_TS": 20.48}), r"masking\.blocks\.SENTINEL2_TS: not one of"),
        (
            MaskingConfig(blocks={"AERIAL_RGBI": 9.6}),
            r"9\.6 m is not a multiple of the 6\.4 m mask unit",
        ),
    ],
)
def test_masking_that_does_not_fit_the_modalities_raises(config: MaskingConfig, message: str) -> None:
    names = ("AERIAL_RGBI", "SPOT_RGBI", "SENTINEL2_TS")
    with pytest.raises(InputError, match=message):
        block_sizes({name: FLAIR_HUB[name] for name in names}, config)


def test_at_least_one_date_stays_visible_and_one_is_masked() -> None:
    padding = torch.zeros(256, 12, dtype=torch.bool)
    padding[0] = True  # no date
    padding[1, 1:] = True  # one date
    padding[2, 2:] = True  # two
    padding[3:100, 9:] = True
    masks = masks_of({"SENTINEL2_TS": series("SENTINEL2_TS", padding)}, MaskingConfig())
    mask = masks["SENTINEL2_TS"]
    assert mask.dates is not None
    assert not (mask.dates & padding).any()
    assert mask.dropped[0]
    count = mask.dates.sum(dim=1)
    assert count[:3].tolist() == [0, 0, 1]
    assert (count[3:100] == round(0.6 * 9)).all()
    assert (count[100:] == round(0.6 * 12)).all()
    assert 0.15 < (gap_count(mask.dates[100:]) == 1).float().mean() < 0.5


def gap_count(masked: torch.Tensor) -> torch.Tensor:
    """Number of gaps, runs of masked dates, of each sample; a gap may wrap around the end of the year."""
    return (masked & ~masked.roll(1, dims=1)).sum(dim=1)


def test_a_gap_is_a_single_run_of_dates() -> None:
    padding = torch.zeros(256, 20, dtype=torch.bool)
    config = MaskingConfig(gap_probability=1.0)
    mask = masks_of({"SENTINEL2_TS": series("SENTINEL2_TS", padding)}, config)["SENTINEL2_TS"]
    assert mask.dates is not None
    assert (gap_count(mask.dates) == 1).all()
    assert (mask.dates.sum(dim=1) == 12).all()
    assert (mask.dates.float().mean(dim=0) - 0.6).abs().max() < 0.12  # all dates equally often


def test_one_present_modality_always_stays_visible() -> None:
    absent = torch.rand(256, generator=torch.Generator().manual_seed(0)) < 0.5
    inputs = {"AERIAL_RGBI": image("AERIAL_RGBI", present=~absent), "SPOT_RGBI": image("SPOT_RGBI")}
    masks = masks_of(inputs, MaskingConfig(modality_ratio=0.9))
    dropped = torch.stack([masks[name].dropped for name in inputs], dim=1)
    assert not dropped.all(dim=1).any()
    assert dropped[absent, 0].all()
    assert dropped[~absent].float().mean() > 0.4
    none = masks_of(inputs, MaskingConfig(modality_ratio=0.0))
    assert torch.equal(none["AERIAL_RGBI"].dropped, absent)


def test_one_feature_map_always_stays() -> None:
    weights = draw_map_weights(SEEDS, "SPOT_RGBI", 4, 0.5)
    kept = (weights > 0).sum(dim=1)
    assert torch.allclose(weights.sum(dim=1), torch.tensor(4.0))
    assert kept.min() == 1 and kept.max() == 4
    assert ((weights > 0).float().mean(dim=0) - 8.25 / 16).abs().max() < 0.1  # 1/2, and one map if all are drawn
    assert torch.equal(draw_map_weights(SEEDS.flip(0), "SPOT_RGBI", 4, 0.5), weights.flip(0))
    assert (draw_map_weights(SEEDS, "SPOT_RGBI", 4, 1.0) > 0).sum(dim=1).eq(1).all()


def test_a_mask_depends_on_the_seed_of_its_sample_alone() -> None:
    inputs = {"SPOT_RGBI": image("SPOT_RGBI")}
    forward = masks_of(inputs, MaskingConfig())["SPOT_RGBI"].units
    backwards = masks_of(inputs, MaskingConfig(), SEEDS.flip(0))["SPOT_RGBI"].units
    assert forward is not None
    assert backwards is not None
    assert torch.equal(forward, backwards.flip(0))


@pytest.mark.parametrize(
    ("names", "side", "settings", "sentence"),
    [
        (["SENTINEL2_TS"], 20.48, {}, r"SENTINEL2_TS is reconstructed in units of 51.2 m.*; .* are 51.2, 102.4 m wide"),
        (["SENTINEL2_TS"], 10.0, {}, r"not whole pixels in every modality; windows that fit are 51.2, 102.4 m"),
        (["AERIAL_RGBI"], 50.0, {}, r"pairs of blocks of 6.4 m .*; windows that fit are 12.8, 25.6, 38.4, ... 102.4 m"),
        (["AERIAL_RGBI"], 19.2, {}, r"AERIAL_RGBI is masked in pairs of blocks of 6.4 m .* do not divide 19.2 m"),
        (
            ["AERIAL_RGBI"],
            12.8,
            {"images": "mask_token", "blocks": {"AERIAL_RGBI": 12.8}},
            r"a single block of 12.8 m, so nothing can be masked",
        ),
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
        (["SENTINEL2_TS"], 51.2, {"blocks": {"SPOT_RGBI": 12.8}}, r"masking.blocks.SPOT_RGBI: it applies to images"),
    ],
)
def test_a_window_that_does_not_fit_raises_and_names_windows_that_fit(
    names: list[str], side: float, settings: dict[str, Any], sentence: str
) -> None:
    modalities = {name: FLAIR_HUB[name] for name in names}
    with pytest.raises(InputError, match=sentence):
        check_window(modalities, side, MaskingConfig(**settings), reconstructed=True)


def test_windows_that_fit_pass() -> None:
    series, image = {"SENTINEL2_TS": FLAIR_HUB["SENTINEL2_TS"]}, {"AERIAL_RGBI": FLAIR_HUB["AERIAL_RGBI"]}
    check_window(series, 51.2, MaskingConfig(), reconstructed=True)
    check_window(series, 20.48, MaskingConfig(), reconstructed=False)
    for side in (12.8, 38.4, 102.4):
        check_window(image, side, MaskingConfig(), reconstructed=True)


def test_wrong_values_name_their_key() -> None:
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


def test_an_image_of_one_unit_is_masked_as_a_whole_only() -> None:
    point = replace(FLAIR_HUB["SPOT_RGBI"], name="POINT", size=4, gsd=25.6, unit=4)
    modalities = {"SPOT_RGBI": FLAIR_HUB["SPOT_RGBI"], "POINT": point}
    for images in ("packed", "mask_token"):
        config = MaskingConfig(images=images, joint=True, modality_ratio=0.5)
        blocks = block_sizes(modalities, config)
        assert blocks == {"SPOT_RGBI": 1, "POINT": 1}  # blocks of joint masks ignore it
        check_window(modalities, None, config, reconstructed=True)
        inputs = {"SPOT_RGBI": image("SPOT_RGBI"), "POINT": image("SPOT_RGBI", pixels=4)}
        mask = draw_masks(inputs, modalities, blocks, SEEDS, config)["POINT"]
        assert mask.units is not None and not mask.packed and not mask.units.any()
        assert 0.2 < mask.dropped.float().mean() < 0.5
    with pytest.raises(InputError, match=r"POINT is masked in pairs of blocks .*; windows that fit are 102.4 m wide"):
        check_window(modalities, 51.2, MaskingConfig(), reconstructed=True)
    with pytest.raises(InputError, match="POINT is masked in pairs of blocks"):
        check_window({"POINT": point}, None, MaskingConfig(), reconstructed=True)
