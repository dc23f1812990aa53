"""Steps of demonstrations: trainings side by side, skipped when they are finished, stopped when one fails."""

import io
import time
from pathlib import Path

import pytest
from rich.console import Console

from bocage.shards.errors import InputError
from bocage.tools.steps import Job, Steps


def job(folder: Path, name: str, *words: str) -> Job:
    return Job(name, name, ("module",), words, folder / name, "done", 3)


@pytest.fixture(autouse=True)
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """``python -m module FOLDER STATUS SECONDS``, in place of a training."""
    (tmp_path / "module.py").write_text(
        "import pathlib, sys, time\n"
        "folder = pathlib.Path(sys.argv[1])\n"
        "folder.mkdir(exist_ok=True)\n"
        "(folder / 'began').touch()\n"
        "print('it says why')\n"
        "time.sleep(float(sys.argv[3]))\n"
        "if sys.argv[2] == '0':\n"
        "    (folder / 'done').touch()\n"
        "sys.exit(int(sys.argv[2]))\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))


def test_jobs_run_once_and_are_told(tmp_path: Path) -> None:
    told = io.StringIO()
    steps = Steps(Console(file=told, width=200))
    jobs = [job(tmp_path, name, str(tmp_path / name), "0", "0") for name in ("one", "two", "three")]
    steps.side_by_side(jobs, 2)
    assert all((item.output / "done").exists() for item in jobs)
    assert f"$ two {tmp_path / 'two'} 0 0" in told.getvalue()
    (tmp_path / "one" / "began").unlink()
    steps.side_by_side(jobs, 2)
    assert not (tmp_path / "one" / "began").exists()


# Two seconds of waiting for processes.
def test_one_that_fails_stops_the_others_and_names_its_log(tmp_path: Path) -> None:
    jobs = [
        job(tmp_path, "slow", str(tmp_path / "slow"), "0", "60"),
        job(tmp_path, "bad", str(tmp_path / "bad"), "3", "1"),
    ]
    began = time.monotonic()
    with pytest.raises(InputError, match=rf"bad ended with status 3: see {jobs[1].log}"):
        Steps(Console(file=io.StringIO())).side_by_side(jobs, 2)
    assert time.monotonic() - began < 30
    assert jobs[1].log.read_text() == "it says why\n"
    assert not (tmp_path / "slow" / "done").exists()


def test_progress_is_what_the_training_records(tmp_path: Path) -> None:
    item = job(tmp_path, "one")
    assert item.last_step() == 0
    item.output.mkdir()
    (item.output / "metrics.jsonl").write_text('{"step": 10}\n{"step": 20}\n{"ste')  # while a line is written
    assert item.last_step() == 20
