"""Latent prediction: inputs of students and teachers, targets, loss mask, EMA updates."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from small_recipes import PRETRAIN
from tiny_pretraining import NAMES, fill_masked_with_noise, make_batch, make_model
from tiny_run import TinySource, TinyTask, run
from torch import nn

from bocage import recipes
from bocage.shards.errors import InputError
from bocage.shards.modality import FLAIR_HUB
from bocage.shards.preprocess.inputs import quality_masks
from bocage.shards.simulate.tree import write_tree
from bocage.shards.source.flair_hub.tree import FlairHubCatalogue
from bocage.shards.write.writer import write_shards
from bocage.ssl.encoders.export import save_encoder
from bocage.ssl.encoders.initialization import load_teacher
from bocage.ssl.objectives.decoder import DecoderConfig
from bocage.ssl.objectives.latent import LatentConfig, LatentPrediction
from bocage.ssl.objectives.masking import MaskingConfig
from bocage.ssl.objectives.model import EncodedBatch, PretrainingModel
from bocage.ssl.pretrain import pretrain
from bocage.ssl.pretrain_config import PretrainConfig

SMALL = LatentConfig(decoder=DecoderConfig(width=32, fusion_depth=1, heads=4), momentum=0.9)


def make_latent_model(
    names: list[str] = NAMES, masking: MaskingConfig | None = None
) -> tuple[PretrainingModel, LatentPrediction]:
    masking = masking or MaskingConfig()
    encoders = {name: make_model(masking, [name]).encoder(name) for name in names}
    modalities = {name: FLAIR_HUB[name] for name in names}
    torch.manual_seed(1)
    objective = LatentPrediction(encoders, modalities, SMALL)
    masks = quality_masks(FLAIR_HUB, names)
    model = PretrainingModel(encoders, modalities, masks, masking, {"latent": objective}, {"latent": 1.0})
    return model, objective


def predictions(objective: LatentPrediction, encoded: EncodedBatch) -> dict[str, torch.Tensor]:
    outputs: dict[str, torch.Tensor] = {}

    def record(name: str) -> Any:
        return lambda module, args, output: outputs.update({name: output})

    handles = [head.register_forward_hook(record(name)) for name, head in objective.heads.items()]
    with torch.no_grad():
        objective(encoded)
    for handle in handles:
        handle.remove()
    return outputs


@pytest.mark.parametrize("images", ["packed", "mask_token"])
def test_masked_values_change_the_targets_but_not_the_predictions(images: str) -> None:
    model, objective = make_latent_model(masking=MaskingConfig(images=images, modality_ratio=0.3))  # type: ignore[arg-type]
    model.eval()
    with torch.no_grad():
        encoded = model.encode_batch(make_batch(6), augment=False)
        noisy = model.encode_inputs(fill_masked_with_noise(encoded), encoded.masks, encoded.seeds, encoded.sample_ids)
        before, after = predictions(objective, encoded), predictions(objective, noisy)
        for name in NAMES:
            assert torch.equal(before[name], after[name]), name
            cells = round(before[name].shape[1] ** 0.5)
            rows = encoded.present_rows[name]
            target, noisy_target = (
                objective.targets(name, item.inputs[name], rows, cells) for item in (encoded, noisy)
            )
            assert (target != noisy_target).any(), name


def test_the_loss_mask_covers_masked_units_and_pixels() -> None:
    model, objective = make_latent_model(["AERIAL_RGBI", "SENTINEL2_TS"])
    encoded = model.encode_batch(make_batch(8), augment=False)
    image, series = (
        objective.loss_mask(encoded.inputs[name], encoded.masks[name]) for name in ("AERIAL_RGBI", "SENTINEL2_TS")
    )
    mask = encoded.masks["AERIAL_RGBI"]
    assert mask.units is not None
    assert torch.equal(image[~mask.dropped], mask.units[~mask.dropped].flatten(1)) and image[mask.dropped].all()
    assert series.all()  # every series has a masked date
    absent = model.encode_batch(make_batch(2, missing=("AERIAL_RGBI",)), augment=False)
    assert not objective.loss_mask(absent.inputs["AERIAL_RGBI"], absent.masks["AERIAL_RGBI"]).any()


def test_targets_are_normalised_features_of_the_deepest_map() -> None:
    model, objective = make_latent_model(["AERIAL_RGBI"])
    encoded = model.encode_batch(make_batch(3), augment=False)
    inputs = encoded.inputs["AERIAL_RGBI"]
    target = objective.targets("AERIAL_RGBI", inputs, encoded.present_rows["AERIAL_RGBI"], 8)
    features = model.encoder("AERIAL_RGBI").eval().features(inputs.values)[-1]  # the teacher starts as the student
    assert features.shape[-2:] == (8, 8)
    expected = torch.nn.functional.layer_norm(features.flatten(2).transpose(1, 2), features.shape[1:2])
    torch.testing.assert_close(target, expected.detach())
    assert not target.requires_grad
    some = objective.targets("AERIAL_RGBI", inputs, torch.tensor([0, 2]), 8)
    assert not some[1].any()
    torch.testing.assert_close(some[::2], target[::2])


def test_teachers_get_no_gradient_and_are_moving_averages() -> None:
    model, objective = make_latent_model(["AERIAL_RGBI", "SENTINEL2_TS"])
    model.train()
    assert not objective.teachers.training and objective.heads.training
    loss, _ = model(make_batch(4))
    loss.backward()
    assert all(parameter.grad is None for parameter in objective.teachers.parameters())
    student, teacher = model.encoder("SENTINEL2_TS"), objective.teachers["SENTINEL2_TS"]
    before = {name: value.clone() for name, value in teacher.named_parameters()}
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.add_(1.0)
    objective.after_step()
    for name, value in teacher.named_parameters():
        torch.testing.assert_close(value, before[name] + 0.1)
    for buffer, student_buffer in zip(teacher.buffers(), student.buffers(), strict=True):
        assert torch.equal(buffer, student_buffer)


class CallCounter(nn.Module):
    """Counts the calls of its ``after_step`` hook."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def after_step(self) -> None:
        self.calls += 1


