"""Execute one run of a study in this process: fine-tune or probe, and score it."""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from bocage.finetune.evaluation.evaluate import (
    classification_report,
    compute_confusions,
    rows_with_all_modalities,
    sensor_ablations,
)
from bocage.finetune.finetune_config import FinetuneConfig
from bocage.finetune.models.segmentation import load_segmentation
from bocage.finetune.probes.probe import PROBE_KINDS, run_probe
from bocage.finetune.study.run_folders import RunFolders
from bocage.finetune.study.study_config import StudyConfig, StudyRun, run_config, study_runs
from bocage.finetune.train import finetune, split_rows
from bocage.shards.errors import InputError
from bocage.shards.files import atomic_write
from bocage.shards.locks import FileLock
from bocage.shards.read.patches import ShardPatches
from bocage.ssl.engine.parallel.distributed import is_main, launcher_rank_and_world, run_on_all_ranks

_TIMED_STEPS = 5


def execute_run(study: StudyConfig, name: str) -> int:
    """Execute the run of a name, unless it is finished, and return the exit status.

    Raises:
        InputError: the study has no such run, or its folder has a run of another configuration.
    """
    by_name = {run.name: run for run in study_runs(study)}
    if name not in by_name:
        raise InputError(f"--run {name}: the study has no such run; `--dry-run` lists all runs")
    run, folders = by_name[name], RunFolders(study)
    folders.prepare(run)
    if not folders.is_finished(run):
        start = time.monotonic()
        try:
            status = _finetune_or_probe(study, run, folders)
        finally:
            if launcher_rank_and_world()[0] == 0:
                folders.add_seconds(run, time.monotonic() - start)
        if status:
            return status
    if launcher_rank_and_world()[0] == 0 and folders.is_finished(run):
        folders.remove_large_files(run)
    return 0


def _finetune_or_probe(study: StudyConfig, run: StudyRun, folders: RunFolders) -> int:
    config = run_config(study, run, str(folders.path(run)))
    if run.mode in PROBE_KINDS:
        if launcher_rank_and_world()[0] == 0:  # a probe does not use several ranks
            with FileLock(folders.path(run) / ".lock", range(1), folders.path(run)):
                # All initializations have the same raw inputs, and scratch is the random encoder.
                controls = ("raw",) if run.initialization == study.reference else ()
                run_probe(config, run.mode, folders.features, controls=controls)
        return 0
    result = finetune(config)
    if not result["stopped"] and study.missing:
        run_on_all_ranks(lambda: None)  # wait until rank 0 has written the model
        _score_sensor_ablations(config, folders, run)
    return int(result["exit_code"])


def _score_sensor_ablations(config: FinetuneConfig, folders: RunFolders, run: StudyRun) -> None:
    """Write ``missing.json``: scores by set of sensors and label, on the reported patches that have all sensors.

    It is empty for a model of a single sensor, and when no patch has all sensors.
    """
    task = load_segmentation(folders.path(run) / "model")
    task.to("cuda" if torch.cuda.is_available() else "cpu")
    patches = ShardPatches(folders.manifest)
    rows = split_rows(config, patches, task)
    reported = rows_with_all_modalities(patches, rows["test" if "test" in rows else "valid"], task.modalities)
    scores: dict[str, dict[str, Any]] = {}
    ablations = sensor_ablations(task.modalities) if len(reported) else {}
    for name, modalities in ablations.items():
        # With two sensors, "without A" equals "only B".
        if same := next((other for other in scores if ablations[other] == modalities), None):
            scores[name] = scores[same]
            continue
        matrices = compute_confusions(
            task,
            folders.manifest,
            reported,
            batch_size=config.batch_size,
            workers=config.workers,
            modalities=modalities,
        )
        scores[name] = {label: classification_report(matrix) for label, matrix in matrices.items()}
    if is_main():
        with atomic_write(folders.path(run) / "missing.json") as path:
            path.write_text(json.dumps(scores, indent=1) + "\n", encoding="utf-8")


@dataclass(frozen=True)
class Cost:
    """Cost of one run.

    Attributes:
        seconds: duration of the run.
        step_seconds: duration of one optimizer step; None when it was not measured.
        disk_bytes: disk space of the finished run.
    """

    seconds: float
    step_seconds: float | None
    disk_bytes: int


def measure_cost(study: StudyConfig, run: StudyRun) -> Cost | int:
    """Estimate the cost of a training run from a few steps and the evaluation, in a temporary folder.

    Returns:
        The cost, or the exit status when a signal stopped the measurement.
    """
    with tempfile.TemporaryDirectory(prefix="bocage-") as folder:
        output = Path(folder) / "run"
        config = run_config(study, run, str(output))
        steps = config.engine.steps
        timed_steps = min(_TIMED_STEPS, steps)
        warmup_steps = min(config.engine.optimizer.warmup_steps, timed_steps)
        optimizer = replace(config.engine.optimizer, warmup_steps=warmup_steps)
        engine = replace(
            config.engine,
            steps=timed_steps,
            log_every=1,
            save_every=0,
            evaluate_every=0,
            tracker="none",
            optimizer=optimizer,
        )
        start = time.monotonic()
        result = finetune(replace(config, engine=engine))
        if result["stopped"]:
            return int(result["exit_code"])
        total = time.monotonic() - start
        lines = (output / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        step_seconds = statistics.median(json.loads(line)["step_seconds"] for line in lines)
        disk_bytes = sum(path.stat().st_size for path in output.iterdir() if path.is_file())
        if study.keep_models:
            disk_bytes = sum(path.stat().st_size for path in output.rglob("*") if path.is_file())
    return Cost(total + (steps - timed_steps) * step_seconds, step_seconds, disk_bytes)
