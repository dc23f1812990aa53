"""The report of a study: one page that needs nothing else to be read, its figures and tables beside it."""

from __future__ import annotations

import base64
import importlib.metadata
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from importlib import resources
from pathlib import Path

from jinja2 import Environment, StrictUndefined
from matplotlib.figure import Figure

from bocage import recipes
from bocage.finetune.evaluation.statistics import CONFIDENCE
from bocage.finetune.probes.probe import MAX_TRAIN_CELLS
from bocage.finetune.study import tables as study_tables
from bocage.finetune.study.figures import (
    DARK,
    LIGHT,
    Theme,
    draw_classes,
    draw_curves,
    draw_differences,
    percent,
    png,
    svg,
)
from bocage.finetune.study.study_config import StudyConfig, study_runs
from bocage.finetune.study.results import Analysis, analyze_study
from bocage.finetune.study.run_folders import RunFolders
from bocage.finetune.study.tables import Table
from bocage.shards.files import atomic_write
from bocage.shards.read.open import open_shards
from bocage.ssl.engine.logging.provenance import git_revision, library_versions

PAGE = "report.html"


@dataclass(frozen=True)
class Picture:
    """A figure in the page: data addresses for light and dark, what it shows, and its size in pixels."""

    light: str
    dark: str
    about: str
    width: int
    height: int


@dataclass
class Section:
    """What the page says of one label."""

    label: str
    anchor: str
    findings: list[str]
    figures: list[Picture] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)
    detail_figures: list[Picture] = field(default_factory=list)
    details: list[Table] = field(default_factory=list)


def write_report(study: StudyConfig, out: Path) -> Path:
    """Write ``report.html``, ``*.svg``, ``*.png``, ``cells.csv``, ``curves.csv``, ``classes.csv`` and ``tables.tex``.

    The same results give the same bytes.

    Args:
        study: of which some cells are finished.
        out: a folder.

    Returns:
        The page.

    Raises:
        InputError: see ``study_results.analyze_study``.
    """
    found = analyze_study(study)
    out.mkdir(parents=True, exist_ok=True)
    sections = [_section(label, analysis, out) for label, analysis in found.items()]
    written = {
        "cells.csv": study_tables.to_csv(study_tables.run_rows(found)),
        "curves.csv": study_tables.to_csv(study_tables.curve_rows(found)),
        "classes.csv": study_tables.to_csv(study_tables.class_rows(found)),
        "tables.tex": study_tables.to_latex([table for section in sections for table in section.tables]),
    }
    grid, folders = study_runs(study), RunFolders(study)
    template = resources.files("bocage.finetune").joinpath("study_report.html.jinja").read_text(encoding="utf-8")
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    written[PAGE] = environment.from_string(template).render(
        title="Labels and encoders: " + ", ".join(study.starts),
        lead=_lead(study, found),
        sections=sections,
        method=_method(study, found),
        compute=_compute(study, found),
        provenance=_provenance(study, found),
        unfinished=[cell.name for cell in grid if not folders.finished(cell)],
        total=len(grid),
        configuration=recipes.to_yaml(study),
    )
    for name, text in written.items():
        with atomic_write(out / name) as path:
            path.write_text(text, encoding="utf-8")
    return out / PAGE


