"""``bocage study demo``: a small study on simulated data, from patches to two reports.

The steps: simulate patches, pretrain encoders with three objectives, run the grids of two studies, write the reports.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from bocage.shards.modality import FLAIR_HUB
from bocage.tools.cli.steps import DemoSteps, TrainingProcess

PATCHES, SAMPLE_SEED = 600, 11
OBJECTIVES = {
    "combined": ["weights.masked=1", "weights.contrastive=0.02"],
    "masked": ["weights.masked=1", "weights.contrastive=0"],
    "contrastive": ["weights.masked=0", "weights.contrastive=1"],
}
"""Overrides of the pretraining objectives by name, the slowest first."""


@dataclass(frozen=True)
class DemoStudy:
    """One of the two studies of the demonstration.

    Attributes:
        title: name of its folder.
        recipe: recipe of the study.
        sensors: sensors to pretrain; the study scores the first one, contrast pairs it with the second.
        pretraining: arguments of the pretraining: its recipe and overrides.
        steps: pretraining steps.
    """

    title: str
    recipe: str
    sensors: tuple[str, str]
    pretraining: tuple[str, ...]
    steps: int


def study_demo(out: Path, figures: Path | None, processes: int) -> int:
    """Run all unfinished steps of the demonstration.

    Args:
        out: folder of shards, encoders and studies.
        figures: folder that receives copies of the figures and CSV tables, in one folder per study; None copies none.
        processes: number of processes at a time.

    Returns:
        Exit status.
    """
    steps = DemoSteps(Console(highlight=False))
    tree, shards = out / "tree", out / "shards"
    studies = demo_studies()
    steps.announce("1. Simulate patches in FLAIR-HUB's format, and shard them")
    sample = ["sample", tree, "--patches", PATCHES, "--seed", SAMPLE_SEED, "--workers", processes]
    steps.command("bocage", "bocage", [*sample, "--modalities", *_simulated_modalities(studies)])
    steps.command("bocage", "bocage", ["shard", tree, shards, "--workers", processes])

    steps.announce("2. Pretrain encoders without labels, with three objectives for each of two sensors")
    jobs = {
        (study, objective): pretraining_process(study, objective, shards, out)
        for study in reversed(studies)
        for objective in OBJECTIVES
    }
    steps.side_by_side(list(jobs.values()), processes)

    for number, study in enumerate(studies, start=3):
        steps.announce(f"{number}. Run the study of {study.title} and write its report")
        output = out / study.title
        arguments = [f"recipe={study.recipe}", f"shards={shards}", f"output={output}"]
        sensor = study.sensors[0]
        for objective in OBJECTIVES:
            encoder = jobs[study, objective].output / "encoders" / sensor
            arguments.append(f"initializations.{objective}.{sensor}={encoder}")
        steps.command("bocage", "bocage", ["study", "run", *arguments, "--processes", processes])
        steps.command("bocage", "bocage", ["study", "report", *arguments])
        if figures is not None:
            _copy_figures(output / "report", figures / study.title)
    steps.announce("Done")
    return 0


def _copy_figures(report: Path, folder: Path) -> None:
    """Copy the figures and CSV tables of a report to a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for path in sorted(report.iterdir()):
        if path.suffix in (".png", ".svg", ".csv"):
            shutil.copyfile(path, folder / path.name)


def demo_studies() -> list[DemoStudy]:
    """Return the studies: land cover from aerial images (with SPOT), and crops from Sentinel-2 series (with radar)."""
    images = [m.name for m in FLAIR_HUB.by_role("image") if m.bands[0].quantity == "reflectance" and not m.historical]
    series = [modality.name for modality in FLAIR_HUB.by_role("series")]
    return [
        DemoStudy(
            "land-cover",
            "label_efficiency_land_cover_quickstart",
            (images[0], images[-1]),
            ("recipe=quickstart",),
            300,
        ),
        DemoStudy(
            "crops",
            "label_efficiency_crops_quickstart",
            (series[0], series[1]),
            ("recipe=mae_sentinel_quickstart", "batch_size=16"),
            300,
        ),
    ]


def _simulated_modalities(studies: list[DemoStudy]) -> list[str]:
    """List the sensors of all studies, their quality masks, and the labels."""
    sensors = {name for study in studies for name in study.sensors}
    masks = {modality.name for modality in FLAIR_HUB.by_role("mask") if modality.mask_of in sensors}
    names = sensors | masks | {modality.name for modality in FLAIR_HUB.labels}
    return [name for name in FLAIR_HUB if name in names]


def pretraining_process(study: DemoStudy, objective: str, shards: Path, out: Path) -> TrainingProcess:
    """Return the pretraining of a study's sensors with one of the ``OBJECTIVES``."""
    output = out / "pretrain" / f"{study.title}-{objective}"
    sensors = f"modalities=[{','.join(study.sensors)}]"
    arguments = [*study.pretraining, f"engine.steps={study.steps}", *OBJECTIVES[objective], sensors]
    arguments += ["reconstructions=0", "workers=0", "engine.log_every=10", f"shards={shards}", f"output={output}"]
    finished = f"encoders/{study.sensors[-1]}/config.json"  # the encoder that is written last
    title = f"{study.title}, {objective}"
    command = ("bocage", "pretrain")
    return TrainingProcess(title, "bocage pretrain", command, tuple(arguments), output, finished, study.steps)
