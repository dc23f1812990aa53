"""Losses: scored targets, cross-entropy, focal, Dice and Lovasz, class weights."""

import pytest
import torch

from bocage.finetune.models.losses import IGNORE_INDEX, LossConfig, SegmentationLoss, cross_entropy, scored_targets
from bocage.shards import classes
from bocage.shards.errors import InputError

SMALL = classes.ClassScheme(name="small", classes=("a", "b", "c", "d"), colours=("000000",) * 4, unscored=(3,))


def compute_loss(config: LossConfig, logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return SegmentationLoss(config, SMALL, "tasks.X.loss")(logits, targets)


def logits_and_targets() -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    targets = torch.randint(0, 3, (2, 6, 6))
    targets[0, :2] = IGNORE_INDEX
    return torch.randn(2, 4, 6, 6, requires_grad=True), targets


def test_unscored_classes_and_unlabelled_samples_are_ignored() -> None:
    labels = torch.tensor([[[0, 14, 15, 18]], [[1, 2, 3, 4]]], dtype=torch.uint8)
    targets = scored_targets(labels, torch.tensor([True, False]), classes.COSIA)
    assert targets.tolist() == [[[0, 14, IGNORE_INDEX, IGNORE_INDEX]], [[IGNORE_INDEX] * 4]]
    with pytest.raises(IndexError):
        scored_targets(torch.full((1, 1, 1), 19, dtype=torch.uint8), torch.tensor([True]), classes.COSIA)


def test_cross_entropy_is_the_mean_over_scored_pixels() -> None:
    logits = torch.randn(2, 5, 3, 3, requires_grad=True)
    targets = torch.randint(0, 5, (2, 3, 3))
    targets[0, 0] = IGNORE_INDEX
    chosen = targets != IGNORE_INDEX
    expected = -logits.log_softmax(dim=1).permute(0, 2, 3, 1)[chosen].gather(1, targets[chosen][:, None]).mean()
    torch.testing.assert_close(cross_entropy(logits, targets), expected)
    nothing = cross_entropy(logits, torch.full_like(targets, IGNORE_INDEX))
    nothing.backward()
    assert nothing == 0
    assert logits.grad is not None
    assert not logits.grad.any()


def test_class_weights_make_a_weighted_mean() -> None:
    logits, targets = logits_and_targets()
    weights = torch.tensor([1.0, 3.0, 0.0, 1.0])
    expected = torch.nn.functional.cross_entropy(logits, targets, weights, ignore_index=IGNORE_INDEX)
    torch.testing.assert_close(compute_loss(LossConfig(class_weights={"b": 3.0, "c": 0.0}), logits, targets), expected)
    only_c = torch.full_like(targets, 2)
    assert compute_loss(LossConfig(class_weights={"c": 0.0}), logits, only_c) == 0


def test_dice_and_focal_follow_their_formulas() -> None:
    logits, targets = logits_and_targets()
    mask = targets != IGNORE_INDEX
    probabilities = logits.softmax(dim=1).permute(0, 2, 3, 1)[mask]
    truth = torch.nn.functional.one_hot(targets[mask], 4).float()
    dice = 1 - 2 * (probabilities * truth).sum(dim=0) / (probabilities.sum(dim=0) + truth.sum(dim=0))
    loss = compute_loss(LossConfig(overlap="dice", overlap_weight=0.5), logits, targets)
    torch.testing.assert_close(loss, cross_entropy(logits, targets) + 0.5 * dice[:3].mean())

    sigmoid = logits.permute(0, 2, 3, 1)[mask].sigmoid()
    correct = torch.where(truth > 0, sigmoid, 1 - sigmoid)
    focal = (-((1 - correct) ** 3) * correct.log()).mean()
    torch.testing.assert_close(compute_loss(LossConfig(pixels="focal", gamma=3.0), logits, targets), focal)


def test_lovasz_of_confident_predictions_is_the_mean_jaccard_distance() -> None:
    targets = torch.tensor([[[0, 0, 1, 1, 2, IGNORE_INDEX]]])
    predicted = torch.tensor([[[0, 1, 1, 1, 2, 0]]])
    logits = 100 * torch.nn.functional.one_hot(predicted, 4).permute(0, 3, 1, 2).float()
    config = LossConfig(overlap="lovasz")
    lovasz = compute_loss(config, logits, targets) - cross_entropy(logits, targets)
    torch.testing.assert_close(lovasz, torch.tensor((1 / 2 + 1 / 3 + 0) / 3), atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    "config", [LossConfig(pixels="focal"), LossConfig(overlap="dice"), LossConfig(overlap="lovasz")]
)
def test_without_scored_pixels_loss_and_gradients_are_zero(config: LossConfig) -> None:
    logits, targets = logits_and_targets()
    loss = compute_loss(config, logits, torch.full_like(targets, IGNORE_INDEX))
    loss.backward()
    assert loss == 0
    assert logits.grad is not None
    assert not logits.grad.any()


@pytest.mark.parametrize("settings", [{}, {"pixels": "focal"}, {"overlap": "dice"}, {"overlap": "lovasz"}])
def test_classes_of_weight_zero_have_no_gradient(settings: dict) -> None:
    logits, targets = logits_and_targets()
    compute_loss(LossConfig(class_weights={"b": 0.0}, **settings), logits, targets).backward()
    assert logits.grad is not None
    gradients = logits.grad.permute(0, 2, 3, 1)
    assert not gradients[targets == 1].any()
    assert gradients[targets == 0].any()


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (LossConfig(class_weights={"d": 1.0}), r"tasks.X.loss.class_weights: d not among the scored classes a, b, c"),
        (LossConfig(class_weights={"a": 0.0, "b": 0.0, "c": 0.0}), r"are all 0: give one class a positive weight"),
    ],
)
def test_wrong_class_weights_raise(config: LossConfig, message: str) -> None:
    with pytest.raises(InputError, match=message):
        SegmentationLoss(config, SMALL, "tasks.X.loss")


@pytest.mark.parametrize(
    "settings", [{"pixels": "hinge"}, {"overlap": "jaccard"}, {"gamma": -1.0}, {"class_weights": {"a": float("nan")}}]
)
def test_invalid_settings_name_their_key(settings: dict) -> None:
    with pytest.raises(ValueError, match=f"loss.{next(iter(settings))}"):
        LossConfig(**settings)