def _section(label: str, analysis: Analysis, out: Path) -> Section:
    study, modes = analysis.study, list(dict.fromkeys(mode for _, mode in analysis.curves))
    section = Section(label, label.lower().replace("_", "-"), _findings(analysis))

    def picture(name: str, about: str, draw: Callable[[Theme], Figure]) -> Picture:
        addresses = []
        for theme in (LIGHT, DARK):
            figure = draw(theme)
            drawn = svg(figure)
            addresses.append("data:image/svg+xml;base64," + base64.b64encode(drawn).decode())
            if theme is LIGHT:
                for ending, content in (("svg", drawn), ("png", png(figure, theme))):
                    with atomic_write(out / f"{label}_{name}.{ending}") as path:
                        path.write_bytes(content)
        width, height = (round(96 * inches) for inches in figure.get_size_inches())
        return Picture(addresses[0], addresses[1], about, width, height)

    mean = "interquartile mean" if study.interquartile else "mean"
    for mode in modes:
        about = f"Strict mIoU on the {analysis.part} patches by share of labelled patches, {mode}: {mean} over runs, "
        about += "95 % bands."
        draw: Callable[[Theme], Figure] = partial(draw_curves, analysis, mode)
        section.figures.append(picture(f"curves_{mode}", about, draw))
        if any(other == mode for _, other in analysis.differences):
            about = f"Points above {study.reference}, {mode}, paired by draw and seed, 95 % intervals."
            draw = partial(draw_differences, analysis, mode)
            section.figures.append(picture(f"differences_{mode}", about, draw))
    for mode in modes:
        shares = sorted({share for (_, other), curve in analysis.curves.items() if other == mode for share in curve})
        section.tables.append(study_tables.score_table(analysis, mode))
        if any(other == mode for _, other in analysis.differences):
            section.tables.append(study_tables.difference_table(analysis, mode))
        if len(study.shares) > 1 and any(other == mode for _, other in analysis.differences):
            section.tables.append(study_tables.labels_needed_table(analysis, mode))
        compared = any(other == mode for _, other in analysis.differences)
        what = f"IoU of each class, points above {study.reference}" if compared else "IoU of each class, percent"
        section.detail_figures.append(
            picture(f"classes_{mode}", f"{what}, {mode}.", partial(draw_classes, analysis, mode))
        )
        for share in dict.fromkeys((shares[0], shares[-1])):
            section.details.append(study_tables.domain_table(analysis, mode, share))
            missing = study_tables.sensor_table(analysis, mode, share)
            if missing is not None:
                section.details.append(missing)
    return section


def _findings(analysis: Analysis) -> list[str]:
    """What can be said, a sentence a start and mode; that nothing can be said is said, too."""
    found = []
    for (start, mode), curve in analysis.differences.items():
        sure = [share for share, item in curve.items() if item.corrected < 1 - CONFIDENCE]
        single = all(item.estimate.runs == 1 for item in curve.values())
        above = [share for share in sure if curve[share].estimate.value > 0]
        below = [share for share in sure if curve[share].estimate.value < 0]
        best = max(sure or curve, key=lambda share: abs(curve[share].estimate.value))
        low, high = curve[best].estimate.interval
        extreme = (
            f"the largest {'such ' if sure else ''}difference is {curve[best].estimate.value:+.1f} points "
            f"at {percent(best)} ({low:+.1f} to {high:+.1f})"
        )
        parts = [
            f"{word} {analysis.study.reference} at {', '.join(map(percent, shares))} of the labels"
            for word, shares in (("above", above), ("below", below))
            if shares
        ]
        if parts:
            found.append(f"{start}, {mode}: {' and '.join(parts)}; {extreme}.")
        elif single:
            found.append(f"{start}, {mode}: one run a share, which cannot tell chance from effect; {extreme}.")
        else:
            found.append(f"{start}, {mode}: not told apart from {analysis.study.reference} at any share; {extreme}.")
    return found or ["One start: there is nothing to compare with."]


def _counted(number: int, what: str) -> str:
    return f"{number:,} {what}" if number == 1 else f"{number:,} {what}s"


def _lead(study: StudyConfig, found: Mapping[str, Analysis]) -> str:
    first = next(iter(found.values()))
    what = "single patches" if study.sampling_unit == "patch" else "whole regions"
    return (
        f"{_counted(len(first.scores), 'run')}: {_counted(len(study.starts), 'start')}, "
        f"{_counted(len(study.shares), 'share')} of the labelled patches ({what}), measured on "
        f"{_counted(len(first.regions), 'region')} of the {first.part} patches."
    )


