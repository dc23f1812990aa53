"""Trainer: updates, records, tracking, warnings and errors."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from tiny_run import TinySource, TinyTask, records, run
from torch import nn
from wandb_records import read_offline_runs

from bocage.shards.batch import Batch
from bocage.shards.errors import InputError
from bocage.ssl.engine.engine_config import EngineConfig
from bocage.ssl.engine.logging.metrics import DataStarvationMonitor
from bocage.ssl.engine.logging.provenance import differences, plain
from bocage.ssl.engine.logging.trackers import link_afterwards
from bocage.ssl.engine.optim import OptimizerConfig, build_optimizer, learning_rate_factor, undecayed_names
from bocage.ssl.engine.trainer import DivergenceError

SCRIPT = Path(__file__).parents[1] / "support" / "tiny_run.py"
CONSTANT = OptimizerConfig(learning_rate=1e-2, min_lr_ratio=1.0)


def same_weights(one: nn.Module, other: nn.Module) -> bool:
    first, second = one.state_dict(), other.state_dict()
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def test_loss_falls_and_records_are_complete(tmp_path: Path) -> None:
    outcome, _ = run(tmp_path, steps=60, save_every=0)
    lines = records(tmp_path)
    assert [line["step"] for line in lines] == list(range(2, 61, 2))
    assert lines[-1]["loss"] < 0.5 * lines[0]["loss"]
    assert {"error", "gradient_norm", "samples_per_second", "data_wait", "learning_rate"} <= lines[-1].keys()
    assert 0.05 < lines[-1]["memory_gb"] < 50
    assert (outcome.step, outcome.stopped, outcome.exit_code, outcome.best) == (60, False, 0, None)
    assert outcome.last == tmp_path / "checkpoints" / "step-00000060"
    assert outcome.metrics["loss"] == lines[-1]["loss"]


def test_accumulation_equals_the_larger_batch(tmp_path: Path) -> None:
    _, large = run(tmp_path / "large", TinySource(8), plain=True)
    _, accumulated = run(tmp_path / "accumulated", TinySource(4), plain=True, accumulation=2)
    for (name, one), other in zip(large.named_parameters(), accumulated.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-6, msg=name)
    for line, other_line in zip(records(tmp_path / "large"), records(tmp_path / "accumulated"), strict=True):
        assert line["loss"] == pytest.approx(other_line["loss"], abs=1e-6)


def test_a_bad_step_changes_no_weight_and_no_running_statistics(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, clean = run(tmp_path / "clean", steps=5, optimizer=CONSTANT)
    source = TinySource(broken=frozenset({21}))  # in the batch of step 6
    outcome, skipped = run(tmp_path / "skipped", source, steps=6, optimizer=CONSTANT)
    assert same_weights(clean, skipped)
    assert outcome.metrics["skipped_steps"] == 1
    assert "step 6: loss is not finite on rank 0 (samples place 20, place 21, " in capsys.readouterr().err
    assert records(tmp_path / "skipped")[-1]["loss"] == pytest.approx(records(tmp_path / "clean")[-1]["loss"])


def test_training_goes_on_after_a_bad_step(tmp_path: Path) -> None:
    outcome, task = run(tmp_path, TinySource(broken=frozenset({5})))
    assert outcome.step == 12
    assert all(torch.isfinite(value).all() for value in task.state_dict().values())


def test_consecutive_bad_steps_abort_the_run(tmp_path: Path) -> None:
    with pytest.raises(DivergenceError, match=r"3 steps in a row, up to step 6"):
        run(tmp_path, TinySource(broken=frozenset({12, 16, 20})), max_bad_steps=3)


def test_the_best_checkpoint_is_kept_and_exported(tmp_path: Path) -> None:
    scores = {3: 0.2, 6: 0.9, 9: 0.4, 12: float("nan")}
    calls: list[tuple[int, bool, bool]] = []

    def evaluate(task: nn.Module, step: int) -> dict[str, float]:
        calls.append((step, task.training, torch.is_grad_enabled()))
        return {"mIoU": scores[step]}

    def export(task: nn.Module, folder: Path) -> None:
        (folder / "encoder.txt").write_text("encoder")

    options: dict[str, Any] = {"evaluate": evaluate, "monitor": "mIoU", "export": export}
    outcome, task = run(tmp_path, options=options, evaluate_every=3, save_every=5, keep_last=1)
    assert calls == [(step, False, False) for step in scores]
    assert task.training
    assert outcome.best == tmp_path / "checkpoints" / "step-00000006"
    assert sorted(item.name for item in (tmp_path / "checkpoints").iterdir()) == ["step-00000006", "step-00000012"]
    assert (outcome.best / "export" / "encoder.txt").read_text() == "encoder"
    assert "export/encoder.txt" in json.loads((outcome.best / "complete.json").read_text())["files"]
    assert outcome.metrics["evaluation/mIoU"] is None  # JSON has no NaN


def test_evaluation_does_not_change_training(tmp_path: Path) -> None:
    def evaluate(task: nn.Module, step: int) -> dict[str, float]:
        return {"draw": torch.rand(7).sum().item()}

    _, without = run(tmp_path / "without")
    _, evaluated = run(tmp_path / "evaluated", options={"evaluate": evaluate}, evaluate_every=1)
    assert same_weights(without, evaluated)


def test_a_monitor_without_its_metric_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"monitor='mIoU' is not among the evaluated metrics: OA"):
        run(tmp_path, options={"evaluate": lambda task, step: {"OA": 1.0}, "monitor": "mIoU"})


def test_a_process_can_train_in_two_precisions(tmp_path: Path) -> None:
    task = TinyTask()
    run(tmp_path / "half", task=task, precision="bf16")
    assert all(parameter.dtype == torch.float32 for parameter in task.parameters())
    run(tmp_path / "full", task=task, precision="fp32")
    hidden = task.first(torch.zeros(1, 2, 8, 8))
    assert hidden.dtype == torch.float32


@pytest.mark.skipif(torch.accelerator.is_available(), reason="GPUs have fp16")
def test_fp16_on_the_cpu_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"engine\.precision=fp16 needs a GPU"):
        run(tmp_path, precision="fp16")


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"steps": 0}, "engine.steps"),
        ({"accumulation": 0}, "engine.accumulation"),
        ({"clip_norm": -1.0}, "engine.clip_norm"),
        ({"precision": "fp8"}, "engine.precision"),
    ],
)
def test_invalid_values_name_their_key(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EngineConfig(**keys)


def test_a_warmup_that_is_longer_than_the_run_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    outcome, _ = run(tmp_path, steps=2, log_every=1, optimizer=OptimizerConfig(learning_rate=1e-2, warmup_steps=20))
    assert outcome.exit_code == 0
    lines = [line for line in capsys.readouterr().err.splitlines() if "warm" in line]
    assert lines == [
        "bocage: the warm-up does not end: engine.optimizer.warmup_steps=20 exceeds engine.steps=2; lower it, e.g. to 0"
    ]
    assert [record["learning_rate"] for record in records(tmp_path)] == pytest.approx([1e-2 / 20, 1e-2 / 10])


def test_cosine_schedule_with_warmup() -> None:
    config = OptimizerConfig(warmup_steps=4, min_lr_ratio=0.1)
    factors = [learning_rate_factor(step, 104, config) for step in range(104)]
    assert factors[:4] == [0.25, 0.5, 0.75, 1.0]
    assert factors[4] == 1.0
    assert factors[54] == pytest.approx(0.55)
    assert factors[103] == pytest.approx(0.1, abs=1e-3)
    assert factors[4:] == sorted(factors[4:], reverse=True)


@pytest.mark.parametrize("features_only", [False, True])
def test_no_weight_decay_of_vectors_tables_tokens_and_embeddings(features_only: bool) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.backbone = timm.create_model(
                "swin_tiny_patch4_window7_224",
                features_only=features_only,
                embed_dim=16,
                depths=(1, 1, 1, 1),
                num_heads=(1, 1, 1, 1),
            )
            self.mask_token = nn.Parameter(torch.zeros(1, 1, 16))
            self.modalities = nn.Embedding(3, 16)
            self.last = nn.Linear(16, 1)
            self.last.bias.requires_grad_(False)

    model = Model()
    undecayed = undecayed_names(model)
    assert {"mask_token", "modalities.weight"} < undecayed
    assert not {"last.weight", "last.bias"} & undecayed
    tables = [name for name, _ in model.named_parameters() if "relative_position_bias_table" in name]
    assert tables
    assert set(tables) < undecayed
    optimizer = build_optimizer(model, OptimizerConfig(weight_decay=0.3), global_batch=1, device=torch.device("cpu"))
    decayed, others = optimizer.param_groups
    assert (decayed["weight_decay"], others["weight_decay"]) == (0.3, 0.0)
    assert all(parameter.ndim >= 2 for parameter in decayed["params"])
    assert len(decayed["params"]) + len(others["params"]) == len(list(model.parameters())) - 1


def test_custom_parameter_groups_keep_their_peak_rates(tmp_path: Path) -> None:
    def groups(task: TinyTask) -> list[dict[str, Any]]:
        return [{"params": list(task.head.parameters()), "lr_scale": 0.1}, {"params": list(task.first.parameters())}]

    outcome, task = run(tmp_path, options={"parameter_groups": groups}, optimizer=CONSTANT)
    start = (torch.manual_seed(1), TinyTask())[1]
    assert torch.equal(task.branch.weight, start.branch.weight)
    assert not torch.equal(task.first.weight, start.first.weight)
    assert outcome.metrics["learning_rate"] == pytest.approx(1e-3)


def test_plain_lines_have_no_control_characters(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(tmp_path)
    text = capsys.readouterr().err
    # On a busy machine a warning about data loading may come, too.
    assert len([line for line in text.splitlines() if "waits for data" not in line]) == 7  # first message, six records
    assert text.replace("\n", "").isprintable()


def test_data_starvation_is_reported_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(tmp_path / "slow", TinySource(pause=0.1))
    assert capsys.readouterr().err.count("waits for data") == 1
    # Short waits give no warning. Whether a run without pauses waits depends on the load of the machine.
    monitor = DataStarvationMonitor()
    for averages in ({"data_wait": 0.1, "step_seconds": 1.0}, {"data_wait": 0.9, "step_seconds": 0.01}):
        assert [monitor.warnings(averages) for _ in range(5)] == [[]] * 5


def test_profiled_steps_leave_a_trace_and_a_table(tmp_path: Path) -> None:
    run(tmp_path, steps=8, profile_steps=2)
    events = json.loads((tmp_path / "profile" / "trace.json").read_text())["traceEvents"]
    steps = {event["name"] for event in events if event.get("name", "").startswith("ProfilerStep#")}
    assert steps == {"ProfilerStep#3", "ProfilerStep#4"}
    assert "aten::convolution_backward" in (tmp_path / "profile" / "operators.txt").read_text()
    run(tmp_path / "without")
    assert not (tmp_path / "without" / "profile").exists()


def test_a_batch_of_the_wrong_size_is_refused(tmp_path: Path) -> None:
    class WrongSize(TinySource):
        def batches(self, position: int, rank: int, world: int) -> Iterator[Batch]:
            return TinySource(3).batches(position, rank, world)

    with pytest.raises(RuntimeError, match="batch of 3 samples instead of 4"):
        run(tmp_path, WrongSize(4))


def test_a_missing_tracker_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("tensorboard", "tensorboardX"):
        monkeypatch.setitem(sys.modules, name, None)  # find_spec then finds no package
    with pytest.raises(InputError, match=r"engine\.tracker=tensorboard needs a package"):
        run(tmp_path, tracker="tensorboard")


def test_secrets_are_replaced_by_name_value_argument_and_url(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_API_KEY", "value-of-the-environment")
    config = {
        "hub_token": "abc",
        "masking": {"images": "mask_token", "mask_token": "learned", "tokens": 1880},
        "note": "uses value-of-the-environment here",
        "endpoint": "https://user:word@host/path",
        "words": ["hub_token=abc", "steps=3", "api-key=abc"],
        "shards": "https://host/shards?sig=abc&token=def",
    }
    assert plain(config) == {
        "hub_token": "<redacted>",
        "masking": {"images": "mask_token", "mask_token": "learned", "tokens": 1880},
        "note": "uses <redacted> here",
        "endpoint": "https://<redacted>@host/path",
        "words": ["hub_token=<redacted>", "steps=3", "api-key=<redacted>"],
        "shards": "https://host/shards?<redacted>",
    }


def test_differences_name_keys_and_ignore_changeable_ones() -> None:
    saved = {"batch_size": 4, "engine": {"steps": 10, "clip_norm": 1.0}, "data": {"workers": 1}}
    current = {"batch_size": 8, "engine": {"steps": 20, "clip_norm": 1.0}, "data": {"workers": 3}, "new": 1}
    assert differences(saved, current) == {"batch_size": "4 -> 8", "new": "(not set) -> 1"}


def environment(**more: str) -> dict[str, str]:
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("WANDB")}
    return inherited | {"OMP_NUM_THREADS": "1"} | more


# About 6 s: two interpreters import torch.
@pytest.mark.slow
def test_wandb_writes_an_offline_run_without_any_secret(tmp_path: Path) -> None:
    secret = "f4ke" * 10
    output = tmp_path / "run"
    command = [sys.executable, str(SCRIPT), str(output), "--tracker", "wandb"]
    home = tmp_path / "home"
    home.mkdir()
    settings = environment(HOME=str(home), TINY_TOKEN=secret, HF_TOKEN=secret)
    settings.pop("NETRC", None)
    first = subprocess.run(command, env=settings, capture_output=True, text=True, timeout=120)
    assert first.returncode == 0, first.stderr
    (offline,) = output.glob("wandb/offline-run-*/run-*.wandb")
    again = [*command, "--steps", "16"]
    settings |= {"WANDB_API_KEY": secret, "WANDB_MODE": "offline"}
    second = subprocess.run(again, env=settings, capture_output=True, text=True, timeout=120)
    assert second.returncode == 0, second.stderr
    names = {path.name for path in output.glob("wandb/offline-run-*/run-*.wandb")}
    assert names == {offline.name}  # the same run id
    merged = read_offline_runs(output)
    steps = [step for step, _ in merged["history"]]
    assert len(merged["ids"]) == 1 and steps == sorted(set(steps)) and steps[-1] == 16
    assert {"loss", "gradient_norm", "samples_per_second", "data_wait"} <= merged["history"][-1][1].keys()
    assert merged["config"]["hub_token"] == "<redacted>"
    assert merged["summary"]["checkpoint"] == str(output / "checkpoints" / "step-00000016")
    assert "memory_percent" in merged["system"]
    for path in output.rglob("*"):
        if path.is_file():
            assert secret.encode() not in path.read_bytes(), path


# Some seconds: W&B starts a process.
def test_wandb_marks_a_failed_run_and_an_unknown_mode_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    with pytest.raises(DivergenceError):
        run(tmp_path / "run", TinySource(4, broken=frozenset(range(400))), tracker="wandb", max_bad_steps=2)
    # On a busy machine the process of W&B writes the last record some time after finish() has returned.
    deadline = time.monotonic() + 30
    while not read_offline_runs(tmp_path / "run")["exits"] and time.monotonic() < deadline:
        time.sleep(0.1)
    assert read_offline_runs(tmp_path / "run")["exits"] == [1]
    monkeypatch.setenv("WANDB_MODE", "quiet")
    with pytest.raises(InputError, match=r"^WANDB_MODE=quiet is not one of online, offline, disabled, shared$"):
        run(tmp_path / "other", tracker="wandb")
    # An untracked run is not opened to link its encoders.
    monkeypatch.setenv("WANDB_MODE", "offline")
    link_afterwards("wandb", tmp_path / "other", "bocage", "a run", 4, {"published/DEM_ELEV": "hf:org/name"})
    assert not list((tmp_path / "other").glob("wandb/*run-*"))


# About 8 s: torchrun starts two interpreters that import torch.
def test_two_ranks_equal_one_with_the_same_global_batch(tmp_path: Path) -> None:
    run(tmp_path / "one", TinySource(4), plain=True, steps=20, log_every=1)
    args = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(SCRIPT), str(tmp_path / "two")]
    args += ["--plain", "--batch-size", "2", "--steps", "20"]
    result = subprocess.run([sys.executable, *args], env=environment(), capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    one, two = records(tmp_path / "one"), records(tmp_path / "two")
    assert [line["step"] for line in one] == [line["step"] for line in two]
    assert [line["loss"] for line in one] == pytest.approx([line["loss"] for line in two], abs=1e-5)
    # One rank resumes the run of two ranks, in the same global order.
    run(tmp_path / "one", TinySource(4), plain=True, steps=24, log_every=1)
    source = TinySource(4)
    run(tmp_path / "two", source, plain=True, steps=24, log_every=1, options={"resolved_config": {"hub_token": ""}})
    assert source.started_at == [80]
    one, two = records(tmp_path / "one"), records(tmp_path / "two")
    assert [line["loss"] for line in one] == pytest.approx([line["loss"] for line in two], abs=1e-5)


# About 8 s, as above. One rank has a NaN, and both skip the step.
@pytest.mark.slow
def test_both_ranks_skip_a_step_that_is_bad_on_one(tmp_path: Path) -> None:
    args = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(SCRIPT), str(tmp_path)]
    args += ["--plain", "--batch-size", "2", "--steps", "6", "--broken", "21"]
    result = subprocess.run([sys.executable, *args], env=environment(), capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    assert "step 6: loss is not finite on rank 1 (samples place 21, place 23); no update (1 in a row)" in result.stderr
    line = records(tmp_path)[-1]
    assert (line["step"], line["skipped_steps"]) == (6, 1)
    assert "loss" not in line


# About 5 s: an interpreter imports torch.
def test_a_second_run_in_the_same_folder_is_refused(tmp_path: Path) -> None:
    first = subprocess.Popen([sys.executable, str(SCRIPT), str(tmp_path), "--pause", "30"], env=environment())
    try:
        while not (tmp_path / "metrics.jsonl").exists():
            assert first.poll() is None
            time.sleep(0.02)
        with pytest.raises(InputError, match=f"^{tmp_path}: another run is writing there"):
            run(tmp_path)
    finally:
        first.kill()
        first.wait()
    run(tmp_path)  # the lock ended with its process
