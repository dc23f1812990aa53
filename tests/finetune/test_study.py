"""Label-efficiency studies: configuration, grid, run folders, parallel processes and SLURM script."""

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
from small_study import S2, SMALL, known_shards, runner, sharded, shards, study  # noqa: F401  (two are fixtures)

from bocage import recipes
from bocage.finetune.finetune_config import FinetuneConfig
from bocage.finetune.study.launch import slurm_script
from bocage.finetune.study.run_folders import RunFolders
from bocage.finetune.study.study_config import LabelFraction, StudyConfig, StudyRun, run_config, study_runs
from bocage.shards.errors import InputError
from bocage.tools.main import main


def test_grid_has_every_combination_once_and_learning_rates_only_for_trained_modes(tmp_path: Path) -> None:
    grid = study_runs(study(tmp_path, learning_rates=[1e-4, 1e-3]))
    assert len(grid) == len(set(grid)) == len({run.name for run in grid}) == 2 * ((6 + 3) * 2 + 4)
    # Probes are deterministic, so they have one seed.
    assert {(run.learning_rate, run.seed) for run in grid if run.mode == "knn"} == {(None, 0)}
    assert grid == sorted(grid, key=lambda run: run.fraction)


def test_variants_of_full_fine_tuning_are_tried_with_every_initialization(tmp_path: Path) -> None:
    variants = {"plain": [], "slow": ["encoder_lr_scale=0.2", "head_steps=5"]}
    settings = study(tmp_path, variants=variants, modes=["knn", "frozen", "full"])
    grid = study_runs(settings)
    assert len(grid) == len({run.name for run in grid}) == 2 * ((6 + 3) * 3 + 4)
    assert {run.variant for run in grid if run.mode != "full"} == {""}
    for run in grid:
        config = run_config(settings, run, "out")
        assert (config.encoder_lr_scale, config.head_steps) == ((0.2, 5) if run.variant == "slow" else (0.5, 0))


def test_initializations_differ_only_in_their_encoders(tmp_path: Path) -> None:
    settings = study(tmp_path, modes=["frozen", "full"])
    by_key: dict[tuple[object, ...], list[FinetuneConfig]] = {}
    for run in study_runs(settings):
        config = run_config(settings, run, "out")
        assert (config.train_fraction, config.draw, config.sampling_unit) == (run.fraction, run.draw, "patch")
        assert config.freeze == ([S2] if run.mode == "frozen" else [])
        assert config.encoders == settings.initializations[run.initialization]
        key = (run.mode, run.fraction, run.draw, run.seed)
        by_key.setdefault(key, []).append(replace(config, encoders={}))
    assert all(len(found) == 2 and found[0] == found[1] for found in by_key.values())
    # All labels have one draw, with the seeds of the first draw and one more.
    assert len({found[0].engine.seed for found in by_key.values()}) == 3 * 2 + 1