def _method(study: StudyConfig, found: Mapping[str, Analysis]) -> list[str]:
    mean = "the mean of the middle half of the runs" if study.interquartile else "the mean over runs"
    runs = "; ".join(
        f"{percent(share.fraction)}: {_counted(share.draws, 'draw')} of {_counted(share.seeds, 'seed')}"
        for share in sorted(study.shares, key=lambda share: share.fraction)
    )
    what = "subsets of patches" if study.sampling_unit == "patch" else "subsets of whole regions"
    lines = [
        f"Labels: nested {what}, stratified by domain and rarest class. Runs by share: {runs}; of probes one seed.",
        f"Scores: strict mIoU (a scored pixel predicted as an unscored class is a miss), {mean}; "
        "classes that the tested patches lack are left out.",
        f"Intervals and bands are of 95 %: in each of {study.replicates:,} replicates, the regions of a domain have "
        "random weights (Bayesian bootstrap), and the mean over draws, or over the seeds of a single draw, is off by a "
        "Student variable. "
        "Differences are paired by region, draw and seed; p-values are corrected over the shares (Holm), intervals are "
        "not: one may leave 0 out where the p-value is above 0.05. Of a single run, marked *, the interval holds what "
        "regions do alone, and there is no p-value.",
    ]
    if study.learning_rates:
        rates = ", ".join(f"{rate:g}" for rate in study.learning_rates)
        lines.append(f"Learning rates {rates} are tried for every start; the best on validation counts, by share.")
    if "knn" in study.modes or "linear" in study.modes:
        lines.append("knn and linear are probes of frozen features on cells of 12.8 m: not comparable with maps.")
        scores = [score for analysis in found.values() for score in analysis.scores if score.facts["taught"]]
        full = {score.cell.fraction for score in scores if score.facts["taught"]["cells"] < score.facts["taught"]["of"]}
        if full:
            lines.append(
                f"Probes learn from at most {MOST_CELLS:,} labelled cells: those of shares from {percent(min(full))} "
                "on learn from as many."
            )
    if not study.background and any(item.scheme.background is not None for item in found.values()):
        lines.append("The background of crops is left out of the mean.")
    every = next(iter(found.values())).scores
    if skipped := [score.cell.name for score in every if score.facts["skipped_steps"]]:
        lines.append(
            f"Of {_counted(len(skipped), 'run')} some steps were left out because their loss was not finite, see "
            f"skipped_steps in cells.csv: {', '.join(skipped[:3])}{', …' if len(skipped) > 3 else ''}."
        )
    if next(iter(found.values())).part == "valid":
        lines.append("There are no test patches: what is reported was measured on validation patches.")
    return lines


def _compute(study: StudyConfig, found: Mapping[str, Analysis]) -> Table:
    scores = next(iter(found.values())).scores
    rows = []
    total = 0.0
    for start in study.starts:
        for mode in study.modes:
            here = [score for score in scores if (score.cell.start, score.cell.mode) == (start, mode)]
            if not here:
                continue
            hours = sum(score.facts["seconds"] for score in here) / 3600
            total += hours
            steps = sum(score.facts["steps"] for score in here)
            rows.append([start, mode, str(len(here)), f"{steps:,}", f"{hours:.3g}", *_energy(study, hours)])
    rows.append(["all", "", str(len(scores)), "", f"{total:.3g}", *_energy(study, total)])
    head = ["start", "mode", "runs", "steps", "hours of a process"]
    return Table(
        "What the runs took; pretraining is not in it", head + (["kWh (estimate)"] if study.watts else []), rows
    )


def _energy(study: StudyConfig, hours: float) -> list[str]:
    return [f"{hours * study.watts / 1000:.3g}"] if study.watts else []


def _provenance(study: StudyConfig, found: Mapping[str, Analysis]) -> Table:
    manifest = open_shards(study.shards)
    keys = sorted({score.facts["train_keys"] for analysis in found.values() for score in analysis.scores})
    versions = ", ".join(f"{name} {version}" for name, version in library_versions().items())
    rows = [
        ["bocage", f"{importlib.metadata.version('bocage')}, {git_revision() or 'revision unknown'}"],
        ["libraries", versions],
        ["shards", f"{len(manifest):,} patches, dataset.json {manifest.digest[:16]}…"],
        ["subsets learned from", f"{len(keys)}, by the hash of their keys in cells.csv"],
        *([f"encoders of {start}", "; ".join(f"{n}: {s}" for n, s in sources.items()) or "from scratch"]
          for start, sources in study.starts.items()),
    ]  # fmt: skip
    return Table("Where this comes from", ["", ""], rows)
