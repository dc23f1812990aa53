"""Write the report of a study: a self-contained HTML page, and its figures and tables as files."""

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
from bocage.finetune.study.results import Analysis, analyze_study
from bocage.finetune.study.run_folders import RunFolders
from bocage.finetune.study.study_config import StudyConfig, study_runs
from bocage.finetune.study.tables import Table
from bocage.shards.errors import counted
from bocage.shards.files import atomic_write
from bocage.shards.read.open import open_shards
from bocage.ssl.engine.logging.provenance import git_revision, library_versions

PAGE = "report.html"


@dataclass(frozen=True)
class Picture:
    """Figure of the page.

    Attributes:
        light: data URL of the figure for light pages.
        dark: data URL of the figure for dark pages.
        caption: caption, also used as alternative text.
        width: width in pixels.
        height: height in pixels.
    """

    light: str
    dark: str
    caption: str
    width: int
    height: int


@dataclass
class Section:
    """Section of the page for one label."""

    label: str
    anchor: str
    findings: list[str]
    figures: list[Picture] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)
    detail_figures: list[Picture] = field(default_factory=list)
    details: list[Table] = field(default_factory=list)


def write_report(study: StudyConfig, out: Path) -> Path:
    """Write ``report.html``, ``*.svg``, ``*.png``, ``runs.csv``, ``curves.csv``, ``classes.csv`` and ``tables.tex``.

    Equal results give equal bytes.

    Args:
        study: study with at least one finished run.
        out: output folder, created when missing.

    Returns:
        Path of the page.

    Raises:
        InputError: see ``results.analyze_study``.
    """
    analyses = analyze_study(study)
    out.mkdir(parents=True, exist_ok=True)
    sections = [_section(label, analysis, out) for label, analysis in analyses.items()]
    files = {
        "runs.csv": study_tables.to_csv(study_tables.run_rows(analyses)),
        "curves.csv": study_tables.to_csv(study_tables.curve_rows(analyses)),
        "classes.csv": study_tables.to_csv(study_tables.class_rows(analyses)),
        "tables.tex": study_tables.to_latex([table for section in sections for table in section.tables]),
    }
    grid, folders = study_runs(study), RunFolders(study)
    template = resources.files("bocage.finetune.study").joinpath("report.html.jinja").read_text(encoding="utf-8")
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    files[PAGE] = environment.from_string(template).render(
        title="Label efficiency of encoders: " + ", ".join(study.initializations),
        lead=_lead(study, analyses),
        sections=sections,
        method=_method(study, analyses),
        compute=_compute(study, analyses),
        provenance=_provenance(study, analyses),
        unfinished=[run.name for run in grid if not folders.is_finished(run)],
        total=len(grid),
        configuration=recipes.to_yaml(study),
    )
    for name, text in files.items():
        with atomic_write(out / name) as path:
            path.write_text(text, encoding="utf-8")
    return out / PAGE


