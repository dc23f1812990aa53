"""Build the tables of a study, as CSV, as LaTeX and for the HTML report."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from bocage.finetune.evaluation.statistics import BootstrapEstimate
from bocage.finetune.study.figures import percent
from bocage.finetune.study.results import Analysis


@dataclass(frozen=True)
class Table:
    """Table of the report.

    Attributes:
        title: title of the table.
        head: column titles.
        rows: text of each row.
        significant: (row, column) of the significant differences, shown in bold.
    """

    title: str
    head: list[str]
    rows: list[list[str]]
    significant: frozenset[tuple[int, int]] = frozenset()


def to_csv(rows: Sequence[Mapping[str, Any]]) -> str:
    """Format rows as CSV; all rows have the same keys."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def run_rows(analyses: Mapping[str, Analysis]) -> list[dict[str, Any]]:
    """List the scores of every run, for ``runs.csv``."""
    return [
        {
            "label": label,
            "initialization": result.run.initialization,
            "mode": result.run.mode,
            "fraction": result.run.fraction,
            "draw": result.run.draw,
            "seed": result.run.seed,
            "learning_rate": "" if result.run.learning_rate is None else result.run.learning_rate,
            "variant": result.run.variant,
            "selected": int(result in analysis.selected),
            "valid_miou": f"{result.valid_miou:.4f}",
            "part": analysis.part,
            "miou": f"{float(analysis.miou(result.counts.sum(axis=0))):.4f}",
            **{key: result.facts[key] for key in ("patches", "steps", "skipped_steps", "seconds", "train_keys")},
        }
        for label, analysis in analyses.items()
        for result in analysis.results
    ]


def curve_rows(analyses: Mapping[str, Analysis]) -> list[dict[str, Any]]:
    """List all points of the learning curves with their intervals and differences, for ``curves.csv``."""
    rows = []
    for label, analysis in analyses.items():
        for (initialization, mode), curve in analysis.curves.items():
            for fraction, item in curve.items():
                low, high = item.interval
                row = {
                    "label": label,
                    "initialization": initialization,
                    "mode": mode,
                    "fraction": fraction,
                    "runs": item.runs,
                    "miou": f"{item.value:.4f}",
                    "low": f"{low:.4f}",
                    "high": f"{high:.4f}",
                }
                difference = analysis.differences.get((initialization, mode), {}).get(fraction)
                values: list[Any] = [""] * 5
                if difference is not None:
                    estimate = difference.estimate
                    # A single run has no p-value.
                    p_values = [estimate.p_value, difference.p_holm] if estimate.runs > 1 else []
                    values = [f"{value:.4f}" for value in (estimate.value, *estimate.interval, *p_values)]
                    values += [""] * (5 - len(values))
                names = ("difference", "difference_low", "difference_high", "p", "p_holm")
                rows.append(row | dict(zip(names, values, strict=True)))
    return rows


def class_rows(analyses: Mapping[str, Analysis]) -> list[dict[str, Any]]:
    """List the IoU of every class, for ``classes.csv``."""
    return [
        {
            "label": label,
            "initialization": initialization,
            "mode": mode,
            "fraction": fraction,
            "class": name,
            "iou": f"{iou:.4f}",
        }
        for label, analysis in analyses.items()
        for (initialization, mode), curve in analysis.curves.items()
        for fraction in curve
        for name, iou in zip(
            (analysis.scheme.classes[value] for value in analysis.scheme.scored),
            analysis.class_iou(initialization, mode, fraction),
            strict=True,
        )
        if not math.isnan(iou)
    ]


def _curves(analysis: Analysis, mode: str) -> dict[str, dict[float, BootstrapEstimate]]:
    """Learning curves of a mode by initialization."""
    return {name: curve for (name, curve_mode), curve in analysis.curves.items() if curve_mode == mode}


def _fractions(analysis: Analysis, mode: str) -> list[float]:
    return sorted({fraction for curve in _curves(analysis, mode).values() for fraction in curve})


def _with_interval(item: BootstrapEstimate) -> str:
    """Format an estimate with its interval; ``*`` marks a single run."""
    low, high = item.interval
    return f"{item.value:.1f} ({low:.1f} to {high:.1f}){'*' if item.runs == 1 else ''}"


def score_table(analysis: Analysis, mode: str) -> Table:
    """Build the table of scores by initialization and fraction."""
    fractions = _fractions(analysis, mode)
    rows = [
        [name, *(_with_interval(curve[fraction]) if fraction in curve else "" for fraction in fractions)]
        for name, curve in _curves(analysis, mode).items()
    ]
    patches = {result.run.fraction: result.facts["patches"] for result in analysis.results}
    head = [f"{percent(fraction)} ({patches[fraction]:,})" for fraction in fractions]
    return Table(f"mIoU (%), {mode}, by fraction (number) of labelled patches", ["", *head], rows)


