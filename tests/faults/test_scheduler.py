"""Ranks that a scheduler starts and stops as `srun` does: no launcher, and SIGUSR1 before the time limit."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "support" / "tiny_run.py"


def start(output: Path, *arguments: str, ranks: int = 2) -> list[subprocess.Popen[str]]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    settings = {name: value for name, value in os.environ.items() if not name.startswith("WANDB")}
    settings |= {"OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(ranks)}
    command = [sys.executable, str(SCRIPT), str(output), "--batch-size", "2", "--plain", *arguments]
    return [
        subprocess.Popen(command, env=settings | {"RANK": str(rank), "LOCAL_RANK": str(rank)}, stderr=-1, text=True)
        for rank in range(ranks)
    ]


def steps(output: Path) -> list[int]:
    path = output / "metrics.jsonl"
    return [json.loads(line)["step"] for line in path.read_text().splitlines()] if path.exists() else []


# About 15 s: two ranks import torch, twice.
@pytest.mark.slow
def test_a_signal_to_one_rank_stops_all_and_the_same_command_resumes(tmp_path: Path) -> None:
    processes = start(tmp_path, "--steps", "400", "--pause", "0.05", "--save-every", "0")
    deadline = time.monotonic() + 60
    while len(steps(tmp_path)) < 3:
        assert time.monotonic() < deadline and all(process.poll() is None for process in processes)
        time.sleep(0.02)
    processes[1].send_signal(signal.SIGUSR1)
    errors = [process.communicate(timeout=30)[1] for process in processes]
    assert [process.returncode for process in processes] == [138, 138], errors
    (saved,) = (tmp_path / "checkpoints").glob("step-*/complete.json")
    stopped = int(saved.parent.name.removeprefix("step-"))
    assert f"stopped at step {stopped} of 400, saved; the same command resumes" in errors[0]
    processes = start(tmp_path, "--steps", str(stopped + 4))
    errors = [process.communicate(timeout=60)[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], errors
    assert f"resuming at step {stopped} of {stopped + 4}" in errors[0]
    assert steps(tmp_path) == list(range(1, stopped + 5))


# About 20 s each: two ranks import torch, and the other rank waits for the timeout and for heartbeats.
@pytest.mark.slow
@pytest.mark.parametrize(
    ("signal_number", "lost"),
    [
        (signal.SIGSTOP, 1),
        (signal.SIGSTOP, 0),
        (signal.SIGKILL, 1),
        (signal.SIGKILL, 0),
    ],
)
def test_a_dead_or_hanging_rank_is_named_and_ends_the_others(tmp_path: Path, signal_number: int, lost: int) -> None:
    arguments = ["--steps", "400", "--pause", "0.05", "--save-every", "2", "--rank-timeout", "5"]
    processes = start(tmp_path, *arguments)
    try:
        deadline = time.monotonic() + 60
        while len(steps(tmp_path)) < 4:
            assert time.monotonic() < deadline and all(process.poll() is None for process in processes)
            time.sleep(0.02)
        processes[lost].send_signal(signal_number)
        _, errors = processes[1 - lost].communicate(timeout=60)
    finally:
        for process in processes:
            process.kill()
    assert processes[1 - lost].returncode not in (0, None)
    last = errors.strip().splitlines()[-1]
    # Rank 0 holds the store of the heartbeats.
    assert ("rank 1 (on " if lost else "the rank that holds the store") in last, errors
    processes = start(tmp_path, "--steps", str(len(steps(tmp_path)) + 2))
    errors = "".join(process.communicate(timeout=60)[1] for process in processes)
    assert [process.returncode for process in processes] == [0, 0], errors
    assert "resuming at step" in errors
