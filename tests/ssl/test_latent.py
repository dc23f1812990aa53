"""Latent prediction: what teachers see, what students may see, and how teachers follow."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from small_recipes import PRETRAIN
from test_masked import NAMES, make_batch, make_task
from tiny_run import TinySource, TinyTask, run
from torch import nn

from bocage import recipes
from bocage.shards.modality import FLAIR_HUB
from bocage.shards.preprocess.inputs import quality_masks
from bocage.shards.simulate.tree import write_tree
from bocage.shards.source.catalogue import Catalogue
from bocage.shards.write.writer import write_shards
from bocage.ssl.objectives.decoder import DecoderConfig
from bocage.ssl.objectives.latent import LatentConfig, LatentPrediction
from bocage.ssl.objectives.masking import MaskingConfig
from bocage.ssl.objectives.model import EncodedBatch, PretrainingModel
from bocage.ssl.pretrain import PretrainConfig, pretrain

SMALL = LatentConfig(decoder=DecoderConfig(width=32, fusion_depth=1, heads=4), momentum=0.9)


def task_of(
    names: list[str] = NAMES, masking: MaskingConfig | None = None
) -> tuple[PretrainingModel, LatentPrediction]:
    masking = masking or MaskingConfig()
    encoders = {name: make_task(masking, [name]).encoder(name) for name in names}
    modalities = {name: FLAIR_HUB[name] for name in names}
    torch.manual_seed(1)
    term = LatentPrediction(encoders, modalities, SMALL)
    masks = quality_masks(FLAIR_HUB, names)
    return PretrainingModel(encoders, modalities, masks, masking, {"latent": term}, {"latent": 1.0}), term


def predictions(term: LatentPrediction, view: EncodedBatch) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}

    def keep(name: str) -> Any:
        return lambda module, given, output: found.update({name: output})

    handles = [head.register_forward_hook(keep(name)) for name, head in term.heads.items()]
    with torch.no_grad():
        term(view)
    for handle in handles:
        handle.remove()
    return found


@pytest.mark.parametrize("images", ["packed", "mask_token"])
def test_students_see_nothing_hidden_and_teachers_all(images: str) -> None:
    """Noise where things are hidden changes no prediction and every target."""
    task, term = task_of(masking=MaskingConfig(images=images, modality_ratio=0.3))  # type: ignore[arg-type]
    task.eval()
    with torch.no_grad():
        view = task.view(make_batch(6), oriented=False)
        inputs = {}
        for name, given in view.inputs.items():
            mask, values = view.masks[name], given.values.clone()
            noise = torch.randn(values.shape, generator=torch.Generator().manual_seed(2))
            if mask.units is not None:
                unit = FLAIR_HUB[name].unit
                hidden = (mask.units | mask.whole[:, None, None]).repeat_interleave(unit, 1).repeat_interleave(unit, 2)
                values = torch.where(hidden[:, None], noise, values)
            else:
                assert mask.dates is not None and given.padding is not None
                hidden = mask.dates | mask.whole[:, None]
                values = torch.where(hidden[:, :, None, None, None], noise, values)
            inputs[name] = replace(given, values=values)
        other = task.encoded(inputs, view.masks, view.seeds, view.samples)
        before, after = predictions(term, view), predictions(term, other)
        for name in NAMES:
            assert torch.equal(before[name], after[name]), name
            cells = round(before[name].shape[1] ** 0.5)
            old, new = (term.targets(name, seen.inputs[name], view.present[name], cells) for seen in (view, other))
            assert (old != new).any(), name


def test_the_loss_looks_only_where_something_is_hidden() -> None:
    task, term = task_of(["AERIAL_RGBI", "SENTINEL2_TS"])
    view = task.view(make_batch(8), oriented=False)
    image, series = (term.wanted(view.inputs[name], view.masks[name]) for name in ("AERIAL_RGBI", "SENTINEL2_TS"))
    mask = view.masks["AERIAL_RGBI"]
    assert mask.units is not None
    assert torch.equal(image[~mask.whole], mask.units[~mask.whole].flatten(1)) and image[mask.whole].all()
    assert series.all()  # some date of every series is hidden
    absent = task.view(make_batch(2, missing=("AERIAL_RGBI",)), oriented=False)
    assert not term.wanted(absent.inputs["AERIAL_RGBI"], absent.masks["AERIAL_RGBI"]).any()


def test_targets_are_normalised_features_of_the_deepest_map() -> None:
    task, term = task_of(["AERIAL_RGBI"])
    view = task.view(make_batch(3), oriented=False)
    given = view.inputs["AERIAL_RGBI"]
    target = term.targets("AERIAL_RGBI", given, view.present["AERIAL_RGBI"], 8)
    features = task.encoder("AERIAL_RGBI").eval().features(given.values)[-1]  # the teacher starts as the student
    assert features.shape[-2:] == (8, 8)
    expected = torch.nn.functional.layer_norm(features.flatten(2).transpose(1, 2), features.shape[1:2])
    torch.testing.assert_close(target, expected.detach())
    assert not target.requires_grad
    found = term.targets("AERIAL_RGBI", given, torch.tensor([0, 2]), 8)
    assert not found[1].any()
    torch.testing.assert_close(found[::2], target[::2])


def test_teachers_learn_nothing_themselves_and_follow() -> None:
    task, term = task_of(["AERIAL_RGBI", "SENTINEL2_TS"])
    task.train()
    assert not term.teachers.training and term.heads.training
    loss, _ = task(make_batch(4))
    loss.backward()
    assert all(parameter.grad is None for parameter in term.teachers.parameters())
    student, teacher = task.encoder("SENTINEL2_TS"), term.teachers["SENTINEL2_TS"]
    before = {name: value.clone() for name, value in teacher.named_parameters()}
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.add_(1.0)
    term.after_step()
    for name, value in teacher.named_parameters():
        torch.testing.assert_close(value, before[name] + 0.1)
    for own, other in zip(teacher.buffers(), student.buffers(), strict=True):
        assert torch.equal(own, other)


class Follower(nn.Module):
    """Counts how often the loop calls it."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def after_step(self) -> None:
        self.calls += 1


