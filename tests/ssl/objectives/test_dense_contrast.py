"""Dense contrast: reference implementation, negatives, queue, temperature."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import permutations

import pytest
import torch
from tiny_pretraining import NAMES, SIDE, make_batch, make_model

from bocage.shards.batch import Batch
from bocage.shards.errors import InputError
from bocage.shards.modality import FLAIR_HUB
from bocage.shards.preprocess.inputs import quality_masks
from bocage.shards.sample_seed import sample_id, sample_seed
from bocage.ssl.objectives.dense_contrast import ContrastiveConfig, DenseContrast
from bocage.ssl.objectives.masking import MaskingConfig
from bocage.ssl.objectives.model import EncodedBatch, PretrainingModel
from bocage.ssl.objectives.tokens import GeoreferencedTokens, cell_means

SENSORS = ["AERIAL_RGBI", "SPOT_RGBI", "SENTINEL2_TS"]


def make_contrast_model(
    names: list[str] = SENSORS, masking: MaskingConfig | None = None, **keys: float | bool
) -> tuple[PretrainingModel, DenseContrast]:
    masking = masking or MaskingConfig()
    encoders = {name: make_model(masking, [name]).encoder(name) for name in names}
    modalities = {name: FLAIR_HUB[name] for name in names}
    torch.manual_seed(1)
    objective = DenseContrast(encoders, modalities, ContrastiveConfig(width=32, **keys))  # type: ignore[arg-type]
    masks = quality_masks(FLAIR_HUB, names)
    model = PretrainingModel(encoders, modalities, masks, masking, {"contrastive": objective}, {"contrastive": 1.0})
    return model, objective


def reference_loss(objective: DenseContrast, encoded: EncodedBatch, temperature: float) -> float:
    """Compute the loss by loops over sensor pairs, samples and cells; all cells are used."""
    with torch.no_grad():
        vectors, valid = objective.cell_vectors(encoded)
    losses = []
    sensors, samples, cells, _ = vectors.shape
    for sensor, other in permutations(range(sensors), 2):
        for sample in range(samples):
            for cell in range(cells):
                if not (valid[sensor, sample, cell] and valid[other, sample, cell]):
                    continue
                query = vectors[sensor, sample, cell].double()
                positive = float(query @ vectors[other, sample, cell].double()) / temperature
                negatives = [
                    float(query @ vectors[other, other_sample, other_cell].double()) / temperature
                    for other_sample in range(samples)
                    for other_cell in range(cells)
                    if other_sample != sample and valid[other, other_sample, other_cell]
                ]
                if negatives:
                    logits = [positive, *negatives]
                    highest = max(logits)
                    log_sum = highest + math.log(sum(math.exp(value - highest) for value in logits))
                    losses.append(log_sum - positive)
    return sum(losses) / len(losses)


@pytest.mark.parametrize("images", ["packed", "mask_token"])
@pytest.mark.parametrize("temperature", [0.1, 1.0])
def test_loss_equals_the_reference_implementation(images: str, temperature: float) -> None:
    masking = MaskingConfig(images=images)  # type: ignore[arg-type]
    model, objective = make_contrast_model(masking=masking, temperature=temperature, cells_per_sample=1000)
    with torch.no_grad():
        encoded = model.encode_batch(make_batch(5), augment=False)
        loss, metrics = objective(encoded)
    assert float(loss) == pytest.approx(reference_loss(objective, encoded, temperature), rel=1e-5)
    assert 0 <= metrics["accuracy"] <= 1


def test_cell_means_average_the_visible_tokens_in_each_cell() -> None:
    # Tokens whose values are their own centres: the mean of a cell is the mean of the centres in it.
    model, objective = make_contrast_model(masking=MaskingConfig(modality_ratio=0.0))
    encoded = model.encode_batch(make_batch(3), augment=False)
    _, valid = objective.cell_vectors(encoded)
    fractions = dict(zip(SENSORS, valid.float().mean(dim=(1, 2)).tolist(), strict=True))
    # Cells are 12.8 m. One in four SPOT units (12.8 m) is visible; every cell has a visible aerial unit (6.4 m).
    assert fractions == {"AERIAL_RGBI": 1.0, "SPOT_RGBI": 0.25, "SENTINEL2_TS": 1.0}
    generator = torch.Generator().manual_seed(0)
    centres = torch.rand(2, 40, 2, generator=generator) * SIDE
    visible = torch.rand(2, 40, generator=generator) < 0.5
    means, any_visible = cell_means(GeoreferencedTokens(centres, centres, visible), SIDE, 4)
    for sample in range(2):
        for cell in range(16):
            low = torch.tensor([cell % 4, cell // 4]) * 12.8
            inside = visible[sample] & ((centres[sample] >= low) & (centres[sample] < low + 12.8)).all(dim=1)
            assert any_visible[sample, cell] == inside.any()
            if inside.any():
                torch.testing.assert_close(means[sample, cell], centres[sample][inside].mean(dim=0))


def test_cells_of_the_same_sample_are_no_negatives() -> None:
    model, objective = make_contrast_model(masking=MaskingConfig(modality_ratio=0.0))
    batch = make_batch(2)
    copies = batch.subset([0, 0])
    with torch.no_grad():
        assert float(objective(model.encode_batch(copies, augment=False))[0]) == 0.0
        assert float(objective(model.encode_batch(batch, augment=False))[0]) > 0.0


def test_every_present_encoder_gets_a_gradient() -> None:
    model, _ = make_contrast_model(NAMES)
    loss, logs = model(make_batch(4, missing=("SPOT_RGBI",)))
    loss.backward()
    assert torch.isfinite(loss) and "contrastive/accuracy" in logs
    for name in NAMES:
        gradients = [parameter.grad for parameter in model.encoder(name).parameters()]
        if name == "SPOT_RGBI":
            assert all(gradient is None or not gradient.any() for gradient in gradients)
        else:
            assert any(gradient is not None and gradient.abs().max() > 0 for gradient in gradients), name
        assert all(gradient is None or gradient.isfinite().all() for gradient in gradients)


@pytest.mark.parametrize("count", [1, 2])
def test_a_batch_of_one_sample_has_loss_0(count: int) -> None:
    model, _ = make_contrast_model()
    loss, _ = model(make_batch(count))
    loss.backward()
    assert torch.isfinite(loss)
    assert (float(loss.detach()) == 0) == (count == 1)
    assert all(parameter.grad is None or parameter.grad.isfinite().all() for parameter in model.parameters())


def test_samples_with_one_visible_sensor_have_loss_0() -> None:
    model, _ = make_contrast_model(masking=MaskingConfig(modality_ratio=1.0))
    loss, _ = model(make_batch(4))
    loss.backward()
    assert float(loss.detach()) == 0.0


def test_the_choice_of_keys_does_not_depend_on_the_order_of_samples() -> None:
    model, objective = make_contrast_model(keys=8, masking=MaskingConfig(modality_ratio=0.0))
    model.eval()
    batch = make_batch(6)
    loss = float(objective(model.encode_batch(batch, augment=False))[0].detach())
    objective.config = replace(objective.config, keys=4096)
    assert loss < float(objective(model.encode_batch(batch, augment=False))[0].detach())  # fewer negatives
    objective.config = replace(objective.config, keys=8)
    order = torch.tensor([3, 1, 5, 0, 4, 2])
    encoded = model.encode_batch(batch, augment=False)
    shuffled = replace(
        encoded,
        features={name: [features[order] for features in maps] for name, maps in encoded.features.items()},
        masks={
            name: replace(
                mask,
                units=None if mask.units is None else mask.units[order],
                dates=None if mask.dates is None else mask.dates[order],
                dropped=mask.dropped[order],
            )
            for name, mask in encoded.masks.items()
        },
        seeds=encoded.seeds[order],
        sample_ids=encoded.sample_ids[order],
    )
    assert float(objective(shuffled)[0].detach()) == pytest.approx(loss, rel=1e-5)


def test_a_learned_temperature_gets_a_gradient_and_stays_in_bounds() -> None:
    model, objective = make_contrast_model(learn_temperature=True, temperature=0.07)
    assert objective.log_scale is not None
    _, logs = model(make_batch(4))
    assert float(logs["contrastive/temperature"]) == pytest.approx(0.07, rel=1e-5)
    loss, _ = model(make_batch(4))
    loss.backward()
    assert objective.log_scale.grad is not None and objective.log_scale.grad.abs() > 0
    with torch.no_grad():
        objective.log_scale.fill_(50.0)
    loss, logs = model(make_batch(4))
    assert torch.isfinite(loss)
    assert float(logs["contrastive/temperature"]) == pytest.approx(0.01, rel=1e-5)


def test_a_single_sensor_raises() -> None:
    with pytest.raises(InputError, match=r"weights\.contrastive compares sensors, and modalities has SPOT_RGBI alone"):
        make_contrast_model(["SPOT_RGBI"])


@pytest.mark.parametrize(
    ("key", "value"), [("width", 0), ("cells_per_sample", 0), ("keys", 0), ("cell", 0.0), ("temperature", -1.0)]
)
def test_wrong_values_name_their_key(key: str, value: float) -> None:
    with pytest.raises(ValueError, match=rf"contrastive\.{key}="):
        ContrastiveConfig(**{key: value})  # type: ignore[arg-type]


def test_the_queue_holds_the_keys_of_earlier_steps_and_drops_the_oldest() -> None:
    masking = MaskingConfig(modality_ratio=0.0)
    model, objective = make_contrast_model(masking=masking, queue=100, cells_per_sample=4)
    queue = objective.queue
    assert queue is not None and "objectives.contrastive.queue.vectors" in model.state_dict()
    batch = make_batch(2)

    def batch_of_step(number: int) -> Batch:
        keys = [f"{number}/{key}" for key in batch.keys]
        sample_ids = torch.tensor([sample_id(key) for key in keys])
        return replace(batch, seeds=batch.seeds + number, keys=keys, sample_ids=sample_ids)

    batches = [batch_of_step(number) for number in range(3)]
    with torch.no_grad():
        losses = [float(objective(model.encode_batch(item, augment=False))[0]) for item in batches]
        assert int(queue.valid.any(dim=0).sum()) == 3 * 2 * 4
        assert losses[2] > losses[0]  # more negatives in each step
        newest = set(batches[2].sample_ids.tolist())
        assert set(queue.sample_ids[:8].tolist()) == newest
        before = queue.vectors.clone()
        model.eval()
        objective(model.encode_batch(batches[0], augment=False))
        assert torch.equal(queue.vectors, before)  # evaluation does not change the queue
        model.train()
        for number in range(20):
            objective(model.encode_batch(batch_of_step(10 + number), augment=False))
    assert not newest & set(queue.sample_ids.tolist())
    assert queue.vectors.shape == (len(SENSORS), 100, 32)


def test_the_queue_gives_negatives_to_a_single_sample() -> None:
    model, _ = make_contrast_model(masking=MaskingConfig(modality_ratio=0.0), queue=64)
    batch = make_batch(2)
    for index in range(2):
        loss, _ = model(batch.subset([index]))
        assert (float(loss.detach()) > 0) == (index == 1)


def test_queued_cells_of_the_same_sample_are_no_negatives() -> None:
    model, objective = make_contrast_model(masking=MaskingConfig(modality_ratio=0.0), queue=64)
    with torch.no_grad():
        for epoch in range(2):
            batch = replace(make_batch(1), seeds=torch.tensor([sample_seed(0, epoch, "0")]))
            assert float(objective(model.encode_batch(batch, augment=False))[0]) == 0.0


def test_cells_are_an_eighth_of_a_patch_by_default() -> None:
    assert make_contrast_model()[1].cell == 12.8
    assert make_contrast_model(["SENTINEL1-ASC_TS", "SENTINEL2_TS"])[1].cell == 12.8
    coarse = {name: replace(FLAIR_HUB[name], size=2, gsd=51.2, unit=1) for name in ("SENTINEL1-ASC_TS", "SENTINEL2_TS")}
    encoders = {name: make_model(names=[name]).encoder(name) for name in coarse}
    assert DenseContrast(encoders, coarse, ContrastiveConfig()).cell == 51.2
    with pytest.raises(InputError, match=r"contrastive.cell=200: a patch is 102.4 m wide; use contrastive.cell=102.4"):
        make_contrast_model(cell=200.0)
