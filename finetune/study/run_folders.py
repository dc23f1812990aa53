"""Where the cells of a study lie, which are finished, and a script that runs the others on a cluster.

A cell is finished when its folder has its scores; a killed one goes on from its last checkpoint. ``cell.json``
beside it says which configuration it has, so that a folder is never taken for the result of another one.
"""

from __future__ import annotations

import json
import shlex
import shutil
from collections.abc import Sequence
from dataclasses import replace
from functools import cache, cached_property
from pathlib import Path
from typing import Any

from bocage.finetune.probes.probe import CELL_SIZE, PROBE_KINDS
from bocage.finetune.study.study_config import StudyConfig, StudyRun, comparable_config, differing_keys, run_config, study_runs
from bocage.finetune.train import build_task
from bocage.shards.errors import InputError
from bocage.shards.files import atomic_write
from bocage.shards.format.manifest import Manifest
from bocage.shards.modality import PATCH_SIZE
from bocage.shards.read.open import open_shards
from bocage.ssl.encoders.initialization import SCRATCH, weights_digest

_SECONDS = "seconds.txt"
_digest = cache(weights_digest)  # cells of a study share weights
_BULKY = ("checkpoints", "model", "predictions", "pictures")


class RunFolders:
    """Where the cells of a study lie, and which are done.

    Args:
        study: the study.

    Raises:
        InputError: the study has no output folder.
    """

    def __init__(self, study: StudyConfig) -> None:
        if not study.output:
            raise InputError("output=PATH is missing: give a folder for the study")
        self.study, self.root = study, Path(study.output)

    @property
    def features(self) -> Path:
        """Where features of probes are kept."""
        return self.root / "features"

    def of(self, cell: StudyRun) -> Path:
        """The folder of a cell."""
        return self.root / "cells" / cell.name

    def finished(self, cell: StudyRun) -> bool:
        """Whether a cell has its scores, and those without sensors where the study wants them."""
        wanted = ["metrics.json"]
        if self.study.missing and cell.mode not in PROBE_KINDS:
            wanted.append("missing.json")
        return all((self.of(cell) / name).is_file() for name in wanted)

    def add_seconds(self, cell: StudyRun, seconds: float) -> None:
        """Add to the time that a cell has taken."""
        path = self.of(cell) / _SECONDS
        with atomic_write(path) as temporary:
            temporary.write_text(f"{self.seconds(cell) + seconds:.1f}\n", encoding="utf-8")

    def seconds(self, cell: StudyRun) -> float:
        """The time that a cell has taken, restarts included; what a process that was killed did is not in it."""
        path = self.of(cell) / _SECONDS
        return float(path.read_text(encoding="utf-8")) if path.is_file() else 0.0

    @cached_property
    def manifest(self) -> Manifest:
        """The shards, open."""
        first = next(iter(study_runs(self.study)))
        return open_shards(self.study.shards, run_config(self.study, first, "").cache)

    def identity(self, cell: StudyRun) -> dict[str, Any]:
        """What decides the scores of a cell: its configuration, the shards, and the weights that it starts from.

        Of sources that are no folders, as ``hf:org/name``, only the name is known: give a revision.
        """
        return {
            "mode": cell.mode,
            "start": cell.start,
            "missing": self.study.missing and cell.mode not in PROBE_KINDS,
            "shards": self.manifest.digest,
            "encoders": {name: _digest(source) for name, source in self.study.starts[cell.start].items()},
            "config": comparable_config(run_config(self.study, cell, "")),
        }

    def feature_bytes(self) -> int:
        """What features of all patches by all encoders would take."""
        first = next(iter(study_runs(self.study)))
        encoders = build_task(replace(run_config(self.study, first, ""), encoders={}), self.manifest).model.encoders
        width = {name: sum(encoder.widths) for name, encoder in encoders.items()}  # type: ignore[arg-type]
        kept = set()
        for cell in study_runs(self.study):
            if cell.mode in PROBE_KINDS:
                sources = {name: self.study.starts[cell.start].get(name, SCRATCH) for name in width}
                # A random encoder is another one in every draw.
                kept |= {(name, source, cell.draw if source == SCRATCH else 0) for name, source in sources.items()}
        return 2 * sum(width[name] for name, _, _ in kept) * round(PATCH_SIZE / CELL_SIZE) ** 2 * len(self.manifest)

    def prepare(self, cell: StudyRun) -> None:
        """Write ``cell.json``.

        Raises:
            InputError: the folder is that of another configuration, other shards or other weights.
        """
        folder, wanted = self.of(cell), self.identity(cell)
        path = folder / "cell.json"
        if path.is_file():
            found = json.loads(path.read_text(encoding="utf-8"))
            # The place of weights may change, what they are may not.
            found_config, wanted_config = ({**item["config"], "encoders": {}} for item in (found, wanted))
            other = [key for key in wanted if key != "config" and found.get(key) != wanted[key]]
            if keys := [*other, *differing_keys(found_config, wanted_config)]:
                raise InputError(
                    f"{folder} is a cell of another study ({', '.join(keys)} differ): give another output, or delete "
                    "its folder to run it again"
                )
            return
        folder.mkdir(parents=True, exist_ok=True)
        with atomic_write(path, concurrent=True) as temporary:  # ranks of one cell write the same
            temporary.write_text(json.dumps(wanted, indent=1) + "\n", encoding="utf-8")

    def check(self, study_runs: Sequence[StudyRun]) -> None:
        """Build the model of every start, as its runs will: whatever is wrong with words or encoders is found here.

        Args:
            cells: that are going to run.

        Raises:
            InputError: what the runs would end with.
        """
        seen: set[str] = set()
        for cell in study_runs:
            config = run_config(self.study, cell, "")
            if cell.start not in seen:
                seen.add(cell.start)
                build_task(config, self.manifest)

    def tidy(self, cell: StudyRun) -> None:
        """Delete what a finished cell need not keep."""
        if not self.study.keep_models:
            for name in _BULKY:
                shutil.rmtree(self.of(cell) / name, ignore_errors=True)


def slurm_script(
    folders: RunFolders, study_runs: Sequence[StudyRun], launcher: str, words: Sequence[str], options: Sequence[str]
) -> str:
    """A script for ``sbatch`` whose array runs the cells that are not finished, a task each.

    Args:
        folders: of the study.
        cells: of the study.
        launcher: what starts bocage, e.g. ``bocage``, or ``accelerate launch -m bocage`` for several GPUs.
        words: those of ``bocage study run`` that name the study.
        options: of ``#SBATCH``, e.g. ``--gpus=1``.

    Raises:
        InputError: all cells are finished.
    """
    names = [cell.name for cell in study_runs if not folders.finished(cell)]
    if not names:
        raise InputError(f"{folders.root}: all cells are finished; `bocage study report` tells what they scored")
    lines = ["#!/bin/bash", f"#SBATCH --array=0-{len(names) - 1}", "#SBATCH --job-name=bocage-study"]
    lines += [f"#SBATCH {option}" for option in options]
    # The names are in the script, so that a task means the same cell whatever has finished since.
    lines += ["set -euo pipefail", "cells=(", *(f"  {shlex.quote(name)}" for name in names), ")"]
    # srun has not taken it from sbatch since SLURM 22.05: readers and trainer would share one core.
    lines.append('export SRUN_CPUS_PER_TASK="${SLURM_CPUS_PER_TASK:-1}"')
    lines.append(f'srun {launcher} study run {shlex.join(words)} "--cell=${{cells[$SLURM_ARRAY_TASK_ID]}}"')
    return "\n".join(lines) + "\n"
