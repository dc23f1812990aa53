"""What the cells of a study scored, and what follows: curves, paired differences, labels needed, classes, domains."""

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
    holm_correction,
    labels_needed,
    mean_iou,
    estimate_over_runs,
    paired_difference,
    region_weights,
    strict_counts,
    strict_iou,
    aggregate,
)
from bocage.finetune.models.targets import scheme_from_json
from bocage.finetune.probes.probe import PROBE_KINDS
from bocage.finetune.study.study_config import StudyConfig, StudyRun, study_runs
from bocage.finetune.study.run_folders import RunFolders
from bocage.shards.classes import ClassScheme
from bocage.shards.errors import InputError
from bocage.ssl.evaluation.confusion import ConfusionMatrix

CurveKey = tuple[str, str]
"""A start and a mode."""


@dataclass(frozen=True)
class RunResult:
    """What one cell scored for one label.

    Attributes:
        cell: which.
        valid: strict mIoU on the validation patches, percent.
        counts: (regions, 3, scored classes) ``strict_counts`` of what is reported.
        facts: the rest of what the cell tells: ``steps``, ``patches`` and ``train_keys`` of training, ``seconds``, and
            ``taught`` of probes.
        missing: mIoU by set of sensors, where it was measured.
    """

    cell: StudyRun
    valid: float
    counts: np.ndarray
    facts: dict[str, Any]
    missing: dict[str, float]


@dataclass(frozen=True)
class Difference:
    """A start against the reference: the paired difference, and its p-value corrected over the shares of a curve."""

    estimate: BootstrapEstimate
    corrected: float


class Analysis:
    """The results for one label.

    Args:
        study: the study.
        scheme: classes of the label.
        regions: names of the regions tested on.
        scores: of all finished cells.
        part: what is reported: ``test``, or ``valid`` where the shards have no test patches.
    """

    def __init__(
        self, study: StudyConfig, scheme: ClassScheme, regions: Sequence[str], scores: Sequence[RunResult], part: str
    ) -> None:
        self.study, self.scheme, self.regions, self.part = study, scheme, list(regions), part
        self.scores = list(scores)
        self.rates = self._rates()
        self.chosen = [score for score in scores if score.cell.rate == self.rates[self._key(score.cell)]]
        self._weights = region_weights(
            [ConfusionMatrix.domain(region) for region in self.regions], study.replicates, np.random.default_rng(0)
        )
        self._measured: dict[tuple[str, str, float], dict[tuple[int, int], tuple[float, np.ndarray]]] = {}
        for score in self.chosen:
            value = self.miou(score.counts.sum(axis=0))
            resampled = self.miou(np.einsum("br,rkc->bkc", self._weights, score.counts))
            run = (score.cell.draw, score.cell.seed)
            self._measured.setdefault(self._key(score.cell), {})[run] = (float(value), resampled)

    @staticmethod
    def _key(cell: StudyRun) -> tuple[str, str, float]:
        return (cell.start, cell.mode, cell.fraction)

    def miou(self, counts: np.ndarray) -> np.ndarray:
        """The study's mean IoU of (..., 3, C) counts."""
        return mean_iou(counts, self.scheme, background=self.study.background)

    def _rates(self) -> dict[tuple[str, str, float], float | None]:
        """By start, mode and share the learning rate that is best on validation, over the runs that all rates have.

        Without such a run, of a study that has only begun, the one with most runs.
        """
        found: dict[tuple[str, str, float], dict[float | None, dict[tuple[int, int], float]]] = {}
        for score in self.scores:
            runs = found.setdefault(self._key(score.cell), {}).setdefault(score.cell.rate, {})
            runs[score.cell.draw, score.cell.seed] = score.valid
        chosen = {}
        for key, rates in found.items():
            common = set.intersection(*(set(runs) for runs in rates.values()))
            merit = {
                rate: float(np.mean([runs[run] for run in common])) if common else float(len(runs))
                for rate, runs in rates.items()
            }
            chosen[key] = max(merit, key=lambda rate: merit[rate])
        return chosen

    @property
    def curves_there(self) -> list[CurveKey]:
        """Starts and modes of which there are results, in the order of the study."""
        there = {(start, mode) for start, mode, _ in self._measured}
        return [(start, mode) for mode in self.study.modes for start in self.study.starts if (start, mode) in there]

    @cached_property
    def curves(self) -> dict[CurveKey, dict[float, BootstrapEstimate]]:
        """By start and mode, the score at each share."""
        found: dict[CurveKey, dict[float, BootstrapEstimate]] = {}
        for start, mode in self.curves_there:
            shares = sorted(share for one, other, share in self._measured if (one, other) == (start, mode))
            found[start, mode] = {share: self._estimate(start, mode, share) for share in shares}
        return found

    def _estimate(self, start: str, mode: str, share: float) -> BootstrapEstimate:
        found = estimate_over_runs(
            self._measured[start, mode, share],
            self._random("curve", start, mode, share),
            interquartile=self.study.interquartile,
        )
        return replace(found, replicates=found.replicates.clip(0, 100))  # what a mean IoU may be

    def _random(self, *names: object) -> np.random.Generator:
        """A generator that depends on names alone: no figure depends on which others were asked for before."""
        return np.random.default_rng(list("/".join(map(str, names)).encode()))

    @cached_property
    def differences(self) -> dict[CurveKey, dict[float, Difference]]:
        """By start and mode, what it is above the reference at each share, paired by draw and seed."""
        found: dict[CurveKey, dict[float, Difference]] = {}
        for start, mode in self.curves_there:
            if start == self.study.reference:
                continue
            shares, estimates = [], []
            for share in self.curves[start, mode]:
                difference = paired_difference(
                    self._measured[start, mode, share],
                    self._measured.get((self.study.reference, mode, share), {}),
                    self._random("difference", start, mode, share),
                    interquartile=self.study.interquartile,
                )
                if difference is not None:
                    shares.append(share)
                    estimates.append(difference)
            told = [item.p_value for item in estimates if item.runs > 1]  # a single run asks no question
            by_holm = iter(holm_correction(told))
            corrected = [next(by_holm) if item.runs > 1 else 1.0 for item in estimates]
            if shares:
                found[start, mode] = {
                    share: Difference(item, p) for share, item, p in zip(shares, estimates, corrected, strict=True)
                }
        return found

    @cached_property
    def needed(self) -> dict[tuple[str, str, str], BootstrapEstimate]:
        """By start, mode and other start: the share of labels at which it reaches what the other has at the largest."""
        found = {}
        for start, mode in self.curves_there:
            for other in self.study.starts:
                if other != start and (other, mode) in self.curves:
                    largest = max(self.curves[other, mode])
                    target = self.curves[other, mode][largest]
                    found[start, mode, other] = labels_needed(self.curves[start, mode], target)
        return found

    def classes(self, start: str, mode: str, share: float) -> np.ndarray:
        """(C,) IoU in percent of the scored classes, mean over runs; NaN for those that no pixel tested is of."""
        runs = [strict_iou(score.counts.sum(axis=0)) for score in self._of(start, mode, share)]
        return aggregate(np.stack(runs), False)

    def domains(self, start: str, mode: str, share: float) -> dict[str, float]:
        """Mean IoU in percent in each domain, mean over runs."""
        names = np.array([ConfusionMatrix.domain(region) for region in self.regions])
        runs = self._of(start, mode, share)
        return {
            str(name): float(np.mean([self.miou(score.counts[names == name].sum(axis=0)) for score in runs]))
            for name in np.unique(names)
        }

    def missing(self, start: str, mode: str, share: float) -> dict[str, float]:
        """Mean IoU by set of sensors, mean over runs; empty where it was not measured."""
        runs = [score.missing for score in self._of(start, mode, share) if score.missing]
        return {name: float(np.mean([run[name] for run in runs])) for name in (runs[0] if runs else {})}

    def _of(self, start: str, mode: str, share: float) -> list[RunResult]:
        return [score for score in self.chosen if self._key(score.cell) == (start, mode, share)]


