import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_task import AERIAL, COSIA, DECODER, DEM, LPIS, S2, batch, task, trained

from bocage.finetune.models.losses import IGNORED, cross_entropy, scored_targets
from bocage.finetune.models.segmentation import Segmentation, load_segmentation, save_segmentation
from bocage.shards import classes
from bocage.shards.errors import InputError
from bocage.shards.preprocess.augment import orient

BOTH = (AERIAL, S2)
MIXED = (BOTH, (AERIAL,), (S2,), BOTH)


def test_targets_leave_out_unscored_classes_and_unlabelled_samples() -> None:
    labels = torch.tensor([[[0, 14, 15, 18]], [[1, 2, 3, 4]]], dtype=torch.uint8)
    targets = scored_targets(labels, torch.tensor([True, False]), classes.COSIA)
    assert targets.tolist() == [[[0, 14, IGNORED, IGNORED]], [[IGNORED] * 4]]
    with pytest.raises(IndexError):
        scored_targets(torch.full((1, 1, 1), 19, dtype=torch.uint8), torch.tensor([True]), classes.COSIA)


def test_cross_entropy_is_the_mean_over_scored_pixels() -> None:
    logits = torch.randn(2, 5, 3, 3, requires_grad=True)
    targets = torch.randint(0, 5, (2, 3, 3))
    targets[0, 0] = IGNORED
    chosen = targets != IGNORED
    expected = -logits.log_softmax(dim=1).permute(0, 2, 3, 1)[chosen].gather(1, targets[chosen][:, None]).mean()
    torch.testing.assert_close(cross_entropy(logits, targets), expected)
    nothing = cross_entropy(logits, torch.full_like(targets, IGNORED))
    nothing.backward()
    assert nothing == 0
    assert logits.grad is not None
    assert not logits.grad.any()


def test_learns_a_batch_whose_samples_lack_different_sensors() -> None:
    # About ten seconds: a real training run.
    data = batch(BOTH, (AERIAL,), (S2,), inputs=BOTH)
    assert trained(task(*BOTH), data, steps=30) > 0.7


def test_learns_with_one_image() -> None:
    # Some seconds: a real training run.
    data = batch((AERIAL,), (AERIAL,), inputs=(AERIAL,))
    assert trained(task(AERIAL), data, steps=25) > 0.85


def test_learns_with_series_alone() -> None:
    # Some seconds: a real training run. Maps of 10 m cells cannot draw the sharp borders of 0.2 m labels.
    data = batch((S2,), (S2,), (S2,), (S2,), inputs=(S2,))
    assert trained(task(S2, decoder=replace(DECODER, norm="batch")), data, steps=100) > 0.65


@pytest.mark.parametrize(("label", "band", "expected"), [(COSIA, 0, 19), (LPIS, 0, 23), (LPIS, 2, 46)])
def test_labels_and_levels(label: str, band: int, expected: int) -> None:
    model = task(S2, labels=(label,), band=band).eval()
    data = batch((S2,), (S2,), inputs=(S2,), labels=(label,))
    assert model.logits(data)[label].shape == (2, expected, 256, 256)
    assert torch.equal(model.targets[label].truth(data), data.values[label][:, band])
    with pytest.raises(InputError, match="levels 1 to"):
        task(S2, labels=(label,), band=3)


def test_training_turns_inputs_and_labels_together_and_evaluation_does_not() -> None:
    model = task(AERIAL).eval()
    data = batch((AERIAL,), (AERIAL,), (AERIAL,), inputs=(AERIAL,))
    straight, turned = model.logits(data)[COSIA], model.predictions(data, learning=True).logits[COSIA]
    assert not torch.equal(straight, turned)
    by_hand = batch((AERIAL,), (AERIAL,), (AERIAL,), inputs=(AERIAL,))
    by_hand.values[AERIAL] = orient(data.values[AERIAL], data.seeds)
    torch.testing.assert_close(model.logits(by_hand)[COSIA], turned)
    truth = orient(model.targets[COSIA].truth(data), data.seeds)
    targets = scored_targets(truth, data.present[COSIA], classes.COSIA)
    expected = cross_entropy(turned, targets)
    for module in model.model.decoders.modules():
        module.training = False
    model.training = True  # only the task itself: dropout paths stay off, so that the loss is comparable
    torch.testing.assert_close(model(data)[0], expected)


def test_a_stride_of_labels_learns_from_the_pixels_in_the_middle_of_logits_and_predicts_all() -> None:
    whole, strided = task(S2).eval(), task(S2, label_stride=16).eval()
    data = batch((S2,), (S2,), inputs=(S2,))
    logits = strided.predictions(data, learning=True).logits[COSIA]
    assert logits.shape == (2, 19, 16, 16)
    truth = orient(strided.targets[COSIA].truth(data), data.seeds)
    whole.training = strided.training = True  # only the tasks themselves: their losses are comparable
    expected = cross_entropy(logits, scored_targets(truth[:, 8::16, 8::16], data.present[COSIA], classes.COSIA))
    torch.testing.assert_close(strided(data)[0], expected)
    # Cells of 51 pixels: the loss of one pixel in 256 is near that of all.
    torch.testing.assert_close(strided(data)[0], whole(data)[0], rtol=0.05, atol=0.0)
    assert strided.predict(data)[COSIA].shape == (2, 256, 256)
    assert trained(task(S2, decoder=replace(DECODER, norm="batch"), label_stride=16), data, steps=100) > 0.65


