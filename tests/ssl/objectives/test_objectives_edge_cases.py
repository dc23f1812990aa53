"""Edge cases of real archives and clusters, for every objective.

In each case the loss and all gradients are finite, and encoders without data get no gradient.
"""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed
from small_recipes import PRETRAIN
from tiny_pretraining import make_batch, make_model, masked_objective

from bocage.shards.batch import Batch
from bocage.shards.modality import FLAIR_HUB
from bocage.shards.preprocess.inputs import encoder_inputs, quality_masks
from bocage.shards.simulate.tree import write_tree
from bocage.shards.source.flair_hub.tree import FlairHubCatalogue
from bocage.shards.write.writer import write_shards
from bocage.ssl.objectives.decoder import DecoderConfig
from bocage.ssl.objectives.dense_contrast import ContrastiveConfig, DenseContrast
from bocage.ssl.objectives.latent import LatentConfig, LatentPrediction
from bocage.ssl.objectives.masked import MaskedConfig, MaskedReconstruction
from bocage.ssl.objectives.masking import MaskingConfig
from bocage.ssl.objectives.model import PretrainingModel
from bocage.ssl.objectives.pooled_contrast import PooledConfig, PooledContrast
from bocage.ssl.objectives.targets import TARGETS
from bocage.tools.main import main

IMAGE, RELIEF = "SPOT_RGBI", "DEM_ELEV"
OPTICAL, RADAR, CLOUDS = "SENTINEL2_TS", "SENTINEL1-ASC_TS", "SENTINEL2_MSK-SC"
SENSORS = [IMAGE, RELIEF, OPTICAL, RADAR]
DECODER = DecoderConfig(width=32, fusion_depth=1, query_depth=1, heads=4)
MASKED = MaskedConfig(decoder=DECODER, targets=dict.fromkeys(TARGETS, 1.0), dates_per_sample=4)
OBJECTIVES = ("masked", "contrastive", "combined", "pooled_contrast", "latent")


def make_objective_model(objective: str, names: list[str] = SENSORS, **masking: float) -> PretrainingModel:
    base = make_model(MaskingConfig(**masking), names)  # type: ignore[arg-type]
    encoders = {name: base.encoder(name) for name in names}
    modalities = {name: FLAIR_HUB[name] for name in names}
    builders: dict[str, Callable[[], torch.nn.Module]] = {
        "masked": lambda: MaskedReconstruction(encoders, modalities, MASKED),
        "contrastive": lambda: DenseContrast(encoders, modalities, ContrastiveConfig(width=32, learn_temperature=True)),
        "pooled_contrast": lambda: PooledContrast(encoders, PooledConfig(width=32)),
        "latent": lambda: LatentPrediction(encoders, modalities, LatentConfig(decoder=DECODER)),
    }
    chosen = ("masked", "contrastive") if objective == "combined" else (objective,)
    objectives = {name: builders[name]() for name in chosen}
    weights = dict.fromkeys(chosen, 1.0)
    return PretrainingModel(encoders, modalities, quality_masks(FLAIR_HUB, names), base.masking, objectives, weights)


def loss_and_gradients(
    model: PretrainingModel, batch: Batch
) -> tuple[float, dict[str, torch.Tensor], dict[str, float]]:
    """Check that the loss and all gradients are finite; return loss, logs and the largest gradient of each encoder."""
    loss, logs = model(batch)
    loss.backward()
    assert torch.isfinite(loss)
    for name, parameter in model.named_parameters():
        assert parameter.grad is None or torch.isfinite(parameter.grad).all(), name
    grads = {
        name: max(
            (float(p.grad.abs().max()) for p in model.encoder(name).parameters() if p.grad is not None), default=0
        )
        for name in model.encoders
    }
    return float(loss.detach()), logs, grads


def with_values(batch: Batch, name: str, value: Callable[[torch.Tensor], torch.Tensor]) -> Batch:
    return replace(batch, values={**batch.values, name: value(batch.values[name].clone())})


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_batch_of_one(objective: str) -> None:
    loss, _, grads = loss_and_gradients(make_objective_model(objective, modality_ratio=0.0), make_batch(1))
    if objective in ("contrastive", "pooled_contrast"):
        assert loss == 0 or objective == "pooled_contrast"  # dense contrast has no negatives
    else:
        assert all(grads.values())


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("missing", [(IMAGE,), (OPTICAL, CLOUDS), (RELIEF, RADAR)])
def test_a_modality_missing_for_the_whole_batch(objective: str, missing: tuple[str, ...]) -> None:
    loss, _, grads = loss_and_gradients(
        make_objective_model(objective, modality_ratio=0.0), make_batch(3, missing=missing)
    )
    assert loss > 0
    for name in SENSORS:
        if name in missing:
            assert grads[name] == 0, name
        elif objective != "pooled_contrast":  # it only compares two sensors of each sample
            assert grads[name] > 0, name


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_an_image_of_nodata_is_absent(objective: str) -> None:
    batch = with_values(make_batch(3), RELIEF, lambda values: values.index_fill_(0, torch.tensor([0, 1, 2]), -9999.0))
    loss, _, grads = loss_and_gradients(make_objective_model(objective, modality_ratio=0.0), batch)
    assert loss > 0
    assert grads[RELIEF] == 0
    assert objective == "pooled_contrast" or grads[IMAGE] > 0


