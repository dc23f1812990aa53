"""Masked reconstruction: no leak of masked values, loss mask, tokens, missing modalities."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from tiny_pretraining import NAMES, SIDE, fill_masked_with_noise, make_batch, make_model, masked_objective

from bocage.shards.errors import InputError
from bocage.shards.modality import FLAIR_HUB
from bocage.ssl.objectives.decoder import DecoderConfig, Neck
from bocage.ssl.objectives.masked import Discrimination, MaskedConfig, MaskedReconstruction, Reconstruction
from bocage.ssl.objectives.masking import MaskingConfig
from bocage.ssl.objectives.targets import from_units
from bocage.ssl.objectives.tokens import georeferenced_tokens
from bocage.ssl.objectives.visible_blocks import pack_visible_blocks


@pytest.mark.parametrize("images", ["packed", "mask_token"])
def test_every_encoder_gets_a_gradient(images: str) -> None:
    model = make_model(MaskingConfig(images=images))  # type: ignore[arg-type]  # parametrised literal
    loss, logs = model(make_batch(4))
    loss.backward()
    assert torch.isfinite(loss)
    for name in NAMES:
        assert torch.isfinite(logs[f"masked/{name}"])
        for parameter_name, parameter in model.encoder(name).named_parameters():
            assert parameter.grad is not None, f"{name}: {parameter_name}"
        assert any(parameter.grad.abs().max() > 0 for parameter in model.encoder(name).parameters())  # type: ignore[union-attr]


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize(
    "masking",
    [
        MaskingConfig(modality_ratio=0.4),
        MaskingConfig(modality_ratio=0.4, images="mask_token", ratio=0.6),
        MaskingConfig(modality_ratio=0.4, cube_probability=0.7, cube=12.8, joint=True),
    ],
    ids=["packed", "mask_token", "cubes, joint"],
)
def test_masked_values_do_not_change_features_or_predictions(masking: MaskingConfig, training: bool) -> None:
    """Features and predictions stay equal to the bit when all masked values become noise, also in batch statistics."""
    model = make_model(masking).train(training)
    with torch.no_grad():
        torch.manual_seed(5)
        encoded = model.encode_batch(make_batch(6), augment=False)
        before = masked_objective(model).reconstruct(encoded)
        torch.manual_seed(5)
        noisy = model.encode_inputs(fill_masked_with_noise(encoded), encoded.masks, encoded.seeds, encoded.sample_ids)
        after = masked_objective(model).reconstruct(noisy)
    for name in NAMES:
        for features, noisy_features in zip(encoded.features[name], noisy.features[name], strict=True):
            assert torch.equal(features, noisy_features), name
        for target, item in before[name].items():
            assert torch.equal(item.prediction, after[name][target].prediction), (name, target)
            assert not torch.equal(item.target, after[name][target].target), (name, target)


@pytest.mark.parametrize("name", ["SPOT_RGBI", "SENTINEL2_TS"])
def test_dropped_feature_maps_do_not_change_tokens(name: str) -> None:
    model = make_model(names=[name]).eval()
    neck = masked_objective(model).necks[name]
    assert isinstance(neck, Neck)
    with torch.no_grad():
        encoded = model.encode_batch(make_batch(6), augment=True)
        before = georeferenced_tokens(encoded, name, neck).values
        weights = encoded.map_weights[name]
        assert (weights == 0).any()
        for index, features in enumerate(encoded.features[name]):
            noise = torch.randn(features.shape)
            encoded.features[name][index] = torch.where(weights[:, index, None, None, None] == 0, noise, features)
        assert torch.equal(georeferenced_tokens(encoded, name, neck).values, before)
        assert not model.encode_batch(make_batch(6), augment=False).map_weights


def test_masked_raster_values_do_not_change_features() -> None:
    """Noise in the native rasters. Relief is equal up to rounding: the mean of the window is subtracted first."""
    model = make_model(MaskingConfig(modality_ratio=0.0, cube_probability=0.5)).eval()
    batch = make_batch(6)
    with torch.no_grad():
        encoded = model.encode_batch(batch, augment=False)
        generator = torch.Generator().manual_seed(1)
        values = dict(batch.values)
        for name, mask in encoded.masks.items():
            if mask.units is not None:
                unit = FLAIR_HUB[name].unit
                hidden = mask.units.repeat_interleave(unit, 1).repeat_interleave(unit, 2)[:, None]
            else:
                hidden = mask.pixel_mask(batch.padding[name], values[name].shape[-1])[:, :, None]
            noise = torch.randint(1, 200, values[name].shape, generator=generator).to(values[name].dtype)
            values[name] = torch.where(hidden, noise, values[name])
        noisy = model.encode_batch(replace(batch, values=values), augment=False)
    for name in NAMES:
        exact = FLAIR_HUB[name].representation != "relief"
        for features, noisy_features in zip(encoded.features[name], noisy.features[name], strict=True):
            if exact:
                assert torch.equal(features, noisy_features), name
            else:
                assert torch.allclose(features, noisy_features, atol=1e-4), name


def test_the_loss_mask_of_a_series_covers_its_cubes() -> None:
    name = next(item.name for item in FLAIR_HUB.inputs if item.role == "series")
    model = make_model(MaskingConfig(cube_probability=1.0, modality_ratio=0.0), names=[name]).eval()
    with torch.no_grad():
        encoded = model.encode_batch(make_batch(6), augment=False)
        item = masked_objective(model).reconstruct(encoded)[name]["pixels"]
    mask = encoded.masks[name]
    assert item.date_indices is not None and mask.cubes is not None and mask.dates is not None
    loss_mask = from_units(item.loss_mask)[:, :, 0]
    masked = mask.cubes | mask.dates[:, :, None, None]
    for sample in range(6):
        assert torch.equal(loss_mask[sample], masked[sample, item.date_indices[sample]])
    assert 0 < loss_mask.float().mean() < 1


def test_targets_of_a_series_keep_the_seasonal_curve() -> None:
    """Frames have one value each: with the mean of each date removed, all targets would be 0."""
    name = "SENTINEL2_TS"
    model = make_model(names=[name]).eval()
    with torch.no_grad():
        encoded = model.encode_batch(make_batch(6), augment=False)
        series = encoded.inputs[name]
        course = torch.arange(series.values.shape[1]).float()
        series.values[:] = course[:, None, None, None]
        item = masked_objective(model).reconstruct(encoded)[name]["pixels"]
    assert item.date_indices is not None and series.padding is not None
    for sample in range(6):
        existing = course[~series.padding[sample]]
        expected = (course[item.date_indices[sample]] - existing.mean()) / (existing.var(correction=0) + 1e-3).sqrt()
        target = item.target[sample].flatten(1)
        torch.testing.assert_close(target, expected[:, None].expand_as(target), atol=1e-4, rtol=1e-4)


def test_the_loss_mask_covers_masked_values_only() -> None:
    model = make_model().eval()
    with torch.no_grad():
        encoded = model.encode_batch(make_batch(6), augment=False)
        items = masked_objective(model).reconstruct(encoded)
    for name, target, item in (
        (name, target, item) for name, by_target in items.items() for target, item in by_target.items()
    ):
        mask = encoded.masks[name]
        fraction = item.loss_mask.flatten(1).float().mean(dim=1)
        if mask.units is not None:
            expected = torch.where(mask.dropped, 1.0, 0.75)
            # Cells of 2 pixels in the corners of an image have no gradient.
            assert torch.allclose(fraction, expected, atol=0.02 if target == "gradients" else 1e-6), target
        else:
            assert mask.dates is not None
            available = torch.where(mask.dropped, 9, mask.dates.sum(dim=1)).clamp(max=4)
            assert torch.allclose(fraction, available / 4)


def test_token_centres_are_the_centres_of_visible_units() -> None:
    """The mean of an image of ground coordinates over each visible unit is the centre of the token."""
    model = make_model(names=["SPOT_RGBI"])
    encoded = model.encode_batch(make_batch(3), augment=False)
    neck = masked_objective(model).necks["SPOT_RGBI"]
    assert isinstance(neck, Neck)
    centres = georeferenced_tokens(encoded, "SPOT_RGBI", neck).centres
    modality, units = FLAIR_HUB["SPOT_RGBI"], encoded.masks["SPOT_RGBI"].units
    assert units is not None
    pixels = round(SIDE / modality.gsd)
    ground = (torch.arange(pixels) + 0.5) * modality.gsd
    rows, columns = torch.meshgrid(ground, ground, indexing="ij")
    coordinates = pack_visible_blocks(torch.stack([columns, rows]).expand(3, -1, -1, -1), units, 1)
    averages = torch.nn.functional.avg_pool2d(coordinates, modality.unit).flatten(2).transpose(1, 2)
    assert torch.allclose(centres, averages, atol=1e-4)


def test_the_loss_of_a_batch_is_the_mean_over_its_samples() -> None:
    """Hence several ranks and accumulated micro-batches equal one large batch."""
    model = make_model().eval()
    with torch.no_grad():
        whole, _ = model(make_batch(4))
        parts = [model(make_batch(4).subset([index]))[0] for index in range(4)]
    assert torch.allclose(whole, torch.stack(parts).mean(), atol=1e-6)


@pytest.mark.parametrize("missing", [("SENTINEL2_TS", "SENTINEL2_MSK-SC"), ("AERIAL_RGBI",), tuple(NAMES[1:])])
def test_missing_modalities_have_loss_0(missing: tuple[str, ...]) -> None:
    model = make_model()
    loss, logs = model(make_batch(2, missing=missing))
    loss.backward()
    assert torch.isfinite(loss)
    for name in missing:
        if name in NAMES:
            assert logs[f"masked/{name}"] == 0


def test_explained_compares_the_loss_with_that_of_the_best_constant() -> None:
    target = torch.randn(3, 2, 2, 4, 8, 8)
    target[..., 1, :, :] += 5.0
    masked = torch.rand(target.shape) < 0.7
    zero = torch.zeros(())

    def reconstruction(prediction: torch.Tensor) -> Reconstruction:
        return Reconstruction(prediction, target, masked, zero, zero + 1)

    constant = torch.stack([target[:, :, :, c][masked[:, :, :, c]].median() for c in range(4)])[:, None, None]
    best = reconstruction(constant.expand(target.shape))
    torch.testing.assert_close(best.losses(), best.constant_losses())
    zeros = reconstruction(torch.zeros_like(target))
    assert (zeros.losses() > zeros.constant_losses()).all()
    assert not reconstruction(target).losses().any()
    torch.testing.assert_close(reconstruction(target).constant_losses(), best.constant_losses())


def test_explained_of_a_modality_sums_those_of_its_targets() -> None:
    _, logs = make_model()(make_batch(2))
    for name in NAMES:
        total = logs[f"masked/explained/{name}"]
        if FLAIR_HUB[name].role == "series":
            assert f"masked/explained/{name}/pixels" not in logs
            continue
        parts = [value for key, value in logs.items() if key.startswith(f"masked/explained/{name}/")]
        torch.testing.assert_close(torch.stack(parts).sum(dim=0), total)


def test_one_sample_of_one_date() -> None:
    loss, _ = make_model()(make_batch(1, dates=1))
    assert torch.isfinite(loss)


def test_heights_of_masked_units_do_not_change_visible_relief() -> None:
    """Relief is a height above the mean of the window, which must not leak masked units."""
    name = next(item.name for item in FLAIR_HUB.inputs if item.representation == "relief")
    model = make_model(MaskingConfig(modality_ratio=0.0), names=[name]).eval()
    with torch.no_grad():
        batch = make_batch(3)
        encoded = model.encode_batch(batch, augment=False)
        units = encoded.masks[name].units
        assert units is not None
        unit = FLAIR_HUB[name].unit
        masked = units.repeat_interleave(unit, 1).repeat_interleave(unit, 2)
        raised = batch.values[name].clone()
        raised[:, 0] += 50.0 * masked
        again = model.encode_batch(replace(batch, values={**batch.values, name: raised}), augment=False)
    for features, raised_features in zip(encoded.features[name], again.features[name], strict=True):
        assert torch.allclose(features, raised_features, atol=1e-4)


def test_absent_samples_do_not_change_batch_statistics() -> None:
    name = next(item.name for item in FLAIR_HUB.inputs if item.role == "series")
    model = make_model(MaskingConfig(modality_ratio=0.0), names=[name])
    full = make_batch(4)
    present = {**full.present, name: torch.tensor([True, False, True, False])}
    batch = replace(full, present=present)
    torch.manual_seed(0)
    encoded = model.encode_batch(batch, augment=False)
    assert encoded.visible_rows[name].tolist() == [0, 2]
    assert not encoded.features[name][0][[1, 3]].any()
    changed = full.values[name][[0, 0, 2, 2]]
    torch.manual_seed(0)
    again = model.encode_batch(replace(batch, values={**full.values, name: changed}), augment=False)
    assert torch.equal(encoded.features[name][0], again.features[name][0])


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (lambda: MaskedConfig(dates_per_sample=0), r"masked\.dates_per_sample"),
        (lambda: MaskedConfig(weights={"SPOT_RGBI": -1.0}), r"masked\.weights\.SPOT_RGBI"),
        (lambda: MaskedConfig(targets={"pixel": 1.0}), r"masked\.targets\.pixel: not a target"),
        (lambda: MaskedConfig(targets={"pixels": 0.0}), r"masked\.targets: weights must not"),
        (lambda: DecoderConfig(heads=0), r"decoder\.heads"),
        (lambda: DecoderConfig(fusion_depth=-1), r"decoder\.fusion_depth"),
    ],
)
def test_wrong_values_name_their_key(config: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config()


@pytest.mark.parametrize("weights", [{"SPOT_RGB": 2.0}, {"SPOT_RGBI": 0.0}])
def test_weights_must_name_modalities_of_the_run(weights: dict[str, float]) -> None:
    model = make_model(names=["SPOT_RGBI"])
    with pytest.raises(InputError, match=r"masked\.weights"):
        MaskedReconstruction({"SPOT_RGBI": model.encoder("SPOT_RGBI")}, FLAIR_HUB, MaskedConfig(weights=weights))


def test_discrimination_compares_masked_units_of_a_sample() -> None:
    torch.manual_seed(0)
    target = torch.randn(2, 4, 4, 16, 1, 1)
    loss_mask = torch.zeros(2, 4, 4, 1, 1, 1, dtype=torch.bool)
    loss_mask[0, :, :2] = True  # none in the second sample
    loss_mask = loss_mask.expand_as(target)
    mean, std = torch.zeros(()), torch.ones(())

    def losses(prediction: torch.Tensor) -> torch.Tensor:
        return Discrimination(prediction, target, loss_mask, mean, std).losses()

    right, turned, same = losses(target), losses(target.flip(1)), losses(torch.ones_like(target))
    assert right[0] < 0.1 and turned[0] > 3
    constant = Discrimination(target, target, loss_mask, mean, std).constant_losses()
    torch.testing.assert_close(constant, torch.tensor([8.0, 1.0]).log())
    assert same[0] > 0.7 * constant[0]
    assert [float(values[1]) for values in (right, turned, same)] == [0, 0, 0]
    # Units that are not masked are no negatives.
    changed = torch.where(loss_mask, target, torch.randn(target.shape))
    other = Discrimination(target, changed, loss_mask, mean, std).losses()
    torch.testing.assert_close(other, right)
