"""Tables of a study: for programs (CSV), papers (LaTeX) and the page."""

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
    """A table of the page: cells are text; ``strong`` marks (row, column) of those that hold against chance."""

    title: str
    head: list[str]
    rows: list[list[str]]
    strong: frozenset[tuple[int, int]] = frozenset()


def to_csv(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows with the same keys as CSV."""
    out = io.StringIO()
    writer = csv.DictWriter(out, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue()


def run_rows(analyses: Mapping[str, Analysis]) -> list[dict[str, Any]]:
    """What every cell scored."""
    return [
        {
            "label": label,
            "start": score.cell.start,
            "mode": score.cell.mode,
            "fraction": score.cell.fraction,
            "draw": score.cell.draw,
            "seed": score.cell.seed,
            "learning_rate": "" if score.cell.rate is None else score.cell.rate,
            "chosen": int(score in analysis.chosen),
            "valid_miou": f"{score.valid:.4f}",
            "part": analysis.part,
            "miou": f"{float(analysis.miou(score.counts.sum(axis=0))):.4f}",
            **{key: score.facts[key] for key in ("patches", "steps", "skipped_steps", "seconds", "train_keys")},
        }
        for label, analysis in analyses.items()
        for score in analysis.scores
    ]


def curve_rows(analyses: Mapping[str, Analysis]) -> list[dict[str, Any]]:
    """Every estimate with its interval, and the difference to the reference."""
    rows = []
    for label, analysis in analyses.items():
        for (start, mode), curve in analysis.curves.items():
            for share, item in curve.items():
                low, high = item.interval
                row = {
                    "label": label,
                    "start": start,
                    "mode": mode,
                    "fraction": share,
                    "runs": item.runs,
                    "miou": f"{item.value:.4f}",
                    "low": f"{low:.4f}",
                    "high": f"{high:.4f}",
                }
                difference = analysis.differences.get((start, mode), {}).get(share)
                figures: list[Any] = [""] * 5
                if difference is not None:
                    own = difference.estimate
                    # A single run has no p-value: see ``difference_table``.
                    chances = [own.p_value, difference.corrected] if own.runs > 1 else []
                    figures = [f"{figure:.4f}" for figure in (own.value, *own.interval, *chances)]
                    figures += [""] * (5 - len(figures))
                names = ("difference", "difference_low", "difference_high", "p", "p_holm")
                rows.append(row | dict(zip(names, figures, strict=True)))
    return rows


def class_rows(analyses: Mapping[str, Analysis]) -> list[dict[str, Any]]:
    """IoU of every class."""
    return [
        {"label": label, "start": start, "mode": mode, "fraction": share, "class": name, "iou": f"{iou:.4f}"}
        for label, analysis in analyses.items()
        for (start, mode), curve in analysis.curves.items()
        for share in curve
        for name, iou in zip(
            (analysis.scheme.classes[value] for value in analysis.scheme.scored),
            analysis.classes(start, mode, share),
            strict=True,
        )
        if not math.isnan(iou)
    ]


def _shares(analysis: Analysis, mode: str) -> list[float]:
    return sorted({share for (_, other), curve in analysis.curves.items() if other == mode for share in curve})


def _interval(item: BootstrapEstimate) -> str:
    low, high = item.interval
    return f"{item.value:.1f} ({low:.1f} to {high:.1f}){_single(item)}"


def _single(item: BootstrapEstimate) -> str:
    return "*" if item.runs == 1 else ""


def score_table(analysis: Analysis, mode: str) -> Table:
    """Scores of a mode by start and share."""
    shares = _shares(analysis, mode)
    rows = [
        [start, *(_interval(curve[share]) if share in curve else "" for share in shares)]
        for (start, other), curve in analysis.curves.items()
        if other == mode
    ]
    patches = {score.cell.fraction: score.facts["patches"] for score in analysis.scores}
    head = [f"{percent(share)} ({patches[share]:,})" for share in shares]
    return Table(f"mIoU (%), {mode}, by share (number) of labelled patches", ["", *head], rows)


def difference_table(analysis: Analysis, mode: str) -> Table:
    """Differences to the reference by start and share; strong where Holm's p is under 0.05."""
    shares = _shares(analysis, mode)
    rows: list[list[str]] = []
    strong: set[tuple[int, int]] = set()
    for start, other in analysis.differences:
        if other != mode:
            continue
        row = [start]
        for share in shares:
            item = analysis.differences[start, mode].get(share)
            if item is None:
                row.append("")
                continue
            low, high = item.estimate.interval
            if item.corrected < 0.05:
                strong.add((len(rows), len(row)))
            chance = f", p {item.corrected:.2g}" if item.estimate.runs > 1 else "*"
            row.append(f"{item.estimate.value:+.1f} ({low:+.1f} to {high:+.1f}){chance}")
        rows.append(row)
    title = f"Points above {analysis.study.reference}, {mode}; p by Holm over the shares, bold under 0.05"
    return Table(title, ["", *map(percent, shares)], rows, frozenset(strong))


def labels_needed_table(analysis: Analysis, mode: str) -> Table:
    """Labels that each start needs to reach what another has with most of its labels."""
    curves = {start: curve for (start, other), curve in analysis.curves.items() if other == mode}

    def text(share: float, curve: Mapping[float, BootstrapEstimate]) -> str:
        if math.isinf(share):
            return f"over {percent(max(curve))}"
        return f"{percent(min(curve))} or fewer" if share <= min(curve) else percent(share)

    rows = []
    for start, curve in curves.items():
        row = [start]
        for other in curves:
            item = analysis.needed.get((start, mode, other))
            if item is None:
                row.append("")
                continue
            low, high = (text(share, curve) for share in item.interval)
            row.append(f"{text(item.value, curve)} ({low} to {high})")
        rows.append(row)
    head = ["labels that … needs", *(f"to match {other} at {percent(max(curve))}" for other, curve in curves.items())]
    return Table(f"Labels needed, {mode}", head, rows)


def domain_table(analysis: Analysis, mode: str, share: float) -> Table:
    """Scores by domain at one share."""
    starts = [start for (start, other), curve in analysis.curves.items() if other == mode and share in curve]
    columns = {start: analysis.domains(start, mode, share) for start in starts}
    names = sorted(columns[starts[0]]) if starts else []
    rows = [[name, *(f"{columns[start][name]:.1f}" for start in starts)] for name in names]
    return Table(f"mIoU (%) by domain, {mode}, {percent(share)} of labels", ["domain", *starts], rows)


def sensor_table(analysis: Analysis, mode: str, share: float) -> Table | None:
    """Scores without each sensor, and with each alone, at one share; None where they were not measured."""
    starts = [start for (start, other), curve in analysis.curves.items() if other == mode and share in curve]
    columns = {start: analysis.missing(start, mode, share) for start in starts}
    columns = {start: found for start, found in columns.items() if found}
    if not columns:
        return None
    whole = [f"{analysis.curves[start, mode][share].value:.1f}" for start in columns]
    rows = [["all", *whole]]
    rows += [[name, *(f"{found[name]:.1f}" for found in columns.values())] for name in next(iter(columns.values()))]
    return Table(f"mIoU (%) by sensors, {mode}, {percent(share)} of labels", ["sensors", *columns], rows)


def to_latex(tables: Sequence[Table]) -> str:
    """Tables for a paper, with booktabs."""
    parts = []
    for table in tables:
        lines = [r"\begin{table}", rf"\caption{{{_latex(table.title)}}}"]
        lines += [rf"\begin{{tabular}}{{l{'r' * (len(table.head) - 1)}}}", r"\toprule"]
        lines += [" & ".join(map(_latex, table.head)) + r" \\", r"\midrule"]
        for number, row in enumerate(table.rows):
            cells = [_latex(cell) for cell in row]
            for column in range(len(cells)):
                if (number, column) in table.strong:
                    cells[column] = rf"\textbf{{{cells[column]}}}"
            lines.append(" & ".join(cells) + r" \\")
        lines += [r"\bottomrule", r"\end{tabular}", r"\end{table}"]
        parts.append("\n".join(lines))
    return "% needs \\usepackage{booktabs}\n" + "\n\n".join(parts) + "\n"


def _latex(text: str) -> str:
    for sign in "&%_#$":
        text = text.replace(sign, f"\\{sign}")
    return text.replace("…", r"\dots")
