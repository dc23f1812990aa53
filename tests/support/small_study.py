"""A small study for tests: its configuration, shards of one patch, and runs with simulated scores."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from bocage.finetune.evaluation.evaluate import classification_report, write_tables
from bocage.finetune.models.targets import Target
from bocage.finetune.study.launch import ParallelRunner
from bocage.finetune.study.run_folders import RunFolders
from bocage.finetune.study.study_config import LabelFraction, StudyConfig, study_runs
from bocage.finetune.subsets.sampling import keys_digest
from bocage.shards.errors import InputError
from bocage.shards.modality import FLAIR_HUB
from bocage.shards.simulate.tree import write_tree
from bocage.shards.source.flair_hub.tree import FlairHubCatalogue
from bocage.shards.write.writer import write_shards
from bocage.ssl.evaluation.confusion import ConfusionMatrix

LPIS = "ALL_LABEL-LPIS"
S2 = "SENTINEL2_TS"
SMALL = [
    "modalities=[SENTINEL2_TS]",
    "labels=[ALL_LABEL-LPIS]",
    "workers=0",
    "pictures=0",
    "predictions=0",
    "engine.steps=12",
]


@pytest.fixture(scope="session")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards of one simulated patch."""
    return sharded(tmp_path_factory.mktemp("study"))


@pytest.fixture(autouse=True)
def known_shards(shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pass the path of the shards to ``study``, in this process and its children."""
    monkeypatch.setenv("STUDY_SHARDS", str(shards))


def sharded(folder: Path, patches: int = 1, seed: int = 0) -> Path:
    registry = FLAIR_HUB.subset([S2, "SENTINEL2_MSK-SC", LPIS])
    write_tree(folder / "tree", patches=patches, seed=seed, registry=registry, dates=(3, 4))
    return write_shards(FlairHubCatalogue.open(folder / "tree", registry), folder / "shards").path


def study(output: Path, **changes: object) -> StudyConfig:
    settings: dict[str, object] = {
        "shards": os.environ["STUDY_SHARDS"],
        "output": str(output),
        "finetune": "finetune_quickstart",
        "overrides": SMALL,
        "initializations": {"scratch": {}, "ours": {S2: "somewhere"}},
        "fractions": [LabelFraction(fraction=0.1, draws=3, seeds=2), LabelFraction(fraction=1.0, seeds=3)],
        "modes": ["knn", "full"],
        "background": False,
        "replicates": 1000,
    }
    return StudyConfig(**{**settings, **changes})  # type: ignore[arg-type]


def write_scores(settings: StudyConfig, gains: dict[str, float], part: str = "test") -> None:
    """Write simulated scores of all runs, in which an initialization is better by its gain, in logits."""
    target = Target(label=FLAIR_HUB[LPIS])
    classes, folders = len(target.scheme), RunFolders(settings)
    for run in study_runs(settings):
        ease = np.random.default_rng(3).normal(0, 0.5, 24)  # of regions, the same for all runs
        random = np.random.default_rng(100 * run.draw + run.seed)
        gain = gains[run.initialization] + 0.5 * np.log10(run.fraction) + random.normal(0, 0.05)
        gain += -0.3 if run.learning_rate == 1.0 else 0.0
        matrix = ConfusionMatrix(target.scheme)
        for region in range(24):
            chance = 1 / (1 + np.exp(-(gain + ease[region])))
            hits = int(400 * chance)
            counts = hits * np.eye(classes, dtype=np.int64)
            counts += (400 - hits) * np.roll(np.eye(classes, dtype=np.int64), 1, axis=1)
            counts[5] = 0  # a class without a pixel
            matrix.by_roi[f"D{region % 6:03}-2020/R{region}"] = counts
        folders.prepare(run)
        folder = folders.path(run)
        write_tables(folder, {name: {LPIS: matrix} for name in {"valid", part}})
        metrics = {
            "labels": {LPIS: target.scheme_to_json()},
            "patches": {"train": int(100 * run.fraction)},
            **({"train_cells": {LPIS: {"used": 10, "labelled": 20, "side": 12.8}}} if run.mode == "knn" else {}),
            "train_keys": keys_digest([f"{run.fraction}/{run.draw}"]),
            "steps": 2,
            **{name: {LPIS: classification_report(matrix)} for name in {"valid", part}},
        }
        (folder / "metrics.json").write_text(json.dumps(metrics))
        folders.add_seconds(run, 90.0)


def fake_execute_run(settings: StudyConfig, name: str) -> int:
    """Stand in for ``execute_run``: write the files of a run without training.

    It takes ``STUDY_SECONDS`` seconds. Runs of the second draw fail until their folder has a file ``repaired``.
    """
    folder = Path(settings.output) / "runs" / name

    def save_and_exit(*_: object) -> None:
        time.sleep(1.0)
        (folder / "checkpoint").touch()
        sys.exit(143)

    signal.signal(signal.SIGTERM, save_and_exit)
    with (folder / "executions.txt").open("a") as file:
        file.write("x")
    if "draw1" in name and not (folder / "repaired").exists():
        raise InputError("this run fails")
    time.sleep(float(os.environ.get("STUDY_SECONDS", "0")))
    variables = {name: os.environ.get(name) for name in ("CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS")}
    (folder / "metrics.json").write_text(json.dumps({**variables, "threads": torch.get_num_threads()}))
    return 0


def runner(settings: StudyConfig, processes: int = 2) -> ParallelRunner:
    """Return a runner that executes ``fake_execute_run``."""
    return ParallelRunner(RunFolders(settings), fake_execute_run, processes)
