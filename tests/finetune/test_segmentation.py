"""Segmentation: training on small data, several labels, label strides, saving and loading."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_segmentation import AERIAL, COSIA, DECODER, DEM, LPIS, S2, batch, task, trained

from bocage.finetune.models.losses import cross_entropy, scored_targets
from bocage.finetune.models.segmentation import Segmentation, load_segmentation, save_segmentation
from bocage.finetune.models.supervision import TaskConfig
from bocage.finetune.models.targets import Target
from bocage.shards import classes
from bocage.shards.errors import InputError
from bocage.shards.modality import FLAIR_HUB
from bocage.shards.preprocess.augment import orient

BOTH = (AERIAL, S2)
LABELS = (COSIA, LPIS)
MIXED = (BOTH, (AERIAL,), (S2,), BOTH)


@pytest.mark.slow
def test_learns_a_batch_whose_samples_lack_different_sensors() -> None:
    # About ten seconds: a real training run.
    data = batch(BOTH, (AERIAL,), (S2,), inputs=BOTH)
    assert trained(task(*BOTH), data, steps=30) > 0.7


def test_learns_with_one_image() -> None:
    # Some seconds: a real training run.
    data = batch((AERIAL,), (AERIAL,), inputs=(AERIAL,))
    assert trained(task(AERIAL), data, steps=25) > 0.85


@pytest.mark.slow
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
    with pytest.raises(InputError, match=r"has levels 1 to|has one level, not"):
        task(S2, labels=(label,), band=3)


def test_training_orients_inputs_and_labels_together_and_evaluation_does_not() -> None:
    model = task(AERIAL).eval()
    data = batch((AERIAL,), (AERIAL,), (AERIAL,), inputs=(AERIAL,))
    plain, oriented = model.logits(data)[COSIA], model.predictions(data, training=True).logits[COSIA]
    assert not torch.equal(plain, oriented)
    oriented_batch = batch((AERIAL,), (AERIAL,), (AERIAL,), inputs=(AERIAL,))
    oriented_batch.values[AERIAL] = orient(data.values[AERIAL], data.seeds)
    torch.testing.assert_close(model.logits(oriented_batch)[COSIA], oriented)
    truth = orient(model.targets[COSIA].truth(data), data.seeds)
    targets = scored_targets(truth, data.present[COSIA], classes.COSIA)
    expected = cross_entropy(oriented, targets)
    for module in model.model.decoders.modules():
        module.training = False
    model.training = True  # only the task itself, without stochastic depth, so that the loss is comparable
    torch.testing.assert_close(model(data)[0], expected)


def test_label_stride_trains_on_block_centres_and_predicts_all_pixels() -> None:
    dense, strided = task(S2).eval(), task(S2, label_stride=16).eval()
    data = batch((S2,), (S2,), inputs=(S2,))
    logits = strided.predictions(data, training=True).logits[COSIA]
    assert logits.shape == (2, 19, 16, 16)
    truth = orient(strided.targets[COSIA].truth(data), data.seeds)
    dense.training = strided.training = True  # only the tasks themselves, so that their losses are comparable
    expected = cross_entropy(logits, scored_targets(truth[:, 8::16, 8::16], data.present[COSIA], classes.COSIA))
    torch.testing.assert_close(strided(data)[0], expected)
    # Labels have cells of 51 pixels, so one pixel in 256 gives nearly the same loss.
    torch.testing.assert_close(strided(data)[0], dense(data)[0], rtol=0.05, atol=0.0)
    assert strided.predict(data)[COSIA].shape == (2, 256, 256)
    assert trained(task(S2, decoder=replace(DECODER, norm="batch"), label_stride=16), data, steps=100) > 0.65


@pytest.mark.slow
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


def test_a_sample_without_a_label_is_used_for_the_other() -> None:
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
    with pytest.raises(InputError, match="groups the classes of FLAIR-HUB's COSIA only"):
        Target(label=FLAIR_HUB[LPIS], grouping="flair_challenge")


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


def test_damaged_models_raise_an_error_that_names_the_fault(saved: tuple[Segmentation, Path], tmp_path: Path) -> None:
    folder = saved[1]
    config = json.loads((folder / "config.json").read_text())

    def assert_refused(match: str) -> None:
        with pytest.raises(InputError, match=match):
            load_segmentation(folder)

    def change_config(**changes: object) -> None:
        (folder / "config.json").write_text(json.dumps({**config, **changes}))

    weights = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(weights[:-100])
    assert_refused("model.safetensors is truncated")
    (folder / "model.safetensors").write_bytes(weights)
    stored = load_file(folder / "model.safetensors")
    name = next(name for name, tensor in stored.items() if tensor.is_floating_point())
    for damaged in (torch.full_like(stored[name], torch.nan), stored[name].half()):
        save_file({**stored, name: damaged}, folder / "model.safetensors")
        assert_refused("does not fit config.json in the same folder: .* 1 mismatched")
    (folder / "model.safetensors").write_bytes(weights)
    change_config(decoder={**config["decoder"], "width": 8})
    assert_refused("does not fit config.json in the same folder")
    change_config(decoder={"colour": "red"})
    assert_refused("cannot be read as a segmentation model: TypeError")
    change_config(decoder={"width": 0})
    assert_refused("must be positive")
    change_config(decoder={"norm": "layer"})
    assert_refused("decoder.norm = 'layer' is not one of batch, group")
    change_config(decoder={"width": 10**13})
    assert_refused("cannot be read as a segmentation model")
    entry = config["encoders"][AERIAL]
    for key, value in (("gsd", "x"), ("mean", "a"), ("mean", [float("nan")] * 4)):
        change_config(encoders={AERIAL: {**entry, "input": {**entry["input"], key: value}}})
        assert_refused(f"input.{key}")
    change_config(schema=1)
    assert_refused("has schema 1, but this version of bocage reads schema 3")
    change_config(task="other")
    assert_refused("does not describe a segmentation model")
    for text in ("{", "[" * 100_000, "[]"):
        (folder / "config.json").write_text(text)
        assert_refused("config.json (is not readable JSON|does not describe)")
    (folder / "config.json").unlink()
    assert_refused("no fine-tuned model here")
    (folder / "config.json").mkdir()
    assert_refused("config.json is not readable JSON")
    shutil.rmtree(folder)
    assert_refused("no fine-tuned model here")
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
    loaded = load_segmentation(tmp_path)
    assert list(loaded.model.auxiliary) == [S2]
    assert all(torch.equal(value, loaded.state_dict()[name]) for name, value in model.state_dict().items())


def test_a_sensor_that_is_all_nodata_is_absent_except_for_an_official_model() -> None:
    data = batch((AERIAL, DEM), (AERIAL, DEM), inputs=(AERIAL, DEM))
    data.values[DEM][1] = -9999.0
    model = task(AERIAL, DEM).eval()
    absent = replace(data, present={**data.present, DEM: torch.tensor([True, False])})
    with torch.no_grad():
        assert torch.equal(model.logits(data)[COSIA], model.logits(absent)[COSIA])
        official = task(AERIAL, DEM, official=True).eval()
        assert torch.isfinite(official.logits(data)[COSIA]).all()
        with pytest.raises(InputError, match="samples lack DEM_ELEV"):
            official.logits(absent)