def test_training_options_do_not_change_probes(tmp_path: Path) -> None:
    few, more = (study(tmp_path, overrides=[*SMALL[:-1], f"engine.steps={steps}"]) for steps in (12, 24))
    for run in study_runs(few):
        same = run_config(few, run, "out") == run_config(more, run, "out")
        assert same == (run.mode == "knn")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"initializations": {}}, "initializations: name at least one"),
        ({"reference": "imagenet"}, "reference=imagenet is not one of initializations: scratch, ours"),
        ({"initializations": {"scratch": {}, "a/b": {}}}, "cannot be a folder name"),
        ({"initializations": {"scratch": {}, "-x": {}}}, "cannot be a folder name"),
        ({"modes": ["fine"]}, "modes: fine; choose from knn, linear, frozen, full"),
        ({"fractions": []}, "fractions: name at least one"),
        ({"fractions": [LabelFraction(fraction=0.1), LabelFraction(fraction=0.1)]}, "fractions: a value is repeated"),
        ({"sampling_unit": "pixel"}, "sampling_unit=pixel"),
        ({"replicates": 10}, "at least 1000"),
        ({"learning_rates": [0.0]}, "learning_rates"),
        ({"variants": {"a/b": []}}, "variants: 'a/b' cannot be part of a folder name"),
        ({"variants": {"a": ["freeze=[X]"]}}, "variants.a: freeze=[X]: the study itself sets freeze"),
        ({"overrides": ["engine.seed=3"]}, "the study itself sets engine.seed"),
        ({"overrides": ["train_fraction=0.3"]}, "the study itself sets train_fraction"),
    ],
)
def test_invalid_studies_raise(tmp_path: Path, changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        study(tmp_path, **changes)
    with pytest.raises(ValueError, match="fraction=1 has only one draw"):
        LabelFraction(fraction=1.0, draws=2)


def test_the_study_overrides_encoders_and_frozen_parts_of_the_recipe(tmp_path: Path) -> None:
    settings = study(tmp_path, finetune="official/lc_a", overrides=[], modes=["frozen", "full"])
    found = {run.mode: run_config(settings, run, "") for run in study_runs(settings) if run.initialization == "scratch"}
    assert [config.encoders for config in found.values()] == [{}, {}]
    assert (found["frozen"].freeze, found["full"].freeze) == (["AERIAL_RGBI"], [])


def test_paths_are_not_parsed_as_yaml(tmp_path: Path) -> None:
    odd = "runs/2024_05 #2: ${x}"
    settings = study(tmp_path, shards="a #b", initializations={"scratch": {}, "ours": {S2: odd}})
    config = run_config(settings, study_runs(settings)[-1], "o: #")
    assert (config.shards, config.output, config.encoders) == ("a #b", "o: #", {S2: odd})


def test_split_all_and_equal_run_names_raise(tmp_path: Path) -> None:
    settings = study(tmp_path, overrides=[*SMALL, "split=all"])
    with pytest.raises(InputError, match="split=all validates on the training patches"):
        run_config(settings, study_runs(settings)[0], "")
    close = study(tmp_path, fractions=[LabelFraction(fraction=0.1234567), LabelFraction(fraction=0.1234568)])
    with pytest.raises(InputError, match="two runs have the name"):
        study_runs(close)


def test_recipe_accepts_additional_initializations() -> None:
    found = recipes.resolve(
        StudyConfig,
        ["recipe=label_efficiency", "shards=s", "initializations.ours.AERIAL_RGBI=runs/x", "reference=imagenet"],
    )
    assert found.initializations == {
        "scratch": {},
        "imagenet": {"AERIAL_RGBI": "imagenet"},
        "ours": {"AERIAL_RGBI": "runs/x"},
    }
    assert run_config(found, study_runs(found)[-1], "out").engine.steps == 20000
    assert {item.fraction: item.draws for item in found.fractions}[0.05] == 5
    assert len(study_runs(found)) == 3 * 346


def executions(settings: StudyConfig) -> dict[str, int]:
    """Number of executions of each run, by name."""
    folders = RunFolders(settings)
    return {run.name: len((folders.path(run) / "executions.txt").read_text()) for run in study_runs(settings)}


@pytest.mark.slow
def test_a_failed_run_is_reported_and_does_not_stop_the_others(tmp_path: Path) -> None:
    settings = study(tmp_path / "out", modes=["full"], fractions=[LabelFraction(fraction=0.1, draws=3)])
    done: list[StudyRun] = []
    failures = runner(settings).run(study_runs(settings), lambda run, _: done.append(run))
    assert {(failure.run.initialization, failure.run.draw) for failure in failures} == {("scratch", 1), ("ours", 1)}
    assert {(failure.status, failure.message) for failure in failures} == {(2, "error: this run fails")}
    assert len(done) == 6
    for failure in failures:
        (RunFolders(settings).path(failure.run) / "repaired").touch()
    assert runner(settings).run(study_runs(settings), lambda *_: None) == []
    # Finished runs were not executed again.
    assert sorted(executions(settings).values()) == [1, 1, 1, 1, 2, 2]


def test_processes_share_the_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = study(tmp_path / "out", modes=["full"], fractions=[LabelFraction(fraction=0.1, draws=1, seeds=3)])
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,7")
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setenv("STUDY_SECONDS", "0.3")
    assert runner(settings).run(study_runs(settings), lambda *_: None) == []
    folders = RunFolders(settings)
    found = [json.loads((folders.path(run) / "metrics.json").read_text()) for run in study_runs(settings)]
    assert {place["CUDA_VISIBLE_DEVICES"] for place in found} == {"4", "7"}
    threads = max(1, len(os.sched_getaffinity(0)) // 2)
    assert {(place["OMP_NUM_THREADS"], place["threads"]) for place in found} == {(str(threads), threads)}


# Some seconds: a process that is stopped on its way, as a cluster does, which signals it alone or all of its job.
@pytest.mark.slow
@pytest.mark.parametrize("stop", [os.kill, pytest.param(os.killpg, marks=pytest.mark.slow)])
def test_a_stopped_study_saves_its_runs_and_resumes(tmp_path: Path, stop: Callable[[int, int], None]) -> None:
    settings = study(tmp_path / "out", modes=["full"], fractions=[LabelFraction(fraction=0.1, draws=1, seeds=3)])
    script = tmp_path / "study.py"
    script.write_text(
        "import sys\n"
        "sys.path.insert(0, sys.argv[1])\n"
        "from pathlib import Path\n"
        "from small_study import runner, study\n"
        "from bocage.finetune.study.study_config import LabelFraction, study_runs\n"
        "from bocage.tools.cli.interrupts import InterruptedCommand, Interrupts\n"
        "def main():\n"
        "    output = Path(sys.argv[2]) / 'out'\n"
        "    settings = study(output, modes=['full'], fractions=[LabelFraction(fraction=0.1, draws=1, seeds=3)])\n"
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
    folders, grid = RunFolders(settings), study_runs(settings)
    end = time.monotonic() + 60
    while sum((folders.path(run) / "executions.txt").exists() for run in grid) < 2 and time.monotonic() < end:
        time.sleep(0.1)
    time.sleep(0.5)  # the handler of the stand-in is set after its first line
    stop(process.pid, signal.SIGTERM)
    assert process.wait(30) == 143
    saved = [run for run in grid if (folders.path(run) / "checkpoint").exists()]
    assert len(saved) == 2
    assert not any(folders.is_finished(run) for run in grid)
    assert runner(settings).run(grid, lambda *_: None) == []
    assert all(folders.is_finished(run) for run in grid)


# Takes seconds: the runs outlive the fork server.
@pytest.mark.slow
def test_the_fork_server_may_be_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = study(tmp_path / "out", modes=["full"], fractions=[LabelFraction(fraction=0.1, draws=1, seeds=3)])
    monkeypatch.setenv("STUDY_SECONDS", "2")
    killed: list[psutil.Process] = []

    def kill() -> None:
        while not killed and not list((tmp_path / "out" / "runs").glob("*/executions.txt")):
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
    assert all("could not be started" in failure.message for failure in failures)
    assert len(failures) <= 2
    assert runner(settings).run(study_runs(settings), lambda *_: None) == []
    # Runs that were running finished and were not executed again.
    assert set(executions(settings).values()) == {1}


@pytest.mark.parametrize(("variable", "threads"), [("3,1", 3), ("", None), ("many", None)])
def test_numbers_of_threads_are_read_as_openmp_reads_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variable: str, threads: int | None
) -> None:
    settings = study(
        tmp_path / "out", modes=["full"], initializations={"scratch": {}}, fractions=[LabelFraction(fraction=0.1)]
    )
    monkeypatch.setenv("OMP_NUM_THREADS", variable)
    assert runner(settings, processes=1).run(study_runs(settings), lambda *_: None) == []
    found = json.loads((RunFolders(settings).path(study_runs(settings)[0]) / "metrics.json").read_text())
    assert found["threads"] == (threads or len(os.sched_getaffinity(0)))


def test_a_folder_of_another_study_is_refused(tmp_path: Path) -> None:
    encoder = tmp_path / "encoder"
    encoder.mkdir()
    (encoder / "model.safetensors").write_bytes(b"weights")
    settings = study(tmp_path / "out", initializations={"scratch": {}, "ours": {S2: str(encoder)}}, modes=["full"])
    run = study_runs(settings)[1]
    RunFolders(settings).prepare(run)
    RunFolders(settings).prepare(run)
    # What does not matter may change: how often it logs, where shards and encoders lie.
    moved = tmp_path / "moved"
    shutil.copytree(encoder, moved)
    shutil.copytree(settings.shards, tmp_path / "shards")
    overrides = [*SMALL, "engine.log_every=7", "workers=1"]
    same = replace(
        settings,
        initializations={"scratch": {}, "ours": {S2: str(moved)}},
        overrides=overrides,
        shards=str(tmp_path / "shards"),
    )
    RunFolders(same).prepare(run)
    for changes, keys in (
        ({"overrides": [*SMALL, "engine.optimizer.weight_decay=0.5"]}, "engine.optimizer.weight_decay"),
        ({"overrides": [*SMALL, "engine.steps=13"]}, "engine.steps"),
        ({"missing": True}, "missing"),
        ({"shards": str(sharded(tmp_path / "other", seed=4))}, "shards"),
    ):
        with pytest.raises(InputError, match=rf"another study \({keys} differ\)"):
            RunFolders(replace(settings, **changes)).prepare(run)
    (tmp_path / "retrained").mkdir()
    (tmp_path / "retrained" / "model.safetensors").write_bytes(b"other weights")
    initializations = {"scratch": {}, "ours": {S2: str(tmp_path / "retrained")}}
    with pytest.raises(InputError, match=r"another study \(encoders differ\)"):
        RunFolders(replace(settings, initializations=initializations)).prepare(run)


def test_invalid_overrides_and_encoders_fail_before_any_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = tmp_path / "study.yaml"

    def written(**changes: object) -> list[str]:
        settings = {
            "shards": os.environ["STUDY_SHARDS"],
            "output": str(tmp_path / "out"),
            "finetune": "finetune_quickstart",
            "overrides": SMALL,
            "initializations": {"scratch": {}},
            "fractions": [{"fraction": 0.5}],
        }
        recipe.write_text(json.dumps({**settings, **changes}))
        return ["study", "run", f"recipe={recipe}", "--slurm", str(tmp_path / "array.sh")]

    for changes, message in (
        ({"overrides": [*SMALL, "engine.stepps=3"]}, "did you mean 'engine.steps'?"),
        ({"initializations": {"scratch": {}, "ours": {S2: "nowhere"}}}, "encoders.SENTINEL2_TS=nowhere"),
        ({"initializations": {"scratch": {}, "ours": {"SPOT_RGBI": "nowhere"}}}, "encoders: SPOT_RGBI not among"),
        ({"shards": "nowhere"}, "nowhere: no such folder"),
    ):
        assert main(written(**changes)) == 2
        assert message in capsys.readouterr().err
    assert not (tmp_path / "array.sh").exists()
    words = written()
    assert main([*words[:-1], str(tmp_path / "no" / "array.sh")]) == 2
    assert "array.sh: cannot be written" in capsys.readouterr().err
    assert main([*words, "--sbatch", "gpus=1", "time=04:00"]) == 0
    assert "#SBATCH --time=04:00\n" in (tmp_path / "array.sh").read_text()
    assert not (tmp_path / "out").exists()


def test_the_slurm_array_has_the_unfinished_runs(tmp_path: Path) -> None:
    settings = study(tmp_path, modes=["full"], fractions=[LabelFraction(fraction=0.1)])
    folders, (first, second) = RunFolders(settings), study_runs(settings)
    folders.prepare(first)
    (folders.path(first) / "metrics.json").write_text("{}")
    text = slurm_script(folders, study_runs(settings), "bocage", ["recipe=a b.yaml"], ["--gpus=1"])
    script = tmp_path / "array.sh"
    script.write_text(text)
    assert "#SBATCH --array=0-0\n" in text
    assert "#SBATCH --gpus=1\n" in text
    environment = {**os.environ, "SLURM_ARRAY_TASK_ID": "0", "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    (tmp_path / "srun").write_text('#!/bin/sh\nprintf "%s|" "$@"\n')
    (tmp_path / "srun").chmod(0o755)
    ran = subprocess.run(["bash", str(script)], env=environment, capture_output=True, text=True, check=True)
    assert ran.stdout == f"bocage|study|run|recipe=a b.yaml|--run={second.name}|"
    (folders.path(second)).mkdir(parents=True)
    (folders.path(second) / "metrics.json").write_text("{}")
    with pytest.raises(InputError, match="all runs are finished"):
        slurm_script(folders, study_runs(settings), "bocage", [], [])
