"""Several labels at once, and how they are learned: weights, losses, groupings, frozen stages, sensors left out."""

from dataclasses import replace

import pytest
import torch
from tiny_task import AERIAL, COSIA, DEM, LPIS, S1, S2, batch, task, trained

from bocage.finetune.models.losses import IGNORED, LossConfig, SegmentationLoss, cross_entropy
from bocage.finetune.models.supervision import TaskConfig, without_some
from bocage.finetune.models.targets import Target
from bocage.shards import classes
from bocage.shards.errors import InputError
from bocage.shards.modality import FLAIR_HUB
from bocage.shards.preprocess.inputs import EncoderInput
from bocage.shards.sample_seed import sample_seed

BOTH = (AERIAL, S2)
LABELS = (COSIA, LPIS)


def test_learns_two_labels_at_once() -> None:
    # Some ten seconds: a real training run.
    data = batch(BOTH, (AERIAL,), (S2,), inputs=BOTH, labels=LABELS)
    model = task(*BOTH, labels=LABELS)
    assert trained(model, data, steps=30) > 0.7
    assert {name: maps.shape for name, maps in model.predict(data).items()} == dict.fromkeys(LABELS, (3, 256, 256))


def test_the_loss_is_the_weighted_sum_of_those_of_the_labels() -> None:
    data = batch(BOTH, BOTH, inputs=BOTH, labels=LABELS)
    model = task(*BOTH, labels=LABELS, tasks={LPIS: TaskConfig(weight=0.25)}, auxiliary=BOTH, auxiliary_weight=0.5)
    loss, logs = model(data)
    torch.testing.assert_close(logs["main_loss"], logs[f"loss/{COSIA}"] + 0.25 * logs[f"loss/{LPIS}"])
    torch.testing.assert_close(loss, logs["main_loss"] + 0.5 * logs["auxiliary_loss"])
    loss.backward()
    assert all(parameter.grad is not None for parameter in model.model.decoders.parameters() if parameter.requires_grad)


def test_a_sample_without_a_label_teaches_the_other() -> None:
    data = batch(BOTH, BOTH, inputs=BOTH, labels=LABELS)
    data.present[LPIS][:] = False
    model = task(*BOTH, labels=LABELS).eval()
    _, logs = model(data)
    assert logs[f"loss/{LPIS}"] == 0
    assert logs[f"loss/{COSIA}"] > 0
    assert logs["scored_pixels"] == 0.5


def test_classes_are_grouped_as_in_the_flair_challenges() -> None:
    target = Target(label=FLAIR_HUB[COSIA], grouping="flair_challenge")
    assert len(target.scheme) == 13
    assert len(target.scheme.scored) == 12
    data = batch((AERIAL,), inputs=(AERIAL,))
    data.values[COSIA][0, 0, 0, :19] = torch.arange(19)
    names = [target.scheme.classes[value] for value in target.truth(data)[0, 0, :19].tolist()]
    others = {"greenhouse", "swimming pool", "snow", "clear cut", "ligneous", "mixed", "undefined"}
    assert names == ["other" if name in others else name for name in classes.COSIA.classes]
    assert Target.from_json(target.to_json()) == target
    with pytest.raises(InputError, match="is of the classes of COSIA only"):
        Target(label=FLAIR_HUB[LPIS], grouping="flair_challenge")


def test_stages_of_an_encoder_stay_as_they_are() -> None:
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
    # What keeps ranks in step where nobody holds the sensor leaves a frozen part as it was.
    frozen, buffers = model.model.encoder(S2), dict(model.model.encoder(S2).named_buffers())
    before = {name: value.clone() for name, value in buffers.items()}
    asleep = [name for name, module in frozen.named_modules() if not module.training]
    assert asleep
    frozen.features_of_none(torch.randn(1, 3, 10, 10, 10), torch.zeros(1, 3), torch.zeros(1, 3, dtype=torch.bool))
    assert [name for name, module in frozen.named_modules() if not module.training] == asleep
    assert all(torch.equal(value, before[name]) for name, value in buffers.items())
    assert not model.model.get_submodule(f"{swin}.layers_1").training
    assert model.model.get_submodule(f"{swin}.layers_2").training


def inputs_of(*present: list[bool]) -> dict[str, EncoderInput]:
    names = (AERIAL, DEM, S2, S1)
    nothing = torch.zeros(len(present), 1, 1, 1)
    columns = torch.tensor(present).T
    return {name: EncoderInput(nothing, nothing > 0, here) for name, here in zip(names, columns, strict=False)}


def test_sensors_go_as_often_as_they_should_and_one_always_stays() -> None:
    seeds = torch.tensor([sample_seed(0, epoch, "a") for epoch in range(4000)])
    inputs = inputs_of(*[[True, True, True]] * 4000)
    kept = without_some(inputs, seeds, {AERIAL: 0.3, S2: 0.1})
    assert kept[DEM].present.all()
    assert 0.67 < kept[AERIAL].present.float().mean() < 0.73
    assert 0.88 < kept[S2].present.float().mean() < 0.92
    # Independent of each other, and of which other samples there are.
    both = (~kept[AERIAL].present & ~kept[S2].present).float().mean()
    assert 0.02 < both < 0.04
    again = without_some(inputs_of(*[[True, True, True]] * 7), seeds[100:107], {AERIAL: 0.3, S2: 0.1})
    assert torch.equal(again[AERIAL].present, kept[AERIAL].present[100:107])

    few = inputs_of(*[[True, False, True], [False, False, True], [False, False, False]] * 50)
    rates = {AERIAL: 1.0, DEM: 1.0, S2: 1.0}
    left = torch.stack([item.present for item in without_some(few, seeds[:150], rates).values()], dim=1)
    given = torch.stack([item.present for item in few.values()], dim=1)
    assert torch.equal(left.sum(dim=1), given.any(dim=1).long())
    assert not (left & ~given).any()
    assert left[::3, 0].any()
    assert left[::3, 2].any()


