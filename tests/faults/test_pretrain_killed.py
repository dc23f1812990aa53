"""Pretraining killed at twenty random points, with its DataLoader workers, ends with the same bits."""

import json
import os
import random
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
STEPS = 40


def start(shards: Path, output: Path) -> "subprocess.Popen[str]":
    command = [sys.executable, "pretrain.py", *PRETRAIN, f"shards={shards}", f"output={output}", "split=all"]
    command += ["modalities=[AERIAL_RGBI,SENTINEL2_TS]", "window=51.2", "reconstructions=0", "workers=1"]
    command += [f"engine.steps={STEPS}", "engine.save_every=2", "engine.ema_decay=0.9"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, cwd=ROOT, env=environment, stderr=-1, text=True, start_new_session=True)


def recorded_steps(output: Path) -> list[int]:
    path = output / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return [json.loads(line)["step"] for line in lines if line.endswith("}")]


def wait_for_kill_point(process: "subprocess.Popen[str]", output: Path, when: str, rng: random.Random) -> None:
    """Return when the run has reached the point at which to kill it."""
    if when == "start":
        time.sleep(rng.uniform(0.2, 4.0))
        return
    start_steps, saves_seen = len(recorded_steps(output)), set[str]()
    steps, saves = rng.randint(1, 3), rng.randint(1, 2)
    while process.poll() is None:
        saves_seen.update(path.name for path in output.glob("checkpoints/.step-*.partial"))
        if len(saves_seen) >= saves if when == "save" else len(recorded_steps(output)) >= start_steps + steps:
            time.sleep(rng.uniform(0.0, 0.02 if when == "save" else 0.2))
            return
        time.sleep(0.001)


# About 4 min: 22 launches, each of which imports torch.
@pytest.mark.slow
def test_twenty_kills_do_not_change_the_result(tmp_path: Path) -> None:
    write_tree(tmp_path / "tree", patches=6, seed=3, dates=(3, 4))
    shards = write_shards(FlairHubCatalogue.open(tmp_path / "tree"), tmp_path / "shards").path
    uninterrupted, output = tmp_path / "uninterrupted", tmp_path / "killed"
    process = start(shards, uninterrupted)
    assert process.wait(timeout=300) == 0
    rng = random.Random(6)
    kills_during_save = 0
    for when in rng.sample(["start", "step", "save"], counts=[4, 8, 8], k=20):
        process = start(shards, output)
        wait_for_kill_point(process, output, when, rng)
        assert process.poll() is None, (when, process.communicate()[1])
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        kills_during_save += bool(list(output.glob("checkpoints/.step-*.partial")))
    assert kills_during_save >= 3, "no kill hit a save"
    process = start(shards, output)
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    assert recorded_steps(output) == list(range(1, STEPS + 1)) == recorded_steps(uninterrupted)
    for path in uninterrupted.rglob("*.safetensors"):
        expected, actual = load_file(path), load_file(output / path.relative_to(uninterrupted))
        assert [name for name in expected if not torch.equal(expected[name], actual[name])] == [], path
    losses = [
        [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]
        for run in (uninterrupted, output)
    ]
    assert losses[0] == losses[1]
    print(f"kills during a save: {kills_during_save}")
