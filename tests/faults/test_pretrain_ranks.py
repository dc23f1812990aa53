"""Pretraining on several ranks: their number changes, a rank is lost, two hosts (network namespaces) lose contact."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file
from small_recipes import PRETRAIN

from bocage.shards.simulate.tree import write_tree
from bocage.shards.source.flair_hub.tree import FlairHubCatalogue
from bocage.shards.write.writer import write_shards
from bocage.tools.main import main

pytestmark = pytest.mark.slow(minutes=1)  # Every launch takes some 10 s

ROOT = Path(__file__).parents[2]
# These models have no dropout, which depends on the number of ranks, and no batch statistics.
IMAGES = ["modalities=[AERIAL_RGBI,DEM_ELEV]", "split=all", "window=51.2", "reconstructions=0"]
CONSTANT_RATE = "engine.optimizer.min_lr_ratio=1.0"
RATE = "engine.optimizer.learning_rate=3e-4"  # higher rates amplify the rounding by which ranks differ


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sample")
    write_tree(folder / "tree", patches=10, seed=3, dates=(3, 4))
    return write_shards(FlairHubCatalogue.open(folder / "tree"), folder / "shards").path


def command(shards: Path, output: Path, *arguments: str) -> list[str]:
    common = [*PRETRAIN, *IMAGES, f"shards={shards}", f"output={output}", "engine.resume_allow=[batch_size]"]
    return ["pretrain.py", *common, *arguments]


def launched(arguments: list[str], *launcher: str, prefix: tuple[str, ...] = (), **more: str) -> subprocess.Popen[str]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("WANDB")}
    environment |= {"OMP_NUM_THREADS": "1", **more}
    whole = [*prefix, sys.executable, "-m", "torch.distributed.run", *launcher, *arguments]
    return subprocess.Popen(whole, cwd=ROOT, env=environment, stderr=-1, text=True, start_new_session=True)


def two_ranks(arguments: list[str]) -> subprocess.Popen[str]:
    return launched(arguments, "--standalone", "--nproc_per_node", "2")


def finished(process: subprocess.Popen[str]) -> str:
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    return errors


def records(output: Path) -> list[dict[str, float]]:
    path = output / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def wait_for_step(process: subprocess.Popen[str], output: Path, step: int) -> None:
    while len(records(output)) < step:
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.02)


def ranks_of(process: subprocess.Popen[str]) -> list[psutil.Process]:
    """Training processes of a launcher, in rank order."""
    processes = [child for child in psutil.Process(process.pid).children(recursive=True) if "RANK" in child.environ()]
    return sorted(processes, key=lambda child: int(child.environ()["RANK"]))


def assert_same(one: Path, other: Path) -> None:
    expected, actual = load_file(one / "model.safetensors"), load_file(other / "model.safetensors")
    assert [name for name in expected if not torch.equal(expected[name], actual[name])] == []


@pytest.mark.parametrize(
    ("objective", "parallel"),
    [
        ("masked", "ddp"),
        ("masked", "fsdp"),
        ("contrastive", "ddp"),
        ("pooled_contrast", "ddp"),
        ("latent", "fsdp"),
        ("combined", "ddp"),
        ("combined", "fsdp"),
    ],
)
def test_the_loss_is_the_same_when_the_number_of_ranks_changes(
    objective: str, parallel: str, shards: Path, tmp_path: Path
) -> None:
    one, many = tmp_path / "one", tmp_path / "many"
    common = [CONSTANT_RATE, RATE]
    if objective != "masked":
        common += ["weights.contrastive=0.5", "contrastive.learn_temperature=true", "contrastive.width=32"]
    if objective in ("contrastive", "pooled_contrast", "latent"):
        common += ["weights.masked=0"]
    if objective == "latent":
        common += ["weights.contrastive=0", "weights.latent=1", "latent.decoder.width=32"]
    if objective == "pooled_contrast":
        common += ["weights.contrastive=0", "weights.pooled_contrast=1", "weights.vicreg=0.01"]
    assert main(["pretrain", *command(shards, one, "engine.steps=20", "batch_size=4", *common)[1:]]) == 0
    arguments = ["batch_size=2", *common, f"engine.parallel={parallel}"]
    finished(two_ranks(command(shards, many, "engine.steps=7", *arguments)))
    assert main(["pretrain", *command(shards, many, "engine.steps=14", "batch_size=4", *common)[1:]]) == 0
    errors = finished(two_ranks(command(shards, many, "engine.steps=20", *arguments)))
    assert "resuming at step 14 of 20" in errors
    assert "a step now has" not in errors  # as many samples as before
    first, second = records(one), records(many)
    assert [line["step"] for line in second] == list(range(1, 21))
    largest = max(abs(line["loss"] - match["loss"]) for line, match in zip(first, second, strict=True))
    print(f"{objective}, {parallel}: largest difference of the loss over 20 steps: {largest:.2e}")
    assert largest < 1e-5
    states = [
        json.loads((run / "checkpoints" / "step-00000020" / "state.json").read_text())["state"] for run in (one, many)
    ]
    assert states[0]["position"] == states[1]["position"] == 80


def test_another_global_batch_is_reported(shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    finished(two_ranks(command(shards, tmp_path, "engine.steps=2", "batch_size=2")))
    assert main(["pretrain", *command(shards, tmp_path, "engine.steps=3", "batch_size=2")[1:]]) == 0
    assert "a step now has 2 samples in place of 4 (1 ranks, were 2)" in capsys.readouterr().err


@pytest.mark.parametrize("signal_number", [signal.SIGKILL, signal.SIGSTOP])
def test_a_rank_lost_under_torchrun_ends_the_run_and_it_resumes(
    signal_number: int, shards: Path, tmp_path: Path
) -> None:
    uninterrupted, output = tmp_path / "uninterrupted", tmp_path / "run"
    finished(two_ranks(command(shards, uninterrupted, "engine.steps=60", "engine.save_every=5")))
    arguments = command(shards, output, "engine.steps=60", "engine.save_every=5", "engine.rank_timeout=5")
    process = two_ranks(arguments)
    wait_for_step(process, output, 8)
    lost = ranks_of(process)[1]
    started = time.monotonic()
    lost.send_signal(signal_number)
    try:
        _, errors = process.communicate(timeout=90)
    finally:
        with suppress(psutil.NoSuchProcess):  # the launcher has ended it
            lost.kill()
    assert process.returncode != 0
    print(f"ended after {time.monotonic() - started:.0f} s")
    if signal_number == signal.SIGKILL:
        assert "exitcode  : -9" in errors  # torchrun names the rank and ends the other
    else:
        assert "no sign of life from rank 1 (on " in errors, errors
    assert "resuming at step" in finished(two_ranks(arguments))
    assert_same(uninterrupted / "checkpoints" / "step-00000060", output / "checkpoints" / "step-00000060")


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True)


@contextmanager
def two_hosts() -> Iterator[list[str]]:
    """Names of two network namespaces with one cable between them; skips if this user may not create them."""
    names = [f"bocage{os.getpid()}{letter}" for letter in "ab"]
    try:
        try:
            for name in names:
                ip("netns", "add", name)
            ip("link", "add", "cable0", "netns", names[0], "type", "veth", "peer", "name", "cable0", "netns", names[1])
        except (OSError, subprocess.CalledProcessError) as error:
            pytest.skip(f"cannot make network namespaces: {error}")
        for number, name in enumerate(names):
            ip("-n", name, "addr", "add", f"10.91.7.{number + 1}/24", "dev", "cable0")
            for device in ("lo", "cable0"):
                ip("-n", name, "link", "set", device, "up")
        yield names
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], check=False, capture_output=True)


def on_hosts(names: list[str], arguments: list[str], port: int) -> list[subprocess.Popen[str]]:
    return [
        launched(
            arguments,
            *("--nnodes", "2", "--nproc_per_node", "1", "--node_rank", str(number)),
            *("--master_addr", "10.91.7.1", "--master_port", str(port)),
            prefix=("ip", "netns", "exec", name, "unshare", "--uts", "sh", "-c", f'hostname {name}; exec "$@"', "-"),
            GLOO_SOCKET_IFNAME="cable0",
        )
        for number, name in enumerate(names)
    ]


def test_two_hosts_train_like_one_and_a_cut_cable_ends_both(shards: Path, tmp_path: Path) -> None:
    near, far = tmp_path / "near", tmp_path / "far"
    finished(two_ranks(command(shards, near, "engine.steps=40", "engine.save_every=5")))
    with two_hosts() as names:
        arguments = command(shards, far, "engine.steps=40", "engine.save_every=5", "engine.rank_timeout=5")
        processes = on_hosts(names, arguments, 29631)
        wait_for_step(processes[0], far, 8)
        ip("-n", names[0], "link", "set", "cable0", "down")
        started = time.monotonic()
        errors = [process.communicate(timeout=240)[1] for process in processes]
        print(f"ended after {time.monotonic() - started:.0f} s")
        assert all(process.returncode for process in processes)
        assert f"no sign of life from rank 1 (on {names[1]}, last seen in step" in errors[0], errors[0]
        assert "the rank that holds the store of the process group" in errors[1], errors[1]
        ip("-n", names[0], "link", "set", "cable0", "up")
        errors = [finished(process) for process in on_hosts(names, arguments, 29632)]
        assert "resuming at step" in errors[0]
    assert_same(near / "checkpoints" / "step-00000040", far / "checkpoints" / "step-00000040")
