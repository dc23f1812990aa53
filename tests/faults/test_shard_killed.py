"""``bocage shard`` that is killed at random points or asked to stop: no leftovers, and the same bytes in the end."""

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


def started(tree: Path, out: Path, **environment: str) -> subprocess.Popen[str]:
    """A run with two workers in a session, hence process group, of its own."""
    return subprocess.Popen(
        [sys.executable, str(SCRIPT), str(tree), str(out), *OPTIONS],
        env=os.environ | environment,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def wait_until_gone(group: int) -> None:
    """Until no process of the group is left."""
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
def undisturbed(tree: Path) -> dict[str, str]:
    out = tree.parent / "whole"
    assert main(["shard", str(tree), str(out), *OPTIONS[:2]]) == 0
    found = contents(out)
    assert len(found) == len(KEYS) + 3  # a patch is larger than a shard may be
    return found


# Each run starts three processes with their imports: three runs, 8 s, or eleven, 30 s.
@pytest.mark.parametrize("kills", [3, pytest.param(10, marks=pytest.mark.slow)])
def test_sigkill_at_random_points_then_resume(
    kills: int, tree: Path, undisturbed: dict[str, str], tmp_path: Path
) -> None:
    generator = random.Random(kills)
    out = tmp_path / "out"
    for seconds in (generator.uniform(0.3, 2), generator.uniform(0.01, 0.1)):
        process = started(tree, out, SLOWLY="0.4")  # so that the points below are still to come
        if seconds < 0.3:  # as soon as something is being written
            while process.poll() is None and not list(out.glob("*.tmp")):
                time.sleep(0.002)
        time.sleep(seconds)
        os.killpg(process.pid, signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
        process.communicate()
        wait_until_gone(process.pid)
    # Far enough apart that the other worker has not passed the next one.
    missing = [number for number in range(len(KEYS)) if not (out / f"shard-{number:06d}.tar").exists()][1::4][:4]
    extensions = generator.sample(["tar", "tar", "parquet", "parquet"], 4)
    points = [
        f"shard-{number:06d}.{extension}:1:{generator.choice(('before', 'after'))}"
        for number, extension in zip(missing, extensions)
    ]
    # Half-way through the manifest; the last is a folder that is complete but for the parts that should have gone.
    points += ["manifest.parquet:1:before", "index.arrow:1:after", "dataset.json:1:before", "dataset.json:1:after"]
    assert len(points) == 8
    points = sorted(generator.sample(points, kills - 2), key=points.index)
    reached = 0
    for point in points:
        process = started(tree, out, KILL_AT=point, SLOWLY="0.15")  # workers keep pace with each other
        _, errors = process.communicate(timeout=120)
        assert process.returncode in (0, -signal.SIGKILL), errors
        reached += process.returncode == -signal.SIGKILL
        wait_until_gone(process.pid)
    assert reached == len(points)
    assert main(["shard", str(tree), str(out), *OPTIONS]) == 0
    assert contents(out) == undisturbed


# Two runs of three processes.
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_to_the_whole_group_ends_it_in_one_sentence(
    number: signal.Signals, code: int, tree: Path, undisturbed: dict[str, str], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    process = started(tree, out, SLOWLY="0.1")
    while process.poll() is None and not list(out.glob("*.tar")):
        time.sleep(0.01)
    os.killpg(process.pid, number)  # as terminals and schedulers do
    _, errors = process.communicate(timeout=60)
    assert process.returncode == code, errors
    lines = [line for line in errors.splitlines() if not line.startswith("note: ")]
    assert lines == [
        f"bocage: interrupted by {number.name}; finished shards are kept, the same command goes on from there"
    ]
    wait_until_gone(process.pid)
    assert not list(out.rglob("*.tmp"))
    assert 0 < len(list(out.glob("*.tar"))) < len(undisturbed) - 3
    assert main(["shard", str(tree), str(out), *OPTIONS[:2]]) == 0
    assert contents(out) == undisturbed


# Three processes start.
def test_a_second_ctrl_c_ends_at_once(tree: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    process = started(tree, out, SLOWLY="20")
    while process.poll() is None and not list(out.glob("*.tmp")):
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGINT)
    time.sleep(0.8)
    assert process.poll() is None  # a worker is still at its patch
    os.killpg(process.pid, signal.SIGINT)
    assert process.wait(timeout=5) == 130
    process.communicate()
    wait_until_gone(process.pid)


# Three processes start. As when the system runs out of memory.
def test_a_worker_that_is_killed_ends_the_run_in_one_sentence(
    tree: Path, undisturbed: dict[str, str], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    process = started(tree, out, SLOWLY="0.5")
    while process.poll() is None and not list(out.glob("*.tmp")):
        time.sleep(0.01)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    workers = [child for child in children if b"spawn_main" in Path(f"/proc/{child}/cmdline").read_bytes()]
    assert len(workers) == 2
    os.kill(int(workers[0]), signal.SIGKILL)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 2
    assert errors.splitlines()[-1] == (
        f"bocage: error: {out}: a worker process was killed, perhaps for want of memory; run the same command with "
        "fewer --workers; finished shards are kept"
    )
    wait_until_gone(process.pid)
    assert main(["shard", str(tree), str(out), *OPTIONS[:2]]) == 0
    assert contents(out) == undisturbed
