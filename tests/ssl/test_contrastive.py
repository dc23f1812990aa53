"""The dense contrastive objective against a computation written out, and what it must not see."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import permutations

import pytest
import torch
from test_masked import NAMES, SIDE, make_batch, make_task

from bocage.shards.batch import Batch
from bocage.shards.errors import InputError
from bocage.shards.modality import FLAIR_HUB
from bocage.shards.preprocess.inputs import quality_masks
from bocage.shards.sample_seed import sample_seed
from bocage.ssl.objectives.dense_contrast import ContrastiveConfig, DenseContrast
from bocage.ssl.objectives.masking import MaskingConfig
from bocage.ssl.objectives.model import EncodedBatch, PretrainingModel
from bocage.ssl.objectives.tokens import GeoreferencedTokens, cell_means

SOME = ["AERIAL_RGBI", "SPOT_RGBI", "SENTINEL2_TS"]


def task_of(
    names: list[str] = SOME, masking: MaskingConfig | None = None, **keys: float | bool
) -> tuple[PretrainingModel, DenseContrast]:
    masking = masking or MaskingConfig()
    encoders = {name: make_task(masking, [name]).encoder(name) for name in names}
    modalities = {name: FLAIR_HUB[name] for name in names}
    torch.manual_seed(1)
    term = DenseContrast(encoders, modalities, ContrastiveConfig(width=32, **keys))  # type: ignore[arg-type]
    masks = quality_masks(FLAIR_HUB, names)
    return PretrainingModel(encoders, modalities, masks, masking, {"contrastive": term}, {"contrastive": 1.0}), term


def written_out(term: DenseContrast, view: EncodedBatch, temperature: float) -> float:
    """The loss with loops over pairs, samples and cells, all of which take part."""
    with torch.no_grad():
        vectors, known = term.cells(view)
    losses = []
    sensors, samples, cells, _ = vectors.shape
    for one, other in permutations(range(sensors), 2):
        for sample in range(samples):
            for cell in range(cells):
                if not (known[one, sample, cell] and known[other, sample, cell]):
                    continue
                query = vectors[one, sample, cell].double()
                positive = float(query @ vectors[other, sample, cell].double()) / temperature
                negatives = [
                    float(query @ vectors[other, away, place].double()) / temperature
                    for away in range(samples)
                    for place in range(cells)
                    if away != sample and known[other, away, place]
                ]
                if negatives:
                    every = [positive, *negatives]
                    highest = max(every)
                    total = highest + math.log(sum(math.exp(value - highest) for value in every))
                    losses.append(total - positive)
    return sum(losses) / len(losses)


@pytest.mark.parametrize("images", ["packed", "mask_token"])
@pytest.mark.parametrize("temperature", [0.1, 1.0])
def test_the_loss_is_the_one_written_out(images: str, temperature: float) -> None:
    masking = MaskingConfig(images=images)  # type: ignore[arg-type]
    task, term = task_of(masking=masking, temperature=temperature, cells=1000)
    with torch.no_grad():
        view = task.view(make_batch(5), oriented=False)
        loss, figures = term(view)
    assert float(loss) == pytest.approx(written_out(term, view, temperature), rel=1e-5)
    assert 0 <= figures["told_apart"] <= 1


def test_cells_lie_where_sensors_saw_the_ground() -> None:
    """Each token says where it is: the mean of a cell is the mean place of what lies in it. Packed SPOT has gaps."""
    task, term = task_of(masking=MaskingConfig(modality_ratio=0.0))
    view = task.view(make_batch(3), oriented=False)
    _, known = term.cells(view)
    shares = dict(zip(SOME, known.float().mean(dim=(1, 2)).tolist(), strict=True))
    # SPOT's units are 12.8 m, of which one in four is seen; aerial units are 6.4 m, of which every cell has one.
    assert shares == {"AERIAL_RGBI": 1.0, "SPOT_RGBI": 0.25, "SENTINEL2_TS": 1.0}
    generator = torch.Generator().manual_seed(0)
    centres = torch.rand(2, 40, 2, generator=generator) * SIDE
    seen = torch.rand(2, 40, generator=generator) < 0.5
    means, any_there = cell_means(GeoreferencedTokens(centres, centres, seen), SIDE, 4)
    for sample in range(2):
        for cell in range(16):
            low = torch.tensor([cell % 4, cell // 4]) * 12.8
            inside = seen[sample] & ((centres[sample] >= low) & (centres[sample] < low + 12.8)).all(dim=1)
            assert any_there[sample, cell] == inside.any()
            if inside.any():
                torch.testing.assert_close(means[sample, cell], centres[sample][inside].mean(dim=0))


def test_cells_of_the_same_sample_are_no_negatives() -> None:
    """Two copies of one sample have nothing to be told apart from."""
    task, term = task_of(masking=MaskingConfig(modality_ratio=0.0))
    batch = make_batch(2)
    twins = replace(batch, seeds=batch.seeds[:1].repeat(2), keys=batch.keys[:1] * 2)
    with torch.no_grad():
        assert float(term(task.view(twins, oriented=False))[0]) == 0.0
        assert float(term(task.view(batch, oriented=False))[0]) > 0.0


def test_every_encoder_learns_and_absent_sensors_do_no_harm() -> None:
    task, _ = task_of(NAMES)
    loss, logs = task(make_batch(4, missing=("SPOT_RGBI",)))
    loss.backward()
    assert torch.isfinite(loss) and "contrastive/told_apart" in logs
    for name in NAMES:
        gradients = [parameter.grad for parameter in task.encoder(name).parameters()]
        if name == "SPOT_RGBI":
            assert all(gradient is None or not gradient.any() for gradient in gradients)
        else:
            assert any(gradient is not None and gradient.abs().max() > 0 for gradient in gradients), name
        assert all(gradient is None or gradient.isfinite().all() for gradient in gradients)


@pytest.mark.parametrize("count", [1, 2])
def test_a_batch_of_one_has_nothing_to_learn_from_but_breaks_nothing(count: int) -> None:
    task, _ = task_of()
    loss, _ = task(make_batch(count))
    loss.backward()
    assert torch.isfinite(loss)
    assert (float(loss.detach()) == 0) == (count == 1)
    assert all(parameter.grad is None or parameter.grad.isfinite().all() for parameter in task.parameters())


def test_all_sensors_hidden_but_one() -> None:
    """modality_ratio=1 leaves one sensor a sample: no cell has two."""
    task, _ = task_of(masking=MaskingConfig(modality_ratio=1.0))
    loss, _ = task(make_batch(4))
    loss.backward()
    assert float(loss.detach()) == 0.0


def test_fewer_keys_are_a_sample_of_all_and_do_not_depend_on_the_order_of_samples() -> None:
    task, term = task_of(keys=8, masking=MaskingConfig(modality_ratio=0.0))
    task.eval()
    batch = make_batch(6)
    few = float(term(task.view(batch, oriented=False))[0].detach())
    term.config = replace(term.config, keys=4096)
    assert few < float(term(task.view(batch, oriented=False))[0].detach())  # fewer to be told apart from
    term.config = replace(term.config, keys=8)
    order = torch.tensor([3, 1, 5, 0, 4, 2])
    view = task.view(batch, oriented=False)
    shuffled = replace(
        view,
        maps={name: [features[order] for features in maps] for name, maps in view.maps.items()},
        masks={
            name: replace(
                mask,
                units=None if mask.units is None else mask.units[order],
                dates=None if mask.dates is None else mask.dates[order],
                whole=mask.whole[order],
            )
            for name, mask in view.masks.items()
        },
        seeds=view.seeds[order],
        samples=view.samples[order],
    )
    assert float(term(shuffled)[0].detach()) == pytest.approx(few, rel=1e-5)


def test_a_learned_temperature_moves_and_stays_in_bounds() -> None:
    task, term = task_of(learn_temperature=True, temperature=0.07)
    assert term.log_scale is not None
    _, logs = task(make_batch(4))
    assert float(logs["contrastive/temperature"]) == pytest.approx(0.07, rel=1e-5)
    loss, _ = task(make_batch(4))
    loss.backward()
    assert term.log_scale.grad is not None and term.log_scale.grad.abs() > 0
    with torch.no_grad():
        term.log_scale.fill_(50.0)
    loss, logs = task(make_batch(4))
    assert torch.isfinite(loss)
    assert float(logs["contrastive/temperature"]) == pytest.approx(0.01, rel=1e-5)


def test_one_sensor_alone_is_refused() -> None:
    with pytest.raises(InputError, match=r"weights\.contrastive compares sensors, and modalities has SPOT_RGBI alone"):
        task_of(["SPOT_RGBI"])


@pytest.mark.parametrize("keys", [{"width": 0}, {"cells": 0}, {"keys": 0}, {"cell": 0.0}, {"temperature": -1.0}])
def test_wrong_values_name_their_key(keys: dict[str, float]) -> None:
    (key,) = keys
    with pytest.raises(ValueError, match=rf"contrastive\.{key}="):
        ContrastiveConfig(**keys)  # type: ignore[arg-type]


def test_a_queue_holds_the_cells_of_earlier_steps_and_forgets_the_oldest() -> None:
    masking = MaskingConfig(modality_ratio=0.0)
    task, term = task_of(masking=masking, queue=100, cells=4)
    queue = term.queue
    assert queue is not None and "terms.contrastive.queue.vectors" in task.state_dict()
    batch = make_batch(2)

    def step(number: int) -> Batch:
        return replace(batch, seeds=batch.seeds + number, keys=[f"{number}/{key}" for key in batch.keys])

    batches = [step(number) for number in range(3)]
    with torch.no_grad():
        losses = [float(term(task.view(given, oriented=False))[0]) for given in batches]
        assert int(queue.known.any(dim=0).sum()) == 3 * 2 * 4
        assert losses[2] > losses[0]  # ever more to be told apart from
        newest = [sample_seed(0, 0, key) for key in batches[2].keys]
        assert set(queue.owners[:8].tolist()) == set(newest)
        before = queue.vectors.clone()
        task.eval()
        term(task.view(batches[0], oriented=False))
        assert torch.equal(queue.vectors, before)  # evaluation leaves no trace
        task.train()
        for number in range(20):
            term(task.view(step(10 + number), oriented=False))
    assert not set(newest) & set(queue.owners.tolist())
    assert queue.vectors.shape == (len(SOME), 100, 32)


def test_one_sample_learns_from_the_queue() -> None:
    task, _ = task_of(masking=MaskingConfig(modality_ratio=0.0), queue=64)
    batch = make_batch(2)
    for index in range(2):
        alone = make_batch(1)
        loss, _ = task(replace(alone, seeds=batch.seeds[index : index + 1], keys=batch.keys[index : index + 1]))
        assert (float(loss.detach()) > 0) == (index == 1)


def test_a_sample_of_an_earlier_epoch_in_the_queue_is_no_negative() -> None:
    task, term = task_of(masking=MaskingConfig(modality_ratio=0.0), queue=64)
    with torch.no_grad():
        for epoch in range(2):
            alone = replace(make_batch(1), seeds=torch.tensor([sample_seed(0, epoch, "0")]))
            assert float(term(task.view(alone, oriented=False))[0]) == 0.0