def test_the_trainer_calls_after_step_only_after_updates(tmp_path: Path) -> None:
    task = TinyTask()
    task.counter = CallCounter()
    run(tmp_path, TinySource(broken=frozenset({8})), task=task, steps=6)  # the third step is skipped
    assert task.counter.calls == 5


def recipe_words(folder: Path) -> list[str]:
    """Words of a run of latent prediction on simulated patches, without output and steps."""
    write_tree(folder / "tree", patches=4, seed=3, dates=(3, 4))
    shards = write_shards(FlairHubCatalogue.open(folder / "tree"), folder / "shards").path
    words = [*PRETRAIN, f"shards={shards}", "modalities=[AERIAL_RGBI,SENTINEL2_TS]", "split=all", "reconstructions=0"]
    words += ["weights.latent=1", "weights.masked=0", "latent.decoder.width=32", "window=51.2"]
    return [*words, "engine.optimizer.min_lr_ratio=1.0"]


# Some 8 s: patches are simulated and sharded, and two runs pretrain on them.
@pytest.mark.slow
def test_a_resumed_run_ends_with_the_same_teachers(tmp_path: Path) -> None:
    words = recipe_words(tmp_path)

    def weights(output: str, *steps: int) -> dict[str, torch.Tensor]:
        for last in steps:
            config = recipes.resolve(PretrainConfig, [*words, f"output={tmp_path / output}", f"engine.steps={last}"])
            outcome = pretrain(config)
        return load_file(outcome.last / "model.safetensors")

    whole, parts = weights("whole", 6), weights("parts", 3, 6)
    assert any(name.startswith("objectives.latent.teachers.") for name in whole)
    assert [name for name in whole if not torch.equal(whole[name], parts[name])] == []


# Some 8 s: patches are simulated and sharded, and two runs pretrain on them.
@pytest.mark.slow
def test_frozen_teachers_do_not_change(tmp_path: Path) -> None:
    words = [*recipe_words(tmp_path), "engine.steps=2"]
    first = pretrain(recipes.resolve(PretrainConfig, [*words, f"output={tmp_path / 'first'}"]))
    folder = tmp_path / "first" / "encoders" / "AERIAL_RGBI"
    given = [f"latent.teachers.AERIAL_RGBI={folder}", "engine.seed=1"]
    second = pretrain(recipes.resolve(PretrainConfig, [*words, *given, f"output={tmp_path / 'second'}"]))
    pretrained, weights = (load_file(run.last / "model.safetensors") for run in (first, second))
    teacher = "objectives.latent.teachers.AERIAL_RGBI."
    assert any(name.startswith(teacher) for name in weights)
    for name, tensor in weights.items():
        if name.startswith(teacher):
            assert torch.equal(tensor, pretrained[name.replace(teacher, "encoders.AERIAL_RGBI.")]), name
    average = "objectives.latent.teachers.SENTINEL2_TS.in_conv.conv.conv.0.weight"
    assert not torch.equal(weights[average], pretrained["encoders.SENTINEL2_TS.in_conv.conv.conv.0.weight"])


def test_a_teacher_must_read_the_input_of_its_encoder(tmp_path: Path) -> None:
    spec = make_model(names=["AERIAL_RGBI"]).encoder("AERIAL_RGBI").spec
    encoder = make_model(names=["SPOT_RGBI"]).encoder("SPOT_RGBI")
    save_encoder(encoder, tmp_path / "spot")
    with pytest.raises(InputError, match=r"latent\.teachers\.AERIAL_RGBI=.*spot: the encoder reads modality SPOT_RGBI"):
        load_teacher("latent.teachers.AERIAL_RGBI", str(tmp_path / "spot"), spec)
    other = replace(encoder.spec, mean=tuple(value + 1 for value in encoder.spec.mean))
    with pytest.raises(InputError, match="standardises its input otherwise"):
        load_teacher("latent.teachers.SPOT_RGBI", str(tmp_path / "spot"), other)


def test_a_wrong_momentum_names_its_key() -> None:
    with pytest.raises(ValueError, match=r"latent\.momentum=1.0 must be in \[0, 1\)"):
        LatentConfig(momentum=1.0)
