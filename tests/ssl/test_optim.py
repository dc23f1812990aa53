"""Optimisers, learning rates by layer and batch size, and the moving average of the weights, in small runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny_pretraining import make_batch, make_model
from tiny_run import TinySource, TinyTask, records, run
from torch import nn

from bocage.finetune.finetune_config import FinetuneConfig
from bocage.finetune.models.segmentation import Segmentation
from bocage.finetune.models.targets import Target
from bocage.finetune.models.upernet import UPerNetConfig
from bocage.finetune.train import scaled_parameter_groups
from bocage.shards.errors import InputError
from bocage.shards.modality import FLAIR_HUB
from bocage.shards.preprocess.inputs import quality_masks
from bocage.ssl.engine.ema import MovingAverage
from bocage.ssl.engine.engine_config import EngineConfig
from bocage.ssl.engine.optim import OptimizerConfig, build_optimizer, decay_groups, layer_scales

CPU = torch.device("cpu")
LARS = OptimizerConfig(name="lars", learning_rate=1.0)
INPUTS = ["AERIAL_RGBI", "SENTINEL2_TS"]


def weights(task: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in task.state_dict().items()}


def different_keys(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> list[str]:
    assert one.keys() == other.keys()
    return [name for name in one if not torch.equal(one[name], other[name])]


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"name": "sgd"}, r"optimizer\.name must be one of adamw, lars, not 'sgd'"),
        ({"base_batch_size": -1}, r"optimizer\.base_batch_size"),
        ({"layer_decay": 0.0}, r"optimizer\.layer_decay"),
        ({"layer_decay": 1.1}, r"optimizer\.layer_decay"),
    ],
)
def test_invalid_optimizer_values_name_their_key(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        OptimizerConfig(**keys)


def test_lars_trains_and_resumes_to_the_same_bits(tmp_path: Path) -> None:
    _, whole = run(tmp_path / "whole", optimizer=LARS, steps=40)
    lines = records(tmp_path / "whole")
    assert lines[-1]["loss"] < 0.8 * lines[0]["loss"]
    run(tmp_path / "parts", TinySource(interrupt_at=28), optimizer=LARS, steps=40)
    _, parts = run(tmp_path / "parts", optimizer=LARS, steps=40)
    assert different_keys(weights(whole), weights(parts)) == []


def test_another_optimizer_cannot_resume_a_checkpoint(tmp_path: Path) -> None:
    run(tmp_path, TinySource(interrupt_at=8))
    with pytest.raises(InputError, match=r"step-00000003 was made with another optimiser .*engine\.optimizer\.name"):
        run(tmp_path, optimizer=LARS, resume_allow=["engine.optimizer.*"])


# The fused kernel reads raw memory; with channels-last tensors it must still equal the plain loop.
def test_fused_adamw_equals_the_plain_loop_on_real_encoders() -> None:
    batch = make_batch(2)
    results = []
    for fused in (True, False):
        # Not in training mode, in which biases before a batch norm have only rounding errors as gradients.
        task = make_model(names=INPUTS).eval()
        optimizer = build_optimizer(task, OptimizerConfig(learning_rate=1e-3), global_batch=2, device=CPU)
        assert all(group["fused"] for group in optimizer.param_groups)
        for group in optimizer.param_groups:
            group["fused"] = fused
        for _ in range(2):
            task(batch)[0].backward()
            optimizer.step()
            optimizer.zero_grad()
        results.append(weights(task))
    for name, value in results[0].items():
        torch.testing.assert_close(value, results[1][name], rtol=1e-4, atol=1e-5, msg=name)


def test_the_learning_rate_scales_with_the_global_batch(tmp_path: Path) -> None:
    constant = OptimizerConfig(learning_rate=1e-3, min_lr_ratio=1.0, base_batch_size=16)
    outcome, _ = run(tmp_path / "scaled", optimizer=constant, accumulation=2)  # 4 samples x 2
    assert outcome.metrics["learning_rate"] == pytest.approx(0.5e-3)
    off = OptimizerConfig(learning_rate=1e-3, min_lr_ratio=1.0)
    outcome, _ = run(tmp_path / "plain", optimizer=off, accumulation=2)
    assert outcome.metrics["learning_rate"] == 1e-3


def test_layer_decay_lowers_the_rate_of_deeper_layers() -> None:
    task = make_model(names=INPUTS)
    scales = layer_scales(task, 0.5)
    encoders = {name for name, _ in task.named_parameters() if name.startswith("encoders.")}
    assert scales.keys() == encoders  # every parameter of the encoders and no other

    def scale(start: str) -> float:
        (value,) = {factor for name, factor in scales.items() if name.startswith(start)}
        return value

    swin, utae = (next(p for p, m in task.named_modules() if type(m).__name__ == n) for n in ("SwinEncoder", "UTAE"))
    stages = [scale(f"{swin}.model.layers_{stage}.") for stage in range(4)]
    assert [scale(f"{swin}.model.patch_embed"), *stages] == [0.5**power for power in (5, 4, 3, 2, 1)]
    parts = ("in_conv", "down_blocks.0", "down_blocks.1", "temporal_encoder", "up_blocks.0", "up_blocks.1")
    assert [scale(f"{utae}.{part}") for part in parts] == [0.5**power for power in (6, 5, 4, 3, 2, 1)]
    groups = decay_groups(task, OptimizerConfig(layer_decay=0.5))
    assert sum(len(group["params"]) for group in groups) == len(list(task.parameters()))
    assert (groups[0]["lr_scale"], groups[0]["weight_decay"], groups[1]["weight_decay"]) == (1.0, 0.05, 0.0)
    assert [group["lr_scale"] for group in groups] == sorted((group["lr_scale"] for group in groups), reverse=True)
    optimizer = build_optimizer(task, OptimizerConfig(learning_rate=1.0, layer_decay=0.5), global_batch=1, device=CPU)
    rates = {id(parameter): group["lr"] for group in optimizer.param_groups for parameter in group["params"]}
    for name, parameter in task.named_parameters():
        assert rates[id(parameter)] == scales.get(name, 1.0), name


def test_layer_decay_without_an_encoder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"engine\.optimizer\.layer_decay=0\.9: TinyTask has no encoder"):
        run(tmp_path, optimizer=OptimizerConfig(layer_decay=0.9))


def test_the_average_follows_its_formula_and_is_evaluated_exported_and_final(tmp_path: Path) -> None:
    evaluated: list[dict[str, torch.Tensor]] = []
    exported: list[dict[str, torch.Tensor]] = []

    def evaluate(task: nn.Module, step: int) -> dict[str, float]:
        evaluated.append(weights(task))
        return {"score": 0.0}

    options = {"evaluate": evaluate, "export": lambda task, folder: exported.append(weights(task))}
    torch.manual_seed(1)
    expected = {name: value.double() for name, value in TinyTask().state_dict().items()}
    _, task = run(tmp_path, steps=6, save_every=1, keep_last=9, options=options, evaluate_every=1, ema_decay=0.75)
    for step in range(1, 7):
        folder = tmp_path / "checkpoints" / f"step-{step:08d}"
        last, average = load_file(folder / "model.safetensors"), load_file(folder / "ema.safetensors")
        assert "ema.safetensors" in json.loads((folder / "complete.json").read_text())["files"]
        assert {"first.weight", "head.weight", "norm.running_mean"} < average.keys()
        for name, value in average.items():
            if value.is_floating_point() and name in last:
                expected[name] = 0.75 * expected[name] + 0.25 * last[name].double()
                torch.testing.assert_close(value.double(), expected[name], rtol=0, atol=1e-6, msg=name)
                assert not torch.equal(value, last[name])
        assert average["norm.num_batches_tracked"] == step
        for values in (evaluated[step - 1], exported[step - 1]):
            assert all(torch.equal(values[name], value) for name, value in average.items())
    assert different_keys(weights(task), evaluated[-1]) == []
    _, again = run(tmp_path, steps=6, save_every=1, keep_last=9, options=options, evaluate_every=1, ema_decay=0.75)
    assert different_keys(weights(again), evaluated[-1]) == []  # a finished run returns the same weights


def test_averaging_does_not_change_training_and_resumes_to_the_same_bits(tmp_path: Path) -> None:
    options: dict[str, Any] = {"evaluate": lambda task, step: {"score": 0.0}}
    run(tmp_path / "without")
    _, whole = run(tmp_path / "whole", options=options, evaluate_every=2, ema_decay=0.9)
    run(tmp_path / "parts", TinySource(interrupt_at=24), options=options, evaluate_every=2, ema_decay=0.9)
    _, parts = run(tmp_path / "parts", options=options, evaluate_every=2, ema_decay=0.9)
    assert different_keys(weights(whole), weights(parts)) == []
    without, one, two = (tmp_path / name / "checkpoints" / "step-00000012" for name in ("without", "whole", "parts"))
    assert not (without / "ema.safetensors").exists()
    assert different_keys(load_file(one / "ema.safetensors"), load_file(two / "ema.safetensors")) == []
    for other in (one, two):
        assert different_keys(load_file(without / "model.safetensors"), load_file(other / "model.safetensors")) == []


def test_a_bad_step_does_not_change_the_average(tmp_path: Path) -> None:
    constant = OptimizerConfig(learning_rate=1e-2, min_lr_ratio=1.0)
    run(tmp_path / "clean", steps=5, optimizer=constant, ema_decay=0.9)
    run(tmp_path / "spoiled", TinySource(broken=frozenset({21})), steps=6, optimizer=constant, ema_decay=0.9)
    clean = load_file(tmp_path / "clean" / "checkpoints" / "step-00000005" / "ema.safetensors")
    spoiled = load_file(tmp_path / "spoiled" / "checkpoints" / "step-00000006" / "ema.safetensors")
    assert different_keys(clean, spoiled) == []


def test_a_resumed_run_may_begin_averaging(tmp_path: Path) -> None:
    run(tmp_path, TinySource(interrupt_at=24))
    with pytest.raises(InputError, match=r"engine\.ema_decay: 0\.0 -> 0\.9"):
        run(tmp_path, ema_decay=0.9)
    outcome, _ = run(tmp_path, ema_decay=0.9, resume_allow=["engine.ema_decay"])
    assert (outcome.last / "ema.safetensors").is_file()


@pytest.mark.parametrize("value", [-0.1, 1.0])
def test_an_invalid_ema_decay_is_refused(value: float) -> None:
    with pytest.raises(ValueError, match=r"engine\.ema_decay must be in \[0, 1\)"):
        EngineConfig(ema_decay=value)


# Averaged as floats and truncated to integers, 0.999 * 3 + 0.001 * 3 would be 2.
def test_index_tables_survive_averaging() -> None:
    task = TinyTask()
    table = torch.arange(50)
    task.register_buffer("table", table.clone())
    average = MovingAverage(task, 0.999)
    for _ in range(20):
        average.update()
    assert torch.equal(average.tensors()["table"], table)


def test_fine_tuning_combines_encoder_scale_and_layer_decay() -> None:
    masks = quality_masks(FLAIR_HUB, INPUTS)
    encoders = {name: make_model(names=[name]).encoder(name) for name in INPUTS}
    target = Target(label=FLAIR_HUB["AERIAL_LABEL-COSIA"])
    task = Segmentation(encoders, [target], UPerNetConfig(pyramid_width=32, width=16), masks)
    engine = EngineConfig(optimizer=OptimizerConfig(learning_rate=1.0, layer_decay=0.5, base_batch_size=4))
    groups = scaled_parameter_groups(FinetuneConfig(encoder_lr_scale=0.1, engine=engine))
    optimizer = build_optimizer(task, engine.optimizer, global_batch=8, device=CPU, parameter_groups=groups)
    rates = {id(parameter): group["lr"] for group in optimizer.param_groups for parameter in group["params"]}
    assert rates.keys() == {id(parameter) for parameter in task.parameters() if parameter.requires_grad}
    patch_embed = task.model.get_submodule("encoders.AERIAL_RGBI.model.patch_embed")
    assert rates[id(next(patch_embed.parameters()))] == pytest.approx(2 * 0.1 * 0.5**5)
    inside = {id(parameter) for parameter in task.model.encoders.parameters()}
    assert {rate for key, rate in rates.items() if key not in inside} == {2.0}
    assert optimizer.param_groups[0]["lr"] == 2.0  # the rate that is recorded
