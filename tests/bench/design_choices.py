"""What pretraining is worth, and which of its choices matter: ``python tests/bench/design_choices.py FOLDER``.

Simulates patches, pretrains encoders in every variant of ``VARIANTS`` with several seeds, fine-tunes them and encoders
from scratch on small shares of the labelled patches, probes them frozen, and writes ``docs/explanation/design-choices.md`` with all
figures in ``docs/explanation/design-choices.csv``. Pretraining and fine-tuning are ordinary runs, each with a folder of its own
under FOLDER, so the same command goes on where it was stopped. Variants without results are left out of the report.
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
    Case,
    Study,
)

DOCS = Path(__file__).parents[2] / "docs"
REPORT = "design-choices.md"
BEGIN, END = "<!-- figures -->", "<!-- end of figures -->"
T_95 = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776}  # of Student's distribution, by degrees of freedom


def probe(study: Study, start: str, seed: int) -> None:
    """Linear and kNN probes of frozen encoders: land cover from the image, crops from the series."""
    import torch

    from bocage import recipes
    from bocage.shards.files import atomic_write
    from bocage.shards.format.manifest import Manifest
    from bocage.ssl.evaluation.probe import Probe, ProbeConfig
    from bocage.ssl.pretrain import build_pretraining_model
    from bocage.ssl.pretrain_config import PretrainConfig

    torch.set_num_threads(1)
    manifest = Manifest.open(study.data())
    found: dict[str, float] = {}
    for task, (sensor, label) in PROBED.items():
        words = ["recipe=quickstart", f"modalities=[{sensor}]", *MASKED]
        if start in VARIANTS:
            words.append(f"encoders.{sensor}={study.encoder(start, seed, sensor)}")
        torch.manual_seed(seed)
        encoders = build_pretraining_model(recipes.resolve(PretrainConfig, words), manifest).eval()
        figures = Probe(manifest, ProbeConfig(label=label, patches=100), "split_1").scores(encoders, 8, 0)
        found |= {f"{kind} {task}": figures[f"{kind}_miou/{sensor}"] for kind in ("linear", "knn")}
    path = study.probed(start, seed)
    path.parent.mkdir(exist_ok=True)
    with atomic_write(path) as temporary:
        temporary.write_text(json.dumps(found), encoding="utf-8")


@dataclass(frozen=True)
class Measure:
    """A figure that starts are compared by."""

    title: str
    what: str | Case


def _of(found: Iterable[Case]) -> list[Measure]:
    return [Measure(case.title, case) for case in found]


FINE = _of(Case(fraction) for fraction in FRACTIONS)
FEWER = _of(Case(fraction, SHORT) for fraction in FRACTIONS)
DURATIONS = [Measure(f"{steps:,} steps", Case(MIDDLE, steps)) for steps in (SHORT, STEPS, LONG)]
UNTRAINED = _of([Case(MIDDLE, frozen=True)])
FROZEN = [Measure(title, title) for title in (f"{kind} {task}" for task in PROBED for kind in ("linear", "knn"))]
SPREADS = [Measure(title, title) for title in SPREAD]


def _values(study: Study, start: str, measure: Measure) -> dict[int, float]:
    found = {seed: study.value(start, seed, measure.what) for seed in SEEDS}
    return {seed: value for seed, value in found.items() if value is not None}


def _mean(values: dict[int, float]) -> str:
    if not values:
        return ""
    spread = f" ± {statistics.stdev(values.values()):.1f}" if len(values) > 1 else ""
    return f"{statistics.mean(values.values()):.1f}{spread}"


def _difference(one: dict[int, float], other: dict[int, float]) -> str:
    """Mean over the seeds that both have, with the 95 % interval of paired differences; bold when it leaves out 0."""
    pairs = [one[seed] - other[seed] for seed in one if seed in other]
    if len(pairs) < 2:
        return f"{pairs[0]:+.1f}" if pairs else ""
    mean = statistics.mean(pairs)
    half = T_95[len(pairs) - 1] * statistics.stdev(pairs) / math.sqrt(len(pairs))
    text = f"{mean:+.1f} ({mean - half:+.1f} to {mean + half:+.1f})"
    return f"**{text}**" if abs(mean) > half else text


def _pooled(study: Study, start: str) -> dict[int, float]:
    """The mean over fractions of each seed that has them all."""
    by_seed: dict[int, list[float]] = {}
    for measure in FINE:
        for seed, value in _values(study, start, measure).items():
            by_seed.setdefault(seed, []).append(value)
    return {seed: statistics.mean(values) for seed, values in by_seed.items() if len(values) == len(FRACTIONS)}


def _table(head: list[str], rows: Iterable[list[str]]) -> list[str]:
    rows = [row for row in rows if any(row[1:])]
    return [f"| {' | '.join(line)} |" for line in (head, ["---"] * len(head), *rows)] + [""]


def write_report(study: Study) -> None:
    """``docs/explanation/design-choices.md`` around its figures, which replace those between the marks, and the CSV."""
    main = [SCRATCH, *(name for name, variant in VARIANTS.items() if variant.main)]
    lines = [
        f"Land cover after {STEPS} steps of fine-tuning by share of labels, strict mIoU (%) on the validation patches,",
        "",
    ]
    lines[0] += " mean ± standard deviation over seeds; *frozen*: the encoder stays as it is:"
    columns = [*FINE, *UNTRAINED]
    lines += _table(
        ["encoder", *(measure.title for measure in columns)],
        ([start, *(_mean(_values(study, start, measure)) for measure in columns)] for start in main),
    )
    lines += ["Differences paired by seed, 95 % intervals, bold where 0 is outside; the mean is over the shares:", ""]
    pairs = [(one, SCRATCH) for one in main[1:]]
    pairs += [("masked", "contrastive"), ("combined", "masked"), ("combined", "contrastive")]
    lines += _table(
        ["", *(measure.title for measure in columns), "mean"],
        (
            [
                f"{one} - {other}",
                *(_difference(_values(study, one, m), _values(study, other, m)) for m in columns),
                _difference(_pooled(study, one), _pooled(study, other)),
            ]
            for one, other in pairs
        ),
    )
    lines += [f"Fewer steps of fine-tuning, {SHORT}:", ""]
    lines += _table(
        ["encoder", *(measure.title for measure in FINE)],
        ([start, *(_mean(_values(study, start, measure)) for measure in FEWER)] for start in main),
    )
    lines += [f"By steps of fine-tuning, {MIDDLE:.0%} of labels, and longer from scratch:", ""]
    lines += _table(
        ["encoder", *(measure.title for measure in DURATIONS)],
        ([start, *(_mean(_values(study, start, measure)) for measure in DURATIONS)] for start in main),
    )
    measures = [*_of([Case(MIDDLE)]), *FROZEN]
    lines += ["Choices as differences to `masked`, or to what is named; probes are of frozen encoders:", ""]
    lines += _table(
        ["variant", *(measure.title for measure in measures)],
        (
            [
                one.about + (f" (to `{one.against}`)" if one.against != "masked" else ""),
                *(_difference(_values(study, name, m), _values(study, one.against, m)) for m in measures),
            ]
            for name, one in VARIANTS.items()
            if name != "masked"
        ),
    )
    lines += ["Probes themselves, and the spread of the deepest features (`feature_std`, 1 is even, times 100):", ""]
    lines += _table(
        ["encoder", *(measure.title for measure in (*FROZEN, *SPREADS))],
        ([name, *(_mean(_values(study, name, m)) for m in (*FROZEN, *SPREADS))] for name in (SCRATCH, *VARIANTS)),
    )
    report = DOCS / REPORT
    before, _, rest = report.read_text(encoding="utf-8").partition(BEGIN)
    _, _, after = rest.partition(END)
    report.write_text(f"{before}{BEGIN}\n\n" + "\n".join(lines) + f"\n{END}{after}", encoding="utf-8")
    rows: list[dict[str, Any]] = []
    for start in (SCRATCH, *VARIANTS):
        for measure in (*FINE, *FEWER, *_of([Case(MIDDLE, LONG)]), *UNTRAINED, *FROZEN, *SPREADS):
            for seed, value in _values(study, start, measure).items():
                rows.append({"encoder": start, "measure": measure.title, "seed": seed, "percent": f"{value:.3f}"})
    with (DOCS / "design-choices.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, ["encoder", "measure", "seed", "percent"])
        writer.writeheader()
        writer.writerows(rows)


def main() -> None:
    """Run what is missing, then write the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    starts = [SCRATCH, *VARIANTS]
    parser.add_argument("--only", nargs="*", choices=starts, default=starts, metavar="START", help=f"of {starts}")
    parser.add_argument("--report", action="store_true", help="write the report of what is there, run nothing")
    parser.add_argument("--probe", help=argparse.SUPPRESS)
    parser.add_argument("--seed", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if BEGIN not in (DOCS / REPORT).read_text(encoding="utf-8"):
        raise SystemExit(f"{DOCS / REPORT} has no line {BEGIN}, after which figures are written")
    study = Study(arguments.folder.resolve(), arguments.processes)
    if arguments.probe:
        probe(study, arguments.probe, arguments.seed)
        return
    if not arguments.report:
        study.run(arguments.only)
    write_report(study)


if __name__ == "__main__":
    main()