def test_the_loop_calls_followers_after_updates_alone(tmp_path: Path) -> None:
    task = TinyTask()
    task.follower = Follower()
    run(tmp_path, TinySource(broken=frozenset({8})), task=task, steps=6)  # the third step is skipped
    assert task.follower.calls == 5


# Some 8 s: patches are simulated and sharded, and two runs pretrain on them.
def test_an_interrupted_run_ends_with_the_same_teachers(tmp_path: Path) -> None:
    write_tree(tmp_path / "tree", patches=4, seed=3, dates=(3, 4))
    shards = write_shards(Catalogue.open(tmp_path / "tree"), tmp_path / "shards").path
    words = [*PRETRAIN, f"shards={shards}", "modalities=[AERIAL_RGBI,SENTINEL2_TS]", "split=all", "pictures=0"]
    words += ["weights.latent=1", "weights.masked=0", "latent.decoder.width=32", "window=51.2"]
    words += ["engine.optimizer.final_learning_rate=1.0"]

    def weights(output: str, *steps: int) -> dict[str, torch.Tensor]:
        for last in steps:
            config = recipes.resolve(PretrainConfig, [*words, f"output={tmp_path / output}", f"engine.steps={last}"])
            outcome = pretrain(config)
        return load_file(outcome.last / "model.safetensors")

    whole, parts = weights("whole", 6), weights("parts", 3, 6)
    assert any(name.startswith("terms.latent.teachers.") for name in whole)
    assert [name for name in whole if not torch.equal(whole[name], parts[name])] == []


def test_a_wrong_momentum_is_named() -> None:
    with pytest.raises(ValueError, match=r"latent\.momentum=1.0 must be in \[0, 1\)"):
        LatentConfig(momentum=1.0)
