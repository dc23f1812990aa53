"""A training command stopped by Ctrl-C resumes to the same bits; SIGTERM to all its processes saves, too."""

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
from small_recipes import PRETRAIN

from bocage.shards.simulate.tree import write_tree
from bocage.shards.source.flair_hub.tree import FlairHubCatalogue
from bocage.shards.write.writer import write_shards

ROOT = Path(__file__).parents[2]
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1"}
STEPS = 8


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sample")
    write_tree(folder / "tree", patches=4, seed=3, dates=(8, 10))
    return write_shards(FlairHubCatalogue.open(folder / "tree"), folder / "shards").path


def launch(shards: Path, output: Path, *overrides: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "accelerate.commands.launch", "pretrain.py", *PRETRAIN]
    command += [f"shards={shards}", f"output={output}", f"engine.steps={STEPS}", "split=all", "workers=1", *overrides]
    # In a new session the signal reaches the whole process group, as a terminal's Ctrl-C does.
    return subprocess.Popen(command, cwd=ROOT, env=ENVIRONMENT, stderr=-1, text=True, start_new_session=True)


def recorded(output: Path) -> list[int]:
    path = output / "metrics.jsonl"
    return [json.loads(line)["step"] for line in path.read_text().splitlines()] if path.exists() else []


# About 40 s: three real launches, each of which imports torch and timm twice (launcher and training process).
@pytest.mark.slow
def test_ctrl_c_then_the_same_command_gives_the_same_bits(shards: Path, tmp_path: Path) -> None:
    uninterrupted = launch(shards, tmp_path / "uninterrupted")
    _, errors = uninterrupted.communicate(timeout=120)
    assert uninterrupted.returncode == 0, errors

    output = tmp_path / "interrupted"
    process = launch(shards, output)
    while len(recorded(output)) < 3:
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGINT)
    process.communicate(timeout=60)
    saved = output / "checkpoints"
    deadline = time.monotonic() + 60
    # The launcher may exit before its child has saved.
    while not list(saved.glob("step-*/complete.json")):
        assert time.monotonic() < deadline, "nothing was saved"
        time.sleep(0.1)
    stopped = int(next(saved.glob("step-*")).name.removeprefix("step-"))
    assert 3 <= stopped < STEPS

    resumed = launch(shards, output)
    _, errors = resumed.communicate(timeout=120)
    assert resumed.returncode == 0, errors
    assert f"resuming at step {stopped} of {STEPS}" in errors
    assert recorded(output) == list(range(1, STEPS + 1))
    for path in sorted((tmp_path / "uninterrupted" / "encoders").glob("*/model.safetensors")):
        expected, actual = load_file(path), load_file(output / path.relative_to(tmp_path / "uninterrupted"))
        assert expected.keys() == actual.keys()
        assert all(torch.equal(expected[name], actual[name]) for name in expected), path.parent.name
    last = f"checkpoints/step-{STEPS:08d}/model.safetensors"
    expected, actual = load_file(tmp_path / "uninterrupted" / last), load_file(output / last)
    assert all(torch.equal(expected[name], actual[name]) for name in expected)


# About 10 s: a training process imports torch.
@pytest.mark.slow
def test_sigterm_to_every_process_saves(shards: Path, tmp_path: Path) -> None:
    command = [sys.executable, "pretrain.py", *PRETRAIN, f"shards={shards}", f"output={tmp_path}", "split=all"]
    command += ["workers=2", "engine.steps=1000", "engine.save_every=0"]
    process = subprocess.Popen(command, cwd=ROOT, env=ENVIRONMENT, stderr=-1, text=True, start_new_session=True)
    while len(recorded(tmp_path)) < 2:
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGTERM)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 143, errors
    assert list((tmp_path / "checkpoints").glob("step-*/complete.json"))