def test_sensors_are_left_out_in_training_alone() -> None:
    data = batch(BOTH, BOTH, inputs=BOTH)
    model = task(*BOTH, modality_dropout={AERIAL: 1.0}).eval()
    without = replace(data, present={**data.present, AERIAL: torch.tensor([False, False])})
    with torch.no_grad():
        learning, blind = (model.predictions(given, learning=True).logits[COSIA] for given in (data, without))
        assert torch.equal(learning, blind)
        assert not torch.equal(model.logits(data)[COSIA], model.logits(without)[COSIA])
    with pytest.raises(InputError, match="official architecture has no stand-in"):
        task(*BOTH, official=True, modality_dropout={AERIAL: 0.1})


SMALL = classes.ClassScheme(name="small", classes=("a", "b", "c", "d"), colours=("000000",) * 4, unscored=(3,))


def scored(loss: LossConfig, logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return SegmentationLoss(loss, SMALL, "tasks.X.loss")(logits, targets)


def pixels() -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    targets = torch.randint(0, 3, (2, 6, 6))
    targets[0, :2] = IGNORED
    return torch.randn(2, 4, 6, 6, requires_grad=True), targets


def test_class_weights_make_a_weighted_mean() -> None:
    logits, targets = pixels()
    weights = torch.tensor([1.0, 3.0, 0.0, 1.0])
    expected = torch.nn.functional.cross_entropy(logits, targets, weights, ignore_index=IGNORED)
    torch.testing.assert_close(scored(LossConfig(class_weights={"b": 3.0, "c": 0.0}), logits, targets), expected)
    only_c = torch.full_like(targets, 2)
    assert scored(LossConfig(class_weights={"c": 0.0}), logits, only_c) == 0


def test_dice_and_focal_follow_their_formulas() -> None:
    logits, targets = pixels()
    here = targets != IGNORED
    shares = logits.softmax(dim=1).permute(0, 2, 3, 1)[here]
    truth = torch.nn.functional.one_hot(targets[here], 4).float()
    dice = 1 - 2 * (shares * truth).sum(dim=0) / (shares.sum(dim=0) + truth.sum(dim=0))
    found = scored(LossConfig(overlap="dice", overlap_weight=0.5), logits, targets)
    torch.testing.assert_close(found, cross_entropy(logits, targets) + 0.5 * dice[:3].mean())

    chances = logits.permute(0, 2, 3, 1)[here].sigmoid()
    right = torch.where(truth > 0, chances, 1 - chances)
    focal = (-((1 - right) ** 3) * right.log()).mean()
    torch.testing.assert_close(scored(LossConfig(pixels="focal", gamma=3.0), logits, targets), focal)


def test_lovasz_of_certain_predictions_is_the_mean_jaccard_distance() -> None:
    targets = torch.tensor([[[0, 0, 1, 1, 2, IGNORED]]])
    predicted = torch.tensor([[[0, 1, 1, 1, 2, 0]]])
    logits = 100 * torch.nn.functional.one_hot(predicted, 4).permute(0, 3, 1, 2).float()
    config = LossConfig(overlap="lovasz")
    lovasz = scored(config, logits, targets) - cross_entropy(logits, targets)
    torch.testing.assert_close(lovasz, torch.tensor((1 / 2 + 1 / 3 + 0) / 3), atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    "config", [LossConfig(pixels="focal"), LossConfig(overlap="dice"), LossConfig(overlap="lovasz")]
)
def test_nothing_scored_is_a_loss_of_zero_with_gradients(config: LossConfig) -> None:
    logits, targets = pixels()
    loss = scored(config, logits, torch.full_like(targets, IGNORED))
    loss.backward()
    assert loss == 0
    assert logits.grad is not None
    assert not logits.grad.any()


@pytest.mark.parametrize("settings", [{}, {"pixels": "focal"}, {"overlap": "dice"}, {"overlap": "lovasz"}])
def test_of_a_class_of_weight_zero_nothing_is_learned(settings: dict) -> None:
    logits, targets = pixels()
    scored(LossConfig(class_weights={"b": 0.0}, **settings), logits, targets).backward()
    assert logits.grad is not None
    gradients = logits.grad.permute(0, 2, 3, 1)
    assert not gradients[targets == 1].any()
    assert gradients[targets == 0].any()


@pytest.mark.parametrize(
    ("config", "sentence"),
    [
        (LossConfig(class_weights={"d": 1.0}), r"tasks.X.loss.class_weights: d not among the scored classes a, b, c"),
        (LossConfig(class_weights={"a": 0.0, "b": 0.0, "c": 0.0}), r"are all 0: nothing would be learned"),
    ],
)
def test_losses_that_cannot_be_are_refused(config: LossConfig, sentence: str) -> None:
    with pytest.raises(InputError, match=sentence):
        SegmentationLoss(config, SMALL, "tasks.X.loss")


@pytest.mark.parametrize(
    "settings", [{"pixels": "hinge"}, {"overlap": "jaccard"}, {"gamma": -1.0}, {"class_weights": {"a": float("nan")}}]
)
def test_impossible_settings_name_their_key(settings: dict) -> None:
    with pytest.raises(ValueError, match=f"loss.{next(iter(settings))}"):
        LossConfig(**settings)