def difference_table(analysis: Analysis, mode: str) -> Table:
    """Build the table of differences to the reference; those with a Holm-corrected p below 0.05 are significant."""
    fractions = _fractions(analysis, mode)
    rows: list[list[str]] = []
    significant: set[tuple[int, int]] = set()
    for initialization, curve_mode in analysis.differences:
        if curve_mode != mode:
            continue
        row = [initialization]
        for fraction in fractions:
            item = analysis.differences[initialization, mode].get(fraction)
            if item is None:
                row.append("")
                continue
            low, high = item.estimate.interval
            if item.p_holm < 0.05:
                significant.add((len(rows), len(row)))
            p_value = f", p {item.p_holm:.2g}" if item.estimate.runs > 1 else "*"
            row.append(f"{item.estimate.value:+.1f} ({low:+.1f} to {high:+.1f}){p_value}")
        rows.append(row)
    title = f"Points above {analysis.study.reference}, {mode}; p Holm-corrected over the fractions, bold below 0.05"
    return Table(title, ["", *map(percent, fractions)], rows, frozenset(significant))


def labels_needed_table(analysis: Analysis, mode: str) -> Table:
    """Build the table of labels that each initialization needs to match another one at its largest fraction."""
    curves = _curves(analysis, mode)

    def text(fraction: float, curve: Mapping[float, BootstrapEstimate]) -> str:
        if math.isinf(fraction):
            return f"over {percent(max(curve))}"
        return f"{percent(min(curve))} or fewer" if fraction <= min(curve) else percent(fraction)

    rows = []
    for initialization, curve in curves.items():
        row = [initialization]
        for other in curves:
            item = analysis.labels_needed.get((initialization, mode, other))
            if item is None:
                row.append("")
                continue
            low, high = (text(fraction, curve) for fraction in item.interval)
            row.append(f"{text(item.value, curve)} ({low} to {high})")
        rows.append(row)
    head = ["labels needed by", *(f"to match {other} at {percent(max(curve))}" for other, curve in curves.items())]
    return Table(f"Labels needed, {mode}", head, rows)


def domain_table(analysis: Analysis, mode: str, fraction: float) -> Table:
    """Build the table of scores by domain at one fraction."""
    initializations = [name for name, curve in _curves(analysis, mode).items() if fraction in curve]
    columns = {name: analysis.domain_miou(name, mode, fraction) for name in initializations}
    domains = sorted(columns[initializations[0]]) if initializations else []
    rows = [[domain, *(f"{columns[name][domain]:.1f}" for name in initializations)] for domain in domains]
    return Table(f"mIoU (%) by domain, {mode}, {percent(fraction)} of labels", ["domain", *initializations], rows)


def sensor_table(analysis: Analysis, mode: str, fraction: float) -> Table | None:
    """Build the table of the sensor ablation at one fraction; None when it was not measured."""
    initializations = [name for name, curve in _curves(analysis, mode).items() if fraction in curve]
    columns = {name: analysis.ablation_miou(name, mode, fraction) for name in initializations}
    columns = {name: scores for name, scores in columns.items() if scores}
    if not columns:
        return None
    rows = [["all", *(f"{analysis.curves[name, mode][fraction].value:.1f}" for name in columns)]]
    rows += [[name, *(f"{scores[name]:.1f}" for scores in columns.values())] for name in next(iter(columns.values()))]
    return Table(f"mIoU (%) by sensors, {mode}, {percent(fraction)} of labels", ["sensors", *columns], rows)


def to_latex(tables: Sequence[Table]) -> str:
    """Format tables as LaTeX with booktabs."""
    parts = []
    for table in tables:
        lines = [r"\begin{table}", rf"\caption{{{_latex(table.title)}}}"]
        lines += [rf"\begin{{tabular}}{{l{'r' * (len(table.head) - 1)}}}", r"\toprule"]
        lines += [" & ".join(map(_latex, table.head)) + r" \\", r"\midrule"]
        for number, row in enumerate(table.rows):
            cells = [_latex(cell) for cell in row]
            for column in range(len(cells)):
                if (number, column) in table.significant:
                    cells[column] = rf"\textbf{{{cells[column]}}}"
            lines.append(" & ".join(cells) + r" \\")
        lines += [r"\bottomrule", r"\end{tabular}", r"\end{table}"]
        parts.append("\n".join(lines))
    return "% needs \\usepackage{booktabs}\n" + "\n\n".join(parts) + "\n"


def _latex(text: str) -> str:
    for character in "&%_#$":
        text = text.replace(character, f"\\{character}")
    return text
