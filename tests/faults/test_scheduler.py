"""Ranks that a scheduler starts and stops, as `srun` does: no launcher, SIGUSR1 before the time limit."""

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


def start(output: Path, *words: str, ranks: int = 2) -> list[subprocess.Popen[str]]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    settings = {name: value for name, value in os.environ.items() if not name.startswith("WANDB")}
    settings |= {"OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(ranks)}
    command = [sys.executable, str(SCRIPT), str(output), "--batch-size", "2", "--plain", *words]
    return [
        subprocess.Popen(command, env=settings | {"RANK": str(rank), "LOCAL_RANK": str(rank)}, stderr=-1, text=True)
        for rank in range(ranks)
    ]


def steps(output: Path) -> list[int]:
    path = output / "metrics.jsonl"
    return [json.loads(line)["step"] for line in path.read_text().splitlines()] if path.exists() else []


# About 15 s: two ranks import torch, twice.
def test_a_warning_that_one_rank_gets_stops_all_and_the_same_command_goes_on(tmp_path: Path) -> None:
    processes = start(tmp_path, "--steps", "400", "--pause", "0.05", "--save-every", "0")
    deadline = time.monotonic() + 60
    while len(steps(tmp_path)) < 3:
        assert time.monotonic() < deadline and all(process.poll() is None for process in processes)
        time.sleep(0.02)
    processes[1].send_signal(signal.SIGUSR1)
    said = [process.communicate(timeout=30)[1] for process in processes]
    assert [process.returncode for process in processes] == [138, 138], said
    (saved,) = (tmp_path / "checkpoints").glob("step-*/complete.json")
    stopped = int(saved.parent.name.removeprefix("step-"))
    assert f"stopped at step {stopped} of 400, saved; the same command resumes" in said[0]
    processes = start(tmp_path, "--steps", str(stopped + 4))
    said = [process.communicate(timeout=60)[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], said
    assert f"resuming at step {stopped} of {stopped + 4}" in said[0]
    assert steps(tmp_path) == list(range(1, stopped + 5))


# About 20 s each: two ranks import torch, and the one that is left waits for the timeout and for signs of life.
@pytest.mark.slow
@pytest.mark.parametrize(
    ("how", "lost"),
    [
        (signal.SIGSTOP, 1),
        (signal.SIGSTOP, 0),
        (signal.SIGKILL, 1),
        (signal.SIGKILL, 0),
    ],
)
def test_a_rank_that_dies_or_hangs_ends_the_others_and_is_named(tmp_path: Path, how: int, lost: int) -> None:
    words = ["--steps", "400", "--pause", "0.05", "--save-every", "2", "--rank-timeout", "5"]
    processes = start(tmp_path, *words)
    try:
        deadline = time.monotonic() + 60
        while len(steps(tmp_path)) < 4:
            assert time.monotonic() < deadline and all(process.poll() is None for process in processes)
            time.sleep(0.02)
        processes[lost].send_signal(how)
        _, said = processes[1 - lost].communicate(timeout=60)
    finally:
        for process in processes:
            process.kill()
    assert processes[1 - lost].returncode not in (0, None)
    last = said.strip().splitlines()[-1]
    # Rank 0 holds the store where ranks tell that they live.
    assert ("rank 1 (on " if lost else "the rank that holds the store") in last, said
    processes = start(tmp_path, "--steps", str(len(steps(tmp_path)) + 2))
    said = "".join(process.communicate(timeout=60)[1] for process in processes)
    assert [process.returncode for process in processes] == [0, 0], said
    assert "resuming at step" in said
