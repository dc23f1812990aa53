"""One cell of a study, run in this process: a fine-tuning run or a probe, with all that the study measures of it."""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from bocage.finetune.finetune_config import FinetuneConfig
from bocage.finetune.evaluation.evaluate import compute_confusions, rows_with_all_modalities, sensor_ablations, classification_report
from bocage.finetune.models.segmentation import load_segmentation
from bocage.finetune.probes.probe import PROBE_KINDS, run_probe
from bocage.finetune.study.study_config import StudyConfig, StudyRun, run_config, study_runs
from bocage.finetune.study.run_folders import RunFolders
from bocage.finetune.train import finetune, split_rows
from bocage.shards.errors import InputError
from bocage.shards.files import atomic_write
from bocage.shards.locks import FileLock
from bocage.shards.read.patches import ShardPatches
from bocage.ssl.engine.parallel.distributed import is_main, launcher_rank_and_world, run_on_all_ranks

_FEW_STEPS = 5


def execute_run(study: StudyConfig, name: str) -> int:
    """Run the cell of a name, unless it is finished; the exit status.

    Raises:
        InputError: the study has no such cell, or its folder is that of another configuration.
    """
    found = {cell.name: cell for cell in study_runs(study)}
    if name not in found:
        raise InputError(f"--cell {name}: the study has no such cell; `--dry-run` lists them")
    cell, folders = found[name], RunFolders(study)
    folders.prepare(cell)
    if not folders.finished(cell):
        began = time.monotonic()
        try:
            status = _run(study, cell, folders)
        finally:
            if launcher_rank_and_world()[0] == 0:
                folders.add_seconds(cell, time.monotonic() - began)
        if status:
            return status
    if launcher_rank_and_world()[0] == 0 and folders.finished(cell):
        folders.tidy(cell)
    return 0


def _run(study: StudyConfig, cell: StudyRun, folders: RunFolders) -> int:
    config = run_config(study, cell, str(folders.of(cell)))
    if cell.mode in PROBE_KINDS:
        if launcher_rank_and_world()[0] == 0:  # there is nothing that ranks could share
            with FileLock(folders.of(cell) / ".claim", range(1), folders.of(cell)):
                run_probe(config, cell.mode, folders.features)
        return 0
    result = finetune(config)
    if not result["stopped"] and study.missing:
        run_on_all_ranks(lambda: None)  # the model is there when rank 0 has written it
        _measure_missing(config, folders, cell)
    return int(result["exit_code"])


def _measure_missing(config: FinetuneConfig, folders: RunFolders, cell: StudyRun) -> None:
    """Write ``missing.json``: scores by set of sensors and label, of the reported patches that have all sensors.

    Of a single sensor, and where there is no such patch, it is empty.
    """
    task = load_segmentation(folders.of(cell) / "model")
    task.to("cuda" if torch.cuda.is_available() else "cpu")
    patches = ShardPatches(folders.manifest)
    rows = split_rows(config, patches, task)
    reported = rows_with_all_modalities(patches, rows["test" if "test" in rows else "valid"], task.modalities)
    found: dict[str, dict[str, Any]] = {}
    sets = sensor_ablations(task.modalities) if len(reported) else {}
    for name, only in sets.items():
        if same := next((part for part in found if sets[part] == only), None):  # of two sensors
            found[name] = found[same]
            continue
        matrices = compute_confusions(
            task, folders.manifest, reported, batch_size=config.batch_size, workers=config.workers, only=only
        )
        found[name] = {label: classification_report(matrix) for label, matrix in matrices.items()}
    if is_main():
        with atomic_write(folders.of(cell) / "missing.json") as path:
            path.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


@dataclass(frozen=True)
class Cost:
    """What a cell takes.

    Attributes:
        seconds: of time.
        step_seconds: of a step; None where it was not measured.
        bytes: on disk, once it is finished.
    """

    seconds: float
    step_seconds: float | None
    bytes: int


def measure_cost(study: StudyConfig, cell: StudyRun) -> Cost | int:
    """What a trained cell takes, from a few steps and the measuring after them, in a folder that is deleted.

    Stopped by a signal, it is the exit status instead.
    """
    with tempfile.TemporaryDirectory(prefix="bocage-") as folder:
        output = Path(folder) / "run"
        config = run_config(study, cell, str(output))
        steps = config.engine.steps
        few = min(_FEW_STEPS, steps)
        optimizer = replace(config.engine.optimizer, warmup_steps=min(config.engine.optimizer.warmup_steps, few))
        engine = replace(
            config.engine,
            steps=few,
            log_every=1,
            save_every=0,
            evaluate_every=0,
            tracker="none",
            optimizer=optimizer,
        )
        began = time.monotonic()
        result = finetune(replace(config, engine=engine))
        if result["stopped"]:
            return int(result["exit_code"])
        whole = time.monotonic() - began
        lines = (output / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        step = statistics.median(json.loads(line)["step_seconds"] for line in lines)
        kept = sum(path.stat().st_size for path in output.iterdir() if path.is_file())
        if study.keep_models:
            kept = sum(path.stat().st_size for path in output.rglob("*") if path.is_file())
    return Cost(whole + (steps - few) * step, step, kept)
