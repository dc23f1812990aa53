"""A small study: its configuration, shards of one patch, and cells as if they had been run."""

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

from bocage.finetune.evaluation.evaluate import summary, write_tables
from bocage.finetune.models.targets import Target
from bocage.finetune.study.grid import LabelFraction, StudyConfig, study_runs
from bocage.finetune.study.runs import CellFolders
from bocage.finetune.subsets.draw import keys_digest
from bocage.shards.errors import InputError
from bocage.shards.modality import FLAIR_HUB
from bocage.shards.simulate.tree import write_tree
from bocage.shards.source.catalogue import Catalogue
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
    """One simulated patch: what a study has to know of its shards."""
    return sharded(tmp_path_factory.mktemp("study"))


@pytest.fixture(autouse=True)
def known_shards(shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where ``study`` finds them, in this process and in those that it starts."""
    monkeypatch.setenv("STUDY_SHARDS", str(shards))


def sharded(folder: Path, patches: int = 1, seed: int = 0) -> Path:
    registry = FLAIR_HUB.subset([S2, "SENTINEL2_MSK-SC", LPIS])
    write_tree(folder / "tree", patches=patches, seed=seed, registry=registry, dates=(3, 4))
    return write_shards(Catalogue.open(folder / "tree", registry), folder / "shards").path


def study(output: Path, **changes: object) -> StudyConfig:
    settings: dict[str, object] = {
        "shards": os.environ["STUDY_SHARDS"],
        "output": str(output),
        "finetune": "finetune_quickstart",
        "words": SMALL,
        "starts": {"scratch": {}, "ours": {S2: "somewhere"}},
        "shares": [LabelFraction(fraction=0.1, draws=3, seeds=2), LabelFraction(fraction=1.0, seeds=3)],
        "modes": ["knn", "full"],
        "background": False,
        "replicates": 1000,
    }
    return StudyConfig(**{**settings, **changes})  # type: ignore[arg-type]


def scored(settings: StudyConfig, gains: dict[str, float], part: str = "test") -> None:
    """Write what cells of a study leave, of a world where starts are better by their gain, in logits."""
    target = Target(label=FLAIR_HUB[LPIS])
    classes, folders = len(target.scheme), CellFolders(settings)
    for cell in study_runs(settings):
        ease = np.random.default_rng(3).normal(0, 0.5, 24)  # of regions, the same for all cells
        run = np.random.default_rng(100 * cell.draw + cell.seed)
        gain = gains[cell.start] + 0.5 * np.log10(cell.fraction) + run.normal(0, 0.05)
        gain += -0.3 if cell.rate == 1.0 else 0.0
        matrix = ConfusionMatrix(target.scheme)
        for region in range(24):
            chance = 1 / (1 + np.exp(-(gain + ease[region])))
            hits = int(400 * chance)
            counts = hits * np.eye(classes, dtype=np.int64)
            counts += (400 - hits) * np.roll(np.eye(classes, dtype=np.int64), 1, axis=1)
            counts[5] = 0  # a class that nobody grows
            matrix.by_roi[f"D{region % 6:03}-2020/R{region}"] = counts
        folders.prepare(cell)
        folder = folders.of(cell)
        write_tables(folder, {name: {LPIS: matrix} for name in {"valid", part}})
        metrics = {
            "labels": {LPIS: target.facts()},
            "patches": {"train": int(100 * cell.fraction)},
            **({"taught": {LPIS: {"cells": 10, "of": 20}}} if cell.mode == "knn" else {}),
            "train_keys": keys_digest([f"{cell.fraction}/{cell.draw}"]),
            "steps": 2,
            **{name: {LPIS: summary(matrix)} for name in {"valid", part}},
        }
        (folder / "metrics.json").write_text(json.dumps(metrics))
        folders.add_seconds(cell, 90.0)


def stand_in(settings: StudyConfig, name: str) -> int:
    """In place of ``run_cell``: what a runner sees of either is a process, its status, and the files that it leaves.

    It takes the seconds that ``STUDY_SECONDS`` tells. Of the second draw it fails until a file ``repaired`` is there.
    """
    folder = Path(settings.output) / "cells" / name

    def stopped(*_: object) -> None:
        time.sleep(1.0)
        (folder / "checkpoint").touch()
        sys.exit(143)

    signal.signal(signal.SIGTERM, stopped)
    with (folder / "starts.txt").open("a") as file:
        file.write("x")
    if "draw1" in name and not (folder / "repaired").exists():
        raise InputError("this one cannot")
    time.sleep(float(os.environ.get("STUDY_SECONDS", "0")))
    place = {name: os.environ.get(name) for name in ("CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS")}
    (folder / "metrics.json").write_text(json.dumps({**place, "threads": torch.get_num_threads()}))
    return 0
