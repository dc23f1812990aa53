"""Objectives on pooled features: sensor pairs, NT-Xent, VICReg."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from small_recipes import PRETRAIN
from tiny_pretraining import NAMES, make_batch, make_model
from torch import nn

from bocage import recipes
from bocage.shards.errors import InputError
from bocage.shards.modality import FLAIR_HUB
from bocage.shards.preprocess.inputs import quality_masks
from bocage.ssl.objectives.masking import MaskingConfig
from bocage.ssl.objectives.model import PretrainingModel
from bocage.ssl.objectives.pooled_contrast import PooledConfig, PooledContrast, PooledVectors, PooledVICReg
from bocage.ssl.pretrain_config import PretrainConfig

SENSORS = ["AERIAL_RGBI", "SPOT_RGBI", "SENTINEL2_TS"]
CONFIG = PooledConfig(width=16, hidden=32, temperature=0.2)


def make_pooled_model(
    kind: type[PooledVectors], names: list[str] = SENSORS, modality_ratio: float = 0.25
) -> tuple[PretrainingModel, PooledVectors]:
    masking = MaskingConfig(modality_ratio=modality_ratio)
    encoders = {name: make_model(masking, [name]).encoder(name) for name in names}
    torch.manual_seed(1)
    objective = kind(encoders, CONFIG)
    masks = quality_masks(FLAIR_HUB, names)
    modalities = {name: FLAIR_HUB[name] for name in names}
    name = "pooled_contrast"
    return PretrainingModel(encoders, modalities, masks, masking, {name: objective}, {name: 1.0}), objective


def test_two_visible_sensors_are_paired_per_sample() -> None:
    model, objective = make_pooled_model(PooledContrast)
    model.eval()
    with torch.no_grad():
        encoded = model.encode_batch(make_batch(40), augment=False)
        pairs = objective.pairs(encoded)
        vectors = torch.stack(
            [head(encoded.features[name][-1].mean(dim=(2, 3))) for name, head in objective.heads.items()]
        )
    combinations = set()
    for sample in range(40):
        first, second = (
            next(index for index in range(3) if torch.equal(vectors[index, sample], paired[sample])) for paired in pairs
        )
        visible = [index for index, name in enumerate(SENSORS) if not encoded.masks[name].dropped[sample]]
        assert first in visible and second in visible
        assert (first == second) == (len(visible) == 1)
        combinations.add((first, second))
    assert len(combinations) >= 6  # all of them occur


def test_nt_xent_equals_a_reference_implementation() -> None:
    model, objective = make_pooled_model(PooledContrast, modality_ratio=0.0)
    model.eval()
    with torch.no_grad():
        encoded = model.encode_batch(make_batch(4), augment=False)
        loss, _ = objective(encoded)
        vectors = [nn.functional.normalize(part.double(), dim=1) for part in objective.pairs(encoded)]
    losses = []
    for sensor, other in ((0, 1), (1, 0)):
        for index in range(4):
            query = vectors[sensor][index]
            positive = math.exp(float(query @ vectors[other][index]) / 0.2)
            others = [sample for sample in range(4) if sample != index]
            keys = [vectors[sensor][sample] for sample in others] + [vectors[other][sample] for sample in others]
            negatives = sum(math.exp(float(query @ key) / 0.2) for key in keys)
            losses.append(-math.log(positive / (positive + negatives)))
    assert float(loss) == pytest.approx(sum(losses) / len(losses), rel=1e-5)


@pytest.mark.parametrize("kind", [PooledContrast, PooledVICReg])
def test_every_present_encoder_gets_a_gradient(kind: type[PooledVectors]) -> None:
    model, _ = make_pooled_model(kind, NAMES)
    loss, _ = model(make_batch(12, missing=("SENTINEL1-ASC_TS",)))
    loss.backward()
    assert torch.isfinite(loss)
    for name in NAMES:
        gradients = [parameter.grad for parameter in model.encoder(name).parameters()]
        assert all(gradient is None or gradient.isfinite().all() for gradient in gradients)
        has_gradient = any(gradient is not None and bool(gradient.abs().max() > 0) for gradient in gradients)
        assert has_gradient == (name != "SENTINEL1-ASC_TS"), name


def test_vicreg_penalises_collapse() -> None:
    """Heads with constant outputs have the largest variance loss."""
    model, objective = make_pooled_model(PooledVICReg, modality_ratio=0.0)
    encoded = model.encode_batch(make_batch(8), augment=False)
    with torch.no_grad():
        for head in objective.heads.values():
            assert isinstance(head, nn.Sequential)
            last = head[-1]
            assert isinstance(last, nn.Linear)
            last.weight.zero_()
            last.bias.zero_()
        collapsed = float(objective(encoded)[0])
    assert collapsed == pytest.approx(25 * (1 - 0.0001**0.5), rel=1e-3)


def test_wrong_values_name_their_key() -> None:
    with pytest.raises(InputError, match=r"compare two sensors, and modalities has only SPOT_RGBI"):
        make_pooled_model(PooledContrast, ["SPOT_RGBI"])
    for key in ("width", "hidden", "temperature"):
        with pytest.raises(ValueError, match=rf"pooled\.{key}=0"):
            replace(CONFIG, **{key: 0})
    for word, message in {
        "weights.vicreg=1": "weights.vicreg needs a batch_size of at least 2",
        "weights.contrast=1": "weights.contrast: not an objective; objectives: masked, contrastive, pooled_contrast, ",
        "weights.masked=0": "at least one objective must have a weight above 0",
        "weights.masked=-1": "weights.masked=-1.0 must not be negative",
    }.items():
        with pytest.raises(InputError, match=message):
            recipes.resolve(PretrainConfig, [*PRETRAIN, "batch_size=1", word])
