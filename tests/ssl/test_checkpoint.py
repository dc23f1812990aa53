"""Checkpoints: resumed runs equal uninterrupted ones; damage, other configurations and payloads are refused."""

from __future__ import annotations

import hashlib
import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_run import TinySource, TinyTask, records, run
from torch import nn

from bocage.shards.errors import InputError
from bocage.ssl.engine.checkpoint import reader
from bocage.ssl.engine.checkpoint.writer import step_folder
from bocage.ssl.engine.logging.provenance import digest
from bocage.ssl.engine.optim import OptimizerConfig, learning_rate_factor

TIMES = {"samples_per_second", "step_seconds", "data_wait", "memory_gb", "tflops", "mfu"}


def weights(task: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in task.state_dict().items()}


def numbers(output: Path) -> list[dict[str, Any]]:
    """Records without values that depend on the machine."""
    return [{name: value for name, value in line.items() if name not in TIMES} for line in records(output)]


def assert_same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    assert [name for name in one if not torch.equal(one[name], other[name])] == []


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, torch.Tensor]]:
    output = tmp_path_factory.mktemp("uninterrupted")
    _, task = run(output)
    return output, weights(task)


# Step 4 is saved by save_every, steps 3 and 7 have no record, step 12 is the last.
@pytest.mark.parametrize("stop", [1, 3, 4, 7, 12])
def test_a_stopped_run_resumes_to_the_same_bits_and_records(
    stop: int, tmp_path: Path, uninterrupted: tuple[Path, dict[str, torch.Tensor]]
) -> None:
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)]
    outcome, _ = run(tmp_path, TinySource(interrupt_at=4 * (stop - 1)))
    assert (outcome.step, outcome.stopped, outcome.exit_code) == (stop, True, 143)
    assert outcome.last.name == f"step-{stop:08d}"
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)] == handlers
    source = TinySource()
    outcome, task = run(tmp_path, source)
    assert source.started_at == ([4 * stop] if stop < 12 else [])
    assert (outcome.step, outcome.stopped, outcome.exit_code) == (12, False, 0)
    assert_same(weights(task), uninterrupted[1])
    assert numbers(tmp_path) == numbers(uninterrupted[0])


def test_an_evaluation_that_a_signal_prevented_runs_on_resume(tmp_path: Path) -> None:
    evaluated: list[int] = []

    def evaluate(task: nn.Module, step: int) -> dict[str, float]:
        evaluated.append(step)
        return {"score": float(step)}

    options = {"evaluate": evaluate, "monitor": "score"}
    run(tmp_path, TinySource(interrupt_at=20), options=options, evaluate_every=3, save_every=0)
    outcome, _ = run(tmp_path, options=options, evaluate_every=3, save_every=0, keep_last=9)
    assert evaluated == [3, 6, 9, 12]
    assert sorted(item.name for item in (tmp_path / "checkpoints").iterdir()) == [
        f"step-{step:08d}" for step in (3, 6, 9, 12)
    ]
    assert outcome.best == outcome.last


def test_a_finished_run_returns_its_results_at_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first, task = run(tmp_path)
    source = TinySource()
    second, again = run(tmp_path, source)
    assert second == first
    assert source.started_at == []
    assert "is complete: all 12 steps are done" in capsys.readouterr().err
    assert_same(weights(again), weights(task))  # the weights are loaded


def _cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


def _flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("name", "harm", "message"),
    [
        ("model.safetensors", _cut, "model.safetensors has"),
        ("optimizer.pt", _flip, "the SHA-256 of optimizer.pt"),
        ("ranks.pt", Path.unlink, "ranks.pt is missing"),
        ("complete.json", Path.unlink, "complete.json is missing"),
        ("complete.json", lambda path: path.write_text("{"), "complete.json cannot be read"),
        ("complete.json", lambda path: path.write_text('{"files": {}}'), "complete.json does not list model.safet"),
    ],
)
def test_a_damaged_checkpoint_is_reported_and_the_previous_one_used(
    name: str,
    harm: Any,
    message: str,
    tmp_path: Path,
    uninterrupted: tuple[Path, dict[str, torch.Tensor]],
    capsys: pytest.CaptureFixture[str],
) -> None:
    run(tmp_path, TinySource(interrupt_at=36))  # checkpoints of steps 8 and 10
    newest = step_folder(tmp_path / "checkpoints", 10)
    harm(newest / name)
    source = TinySource()
    _, task = run(tmp_path, source)
    assert source.started_at == [4 * 8]
    text = capsys.readouterr().err
    assert f"{newest} is damaged ({message}" in text
    assert newest.with_name("step-00000010.damaged").is_dir()
    assert_same(weights(task), uninterrupted[1])
    assert numbers(tmp_path) == numbers(uninterrupted[0])


def test_leftovers_of_a_killed_save_are_removed_or_moved_back(tmp_path: Path) -> None:
    root = tmp_path / "checkpoints"
    run(tmp_path, TinySource(interrupt_at=16))
    (root / ".step-00000008.partial").mkdir()
    (root / "step-00000005").rename(root / ".step-00000005.replaced")
    source = TinySource()
    run(tmp_path, source)
    assert source.started_at == [20]
    assert not list(root.glob(".step-*"))