def _section(label: str, analysis: Analysis, out: Path) -> Section:
    study, modes = analysis.study, list(dict.fromkeys(mode for _, mode in analysis.curves))
    section = Section(label, label.lower().replace("_", "-"), _findings(analysis))

    def picture(name: str, caption: str, draw: Callable[[Theme], Figure]) -> Picture:
        urls = []
        for theme in (LIGHT, DARK):
            figure = draw(theme)
            as_svg = svg(figure)
            urls.append("data:image/svg+xml;base64," + base64.b64encode(as_svg).decode())
            if theme is LIGHT:
                for extension, content in (("svg", as_svg), ("png", png(figure, theme))):
                    with atomic_write(out / f"{label}_{name}.{extension}") as path:
                        path.write_bytes(content)
        width, height = (round(96 * inches) for inches in figure.get_size_inches())
        return Picture(urls[0], urls[1], caption, width, height)

    mean = "interquartile mean" if study.interquartile else "mean"
    for mode in modes:
        is_compared = any(curve_mode == mode for _, curve_mode in analysis.differences)
        caption = f"Strict mIoU on the {analysis.part} patches by fraction of labelled patches, {mode}: {mean} over "
        caption += "runs with 95 % bands."
        draw: Callable[[Theme], Figure] = partial(draw_curves, analysis, mode)
        section.figures.append(picture(f"curves_{mode}", caption, draw))
        if is_compared:
            caption = f"Points above {study.reference}, {mode}, paired by draw and seed, with 95 % intervals."
            draw = partial(draw_differences, analysis, mode)
            section.figures.append(picture(f"differences_{mode}", caption, draw))
    for mode in modes:
        is_compared = any(curve_mode == mode for _, curve_mode in analysis.differences)
        fractions = sorted({key for (_, other), curve in analysis.curves.items() if other == mode for key in curve})
        section.tables.append(study_tables.score_table(analysis, mode))
        if is_compared:
            section.tables.append(study_tables.difference_table(analysis, mode))
        if len(study.fractions) > 1 and is_compared:
            section.tables.append(study_tables.labels_needed_table(analysis, mode))
        unit = f"points above {study.reference}" if is_compared else "percent"
        caption = f"IoU of each class, {unit}, {mode}."
        section.detail_figures.append(picture(f"classes_{mode}", caption, partial(draw_classes, analysis, mode)))
        for fraction in dict.fromkeys((fractions[0], fractions[-1])):
            section.details.append(study_tables.domain_table(analysis, mode, fraction))
            ablation = study_tables.sensor_table(analysis, mode, fraction)
            if ablation is not None:
                section.details.append(ablation)
    return section


def _findings(analysis: Analysis) -> list[str]:
    """Write one sentence per initialization and mode, also where no difference is significant."""
    sentences = []
    reference = analysis.study.reference
    for (initialization, mode), curve in analysis.differences.items():
        significant = [fraction for fraction, item in curve.items() if item.p_holm < 1 - CONFIDENCE]
        has_single_runs = all(item.estimate.runs == 1 for item in curve.values())
        above = [fraction for fraction in significant if curve[fraction].estimate.value > 0]
        below = [fraction for fraction in significant if curve[fraction].estimate.value < 0]
        largest = max(significant or curve, key=lambda fraction: abs(curve[fraction].estimate.value))
        low, high = curve[largest].estimate.interval
        summary = (
            f"the largest {'significant ' if significant else ''}difference is "
            f"{curve[largest].estimate.value:+.1f} points at {percent(largest)} ({low:+.1f} to {high:+.1f})"
        )
        parts = [
            f"{word} {reference} at {', '.join(map(percent, fractions))} of the labels"
            for word, fractions in (("above", above), ("below", below))
            if fractions
        ]
        if parts:
            finding = f"significantly {' and '.join(parts)}"
        elif has_single_runs:
            finding = "one run per fraction, so chance and effect cannot be separated"
        else:
            finding = f"no significant difference to {reference} at any fraction"
        sentences.append(f"{initialization}, {mode}: {finding}; {summary}.")
    return sentences or ["One initialization: there is nothing to compare with."]


def _lead(study: StudyConfig, analyses: Mapping[str, Analysis]) -> str:
    first = next(iter(analyses.values()))
    unit = "single patches" if study.sampling_unit == "patch" else "whole regions"
    return (
        f"{counted(len(first.results), 'run')}: {counted(len(study.initializations), 'initialization')}, "
        f"{counted(len(study.fractions), 'fraction')} of the labelled patches ({unit}), scored on "
        f"{counted(len(first.regions), 'region')} of the {first.part} patches."
    )


