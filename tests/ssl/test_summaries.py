"""Objectives over whole windows: which sensors are paired, and lightly's losses over them."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from small_recipes import PRETRAIN
from test_masked import NAMES, make_batch, make_task
from torch import nn

from bocage import recipes
from bocage.shards.errors import InputError
from bocage.shards.modality import FLAIR_HUB
from bocage.shards.preprocess.inputs import quality_masks
from bocage.ssl.objectives.masking import MaskingConfig
from bocage.ssl.objectives.model import PretrainingModel
from bocage.ssl.objectives.pooled_contrast import PooledConfig, PooledContrast, PooledVectors, PooledVICReg
from bocage.ssl.pretrain import PretrainConfig

SOME = ["AERIAL_RGBI", "SPOT_RGBI", "SENTINEL2_TS"]
CONFIG = PooledConfig(width=16, hidden=32, temperature=0.2)


def task_of(
    kind: type[PooledVectors], names: list[str] = SOME, modality_ratio: float = 0.25
) -> tuple[PretrainingModel, PooledVectors]:
    masking = MaskingConfig(modality_ratio=modality_ratio)
    encoders = {name: make_task(masking, [name]).encoder(name) for name in names}
    torch.manual_seed(1)
    term = kind(encoders, CONFIG)
    masks = quality_masks(FLAIR_HUB, names)
    modalities = {name: FLAIR_HUB[name] for name in names}
    return PretrainingModel(encoders, modalities, masks, masking, {"global": term}, {"global": 1.0}), term


def test_two_visible_sensors_of_each_sample_are_paired() -> None:
    task, term = task_of(PooledContrast)
    task.eval()
    with torch.no_grad():
        view = task.view(make_batch(40), oriented=False)
        one, other = term.pairs(view)
        every = torch.stack([head(view.maps[name][-1].mean(dim=(2, 3))) for name, head in term.heads.items()])
    seen = set()
    for sample in range(40):
        first, second = (
            next(index for index in range(3) if torch.equal(every[index, sample], found[sample]))
            for found in (one, other)
        )
        visible = [index for index, name in enumerate(SOME) if not view.masks[name].whole[sample]]
        assert first in visible and second in visible
        assert (first == second) == (len(visible) == 1)
        seen.add((first, second))
    assert len(seen) >= 6  # in every combination


def test_nt_xent_is_the_one_written_out() -> None:
    task, term = task_of(PooledContrast, modality_ratio=0.0)
    task.eval()
    with torch.no_grad():
        view = task.view(make_batch(4), oriented=False)
        loss, _ = term(view)
        vectors = [nn.functional.normalize(part.double(), dim=1) for part in term.pairs(view)]
    losses = []
    for own, away in ((0, 1), (1, 0)):
        for index in range(4):
            query = vectors[own][index]
            positive = math.exp(float(query @ vectors[away][index]) / 0.2)
            others = [vectors[own][place] for place in range(4) if place != index]
            others += [vectors[away][place] for place in range(4) if place != index]
            negatives = sum(math.exp(float(query @ other) / 0.2) for other in others)
            losses.append(-math.log(positive / (positive + negatives)))
    assert float(loss) == pytest.approx(sum(losses) / len(losses), rel=1e-5)


@pytest.mark.parametrize("kind", [PooledContrast, PooledVICReg])
def test_every_visible_encoder_learns(kind: type[PooledVectors]) -> None:
    task, _ = task_of(kind, NAMES)
    loss, _ = task(make_batch(12, missing=("SENTINEL1-ASC_TS",)))
    loss.backward()
    assert torch.isfinite(loss)
    for name in NAMES:
        gradients = [parameter.grad for parameter in task.encoder(name).parameters()]
        assert all(gradient is None or gradient.isfinite().all() for gradient in gradients)
        learns = any(gradient is not None and bool(gradient.abs().max() > 0) for gradient in gradients)
        assert learns == (name != "SENTINEL1-ASC_TS"), name


def test_vicreg_is_against_collapse() -> None:
    """Heads that answer the same for all samples pay for it."""
    task, term = task_of(PooledVICReg, modality_ratio=0.0)
    view = task.view(make_batch(8), oriented=False)
    with torch.no_grad():
        for head in term.heads.values():
            assert isinstance(head, nn.Sequential)
            head[-1].weight.zero_()  # type: ignore[union-attr]  # a linear layer
            head[-1].bias.zero_()  # type: ignore[union-attr]
        collapsed = float(term(view)[0])
    assert collapsed == pytest.approx(25 * (1 - 0.0001**0.5), rel=1e-3)


def test_wrong_words_name_their_key() -> None:
    with pytest.raises(InputError, match="two sensors are compared, and modalities has SPOT_RGBI alone"):
        task_of(PooledContrast, ["SPOT_RGBI"])
    for key in ("width", "hidden", "temperature"):
        with pytest.raises(ValueError, match=rf"summaries\.{key}=0"):
            replace(CONFIG, **{key: 0})
    for word, message in {
        "weights.vicreg=1": "weights.vicreg needs a batch_size of at least 2",
        "weights.contrast=1": "weights.contrast: not an objective; objectives: masked, contrastive, global, ",
        "weights.masked=0": "at least one objective must weigh more than 0",
        "weights.masked=-1": "weights.masked=-1.0 must not be negative",
    }.items():
        with pytest.raises(InputError, match=message):
            recipes.resolve(PretrainConfig, [*PRETRAIN, "batch_size=1", word])
