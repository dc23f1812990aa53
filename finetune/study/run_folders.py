"""Folder layout of a study: one folder per run, and which runs are finished.

A run is finished when its folder has its scores; an interrupted run resumes from its last checkpoint. ``run.json``
records what determines the scores, so that a folder is never mistaken for the result of another configuration.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import replace
from functools import cache, cached_property
from pathlib import Path
from typing import Any

from bocage.finetune.probes.probe import PROBE_KINDS
from bocage.finetune.study.study_config import (
    StudyConfig,
    StudyRun,
    comparable_config,
    differing_keys,
    run_config,
    study_runs,
)
from bocage.finetune.train import build_task
from bocage.shards.errors import InputError
from bocage.shards.files import atomic_write
from bocage.shards.format.manifest import Manifest
from bocage.shards.read.open import open_shards
from bocage.ssl.encoders.initialization import SCRATCH, weights_digest
from bocage.ssl.evaluation.probe import default_cell

_SECONDS_FILE = "seconds.txt"
_LARGE_FOLDERS = ("checkpoints", "model", "predictions", "pictures")
_cached_digest = cache(weights_digest)  # the runs of a study share weights


class RunFolders:
    """Folders of a study's runs.

    Args:
        study: configuration of the study.

    Raises:
        InputError: the study has no output folder.
    """

    def __init__(self, study: StudyConfig) -> None:
        if not study.output:
            raise InputError("output=PATH is missing: give a folder for the study")
        self.study, self.root = study, Path(study.output)

    @property
    def features(self) -> Path:
        """Folder of the feature cache."""
        return self.root / "features"

    @property
    def runs(self) -> Path:
        """Folder that contains the folders of all runs."""
        return self.root / "runs"

    def path(self, run: StudyRun) -> Path:
        """Return the folder of a run."""
        return self.runs / run.name

    def is_finished(self, run: StudyRun) -> bool:
        """Whether a run has its scores, including the sensor ablation where the study asks for it."""
        required = ["metrics.json"]
        if self.study.missing and run.mode not in PROBE_KINDS:
            required.append("missing.json")
        return all((self.path(run) / name).is_file() for name in required)

    def add_seconds(self, run: StudyRun, seconds: float) -> None:
        """Add to the recorded duration of a run."""
        path = self.path(run) / _SECONDS_FILE
        with atomic_write(path) as temporary:
            temporary.write_text(f"{self.seconds(run) + seconds:.1f}\n", encoding="utf-8")

    def seconds(self, run: StudyRun) -> float:
        """Return the duration of a run in seconds, over all restarts; killed processes are not counted."""
        path = self.path(run) / _SECONDS_FILE
        return float(path.read_text(encoding="utf-8")) if path.is_file() else 0.0

    @cached_property
    def manifest(self) -> Manifest:
        """Manifest of the shards."""
        first = next(iter(study_runs(self.study)))
        return open_shards(self.study.shards, run_config(self.study, first, "").cache)

    def identity(self, run: StudyRun) -> dict[str, Any]:
        """Return what determines the scores of a run: its configuration, the shards and the initial weights.

        Weights in a folder are identified by their hash. Other sources, such as ``hf:org/name``, are identified by
        their name only, so they should name a revision.
        """
        sources = self.study.initializations[run.initialization]
        return {
            "mode": run.mode,
            "initialization": run.initialization,
            "missing": self.study.missing and run.mode not in PROBE_KINDS,
            "shards": self.manifest.digest,
            "encoders": {name: _cached_digest(source) for name, source in sources.items()},
            "config": comparable_config(run_config(self.study, run, "")),
        }

    def feature_bytes(self) -> int:
        """Estimate the size in bytes of the feature cache, for all patches and all probed encoders."""
        first = next(iter(study_runs(self.study)))
        task = build_task(replace(run_config(self.study, first, ""), encoders={}), self.manifest)
        width = {name: sum(task.model.encoder(name).widths) for name in task.modalities}
        cached = set()
        for run in study_runs(self.study):
            if run.mode in PROBE_KINDS:
                sources = self.study.initializations[run.initialization]
                for name in width:
                    source = sources.get(name, SCRATCH)
                    # The random weights of an encoder differ from draw to draw.
                    cached.add((name, source, run.draw if source == SCRATCH else 0))
        cell = default_cell(next(iter(task.targets.values())).label)
        cells = round(task.patch_size / cell) ** 2 * len(self.manifest)
        return 2 * sum(width[name] for name, _, _ in cached) * cells

    def prepare(self, run: StudyRun) -> None:
        """Write ``run.json``, or check an existing one.

        Raises:
            InputError: the folder has a run with another configuration, other shards or other weights.
        """
        folder, requested = self.path(run), self.identity(run)
        path = folder / "run.json"
        if path.is_file():
            stored = json.loads(path.read_text(encoding="utf-8"))
            # The path of the weights may change; their hash, under "encoders", may not.
            stored_config, requested_config = ({**item["config"], "encoders": {}} for item in (stored, requested))
            changed = [key for key in requested if key != "config" and stored.get(key) != requested[key]]
            if keys := [*changed, *differing_keys(stored_config, requested_config)]:
                raise InputError(
                    f"{folder} is a run of another study ({', '.join(keys)} differ): give another output, or delete "
                    "its folder to run it again"
                )
            return
        folder.mkdir(parents=True, exist_ok=True)
        with atomic_write(path, concurrent=True) as temporary:  # all ranks of a run write the same file
            temporary.write_text(json.dumps(requested, indent=1) + "\n", encoding="utf-8")

    def check(self, runs: Sequence[StudyRun]) -> None:
        """Build the model of every initialization, so that invalid overrides and encoders fail before the first run.

        Args:
            runs: runs that are about to start.

        Raises:
            InputError: an override or an encoder is invalid.
        """
        checked: set[str] = set()
        for run in runs:
            config = run_config(self.study, run, "")
            if run.initialization not in checked:
                checked.add(run.initialization)
                build_task(config, self.manifest)

    def remove_large_files(self, run: StudyRun) -> None:
        """Delete checkpoints, models and pictures of a finished run, unless the study keeps models."""
        if not self.study.keep_models:
            for name in _LARGE_FOLDERS:
                shutil.rmtree(self.path(run) / name, ignore_errors=True)
