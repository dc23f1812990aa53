"""Training settings: frozen encoders and stages, modality dropout."""

from dataclasses import replace

import pytest
import torch
from tiny_segmentation import AERIAL, COSIA, DEM, S1, S2, batch, task, trained

from bocage.finetune.models.supervision import apply_modality_dropout
from bocage.shards.errors import InputError
from bocage.shards.preprocess.inputs import EncoderInput
from bocage.shards.sample_seed import sample_seed

BOTH = (AERIAL, S2)
MIXED = (BOTH, (AERIAL,), (S2,), BOTH)


def test_a_frozen_encoder_does_not_change() -> None:
    model = task(*BOTH, freeze=(S2,))
    before = {name: value.clone() for name, value in model.model.encoder(S2).state_dict().items()}
    trained(model, batch(*MIXED, inputs=BOTH), steps=2)
    after = model.model.encoder(S2).state_dict()
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    with pytest.raises(InputError, match="freeze: DEM_ELEV"):
        task(*BOTH, freeze=("DEM_ELEV",))


def test_frozen_stages_of_an_encoder_do_not_change() -> None:
    model = task(*BOTH, freeze=(f"{AERIAL}:2", f"{S2}:1"))
    before = {name: value.clone() for name, value in model.model.named_parameters()}
    trained(model, batch(BOTH, BOTH, inputs=BOTH), steps=3)
    moved = {
        ".".join(name.split(".")[:4])
        for name, value in model.model.named_parameters()
        if name.startswith("encoders.") and not torch.equal(value, before[name])
    }
    swin, utae = f"encoders.{AERIAL}.model", f"encoders.{S2}"
    assert {name for name in moved if name.startswith(swin)} == {f"{swin}.layers_2", f"{swin}.layers_3"}
    assert {name.removeprefix(f"{utae}.").split(".")[0] for name in moved if name.startswith(utae)} == {
        "temporal_encoder",
        "up_blocks",
    }
    model.train()
    # A pass without samples, which keeps FSDP ranks in sync, does not change a frozen part.
    frozen, buffers = model.model.encoder(S2), dict(model.model.encoder(S2).named_buffers())
    before = {name: value.clone() for name, value in buffers.items()}
    in_evaluation = [name for name, module in frozen.named_modules() if not module.training]
    assert in_evaluation
    frozen.empty_features(torch.randn(1, 3, 10, 10, 10), torch.zeros(1, 3), torch.zeros(1, 3, dtype=torch.bool))
    assert [name for name, module in frozen.named_modules() if not module.training] == in_evaluation
    assert all(torch.equal(value, before[name]) for name, value in buffers.items())
    assert not model.model.get_submodule(f"{swin}.layers_1").training
    assert model.model.get_submodule(f"{swin}.layers_2").training


def inputs_with(*present: list[bool]) -> dict[str, EncoderInput]:
    names = (AERIAL, DEM, S2, S1)
    empty = torch.zeros(len(present), 1, 1, 1)
    columns = torch.tensor(present).T
    return {name: EncoderInput(empty, empty > 0, column) for name, column in zip(names, columns, strict=False)}


def test_modality_dropout_has_the_given_rates_and_keeps_one_modality() -> None:
    seeds = torch.tensor([sample_seed(0, epoch, "a") for epoch in range(4000)])
    inputs = inputs_with(*[[True, True, True]] * 4000)
    kept = apply_modality_dropout(inputs, seeds, {AERIAL: 0.3, S2: 0.1})
    assert kept[DEM].present.all()
    assert 0.67 < kept[AERIAL].present.float().mean() < 0.73
    assert 0.88 < kept[S2].present.float().mean() < 0.92
    # Independent between modalities, and of the other samples in the batch.
    both = (~kept[AERIAL].present & ~kept[S2].present).float().mean()
    assert 0.02 < both < 0.04
    again = apply_modality_dropout(inputs_with(*[[True, True, True]] * 7), seeds[100:107], {AERIAL: 0.3, S2: 0.1})
    assert torch.equal(again[AERIAL].present, kept[AERIAL].present[100:107])

    few = inputs_with(*[[True, False, True], [False, False, True], [False, False, False]] * 50)
    rates = {AERIAL: 1.0, DEM: 1.0, S2: 1.0}
    remaining = torch.stack([item.present for item in apply_modality_dropout(few, seeds[:150], rates).values()], dim=1)
    available = torch.stack([item.present for item in few.values()], dim=1)
    assert torch.equal(remaining.sum(dim=1), available.any(dim=1).long())
    assert not (remaining & ~available).any()
    assert remaining[::3, 0].any()
    assert remaining[::3, 2].any()


def test_modality_dropout_applies_to_training_only() -> None:
    data = batch(BOTH, BOTH, inputs=BOTH)
    model = task(*BOTH, modality_dropout={AERIAL: 1.0}).eval()
    without = replace(data, present={**data.present, AERIAL: torch.tensor([False, False])})
    with torch.no_grad():
        dropped, absent = (model.predictions(inputs, training=True).logits[COSIA] for inputs in (data, without))
        assert torch.equal(dropped, absent)
        assert not torch.equal(model.logits(data)[COSIA], model.logits(without)[COSIA])
    with pytest.raises(InputError, match="official=true cannot process a sample without one of its sensors"):
        task(*BOTH, official=True, modality_dropout={AERIAL: 0.1})