def test_dates_of_nodata_are_padding() -> None:
    batch = with_values(make_batch(3), RADAR, lambda values: values.index_fill_(1, torch.tensor([0, 4]), torch.nan))
    empty = with_values(batch, RADAR, lambda values: values.index_fill_(0, torch.tensor([1]), torch.nan))
    spec = {RADAR: make_model(names=[RADAR]).encoder(RADAR).spec}
    series = encoder_inputs(empty, spec, {}, random_orientation=False)[RADAR]
    assert series.padding is not None
    assert series.padding[0].nonzero()[:, 0].tolist() == [0, 4]
    assert series.present.tolist() == [True, False, True]


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("dates", [0, 1])
def test_series_of_zero_or_one_date(objective: str, dates: int) -> None:
    """Two of three samples have few dates; the third has all of them."""
    batch = make_batch(3)
    padding = {name: item.clone() for name, item in batch.padding.items()}
    for name in (OPTICAL, RADAR):
        padding[name][:2, dates:] = True
    present = {**batch.present}
    if dates == 0:
        present |= {name: torch.tensor([False, False, True]) for name in (OPTICAL, RADAR)}
    loss, _, _ = loss_and_gradients(make_objective_model(objective), replace(batch, padding=padding, present=present))
    assert loss > 0


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_constant_patch(objective: str) -> None:
    batch = make_batch(3)
    for name in SENSORS:
        batch = with_values(batch, name, lambda values: torch.full_like(values, 100))
    model = make_objective_model(objective, modality_ratio=0.0)
    loss_and_gradients(model, batch)
    if objective == "masked":  # targets of constant units are zeros, not amplified rounding errors
        for items in masked_objective(model).reconstruct(model.encode_batch(batch, augment=False)).values():
            assert items["pixels"].target.abs().max() < 1e-3


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_series_of_cloudy_dates_keeps_all_dates(objective: str) -> None:
    """As in the official code: a cloudy series is better than none."""
    batch = with_values(make_batch(3), CLOUDS, lambda values: torch.full_like(values, 100))
    model = make_objective_model(objective, modality_ratio=0.0)
    spec = {OPTICAL: model.encoder(OPTICAL).spec}
    series = encoder_inputs(batch, spec, model.quality_masks, random_orientation=False)[OPTICAL]
    assert series.padding is not None and not series.padding.any()
    _, _, grads = loss_and_gradients(model, batch)
    assert grads[OPTICAL] > 0


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_more_dates_than_in_earlier_batches(objective: str) -> None:
    model = make_objective_model(objective, modality_ratio=0.0)
    loss_and_gradients(model, make_batch(2, dates=5))
    model.zero_grad()
    loss, _, grads = loss_and_gradients(model, make_batch(2, dates=160))
    assert loss > 0 and grads[OPTICAL] > 0


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_window_with_odd_feature_maps(objective: str) -> None:
    """76.8 m are 384 px at 0.2 m and 48 px at 1.6 m; the deeper maps are odd and smaller than an attention window."""
    batch = make_batch(2, side=76.8, missing=(OPTICAL, CLOUDS, RADAR))
    loss, _, _ = loss_and_gradients(make_objective_model(objective, [IMAGE, RELIEF], modality_ratio=0.0), batch)
    assert loss > 0


# Some 5 s: patches are simulated.
def test_a_window_that_blocks_do_not_divide_stops_the_run_before_it_starts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_tree(tmp_path / "tree", patches=2, seed=3, dates=(3, 4))
    write_shards(FlairHubCatalogue.open(tmp_path / "tree"), tmp_path / "shards")
    words = [*PRETRAIN, f"shards={tmp_path / 'shards'}", f"output={tmp_path / 'run'}", "split=all"]
    assert main(["pretrain", *words, f"modalities=[{RELIEF}]", "window=70.4"]) == 2
    error = capsys.readouterr().err
    assert "window=70.4: DEM_ELEV is masked in pairs of blocks of 6.4 m (32 px, masking.images=packed)" in error
    assert "windows that fit are 12.8, 25.6, 38.4, ... 102.4 m wide" in error
    assert main(["pretrain", *words, f"modalities=[{RELIEF},{OPTICAL}]", "window=76.8"]) == 2
    error = capsys.readouterr().err
    assert "not whole pixels in every modality; windows that fit are 51.2, 102.4 m wide" in error
    assert not (tmp_path / "run").exists()


def test_a_temperature_that_overflows_fp16_is_limited() -> None:
    model = make_objective_model("contrastive", modality_ratio=0.0)
    contrast = model.objectives["contrastive"]
    assert isinstance(contrast, DenseContrast) and contrast.log_scale is not None
    with torch.no_grad():
        contrast.log_scale.fill_(20.0)  # exp(20) is 4.9e8; the largest fp16 number is 65504
    with torch.autocast("cpu", torch.float16):
        loss, logs, _ = loss_and_gradients(model, make_batch(3))
    assert loss > 0
    assert float(logs["contrastive/temperature"]) == pytest.approx(0.01)


@contextmanager
def process_group_of_one() -> Iterator[None]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.distributed.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=0, world_size=1)
    try:
        yield
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize("objective", ["pooled_contrast", "combined"])
def test_a_process_group_of_one_rank_gives_the_same_gradients_as_none(objective: str) -> None:
    def train_step() -> tuple[float, list[torch.Tensor]]:
        model = make_objective_model(objective)
        torch.manual_seed(3)
        loss, _, _ = loss_and_gradients(model, make_batch(4))
        return loss, [p.grad for p in model.parameters() if p.grad is not None]

    loss, gradients = train_step()
    with process_group_of_one():
        group_loss, group_gradients = train_step()
    assert loss == group_loss
    assert all(torch.equal(one, other) for one, other in zip(gradients, group_gradients, strict=True))
