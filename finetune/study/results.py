"""Analyse the scores of a study: learning curves, paired differences, labels needed, classes and domains."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from bocage.finetune.evaluation.evaluate import read_region_matrices
from bocage.finetune.evaluation.statistics import (
    BootstrapEstimate,
    aggregate,
    estimate_over_runs,
    holm_correction,
    labels_needed,
    mean_iou,
    paired_difference,
    region_weights,
    strict_counts,
    strict_iou,
)
from bocage.finetune.models.targets import scheme_from_json
from bocage.finetune.probes.probe import PROBE_KINDS
from bocage.finetune.study.run_folders import RunFolders
from bocage.finetune.study.study_config import Setting, StudyConfig, StudyRun, study_runs
from bocage.shards.classes import ClassScheme
from bocage.shards.errors import InputError
from bocage.ssl.evaluation.confusion import ConfusionMatrix

CurveKey = tuple[str, str]
"""Initialization and mode of a learning curve."""

PointKey = tuple[str, str, float]
"""Initialization, mode and label fraction of a point on a learning curve."""


@dataclass(frozen=True)
class RunResult:
    """Scores of one run for one label.

    Attributes:
        run: run that was scored.
        valid_miou: strict mIoU on the validation patches, in percent.
        counts: (regions, 3, scored classes) ``strict_counts`` of the reported part.
        facts: other results of the run: ``steps``, ``skipped_steps``, ``patches``, ``train_keys``, ``seconds``, and
            ``train_cells`` for probes.
        ablation_miou: mIoU by set of sensors; empty when it was not measured.
    """

    run: StudyRun
    valid_miou: float
    counts: np.ndarray
    facts: dict[str, Any]
    ablation_miou: dict[str, float]


@dataclass(frozen=True)
class Difference:
    """Paired difference to the reference initialization.

    Attributes:
        estimate: difference with its bootstrap replicates.
        p_holm: p-value, Holm-corrected over the fractions of the curve; 1 for a single run.
    """

    estimate: BootstrapEstimate
    p_holm: float


class Analysis:
    """Statistics of a study for one label.

    Args:
        study: configuration of the study.
        scheme: classes of the label.
        regions: names of the test regions.
        results: results of all finished runs.
        part: reported part of the split: ``test``, or ``valid`` when the shards have no test patches.

    Attributes:
        results: results of all finished runs.
        settings: learning rate and variant selected on the validation patches, by initialization, mode and fraction.
        selected: results of the runs with the selected settings.
    """

    def __init__(
        self, study: StudyConfig, scheme: ClassScheme, regions: Sequence[str], results: Sequence[RunResult], part: str
    ) -> None:
        self.study, self.scheme, self.regions, self.part = study, scheme, list(regions), part
        self.results = list(results)
        self.settings = self._select_settings()
        self.selected = [result for result in results if result.run.setting == self.settings[self._key(result.run)]]
        self._weights = region_weights(
            [ConfusionMatrix.domain(region) for region in self.regions], study.replicates, np.random.default_rng(0)
        )
        self._scores: dict[PointKey, dict[tuple[int, int], tuple[float, np.ndarray]]] = {}
        for result in self.selected:
            value = self.miou(result.counts.sum(axis=0))
            resampled = self.miou(np.einsum("br,rkc->bkc", self._weights, result.counts))
            draw_and_seed = (result.run.draw, result.run.seed)
            self._scores.setdefault(self._key(result.run), {})[draw_and_seed] = (float(value), resampled)

    @staticmethod
    def _key(run: StudyRun) -> PointKey:
        return (run.initialization, run.mode, run.fraction)

    def miou(self, counts: np.ndarray) -> np.ndarray:
        """Compute the mIoU of (..., 3, C) counts, with or without background as the study asks."""
        return mean_iou(counts, self.scheme, background=self.study.background)

    def _select_settings(self) -> dict[PointKey, Setting]:
        """Select the setting with the best validation mIoU over the runs that all settings have.

        Without a common run, which happens in an unfinished study, select the setting with the most runs.
        """
        valid: dict[PointKey, dict[Setting, dict[tuple[int, int], float]]] = {}
        for result in self.results:
            runs = valid.setdefault(self._key(result.run), {}).setdefault(result.run.setting, {})
            runs[result.run.draw, result.run.seed] = result.valid_miou
        selected = {}
        for key, by_setting in valid.items():
            common = set.intersection(*(set(runs) for runs in by_setting.values()))
            merit = {
                setting: float(np.mean([runs[run] for run in common])) if common else float(len(runs))
                for setting, runs in by_setting.items()
            }
            selected[key] = max(merit, key=lambda setting: merit[setting])
        return selected

    @property
    def curve_keys(self) -> list[CurveKey]:
        """Initializations and modes with results, in the order of the study."""
        available = {(initialization, mode) for initialization, mode, _ in self._scores}
        ordered = [(initialization, mode) for mode in self.study.modes for initialization in self.study.initializations]
        return [key for key in ordered if key in available]

    @cached_property
    def curves(self) -> dict[CurveKey, dict[float, BootstrapEstimate]]:
        """Learning curves: mIoU by fraction, for each initialization and mode."""
        curves: dict[CurveKey, dict[float, BootstrapEstimate]] = {}
        for initialization, mode in self.curve_keys:
            fractions = sorted(key[2] for key in self._scores if key[:2] == (initialization, mode))
            curves[initialization, mode] = {
                fraction: self._estimate(initialization, mode, fraction) for fraction in fractions
            }
        return curves

    def _estimate(self, initialization: str, mode: str, fraction: float) -> BootstrapEstimate:
        estimate = estimate_over_runs(
            self._scores[initialization, mode, fraction],
            self._random("curve", initialization, mode, fraction),
            interquartile=self.study.interquartile,
        )
        return replace(estimate, replicates=estimate.replicates.clip(0, 100))  # the range of an mIoU

    def _random(self, *names: object) -> np.random.Generator:
        """Return a generator seeded by names, so that an estimate does not depend on which others were computed."""
        return np.random.default_rng(list("/".join(map(str, names)).encode()))

    @cached_property
    def differences(self) -> dict[CurveKey, dict[float, Difference]]:
        """Differences to the reference by fraction, paired by draw and seed, for each initialization and mode."""
        differences: dict[CurveKey, dict[float, Difference]] = {}
        for initialization, mode in self.curve_keys:
            if initialization == self.study.reference:
                continue
            fractions, estimates = [], []
            for fraction in self.curves[initialization, mode]:
                estimate = paired_difference(
                    self._scores[initialization, mode, fraction],
                    self._scores.get((self.study.reference, mode, fraction), {}),
                    self._random("difference", initialization, mode, fraction),
                    interquartile=self.study.interquartile,
                )
                if estimate is not None:
                    fractions.append(fraction)
                    estimates.append(estimate)
            # A single run has no p-value and does not count as a test.
            corrected = iter(holm_correction([item.p_value for item in estimates if item.runs > 1]))
            if fractions:
                differences[initialization, mode] = {
                    fraction: Difference(item, next(corrected) if item.runs > 1 else 1.0)
                    for fraction, item in zip(fractions, estimates, strict=True)
                }
        return differences

    @cached_property
    def labels_needed(self) -> dict[tuple[str, str, str], BootstrapEstimate]:
        """Fraction of labels at which an initialization matches another one at its largest fraction.

        Keys are the initialization, the mode, and the other initialization.
        """
        needed = {}
        for initialization, mode in self.curve_keys:
            for other in self.study.initializations:
                if other != initialization and (other, mode) in self.curves:
                    largest = max(self.curves[other, mode])
                    target = self.curves[other, mode][largest]
                    needed[initialization, mode, other] = labels_needed(self.curves[initialization, mode], target)
        return needed

    def class_iou(self, initialization: str, mode: str, fraction: float) -> np.ndarray:
        """Return the IoU of the C scored classes in percent, (C,), mean over runs; NaN for classes without a pixel."""
        results = self._results_at(initialization, mode, fraction)
        return aggregate(np.stack([strict_iou(result.counts.sum(axis=0)) for result in results]), False)

    def domain_miou(self, initialization: str, mode: str, fraction: float) -> dict[str, float]:
        """Return the mIoU in percent by domain, mean over runs."""
        names = np.array([ConfusionMatrix.domain(region) for region in self.regions])
        results = self._results_at(initialization, mode, fraction)
        return {
            str(name): float(np.mean([self.miou(result.counts[names == name].sum(axis=0)) for result in results]))
            for name in np.unique(names)
        }

    def ablation_miou(self, initialization: str, mode: str, fraction: float) -> dict[str, float]:
        """Return the mIoU in percent by set of sensors, mean over runs; empty when it was not measured."""
        results = self._results_at(initialization, mode, fraction)
        runs = [result.ablation_miou for result in results if result.ablation_miou]
        return {name: float(np.mean([run[name] for run in runs])) for name in (runs[0] if runs else {})}

    def _results_at(self, initialization: str, mode: str, fraction: float) -> list[RunResult]:
        return [result for result in self.selected if self._key(result.run) == (initialization, mode, fraction)]


def analyze_study(study: StudyConfig) -> dict[str, Analysis]:
    """Analyse the finished runs of a study, by label.

    Raises:
        InputError: no run is finished, or the runs were scored on different patches.
    """
    folders = RunFolders(study)
    finished = [run for run in study_runs(study) if folders.is_finished(run)]
    if not finished:
        raise InputError(f"{study.output}: no run of this study is finished; run `bocage study run` first")
    for run in finished:
        folders.prepare(run)  # check that the scores belong to this configuration
    metrics = {run: json.loads((folders.path(run) / "metrics.json").read_text(encoding="utf-8")) for run in finished}
    part = "test" if all("test" in item for item in metrics.values()) else "valid"
    schemes = {name: scheme_from_json(name, facts) for name, facts in metrics[finished[0]]["labels"].items()}
    analyses = {}
    for label, scheme in schemes.items():
        matrices = {run: read_region_matrices(folders.path(run), part, label, scheme) for run in finished}
        _check_same_patches(matrices, folders, label)
        regions = sorted({region for by_region in matrices.values() for region in by_region})
        if not regions:
            continue  # no patch of this part has the label
        zeros = np.zeros((len(scheme), len(scheme)), np.int64)  # for regions without a labelled cell, in probes
        results = [
            RunResult(
                run,
                _miou(metrics[run]["valid"][label]["strict"], study.background),
                strict_counts(np.stack([matrices[run].get(region, zeros) for region in regions]), scheme),
                {
                    "steps": metrics[run].get("steps", 0),
                    "skipped_steps": metrics[run].get("skipped_steps", 0),
                    "patches": metrics[run]["patches"]["train"],
                    "train_cells": metrics[run].get("train_cells", {}).get(label),
                    "train_keys": metrics[run]["train_keys"],
                    "seconds": folders.seconds(run),
                },
                _read_ablation_miou(folders.path(run), label, study.background),
            )
            for run in finished
        ]
        analyses[label] = Analysis(study, scheme, regions, results, part)
    return analyses


def _check_same_patches(matrices: Mapping[StudyRun, Mapping[str, np.ndarray]], folders: RunFolders, label: str) -> None:
    """Check that all trained runs, and likewise all probes, were scored on the same labelled pixels of each region.

    Raises:
        InputError: two runs differ.
    """
    reference_runs: dict[bool, StudyRun] = {}

    def labelled_pixels(run: StudyRun) -> dict[str, list[int]]:
        return {name: counts.sum(axis=1).tolist() for name, counts in matrices[run].items()}

    for run in matrices:
        reference = reference_runs.setdefault(run.mode in PROBE_KINDS, run)
        if labelled_pixels(run) != labelled_pixels(reference):
            both = f"{folders.path(run)} and {folders.path(reference)}"
            raise InputError(f"{both} were scored on different patches of {label}")


def _miou(strict: Mapping[str, Any], background: bool) -> float:
    without_background = strict["miou_without_background"]
    return float(strict["miou"] if background or without_background is None else without_background)


def _read_ablation_miou(folder: Path, label: str, background: bool) -> dict[str, float]:
    path = folder / "missing.json"
    if not path.is_file():
        return {}
    ablations = json.loads(path.read_text(encoding="utf-8"))
    return {name: _miou(labels[label]["strict"], background) for name, labels in ablations.items() if label in labels}