def analyze_study(study: StudyConfig) -> dict[str, Analysis]:
    """By label, what the finished cells of a study scored.

    Raises:
        InputError: no cell is finished, or they were measured on different patches.
    """
    folders = RunFolders(study)
    done = [cell for cell in study_runs(study) if folders.finished(cell)]
    if not done:
        raise InputError(f"{study.output}: no cell of this study is finished; run `bocage study run` first")
    for cell in done:
        folders.prepare(cell)  # the scores are those of the configuration that is asked for
    metrics = {cell: json.loads((folders.of(cell) / "metrics.json").read_text(encoding="utf-8")) for cell in done}
    part = "test" if all("test" in found for found in metrics.values()) else "valid"
    schemes = {name: scheme_from_json(name, facts) for name, facts in metrics[done[0]]["labels"].items()}
    found = {}
    for label, scheme in schemes.items():
        matrices = {cell: read_region_matrices(folders.of(cell), part, label, scheme) for cell in done}
        _check_same_patches(matrices, folders, label)
        regions = sorted({region for found in matrices.values() for region in found})
        if not regions:
            continue  # no tested patch has the label
        none = np.zeros((len(scheme), len(scheme)), np.int64)  # a probe may find no labelled cell in a region
        scores = [
            RunResult(
                cell,
                _valid(metrics[cell], label, study.background),
                strict_counts(np.stack([matrices[cell].get(region, none) for region in regions]), scheme),
                {
                    "steps": metrics[cell].get("steps", 0),
                    "skipped_steps": metrics[cell].get("skipped_steps", 0),
                    "patches": metrics[cell]["patches"]["train"],
                    "taught": metrics[cell].get("taught", {}).get(label),
                    "train_keys": metrics[cell]["train_keys"],
                    "seconds": folders.seconds(cell),
                },
                _missing(folders.of(cell), label, study.background),
            )
            for cell in done
        ]
        found[label] = Analysis(study, scheme, regions, scores, part)
    return found


def _check_same_patches(
    matrices: Mapping[StudyRun, Mapping[str, np.ndarray]], folders: RunFolders, label: str
) -> None:
    """Raises ``InputError`` unless trained cells counted the same true pixels of each region, and so did probes."""
    first: dict[bool, StudyRun] = {}

    def truth(cell: StudyRun) -> dict[str, list[int]]:
        return {name: counts.sum(axis=1).tolist() for name, counts in matrices[cell].items()}

    for cell in matrices:
        known = first.setdefault(cell.mode in PROBE_KINDS, cell)
        if truth(cell) != truth(known):
            both = f"{folders.of(cell)} and {folders.of(known)}"
            raise InputError(f"{both} were measured on different patches of {label}")


def _valid(metrics: Mapping[str, Any], label: str, background: bool) -> float:
    return _miou(metrics["valid"][label]["strict"], background)


def _miou(strict: Mapping[str, Any], background: bool) -> float:
    bare = strict["miou_without_background"]
    return float(strict["miou"] if background or bare is None else bare)


def _missing(folder: Path, label: str, background: bool) -> dict[str, float]:
    path = folder / "missing.json"
    if not path.is_file():
        return {}
    found = json.loads(path.read_text(encoding="utf-8"))
    return {name: _miou(labels[label]["strict"], background) for name, labels in found.items() if label in labels}