def test_a_changed_configuration_is_refused_key_by_key(tmp_path: Path) -> None:
    run(tmp_path, TinySource(interrupt_at=8), options={"resolved_config": {"width": 3, "workers": 1}})
    with pytest.raises(InputError, match=r"\(engine\.optimizer\.learning_rate: 0\.01 -> 0\.02; width: 3 -> 4\)"):
        run(
            tmp_path,
            optimizer=OptimizerConfig(learning_rate=0.02),
            options={"resolved_config": {"width": 4, "workers": 2}},
        )


def test_an_accepted_change_is_named_and_takes_effect(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    changed: dict[str, Any] = {
        "optimizer": OptimizerConfig(learning_rate=0.02, weight_decay=0.3),
        "options": {"resolved_config": {"width": 4}},
    }
    run(tmp_path, TinySource(interrupt_at=8), options={"resolved_config": {"width": 3}})
    with pytest.raises(InputError, match=r"\(width: 3 -> 4\).* by engine\.resume_allow=\[KEY,\.\.\.\]"):
        run(tmp_path, resume_allow=["engine.optimizer.*"], **changed)
    outcome, _ = run(tmp_path, resume_allow=["engine.optimizer.*", "width"], log_every=1, **changed)
    text = capsys.readouterr().err
    assert "engine.optimizer.learning_rate: 0.01 -> 0.02; engine.optimizer.weight_decay: 0.05 -> 0.3; width: 3" in text
    rates = [line["learning_rate"] for line in records(tmp_path)]
    factor = learning_rate_factor(outcome.step - 1, outcome.step, OptimizerConfig())
    assert rates[-1] == pytest.approx(0.02 * factor)
    saved = torch.load(outcome.last / "optimizer.pt", weights_only=True)["optimizer"]["param_groups"]
    assert [group["weight_decay"] for group in saved] == [0.3, 0.0]
    # The checkpoint now has the accepted configuration.
    run(tmp_path, steps=13, **changed)


def test_milestones_are_kept_and_save_minutes_saves(tmp_path: Path) -> None:
    run(tmp_path / "milestones", save_every=0, keep_last=1, milestone_every=5)
    assert sorted(item.name for item in (tmp_path / "milestones" / "checkpoints").iterdir()) == [
        "step-00000005",
        "step-00000010",
        "step-00000012",
    ]
    run(tmp_path / "minutes", TinySource(pause=0.05), save_every=0, keep_last=99, save_minutes=0.2 / 60)
    assert 2 <= len(list((tmp_path / "minutes" / "checkpoints").iterdir())) <= 5


def test_steps_and_logging_may_change_on_resume(tmp_path: Path) -> None:
    run(tmp_path, steps=6)
    outcome, _ = run(tmp_path, steps=8, log_every=1, save_every=2, keep_last=5)
    assert outcome.step == 8


def test_resume_never_refuses_a_folder_with_checkpoints(tmp_path: Path) -> None:
    run(tmp_path, steps=4, resume="never")
    with pytest.raises(InputError, match=r"engine\.resume=never"):
        run(tmp_path, steps=4, resume="never")


def test_another_model_is_refused_with_its_parameters(tmp_path: Path) -> None:
    run(tmp_path, TinySource(interrupt_at=8))

    class Larger(TinyTask):
        def __init__(self) -> None:
            super().__init__()
            self.more = nn.Linear(2, 2)

    with pytest.raises(InputError, match=r'does not fit this model.*"more\.bias"'):
        run(tmp_path, task=Larger())


class _Payload:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("executed",)


@pytest.mark.parametrize("name", ["optimizer.pt", "ranks.pt"])
def test_a_pickle_payload_is_not_executed(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    run(tmp_path, TinySource(interrupt_at=8))
    (folder,) = (tmp_path / "checkpoints").glob("step-00000003")
    torch.save({"optimizer": _Payload(), "scaler": None}, folder / name)
    marker = json.loads((folder / "complete.json").read_text())
    data = (folder / name).read_bytes()
    marker["files"][name] = {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    (folder / "complete.json").write_text(json.dumps(marker))
    with pytest.raises(InputError, match=rf"{name} is damaged or holds something else .* nothing in it was executed"):
        run(tmp_path)
    assert not (tmp_path / "executed").exists()


def test_everything_in_a_checkpoint_loads_without_unpickling_objects(tmp_path: Path) -> None:
    outcome, task = run(tmp_path)
    assert reader.find_damage(outcome.last) is None
    state, description = reader.read_state(outcome.last)
    assert (state.step, state.position) == (12, 48)
    assert (description["recipe"], description["ranks"], description["samples_a_step"]) == ("tiny", 1, 4)
    assert description["config_sha256"] == digest(description["config"])
    assert description["versions"]["torch"] == torch.__version__.split("+")[0]
    loaded = TinyTask()
    reader.load_task(outcome.last, loaded)
    assert_same(weights(loaded), weights(task))
    assert reader.load_tensors(outcome.last / "optimizer.pt")["optimizer"]["state"]


def test_a_full_disk_leaves_earlier_checkpoints_intact(tmp_path: Path) -> None:
    """The export writes to a device that is always full."""

    def export(task: nn.Module, folder: Path) -> None:
        if reader.has_checkpoints(folder.parents[1]):
            with open("/dev/full", "w") as file:
                file.write("x" * 100_000)

    if not Path("/dev/full").is_char_device():
        pytest.skip("needs /dev/full")
    with pytest.raises(InputError, match=r"step-00000008: .*No space left on device"):
        run(tmp_path, options={"export": export})
    assert [item.name for item in (tmp_path / "checkpoints").iterdir()] == ["step-00000004"]
    outcome, _ = run(tmp_path)
    assert outcome.step == 12
