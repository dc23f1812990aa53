"""An interrupted or killed training process resumes and ends with the same bits."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

SCRIPT = Path(__file__).parents[1] / "support" / "tiny_run.py"
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1"}


def command(output: Path, *arguments: str) -> list[str]:
    return [sys.executable, str(SCRIPT), str(output), *arguments]


def final_weights(output: Path, step: int) -> dict[str, torch.Tensor]:
    return load_file(output / "checkpoints" / f"step-{step:08d}" / "model.safetensors")


def recorded_steps(output: Path) -> list[int]:
    path = output / "metrics.jsonl"
    return [json.loads(line)["step"] for line in path.read_text().splitlines()] if path.exists() else []


def wait_for_step(output: Path, step: int, process: subprocess.Popen[str]) -> None:
    while len(recorded_steps(output)) < step:
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.02)


def assert_same_weights(one: Path, other: Path, step: int) -> None:
    first, second = final_weights(one, step), final_weights(other, step)
    assert first.keys() == second.keys()
    assert [name for name in first if not torch.equal(first[name], second[name])] == []


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("uninterrupted")
    subprocess.run(command(output, "--steps", "30"), env=ENVIRONMENT, check=True, timeout=60)
    return output


# About 7 s: two interpreters import torch.
@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGUSR1, 138)])
def test_a_signal_ends_the_run_after_a_save_and_it_resumes(
    number: int, code: int, tmp_path: Path, uninterrupted: Path
) -> None:
    arguments = ("--steps", "30", "--save-every", "0")
    output = tmp_path / "interrupted"
    process = subprocess.Popen(command(output, *arguments, "--pause", "0.1"), env=ENVIRONMENT, stderr=-1, text=True)
    wait_for_step(output, 3, process)
    process.send_signal(number)
    _, text = process.communicate(timeout=60)
    assert process.returncode == code
    (saved,) = (output / "checkpoints").iterdir()
    step = int(saved.name[5:])
    assert 3 <= step < 30
    assert f"stopped at step {step} of 30, saved" in text
    subprocess.run(command(output, *arguments), env=ENVIRONMENT, check=True, timeout=60)
    assert_same_weights(output, uninterrupted, 30)
    assert recorded_steps(output) == list(range(1, 31))


# About 5 s: an interpreter imports torch.
@pytest.mark.slow
def test_a_second_interrupt_ends_the_process_at_once(tmp_path: Path) -> None:
    process = subprocess.Popen(command(tmp_path, "--pause", "30"), env=ENVIRONMENT, stderr=subprocess.PIPE, text=True)
    while not (tmp_path / "metrics.jsonl").exists():
        assert process.poll() is None
        time.sleep(0.02)
    time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    time.sleep(0.7)
    assert process.poll() is None  # still in its first step, which waits 30 s for data
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=10) == 130
    assert not (tmp_path / "checkpoints").exists()


# About 8 s: an interpreter imports torch, and five runs are killed, three of them inside a save.
@pytest.mark.slow
def test_killed_runs_resume_to_the_same_bits(tmp_path: Path, uninterrupted: Path) -> None:
    arguments = ("--steps", "30", "--save-every", "3", "--slow-export", "--pause", "0.005")
    kills = ("--kill", "step", "save", "save", "step", "save")
    result = subprocess.run(
        command(tmp_path, *arguments, *kills), env=ENVIRONMENT, capture_output=True, text=True, timeout=120
    )
    assert result.returncode == 0, result.stderr
    assert result.stderr.count("resuming at step") >= 3
    assert_same_weights(tmp_path, uninterrupted, 30)
    assert recorded_steps(tmp_path) == list(range(1, 31))
    assert not list((tmp_path / "checkpoints").glob(".*"))
