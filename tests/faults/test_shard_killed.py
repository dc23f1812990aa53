"""``bocage shard`` killed at random points or stopped by signals: no leftovers, and the same bytes after resuming."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from small_shards import contents
from small_tree import write_tree

from bocage.tools.main import main

SCRIPT = Path(__file__).parents[1] / "support" / "killed_sharding.py"
KEYS = [f"D012-2019_AF-S1-27_{row}-{column}" for row in range(6) for column in range(4)]
OPTIONS = ("--shard-mb", "1", "--workers", "2")


def start_sharding(tree: Path, out: Path, **environment: str) -> subprocess.Popen[str]:
    """Start a run with two workers in a new session, and so in a new process group."""
    return subprocess.Popen(
        [sys.executable, str(SCRIPT), str(tree), str(out), *OPTIONS],
        env=os.environ | environment,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def wait_until_gone(group: int) -> None:
    """Wait until the process group has no process left; fail after 20 s."""
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            return
        time.sleep(0.02)
    os.killpg(group, signal.SIGKILL)
    pytest.fail("workers outlived their main process")


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tree(tmp_path_factory.mktemp("killed") / "tree", KEYS, ["AERIAL_RGBI"])


@pytest.fixture(scope="module")
def uninterrupted(tree: Path) -> dict[str, str]:
    out = tree.parent / "whole"
    assert main(["shard", str(tree), str(out), *OPTIONS[:2]]) == 0
    files = contents(out)
    assert len(files) == len(KEYS) + 3  # a patch is larger than --shard-mb, so each has its own shard
    return files


# Slow: each run starts three processes with their imports. 8 s for three runs, 30 s for eleven.
@pytest.mark.slow
@pytest.mark.parametrize("kills", [3, 10])
def test_sigkill_at_random_points_then_resume(
    kills: int, tree: Path, uninterrupted: dict[str, str], tmp_path: Path
) -> None:
    rng = random.Random(kills)
    out = tmp_path / "out"
    for seconds in (rng.uniform(0.3, 2), rng.uniform(0.01, 0.1)):
        process = start_sharding(tree, out, SLOWLY="0.4")  # so that shards remain for the kill points below
        if seconds < 0.3:  # as soon as a shard is being written
            while process.poll() is None and not list(out.glob("*.tmp")):
                time.sleep(0.002)
        time.sleep(seconds)
        os.killpg(process.pid, signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
        process.communicate()
        wait_until_gone(process.pid)
    # Far enough apart that the other worker has not written the next one yet.
    missing = [number for number in range(len(KEYS)) if not (out / f"shard-{number:06d}.tar").exists()][1::4][:4]
    extensions = rng.sample(["tar", "tar", "parquet", "parquet"], 4)
    points = [
        f"shard-{number:06d}.{extension}:1:{rng.choice(('before', 'after'))}"
        for number, extension in zip(missing, extensions)
    ]
    # Kill points while the manifest is written; after the last one the folder is complete but still has its parts.
    points += ["manifest.parquet:1:before", "index.arrow:1:after", "dataset.json:1:before", "dataset.json:1:after"]
    assert len(points) == 8
    points = sorted(rng.sample(points, kills - 2), key=points.index)
    reached = 0
    for point in points:
        process = start_sharding(
            tree, out, KILL_AT=point, SLOWLY="0.15"
        )  # so that both workers proceed at the same pace
        _, errors = process.communicate(timeout=120)
        assert process.returncode in (0, -signal.SIGKILL), errors
        reached += process.returncode == -signal.SIGKILL
        wait_until_gone(process.pid)
    assert reached == len(points)
    assert main(["shard", str(tree), str(out), *OPTIONS]) == 0
    assert contents(out) == uninterrupted


# Two runs of three processes.
@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), pytest.param(signal.SIGTERM, 143, marks=pytest.mark.slow)]
)
def test_a_signal_to_the_group_ends_the_run_with_one_message(
    number: signal.Signals, code: int, tree: Path, uninterrupted: dict[str, str], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    process = start_sharding(tree, out, SLOWLY="0.1")
    while process.poll() is None and not list(out.glob("*.tar")):
        time.sleep(0.01)
    os.killpg(process.pid, number)  # as terminals and schedulers do
    _, errors = process.communicate(timeout=60)
    assert process.returncode == code, errors
    lines = [line for line in errors.splitlines() if not line.startswith("note: ")]
    assert len(lines) == 1
    assert lines[0].startswith(f"bocage: interrupted by {number.name}; finished shards are kept")
    wait_until_gone(process.pid)
    assert not list(out.rglob("*.tmp"))
    assert 0 < len(list(out.glob("*.tar"))) < len(uninterrupted) - 3
    assert main(["shard", str(tree), str(out), *OPTIONS[:2]]) == 0
    assert contents(out) == uninterrupted


# Three processes start.
def test_a_second_ctrl_c_ends_at_once(tree: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    process = start_sharding(tree, out, SLOWLY="20")
    while process.poll() is None and not list(out.glob("*.tmp")):
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGINT)
    time.sleep(0.8)
    assert process.poll() is None  # a worker still encodes its patch
    os.killpg(process.pid, signal.SIGINT)
    assert process.wait(timeout=5) == 130
    process.communicate()
    wait_until_gone(process.pid)


# Three processes start. The kill simulates an out-of-memory kill.
def test_a_killed_worker_ends_the_run_with_one_message(
    tree: Path, uninterrupted: dict[str, str], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    process = start_sharding(tree, out, SLOWLY="0.5")
    while process.poll() is None and not list(out.glob("*.tmp")):
        time.sleep(0.01)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    workers = [child for child in children if b"spawn_main" in Path(f"/proc/{child}/cmdline").read_bytes()]
    assert len(workers) == 2
    os.kill(int(workers[0]), signal.SIGKILL)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 2
    message = errors.splitlines()[-1]
    assert message.startswith(f"bocage: error: {out}: a worker process was killed")
    assert "fewer --workers" in message
    assert "finished shards are kept" in message
    wait_until_gone(process.pid)
    assert main(["shard", str(tree), str(out), *OPTIONS[:2]]) == 0
    assert contents(out) == uninterrupted


# Slow: five runs of three processes.
@pytest.mark.slow
def test_sigkill_while_tables_are_sharded_leaves_nothing_in_the_temporary_folder(tmp_path: Path) -> None:
    data = Path(__file__).parents[1] / "data" / "worldcereal_fr"
    description = Path(__file__).parents[2] / "examples" / "datasets" / "worldcereal.yaml"
    words = [str(data), str(tmp_path / "out"), f"dataset={description}", "--workers", "2"]
    assert main(["shard", str(data), str(tmp_path / "whole"), *words[2:-2]]) == 0
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    for point in ("shard-000000.tar:1:before", "shard-000000.parquet:1:after", "index.arrow:1:before"):
        process = subprocess.Popen(
            [sys.executable, str(SCRIPT), *words],
            env=os.environ | {"KILL_AT": point, "TMPDIR": str(temporary)},
            start_new_session=True,
        )
        assert process.wait(timeout=120) == -signal.SIGKILL
        wait_until_gone(process.pid)
        assert not [path for path in temporary.iterdir() if path.name.startswith("bocage-")]
    assert main(["shard", *words]) == 0
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
