"""Ten situations that real archives and real clusters bring, each through every objective.

For each the loss is finite, every gradient is, and what the situation takes away teaches nothing.
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
from test_masked import make_batch, make_task

from bocage.shards.batch import Batch
from bocage.shards.modality import FLAIR_HUB
from bocage.shards.preprocess.inputs import encoder_inputs, quality_masks
from bocage.shards.simulate.tree import write_tree
from bocage.shards.source.catalogue import Catalogue
from bocage.shards.write.writer import write_shards
from bocage.ssl.objectives.decoder import DecoderConfig
from bocage.ssl.objectives.dense_contrast import ContrastiveConfig, DenseContrast
from bocage.ssl.objectives.latent import LatentConfig, LatentPrediction
from bocage.ssl.objectives.masked import MaskedConfig, MaskedReconstruction
from bocage.ssl.objectives.masking import MaskingConfig
from bocage.ssl.objectives.model import PretrainingModel
from bocage.ssl.objectives.pooled_contrast import PooledConfig, PooledContrast
from bocage.ssl.pretrain import main

IMAGE, RELIEF = "SPOT_RGBI", "DEM_ELEV"
OPTICAL, RADAR, CLOUDS = "SENTINEL2_TS", "SENTINEL1-ASC_TS", "SENTINEL2_MSK-SC"
SOME = [IMAGE, RELIEF, OPTICAL, RADAR]
DECODER = DecoderConfig(width=32, fusion_depth=1, heads=4)
OBJECTIVES = ("masked", "contrastive", "combined", "global", "latent")


def task_of(objective: str, names: list[str] = SOME, **masking: float) -> PretrainingModel:
    base = make_task(MaskingConfig(**masking), names)  # type: ignore[arg-type]
    encoders = {name: base.encoder(name) for name in names}
    modalities = {name: FLAIR_HUB[name] for name in names}
    makers: dict[str, Callable[[], torch.nn.Module]] = {
        "masked": lambda: MaskedReconstruction(encoders, modalities, MaskedConfig(decoder=DECODER, dates=4)),
        "contrastive": lambda: DenseContrast(encoders, modalities, ContrastiveConfig(width=32, learn_temperature=True)),
        "global": lambda: PooledContrast(encoders, PooledConfig(width=32)),
        "latent": lambda: LatentPrediction(encoders, modalities, LatentConfig(decoder=DECODER)),
    }
    chosen = ("masked", "contrastive") if objective == "combined" else (objective,)
    terms = {name: makers[name]() for name in chosen}
    weights = dict.fromkeys(chosen, 1.0)
    return PretrainingModel(encoders, modalities, quality_masks(FLAIR_HUB, names), base.masking, terms, weights)


def learned(task: PretrainingModel, batch: Batch) -> tuple[float, dict[str, torch.Tensor], dict[str, float]]:
    """Loss, what was logged, and by encoder the largest gradient; all finite."""
    loss, logs = task(batch)
    loss.backward()
    assert torch.isfinite(loss)
    for name, parameter in task.named_parameters():
        assert parameter.grad is None or torch.isfinite(parameter.grad).all(), name
    grads = {
        name: max((float(p.grad.abs().max()) for p in task.encoder(name).parameters() if p.grad is not None), default=0)
        for name in task.encoders
    }
    return float(loss.detach()), logs, grads


def changed(batch: Batch, name: str, value: Callable[[torch.Tensor], torch.Tensor]) -> Batch:
    return replace(batch, values={**batch.values, name: value(batch.values[name].clone())})


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_batch_of_one(objective: str) -> None:
    loss, _, grads = learned(task_of(objective, modality_ratio=0.0), make_batch(1))
    if objective in ("contrastive", "global"):
        assert loss == 0 or objective == "global"  # no other sample to tell apart
    else:
        assert all(grads.values())


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("missing", [(IMAGE,), (OPTICAL, CLOUDS), (RELIEF, RADAR)])
def test_a_modality_missing_for_the_whole_batch(objective: str, missing: tuple[str, ...]) -> None:
    loss, _, grads = learned(task_of(objective, modality_ratio=0.0), make_batch(3, missing=missing))
    assert loss > 0
    for name in SOME:
        if name in missing:
            assert grads[name] == 0, name
        elif objective != "global":  # which compares two sensors of each sample
            assert grads[name] > 0, name


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_an_image_without_any_data_is_absent(objective: str) -> None:
    batch = changed(make_batch(3), RELIEF, lambda values: values.index_fill_(0, torch.tensor([0, 1, 2]), -9999.0))
    loss, _, grads = learned(task_of(objective, modality_ratio=0.0), batch)
    assert loss > 0
    assert grads[RELIEF] == 0
    assert objective == "global" or grads[IMAGE] > 0


def test_dates_without_any_data_are_no_dates() -> None:
    batch = changed(make_batch(3), RADAR, lambda values: values.index_fill_(1, torch.tensor([0, 4]), torch.nan))
    empty = changed(batch, RADAR, lambda values: values.index_fill_(0, torch.tensor([1]), torch.nan))
    spec = {RADAR: make_task(names=[RADAR]).encoder(RADAR).spec}
    given = encoder_inputs(empty, spec, {}, oriented=False)[RADAR]
    assert given.padding is not None
    assert given.padding[0].nonzero()[:, 0].tolist() == [0, 4]
    assert given.present.tolist() == [True, False, True]


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("dates", [0, 1])
def test_series_of_no_and_of_one_date(objective: str, dates: int) -> None:
    """Two of three samples: the third has all its dates."""
    batch = make_batch(3)
    padding = {name: item.clone() for name, item in batch.padding.items()}
    for name in (OPTICAL, RADAR):
        padding[name][:2, dates:] = True
    present = {**batch.present}
    if dates == 0:
        present |= {name: torch.tensor([False, False, True]) for name in (OPTICAL, RADAR)}
    loss, _, _ = learned(task_of(objective), replace(batch, padding=padding, present=present))
    assert loss > 0


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_constant_patch(objective: str) -> None:
    batch = make_batch(3)
    for name in SOME:
        batch = changed(batch, name, lambda values: torch.full_like(values, 100))
    task = task_of(objective, modality_ratio=0.0)
    learned(task, batch)
    if objective == "masked":  # the target of a unit without variance is zero, not amplified rounding
        term = task.terms["masked"]
        assert isinstance(term, MaskedReconstruction)
        for item in term.reconstruct(task.view(batch, oriented=False)).values():
            assert item.target.abs().max() < 1e-3


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_every_date_in_clouds(objective: str) -> None:
    """All dates stay then, as in the official code: a series in clouds is better than none."""
    batch = changed(make_batch(3), CLOUDS, lambda values: torch.full_like(values, 100))
    task = task_of(objective, modality_ratio=0.0)
    spec = {OPTICAL: task.encoder(OPTICAL).spec}
    assert not encoder_inputs(batch, spec, task.quality_masks, oriented=False)[OPTICAL].padding.any()  # type: ignore[union-attr]
    _, _, grads = learned(task, batch)
    assert grads[OPTICAL] > 0


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_more_dates_than_ever_seen(objective: str) -> None:
    task = task_of(objective, modality_ratio=0.0)
    learned(task, make_batch(2, dates=5))
    task.zero_grad()
    loss, _, grads = learned(task, make_batch(2, dates=160))
    assert loss > 0 and grads[OPTICAL] > 0


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_an_odd_crop(objective: str) -> None:
    """76.8 m: 384 px at 0.2 m and 48 px at 1.6 m, whose deeper maps are odd and smaller than a window of attention."""
    batch = make_batch(2, side=76.8, missing=(OPTICAL, CLOUDS, RADAR))
    loss, _, _ = learned(task_of(objective, [IMAGE, RELIEF], modality_ratio=0.0), batch)
    assert loss > 0


# Some 5 s: patches are simulated.
def test_a_crop_that_does_not_divide_is_refused_before_anything_starts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_tree(tmp_path / "tree", patches=2, seed=3, dates=(3, 4))
    write_shards(Catalogue.open(tmp_path / "tree"), tmp_path / "shards")
    words = [*PRETRAIN, f"shards={tmp_path / 'shards'}", f"output={tmp_path / 'run'}", "split=all"]
    assert main([*words, f"modalities=[{RELIEF}]", "window=70.4"]) == 2
    error = capsys.readouterr().err
    assert error == (
        "bocage: error: window=70.4: DEM_ELEV is 70.4 m wide there and is masked in pairs of blocks of 6.4 m (32 px, "
        "masking.images=packed); windows that fit are 12.8, 25.6, 38.4, ... 102.4 m wide\n"
    )
    assert main([*words, f"modalities=[{RELIEF},{OPTICAL}]", "window=76.8"]) == 2
    error = capsys.readouterr().err
    assert "not whole pixels in every modality; windows that fit are 51.2, 102.4 m wide" in error
    assert not (tmp_path / "run").exists()


def test_temperature_that_half_precision_cannot_hold() -> None:
    task = task_of("contrastive", modality_ratio=0.0)
    term = task.terms["contrastive"]
    assert isinstance(term, DenseContrast) and term.log_scale is not None
    with torch.no_grad():
        term.log_scale.fill_(20.0)  # exp(20) is 4.9e8; the largest half is 65504
    with torch.autocast("cpu", torch.float16):
        loss, logs, _ = learned(task, make_batch(3))
    assert loss > 0
    assert float(logs["contrastive/temperature"]) == pytest.approx(0.01)


@contextmanager
def one_rank() -> Iterator[None]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.distributed.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=0, world_size=1)
    try:
        yield
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize("objective", ["global", "combined"])
def test_a_process_group_of_one_rank_gathers_what_no_group_does(objective: str) -> None:
    def of_seed() -> tuple[float, list[torch.Tensor]]:
        task = task_of(objective)
        torch.manual_seed(3)
        loss, _, _ = learned(task, make_batch(4))
        return loss, [p.grad for p in task.parameters() if p.grad is not None]

    alone, gradients = of_seed()
    with one_rank():
        together, others = of_seed()
    assert alone == together
    assert all(torch.equal(one, other) for one, other in zip(gradients, others, strict=True))
