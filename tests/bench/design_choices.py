"""Study what pretraining gains and which of its choices matter: ``python tests/bench/design_choices.py FOLDER``.

The script simulates patches and pretrains encoders in every variant of ``VARIANTS`` with several seeds. It fine-tunes
these encoders, and encoders from scratch, on small fractions of the labelled patches, and probes them frozen. It writes
the tables of ``docs/explanation/design-choices.md`` and all values to ``docs/explanation/design-choices.csv``.
Pretraining and fine-tuning are ordinary runs in folders below FOLDER, so the same command resumes an interrupted study.
Runs that do not exist are left out of the tables.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import os
import statistics
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from design_runs import (
    FRACTIONS,
    LONG,
    MASKED,
    MIDDLE,
    PROBED,
    SCRATCH,
    SEEDS,
    SHORT,
    SPREAD,
    STEPS,
    VARIANTS,
    FinetuneCase,
    Study,
)

DOCS = Path(__file__).parents[2] / "docs" / "explanation"
REPORT = "design-choices.md"
BEGIN, END = "<!-- figures -->", "<!-- end of figures -->"
T_95 = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776}  # two-sided 95 % quantile of Student's t, by degrees of freedom


def probe(study: Study, initialization: str, seed: int) -> None:
    """Score linear and kNN probes of frozen encoders: land cover from the image, crops from the series."""
    import torch

    from bocage import recipes
    from bocage.shards.files import atomic_write
    from bocage.shards.format.manifest import Manifest
    from bocage.ssl.evaluation.probe import Probe, ProbeConfig
    from bocage.ssl.pretrain import build_pretraining_model
    from bocage.ssl.pretrain_config import PretrainConfig

    torch.set_num_threads(1)
    manifest = Manifest.open(study.shards())
    miou: dict[str, float] = {}
    for task, (sensor, label) in PROBED.items():
        overrides = ["recipe=quickstart", f"modalities=[{sensor}]", *MASKED]
        if initialization in VARIANTS:
            overrides.append(f"encoders.{sensor}={study.encoder_path(initialization, seed, sensor)}")
        torch.manual_seed(seed)
        encoders = build_pretraining_model(recipes.resolve(PretrainConfig, overrides), manifest).eval()
        scores = Probe(manifest, ProbeConfig(label=label, patches=100), "split_1").scores(encoders, 8, 0)
        miou |= {f"{kind} {task}": scores[f"{kind}_miou/{sensor}"] for kind in ("linear", "knn")}
    path = study.probe_path(initialization, seed)
    path.parent.mkdir(exist_ok=True)
    with atomic_write(path) as temporary:
        temporary.write_text(json.dumps(miou), encoding="utf-8")


@dataclass(frozen=True)
class Measure:
    """Quantity by which initializations are compared.

    Attributes:
        title: column title.
        source: see ``Study.score``.
    """

    title: str
    source: str | FinetuneCase


def _finetuning_measures(cases: Iterable[FinetuneCase]) -> list[Measure]:
    return [Measure(case.title, case) for case in cases]


BY_FRACTION = _finetuning_measures(FinetuneCase(fraction) for fraction in FRACTIONS)
BY_FRACTION_SHORT = _finetuning_measures(FinetuneCase(fraction, SHORT) for fraction in FRACTIONS)
BY_STEPS = [Measure(f"{steps:,} steps", FinetuneCase(MIDDLE, steps)) for steps in (SHORT, STEPS, LONG)]
FROZEN = _finetuning_measures([FinetuneCase(MIDDLE, frozen=True)])
PROBES = [Measure(title, title) for title in (f"{kind} {task}" for task in PROBED for kind in ("linear", "knn"))]
SPREADS = [Measure(title, title) for title in SPREAD]


def _scores(study: Study, initialization: str, measure: Measure) -> dict[int, float]:
    scores = {seed: study.score(initialization, seed, measure.source) for seed in SEEDS}
    return {seed: score for seed, score in scores.items() if score is not None}


def _format_mean(scores: dict[int, float]) -> str:
    if not scores:
        return ""
    spread = f" ± {statistics.stdev(scores.values()):.1f}" if len(scores) > 1 else ""
    return f"{statistics.mean(scores.values()):.1f}{spread}"


def _format_difference(scores: dict[int, float], reference: dict[int, float]) -> str:
    """Format the mean of the differences paired by seed and its 95 % interval; bold if the interval excludes 0."""
    differences = [scores[seed] - reference[seed] for seed in scores if seed in reference]
    if len(differences) < 2:
        return f"{differences[0]:+.1f}" if differences else ""
    mean = statistics.mean(differences)
    half_width = T_95[len(differences) - 1] * statistics.stdev(differences) / math.sqrt(len(differences))
    text = f"{mean:+.1f} ({mean - half_width:+.1f} to {mean + half_width:+.1f})"
    return f"**{text}**" if abs(mean) > half_width else text


def _mean_over_fractions(study: Study, initialization: str) -> dict[int, float]:
    """Average over the fractions, for seeds with a score at every fraction."""
    by_seed: dict[int, list[float]] = {}
    for measure in BY_FRACTION:
        for seed, score in _scores(study, initialization, measure).items():
            by_seed.setdefault(seed, []).append(score)
    return {seed: statistics.mean(scores) for seed, scores in by_seed.items() if len(scores) == len(FRACTIONS)}


def _table(header: list[str], rows: Iterable[list[str]]) -> list[str]:
    """Format a Markdown table without its empty rows."""
    rows = [row for row in rows if any(row[1:])]
    return [f"| {' | '.join(line)} |" for line in (header, ["---"] * len(header), *rows)] + [""]


def write_report(study: Study) -> None:
    """Replace the tables of the page between ``BEGIN`` and ``END``, and write the CSV."""
    main = [SCRATCH, *(name for name, variant in VARIANTS.items() if variant.main)]
    columns = [*BY_FRACTION, *FROZEN]
    lines = [
        f"Land cover after {STEPS} steps of fine-tuning, by fraction of the labels: strict mIoU (%) on the validation "
        "patches, mean ± standard deviation over seeds. *frozen*: the encoder is not updated.",
        "",
    ]
    lines += _table(
        ["encoder", *(measure.title for measure in columns)],
        (
            [initialization, *(_format_mean(_scores(study, initialization, measure)) for measure in columns)]
            for initialization in main
        ),
    )
    lines += [
        "Differences paired by seed, with 95 % intervals; bold where the interval excludes 0. *mean*: mean over the "
        "fractions.",
        "",
    ]
    pairs = [(name, SCRATCH) for name in main[1:]]
    pairs += [("masked", "contrastive"), ("combined", "masked"), ("combined", "contrastive")]
    lines += _table(
        ["", *(measure.title for measure in columns), "mean"],
        (
            [
                f"{name} - {reference}",
                *(_format_difference(_scores(study, name, m), _scores(study, reference, m)) for m in columns),
                _format_difference(_mean_over_fractions(study, name), _mean_over_fractions(study, reference)),
            ]
            for name, reference in pairs
        ),
    )
    lines += [f"Land cover after {SHORT} steps of fine-tuning, by fraction of the labels:", ""]
    lines += _table(
        ["encoder", *(measure.title for measure in BY_FRACTION)],
        (
            [initialization, *(_format_mean(_scores(study, initialization, measure)) for measure in BY_FRACTION_SHORT)]
            for initialization in main
        ),
    )
    lines += [f"Land cover with {MIDDLE:.0%} of the labels, by steps of fine-tuning:", ""]
    lines += _table(
        ["encoder", *(measure.title for measure in BY_STEPS)],
        (
            [initialization, *(_format_mean(_scores(study, initialization, measure)) for measure in BY_STEPS)]
            for initialization in main
        ),
    )
    measures = [*_finetuning_measures([FinetuneCase(MIDDLE)]), *PROBES]
    lines += [
        "Difference of each variant to `masked`, or to the variant in parentheses: land cover after fine-tuning, and "
        "probes of frozen encoders.",
        "",
    ]
    lines += _table(
        ["variant", *(measure.title for measure in measures)],
        (
            [
                variant.about + (f" (to `{variant.against}`)" if variant.against != "masked" else ""),
                *(_format_difference(_scores(study, name, m), _scores(study, variant.against, m)) for m in measures),
            ]
            for name, variant in VARIANTS.items()
            if name != "masked"
        ),
    )
    lines += [
        "mIoU (%) of the probes, and spread of the deepest features (`feature_std`, times 100; 100 when directions are "
        "spread evenly):",
        "",
    ]
    lines += _table(
        ["encoder", *(measure.title for measure in (*PROBES, *SPREADS))],
        (
            [name, *(_format_mean(_scores(study, name, m)) for m in (*PROBES, *SPREADS))]
            for name in (SCRATCH, *VARIANTS)
        ),
    )
    report = DOCS / REPORT
    before, _, rest = report.read_text(encoding="utf-8").partition(BEGIN)
    _, _, after = rest.partition(END)
    report.write_text(f"{before}{BEGIN}\n\n" + "\n".join(lines) + f"\n{END}{after}", encoding="utf-8")
    rows: list[dict[str, Any]] = []
    for initialization in (SCRATCH, *VARIANTS):
        long_runs = _finetuning_measures([FinetuneCase(MIDDLE, LONG)])
        for measure in (*BY_FRACTION, *BY_FRACTION_SHORT, *long_runs, *FROZEN, *PROBES, *SPREADS):
            for seed, score in _scores(study, initialization, measure).items():
                rows.append(
                    {"encoder": initialization, "measure": measure.title, "seed": seed, "percent": f"{score:.3f}"}
                )
    with (DOCS / "design-choices.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, ["encoder", "measure", "seed", "percent"])
        writer.writeheader()
        writer.writerows(rows)


def main() -> None:
    """Execute the missing runs, then write the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="folder of data, runs and logs")
    parser.add_argument(
        "--processes", type=int, default=os.cpu_count() or 1, help="simultaneous runs (default: CPU cores)"
    )
    initializations = [SCRATCH, *VARIANTS]
    parser.add_argument(
        "--only",
        nargs="*",
        choices=initializations,
        default=initializations,
        metavar="ENCODER",
        help=f"variants to run, among {initializations}",
    )
    parser.add_argument(
        "--report", action="store_true", help="write the tables from the existing runs, and run nothing"
    )
    parser.add_argument("--probe", help=argparse.SUPPRESS)
    parser.add_argument("--seed", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if BEGIN not in (DOCS / REPORT).read_text(encoding="utf-8"):
        raise SystemExit(f"{DOCS / REPORT} has no line {BEGIN}: add it and a line {END} where the tables belong")
    study = Study(arguments.folder.resolve(), arguments.processes)
    if arguments.probe:
        probe(study, arguments.probe, arguments.seed)
        return
    if not arguments.report:
        study.run(arguments.only)
    write_report(study)


if __name__ == "__main__":
    main()