def test_a_frozen_encoder_does_not_change() -> None:
    model = task(*BOTH, freeze=(S2,))
    before = {name: value.clone() for name, value in model.model.encoder(S2).state_dict().items()}
    trained(model, batch(*MIXED, inputs=BOTH), steps=2)
    after = model.model.encoder(S2).state_dict()
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    with pytest.raises(InputError, match="freeze: DEM_ELEV"):
        task(*BOTH, freeze=("DEM_ELEV",))


def test_same_seed_gives_the_same_bits() -> None:
    data = batch(*MIXED, inputs=BOTH)
    first, second = task(*BOTH), task(*BOTH)
    trained(first, data, steps=2)
    trained(second, data, steps=2)
    assert all(torch.equal(a, b) for a, b in zip(first.state_dict().values(), second.state_dict().values()))


@pytest.fixture
def saved(tmp_path: Path) -> tuple[Segmentation, Path]:
    model = task(*BOTH).eval()
    save_segmentation(model, tmp_path / "model")
    return model, tmp_path / "model"


def test_a_saved_model_predicts_the_same(saved: tuple[Segmentation, Path]) -> None:
    model, folder = saved
    loaded = load_segmentation(folder)
    data = batch(*MIXED, inputs=BOTH)
    assert torch.equal(loaded.logits(data)[COSIA], model.logits(data)[COSIA])
    assert loaded.targets == model.targets
    assert loaded.quality_masks == {S2: "SENTINEL2_MSK-SC"}
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "model.safetensors"]


def test_damaged_models_are_refused_in_one_sentence(saved: tuple[Segmentation, Path], tmp_path: Path) -> None:
    folder = saved[1]
    config = json.loads((folder / "config.json").read_text())

    def refused(match: str) -> None:
        with pytest.raises(InputError, match=match):
            load_segmentation(folder)

    def described(**changes: object) -> None:
        (folder / "config.json").write_text(json.dumps({**config, **changes}))

    weights = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(weights[:-100])
    refused("model.safetensors is truncated")
    (folder / "model.safetensors").write_bytes(weights)
    stored = load_file(folder / "model.safetensors")
    name = next(name for name, tensor in stored.items() if tensor.is_floating_point())
    for spoiled in (torch.full_like(stored[name], torch.nan), stored[name].half()):
        save_file({**stored, name: spoiled}, folder / "model.safetensors")
        refused("does not fit config.json beside it: .* 1 unfit")
    (folder / "model.safetensors").write_bytes(weights)
    described(decoder={**config["decoder"], "width": 8})
    refused("does not fit config.json beside it")
    described(decoder={"colour": "red"})
    refused("cannot be read as a segmentation model: TypeError")
    described(decoder={"width": 0})
    refused("must be positive")
    described(decoder={"norm": "layer"})
    refused("decoder.norm = 'layer' is not one of batch, group")
    described(decoder={"width": 10**13})
    refused("cannot be read as a segmentation model")
    entry = config["encoders"][AERIAL]
    for key, value in (("gsd", "x"), ("mean", "a"), ("mean", [float("nan")] * 4)):
        described(encoders={AERIAL: {**entry, "input": {**entry["input"], key: value}}})
        refused(f"input.{key}")
    described(schema=1)
    refused("has schema 1, this bocage reads 3")
    described(task="other")
    refused("does not describe a segmentation model")
    for text in ("{", "[" * 100_000, "[]"):
        (folder / "config.json").write_text(text)
        refused("config.json (is not readable JSON|does not describe)")
    (folder / "config.json").unlink()
    refused("no fine-tuned model here")
    (folder / "config.json").mkdir()
    refused("config.json is not readable JSON")
    shutil.rmtree(folder)
    refused("no fine-tuned model here")
    with pytest.raises(InputError, match="no fine-tuned model here"):
        load_segmentation(Path("x" * 5000))


def test_deep_supervision_adds_the_weighted_mean_of_the_auxiliary_losses() -> None:
    model = task(*BOTH, auxiliary=BOTH, auxiliary_weight=0.5)
    loss, logs = model.train()(batch(*MIXED, inputs=BOTH))
    torch.testing.assert_close(loss, logs["main_loss"] + 0.5 * logs["auxiliary_loss"])
    loss.backward()
    for name, parameter in model.model.auxiliary.named_parameters():
        assert parameter.grad is not None or not parameter.requires_grad, name
    loss, logs = model.eval()(batch(*MIXED, inputs=BOTH))
    assert "auxiliary_loss" not in logs


def test_auxiliary_decoders_survive_saving(tmp_path: Path) -> None:
    model = task(*BOTH, auxiliary=(S2,))
    save_segmentation(model, tmp_path)
    again = load_segmentation(tmp_path)
    assert list(again.model.auxiliary) == [S2]
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in model.state_dict().items())


def test_a_sensor_of_nothing_but_holes_is_absent_except_to_an_official_model() -> None:
    data = batch((AERIAL, DEM), (AERIAL, DEM), inputs=(AERIAL, DEM))
    data.values[DEM][1] = -9999.0
    own = task(AERIAL, DEM).eval()
    absent = replace(data, present={**data.present, DEM: torch.tensor([True, False])})
    with torch.no_grad():
        assert torch.equal(own.logits(data)[COSIA], own.logits(absent)[COSIA])
        official = task(AERIAL, DEM, official=True).eval()
        assert torch.isfinite(official.logits(data)[COSIA]).all()
        with pytest.raises(InputError, match="samples lack DEM_ELEV"):
            official.logits(absent)