def _method(study: StudyConfig, analyses: Mapping[str, Analysis]) -> list[str]:
    mean = "the interquartile mean over runs" if study.interquartile else "the mean over runs"
    runs = "; ".join(
        f"{percent(item.fraction)}: {counted(item.draws, 'draw')} with {counted(item.seeds, 'seed')}"
        for item in sorted(study.fractions, key=lambda item: item.fraction)
    )
    unit = "subsets of patches" if study.sampling_unit == "patch" else "subsets of whole regions"
    lines = [
        f"Labels: nested {unit}, stratified by domain and rarest class. Runs by fraction: {runs}. Probes use one seed.",
        f"Scores: strict mIoU, {mean}. A scored pixel predicted as an unscored class is a miss. Classes without a "
        "tested pixel are left out.",
        f"Intervals and bands are 95 % bootstrap intervals with {study.replicates:,} replicates. Each replicate "
        "weights the regions of a domain at random (Bayesian bootstrap) and adds a Student variable for the error of "
        "the mean over draws, or over the seeds of a single draw. Differences are paired by region, draw and seed. "
        "P-values are Holm-corrected over the fractions; intervals are not corrected, so an interval may exclude 0 "
        "where p is above 0.05. For a single run, marked *, the interval covers the regions only and there is no "
        "p-value.",
    ]
    if study.learning_rates:
        rates = ", ".join(f"{rate:g}" for rate in study.learning_rates)
        lines.append(
            f"Learning rates {rates} are tried with every initialization. The best on the validation patches is "
            "selected by initialization, mode and fraction."
        )
    if study.variants:
        lines.append(
            f"Variants {', '.join(study.variants)} are tried with every initialization, and selected in the same way."
        )
    probes = [item for analysis in analyses.values() for item in analysis.results if item.facts["train_cells"]]
    if probes:
        lines.append(
            f"knn and linear are probes of frozen features on cells of {probes[0].facts['train_cells']['side']:g} m. "
            "Their scores are not comparable with those of maps."
        )
        capped = {
            item.run.fraction
            for item in probes
            if item.facts["train_cells"]["used"] < item.facts["train_cells"]["labelled"]
        }
        if capped:
            lines.append(
                f"Probes train on at most {MAX_TRAIN_CELLS:,} labelled cells. Fractions from {percent(min(capped))} on "
                "reach this limit."
            )
    if not study.background and any(analysis.scheme.background is not None for analysis in analyses.values()):
        lines.append("The mean leaves out the background class.")
    results = next(iter(analyses.values())).results
    if skipped := [result.run.name for result in results if result.facts["skipped_steps"]]:
        lines.append(
            f"{counted(len(skipped), 'run')} skipped steps with a non-finite loss, see skipped_steps in runs.csv: "
            f"{', '.join(skipped[:3])}{', …' if len(skipped) > 3 else ''}."
        )
    if next(iter(analyses.values())).part == "valid":
        lines.append("There are no test patches: all reported scores are of the validation patches.")
    return lines


def _compute(study: StudyConfig, analyses: Mapping[str, Analysis]) -> Table:
    results = next(iter(analyses.values())).results
    rows = []
    total_hours = 0.0
    for initialization in study.initializations:
        for mode in study.modes:
            selected = [item for item in results if (item.run.initialization, item.run.mode) == (initialization, mode)]
            if not selected:
                continue
            hours = sum(item.facts["seconds"] for item in selected) / 3600
            total_hours += hours
            steps = sum(item.facts["steps"] for item in selected)
            row = [initialization, mode, str(len(selected)), f"{steps:,}", f"{hours:.3g}", *_energy(study, hours)]
            rows.append(row)
    rows.append(["all", "", str(len(results)), "", f"{total_hours:.3g}", *_energy(study, total_hours)])
    head = ["initialization", "mode", "runs", "steps", "process hours"]
    return Table("Cost of the runs, without pretraining", head + (["kWh (estimate)"] if study.watts else []), rows)


def _energy(study: StudyConfig, hours: float) -> list[str]:
    return [f"{hours * study.watts / 1000:.3g}"] if study.watts else []


def _provenance(study: StudyConfig, analyses: Mapping[str, Analysis]) -> Table:
    manifest = open_shards(study.shards)
    keys = sorted({result.facts["train_keys"] for analysis in analyses.values() for result in analysis.results})
    versions = ", ".join(f"{name} {version}" for name, version in library_versions().items())
    rows = [
        ["bocage", f"{importlib.metadata.version('bocage')}, {git_revision() or 'revision unknown'}"],
        ["libraries", versions],
        ["shards", f"{len(manifest):,} patches, dataset.json {manifest.digest[:16]}…"],
        ["training subsets", f"{len(keys)}, identified by the hash of their keys in runs.csv"],
        *([f"encoders of {name}", "; ".join(f"{n}: {s}" for n, s in sources.items()) or "from scratch"]
          for name, sources in study.initializations.items()),
    ]  # fmt: skip
    return Table("Versions and inputs", ["", ""], rows)
