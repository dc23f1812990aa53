"""Steps of demonstrations: trainings side by side, skipped when they are finished, stopped when one fails."""

import io
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from rich.console import Console

from bocage import recipes
from bocage.finetune.study.study_config import StudyConfig, run_config, study_runs
from bocage.shards.errors import InputError
from bocage.ssl.pretrain_config import PretrainConfig
from bocage.tools.cli import study_demo
from bocage.tools.cli.steps import DemoSteps, TrainingProcess


def job(folder: Path, name: str, *arguments: str) -> TrainingProcess:
    return TrainingProcess(name, name, ("module",), arguments, folder / name, "done", 3)


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


def test_jobs_run_once_and_are_printed(tmp_path: Path) -> None:
    printed = io.StringIO()
    steps = DemoSteps(Console(file=printed, width=200))
    jobs = [job(tmp_path, name, str(tmp_path / name), "0", "0") for name in ("one", "two", "three")]
    steps.side_by_side(jobs, 2)
    assert all((item.output / "done").exists() for item in jobs)
    assert f"$ two {tmp_path / 'two'} 0 0" in printed.getvalue()
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
        DemoSteps(Console(file=io.StringIO())).side_by_side(jobs, 2)
    assert time.monotonic() - began < 30
    assert jobs[1].log.read_text() == "it says why\n"
    assert not (tmp_path / "slow" / "done").exists()


def test_a_folder_of_other_arguments_is_refused(tmp_path: Path) -> None:
    steps = DemoSteps(Console(file=io.StringIO()))
    steps.side_by_side([job(tmp_path, "one", str(tmp_path / "one"), "0", "0")], 1)
    with pytest.raises(InputError, match=r"one holds another run, see .*one\.command: delete it"):
        steps.side_by_side([job(tmp_path, "one", str(tmp_path / "one"), "0", "0.1")], 1)


# Some seconds: processes that are stopped on their way. Signalled alone, they have to stop their children themselves.
@pytest.mark.parametrize("call", ["steps.command('module', 'module', arguments)", "steps.side_by_side([job], 1)"])
def test_stopped_steps_stop_their_children_first(tmp_path: Path, call: str) -> None:
    (tmp_path / "steps_run.py").write_text(
        "import sys\n"
        "from pathlib import Path\n"
        "from rich.console import Console\n"
        "from bocage.tools.cli.steps import DemoSteps, TrainingProcess, interruptible\n"
        "folder = Path(sys.argv[1])\n"
        "steps, arguments = DemoSteps(Console()), (str(folder), '0', '60')\n"
        "job = TrainingProcess('one', 'one', ('module',), arguments, folder, 'done', 3)\n"
        f"sys.exit(interruptible(lambda: {call}))\n"
    )
    folder = tmp_path / "one"
    process = subprocess.Popen([sys.executable, str(tmp_path / "steps_run.py"), str(folder)], stdout=subprocess.PIPE)
    while not (folder / "began").exists() and process.poll() is None:
        time.sleep(0.05)
    (child,) = psutil.Process(process.pid).children()
    process.terminate()
    assert process.wait(30) == 143
    assert not child.is_running()
    assert process.stdout is not None
    assert b"stopped; run the same command to resume" in process.stdout.read()


def test_the_small_study_is_what_its_recipes_say() -> None:
    for demo in study_demo.demo_studies():
        study = recipes.resolve(StudyConfig, [f"recipe={demo.recipe}"])
        for run in study_runs(study):
            assert run_config(study, run, "out").modalities == [demo.sensors[0]]
        for objective in study_demo.OBJECTIVES:
            arguments = study_demo.pretraining_process(demo, objective, Path("shards"), Path("out")).arguments
            config = recipes.resolve(PretrainConfig, list(arguments))
            assert config.modalities == list(demo.sensors)
            assert config.engine.steps == demo.steps
            assert config.weights["masked"] + config.weights["contrastive"] > 0
    assert [demo.sensors for demo in study_demo.demo_studies()] == [
        ("AERIAL_RGBI", "SPOT_RGBI"),
        ("SENTINEL2_TS", "SENTINEL1-ASC_TS"),
    ]


def test_only_figures_and_csv_tables_are_copied_from_a_report(tmp_path: Path) -> None:
    report = tmp_path / "report"
    report.mkdir()
    for name in ("report.html", "tables.tex", "runs.csv", "curves.svg", "curves.png"):
        (report / name).write_text(name)
    study_demo._copy_figures(report, tmp_path / "docs" / "crops")
    copied = sorted(path.name for path in (tmp_path / "docs" / "crops").iterdir())
    assert copied == ["curves.png", "curves.svg", "runs.csv"]


def test_progress_is_what_the_training_records(tmp_path: Path) -> None:
    item = job(tmp_path, "one")
    assert item.last_step() == 0
    item.output.mkdir()
    (item.output / "metrics.jsonl").write_text('{"step": 10}\n{"step": 20}\n{"ste')  # while a line is written
    assert item.last_step() == 20
