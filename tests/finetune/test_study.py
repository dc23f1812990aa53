"""Studies of few labels: the grid, and the processes that run it."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
from small_study import S2, SMALL, known_shards, sharded, shards, stand_in, study  # noqa: F401  (two are fixtures)

from bocage import recipes
from bocage.finetune.config import FinetuneConfig
from bocage.finetune.study.grid import LabelFraction, StudyConfig, StudyRun, run_config, study_runs
from bocage.finetune.study.runner import Runner
from bocage.finetune.study.runs import CellFolders, slurm_script
from bocage.shards.errors import InputError
from bocage.tools.main import main


def test_the_grid_has_every_combination_once_and_rates_for_trained_modes_alone(tmp_path: Path) -> None:
    grid = study_runs(study(tmp_path, learning_rates=[1e-4, 1e-3]))
    assert len(grid) == len(set(grid)) == len({cell.name for cell in grid}) == 2 * ((6 + 3) * 2 + 4)
    # Probes of the same features give the same again.
    assert {(cell.rate, cell.seed) for cell in grid if cell.mode == "knn"} == {(None, 0)}
    assert grid == sorted(grid, key=lambda cell: cell.fraction)


def test_starts_share_draws_seeds_and_everything_but_their_encoders(tmp_path: Path) -> None:
    settings = study(tmp_path, modes=["frozen", "full"])
    by_run: dict[tuple[object, ...], list[FinetuneConfig]] = {}
    for cell in study_runs(settings):
        config = run_config(settings, cell, "out")
        assert (config.train_fraction, config.draw, config.track) == (cell.fraction, cell.draw, "patch")
        assert config.freeze == ([S2] if cell.mode == "frozen" else [])
        assert config.encoders == settings.starts[cell.start]
        run = (cell.mode, cell.fraction, cell.draw, cell.seed)
        by_run.setdefault(run, []).append(replace(config, encoders={}))
    assert all(len(found) == 2 and found[0] == found[1] for found in by_run.values())
    # Of all labels there is one draw: its seeds are those of the first draw, and one more.
    assert len({found[0].engine.seed for found in by_run.values()}) == 3 * 2 + 1


def test_what_is_said_of_training_makes_no_other_cells_of_probes(tmp_path: Path) -> None:
    few, more = (study(tmp_path, words=[*SMALL[:-1], f"engine.steps={steps}"]) for steps in (12, 24))
    for cell in study_runs(few):
        same = run_config(few, cell, "out") == run_config(more, cell, "out")
        assert same == (cell.mode == "knn")


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"starts": {}}, "starts: name at least one"),
        ({"reference": "imagenet"}, "reference=imagenet is not one of starts: scratch, ours"),
        ({"starts": {"scratch": {}, "a/b": {}}}, "names become folders"),
        ({"starts": {"scratch": {}, "-x": {}}}, "names become folders"),
        ({"modes": ["fine"]}, "modes: fine; there are knn, linear, frozen, full"),
        ({"shares": []}, "shares: name at least one"),
        ({"shares": [LabelFraction(fraction=0.1), LabelFraction(fraction=0.1)]}, "shares: each can be given once"),
        ({"track": "pixel"}, "track=pixel"),
        ({"replicates": 10}, "at least 1000"),
        ({"learning_rates": [0.0]}, "learning_rates"),
        ({"words": ["engine.seed=3"]}, "the study itself gives engine.seed"),
        ({"words": ["train_fraction=0.3"]}, "the study itself gives train_fraction"),
    ],
)
def test_impossible_studies_are_named(tmp_path: Path, changes: dict[str, object], sentence: str) -> None:
    with pytest.raises(ValueError, match=re.escape(sentence)):
        study(tmp_path, **changes)
    with pytest.raises(ValueError, match="of fraction=1 there is one draw"):
        LabelFraction(fraction=1.0, draws=2)


def test_scratch_is_scratch_and_full_is_full_whatever_the_recipe_says(tmp_path: Path) -> None:
    settings = study(tmp_path, finetune="official/lc_a", words=[], modes=["frozen", "full"])
    found = {cell.mode: run_config(settings, cell, "") for cell in study_runs(settings) if cell.start == "scratch"}
    assert [config.encoders for config in found.values()] == [{}, {}]
    assert (found["frozen"].freeze, found["full"].freeze) == (["AERIAL_RGBI"], [])


def test_values_are_not_read_as_yaml(tmp_path: Path) -> None:
    odd = "runs/2024_05 #2: ${x}"
    settings = study(tmp_path, shards="a #b", starts={"scratch": {}, "ours": {S2: odd}})
    config = run_config(settings, study_runs(settings)[-1], "o: #")
    assert (config.shards, config.output, config.encoders) == ("a #b", "o: #", {S2: odd})


def test_studies_that_would_say_nothing_are_refused(tmp_path: Path) -> None:
    settings = study(tmp_path, words=[*SMALL, "split=all"])
    with pytest.raises(InputError, match="split=all validates on what is trained on"):
        run_config(settings, study_runs(settings)[0], "")
    close = study(tmp_path, shares=[LabelFraction(fraction=0.1234567), LabelFraction(fraction=0.1234568)])
    with pytest.raises(InputError, match="two cells have the name"):
        study_runs(close)


def test_the_recipe_resolves_and_takes_further_starts() -> None:
    found = recipes.resolve(
        StudyConfig, ["recipe=label_efficiency", "shards=s", "starts.ours.AERIAL_RGBI=runs/x", "reference=imagenet"]
    )
    assert found.starts == {"scratch": {}, "imagenet": {"AERIAL_RGBI": "imagenet"}, "ours": {"AERIAL_RGBI": "runs/x"}}
    assert run_config(found, study_runs(found)[-1], "out").engine.steps == 20000
    assert {share.fraction: share.draws for share in found.shares}[0.05] == 5
    assert len(study_runs(found)) == 3 * 198


def runner(settings: StudyConfig, processes: int = 2) -> Runner:
    return Runner(CellFolders(settings), stand_in, processes)


def starts(settings: StudyConfig) -> dict[str, int]:
    folders = CellFolders(settings)
    return {cell.name: len((folders.of(cell) / "starts.txt").read_text()) for cell in study_runs(settings)}


def test_a_cell_that_fails_does_not_stop_the_rest_and_is_named(tmp_path: Path) -> None:
    settings = study(tmp_path / "out", modes=["full"], shares=[LabelFraction(fraction=0.1, draws=3)])
    told: list[StudyRun] = []
    failures = runner(settings).run(study_runs(settings), lambda cell, _: told.append(cell))
    assert {(failure.cell.start, failure.cell.draw) for failure in failures} == {("scratch", 1), ("ours", 1)}
    assert {(failure.status, failure.line) for failure in failures} == {(2, "bocage: error: this one cannot")}
    assert len(told) == 6
    for failure in failures:
        (CellFolders(settings).of(failure.cell) / "repaired").touch()
    assert runner(settings).run(study_runs(settings), lambda *_: None) == []
    # Finished ones were not run again.
    assert sorted(starts(settings).values()) == [1, 1, 1, 1, 2, 2]


def test_processes_share_the_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = study(tmp_path / "out", modes=["full"], shares=[LabelFraction(fraction=0.1, draws=1, seeds=3)])
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,7")
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setenv("STUDY_SECONDS", "0.3")
    assert runner(settings).run(study_runs(settings), lambda *_: None) == []
    folders = CellFolders(settings)
    found = [json.loads((folders.of(cell) / "metrics.json").read_text()) for cell in study_runs(settings)]
    assert {place["CUDA_VISIBLE_DEVICES"] for place in found} == {"4", "7"}
    threads = max(1, len(os.sched_getaffinity(0)) // 2)
    assert {(place["OMP_NUM_THREADS"], place["threads"]) for place in found} == {(str(threads), threads)}


# Some seconds: a process that is stopped on its way, as a cluster does, which signals it alone or all of its job.
@pytest.mark.parametrize("stop", [os.kill, pytest.param(os.killpg, marks=pytest.mark.slow)])
def test_a_stopped_study_lets_its_cells_save_and_goes_on(tmp_path: Path, stop: Callable[[int, int], None]) -> None:
    settings = study(tmp_path / "out", modes=["full"], shares=[LabelFraction(fraction=0.1, draws=1, seeds=3)])
    script = tmp_path / "study.py"
    script.write_text(
        "import sys\n"
        "sys.path.insert(0, sys.argv[1])\n"
        "from pathlib import Path\n"
        "from test_study import runner\n"
        "from small_study import study\n"
        "from bocage.finetune.study.grid import LabelFraction, study_runs\n"
        "from bocage.tools.cli.interrupts import InterruptedCommand, Interrupts\n"
        "def main():\n"
        "    output = Path(sys.argv[2]) / 'out'\n"
        "    settings = study(output, modes=['full'], shares=[LabelFraction(fraction=0.1, draws=1, seeds=3)])\n"
        "    try:\n"
        "        with Interrupts():\n"
        "            runner(settings).run(study_runs(settings), lambda *_: None)\n"
        "    except InterruptedCommand as stop:\n"
        "        return stop.exit_code\n"
        "if __name__ == '__main__':\n"
        "    sys.exit(main())\n"
    )
    path = str(Path(__file__).parents[1] / "support")
    process = subprocess.Popen(
        [sys.executable, str(script), path, str(tmp_path)],
        env={**os.environ, "PYTHONPATH": path, "STUDY_SECONDS": "60"},
        start_new_session=True,
    )
    folders, grid = CellFolders(settings), study_runs(settings)
    end = time.monotonic() + 60
    while sum((folders.of(cell) / "starts.txt").exists() for cell in grid) < 2 and time.monotonic() < end:
        time.sleep(0.1)
    time.sleep(0.5)  # the handler of the stand-in is set after its first line
    stop(process.pid, signal.SIGTERM)
    assert process.wait(30) == 143
    saved = [cell for cell in grid if (folders.of(cell) / "checkpoint").exists()]
    assert len(saved) == 2
    assert not any(folders.finished(cell) for cell in grid)
    assert runner(settings).run(grid, lambda *_: None) == []
    assert all(folders.finished(cell) for cell in grid)


# Some seconds: cells that outlive what they were forked from.
def test_what_cells_are_forked_from_may_be_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = study(tmp_path / "out", modes=["full"], shares=[LabelFraction(fraction=0.1, draws=1, seeds=3)])
    monkeypatch.setenv("STUDY_SECONDS", "2")
    killed = []

    def kill() -> None:
        while not killed and not list((tmp_path / "out" / "cells").glob("*/starts.txt")):
            time.sleep(0.05)
        for process in psutil.Process().children():
            if any("multiprocessing.forkserver" in word for word in process.cmdline()):
                process.kill()
                killed.append(process)

    thread = threading.Thread(target=kill)
    thread.start()
    failures = runner(settings).run(study_runs(settings), lambda *_: None)
    thread.join()
    assert killed
    assert all("could not be started" in failure.line for failure in failures)
    assert len(failures) <= 2
    assert runner(settings).run(study_runs(settings), lambda *_: None) == []
    # None of those that were running ran again.
    assert set(starts(settings).values()) == {1}


@pytest.mark.parametrize(("variable", "threads"), [("3,1", 3), ("", None), ("many", None)])
def test_numbers_of_threads_are_read_as_openmp_reads_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variable: str, threads: int | None
) -> None:
    settings = study(tmp_path / "out", modes=["full"], starts={"scratch": {}}, shares=[LabelFraction(fraction=0.1)])
    monkeypatch.setenv("OMP_NUM_THREADS", variable)
    assert runner(settings, processes=1).run(study_runs(settings), lambda *_: None) == []
    found = json.loads((CellFolders(settings).of(study_runs(settings)[0]) / "metrics.json").read_text())
    assert found["threads"] == (threads or len(os.sched_getaffinity(0)))


def test_a_folder_of_another_study_is_refused(tmp_path: Path) -> None:
    encoder = tmp_path / "encoder"
    encoder.mkdir()
    (encoder / "model.safetensors").write_bytes(b"weights")
    settings = study(tmp_path / "out", starts={"scratch": {}, "ours": {S2: str(encoder)}}, modes=["full"])
    cell = study_runs(settings)[1]
    CellFolders(settings).prepare(cell)
    CellFolders(settings).prepare(cell)
    # What does not matter may change: how often it logs, where shards and encoders lie.
    moved = tmp_path / "moved"
    shutil.copytree(encoder, moved)
    shutil.copytree(settings.shards, tmp_path / "shards")
    words = [*SMALL, "engine.log_every=7", "workers=1"]
    same = replace(
        settings, starts={"scratch": {}, "ours": {S2: str(moved)}}, words=words, shards=str(tmp_path / "shards")
    )
    CellFolders(same).prepare(cell)
    for changes, keys in (
        ({"words": [*SMALL, "engine.optimizer.weight_decay=0.5"]}, "engine.optimizer.weight_decay"),
        ({"words": [*SMALL, "engine.steps=13"]}, "engine.steps"),
        ({"missing": True}, "missing"),
        ({"shards": str(sharded(tmp_path / "other", seed=4))}, "shards"),
    ):
        with pytest.raises(InputError, match=rf"another study \({keys} differ\)"):
            CellFolders(replace(settings, **changes)).prepare(cell)
    (tmp_path / "retrained").mkdir()
    (tmp_path / "retrained" / "model.safetensors").write_bytes(b"other weights")
    starts = {"scratch": {}, "ours": {S2: str(tmp_path / "retrained")}}
    with pytest.raises(InputError, match=r"another study \(encoders differ\)"):
        CellFolders(replace(settings, starts=starts)).prepare(cell)


def test_wrong_words_and_encoders_are_found_before_any_cell_runs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = tmp_path / "study.yaml"

    def written(**changes: object) -> list[str]:
        settings = {
            "shards": os.environ["STUDY_SHARDS"],
            "output": str(tmp_path / "out"),
            "finetune": "finetune_quickstart",
            "words": SMALL,
            "starts": {"scratch": {}},
            "shares": [{"fraction": 0.5}],
        }
        recipe.write_text(json.dumps({**settings, **changes}))
        return ["study", "run", f"recipe={recipe}", "--slurm", str(tmp_path / "array.sh")]

    for changes, sentence in (
        ({"words": [*SMALL, "engine.stepps=3"]}, "did you mean 'engine.steps'?"),
        ({"starts": {"scratch": {}, "ours": {S2: "nowhere"}}}, "encoders.SENTINEL2_TS=nowhere"),
        ({"starts": {"scratch": {}, "ours": {"SPOT_RGBI": "nowhere"}}}, "encoders: SPOT_RGBI not among"),
        ({"shards": "nowhere"}, "nowhere: no such folder"),
    ):
        assert main(written(**changes)) == 2
        assert sentence in capsys.readouterr().err
    assert not (tmp_path / "array.sh").exists()
    words = written()
    assert main([*words[:-1], str(tmp_path / "no" / "array.sh")]) == 2
    assert "array.sh: cannot be written" in capsys.readouterr().err
    assert main([*words, "--sbatch", "gpus=1", "time=04:00"]) == 0
    assert "#SBATCH --time=04:00\n" in (tmp_path / "array.sh").read_text()
    assert not (tmp_path / "out").exists()


def test_the_slurm_array_runs_what_is_missing(tmp_path: Path) -> None:
    settings = study(tmp_path, modes=["full"], shares=[LabelFraction(fraction=0.1)])
    folders, (first, second) = CellFolders(settings), study_runs(settings)
    folders.prepare(first)
    (folders.of(first) / "metrics.json").write_text("{}")
    text = slurm_script(folders, study_runs(settings), "bocage", ["recipe=a b.yaml"], ["--gpus=1"])
    script = tmp_path / "array.sh"
    script.write_text(text)
    assert "#SBATCH --array=0-0\n" in text
    assert "#SBATCH --gpus=1\n" in text
    environment = {**os.environ, "SLURM_ARRAY_TASK_ID": "0", "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    (tmp_path / "srun").write_text('#!/bin/sh\nprintf "%s|" "$@"\n')
    (tmp_path / "srun").chmod(0o755)
    ran = subprocess.run(["bash", str(script)], env=environment, capture_output=True, text=True, check=True)
    assert ran.stdout == f"bocage|study|run|recipe=a b.yaml|--cell={second.name}|"
    (folders.of(second)).mkdir(parents=True)
    (folders.of(second) / "metrics.json").write_text("{}")
    with pytest.raises(InputError, match="all cells are finished"):
        slurm_script(folders, study_runs(settings), "bocage", [], [])
