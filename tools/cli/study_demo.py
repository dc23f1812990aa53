"""``bocage study demo``: a small study from nothing: simulate, pretrain three ways, run two grids, write two pages."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from bocage.shards.modality import FLAIR_HUB
from bocage.tools.cli.steps import DemoSteps, TrainingProcess

PATCHES, SAMPLE_SEED = 600, 11
WAYS = {
    "combined": ["weights.masked=1", "weights.contrastive=0.02"],
    "masked": ["weights.masked=1", "weights.contrastive=0"],
    "contrastive": ["weights.masked=0", "weights.contrastive=1"],
}
"""Ways to pretrain, the longest first."""


@dataclass(frozen=True)
class Part:
    """One of the two studies: what it pretrains, and the recipe of its grid."""

    title: str
    study: str
    sensors: tuple[str, str]  # of which the first is studied; the second is what it is contrasted with
    words: tuple[str, ...]  # of pretraining
    steps: int


def study_demo(out: Path, report: Path | None, processes: int) -> int:
    """Run everything that is not there yet.

    Args:
        out: folder of shards, encoders and studies.
        report: folder for the two reports; by default they lie in ``out``.
        processes: at a time.
    """
    steps = DemoSteps(Console(highlight=False))
    tree, shards = out / "tree", out / "shards"
    studies = parts()
    steps.announce("1. Simulate patches in FLAIR-HUB's own format, and shard them")
    words = ["sample", tree, "--patches", PATCHES, "--seed", SAMPLE_SEED, "--workers", processes]
    steps.command("bocage", "bocage", [*words, "--modalities", *_simulated(studies)])
    steps.command("bocage", "bocage", ["shard", tree, shards, "--workers", processes])

    steps.announce("2. Pretrain encoders without labels, three ways for each of two sensors")
    jobs = {(part, way): pretraining(part, way, shards, out) for part in reversed(studies) for way in WAYS}
    steps.side_by_side(list(jobs.values()), processes)

    for number, part in enumerate(studies, start=3):
        steps.announce(f"{number}. {part.title}: the grid and its report")
        output = out / part.title
        grid = [f"recipe={part.study}", f"shards={shards}", f"output={output}"]
        sensor = part.sensors[0]
        grid += [f"starts.{way}.{sensor}={jobs[part, way].output / 'encoders' / sensor}" for way in WAYS]
        steps.command("bocage", "bocage", ["study", "run", *grid, "--processes", processes])
        where = [] if report is None else ["--out", report / part.title]
        steps.command("bocage", "bocage", ["study", "report", *grid, *where])
    steps.announce("Done")
    return 0


def parts() -> list[Part]:
    """Land cover from the aerial image, pretrained beside SPOT, and crops from the optical series, beside radar."""
    images = [m.name for m in FLAIR_HUB.by_role("image") if m.bands[0].quantity == "reflectance" and not m.historical]
    series = [modality.name for modality in FLAIR_HUB.by_role("series")]
    return [
        Part(
            "land-cover",
            "label_efficiency_land_cover_quickstart",
            (images[0], images[-1]),
            ("recipe=quickstart",),
            300,
        ),
        Part(
            "crops",
            "label_efficiency_crops_quickstart",
            (series[0], series[1]),
            ("recipe=mae_sentinel_quickstart", "batch_size=16"),
            300,
        ),
    ]


def _simulated(parts: list[Part]) -> list[str]:
    """The sensors of all parts, the quality masks of these, and the labels."""
    sensors = {name for part in parts for name in part.sensors}
    masks = {modality.name for modality in FLAIR_HUB.by_role("mask") if modality.mask_of in sensors}
    wanted = sensors | masks | {modality.name for modality in FLAIR_HUB.labels}
    return [name for name in FLAIR_HUB if name in wanted]


def pretraining(part: Part, way: str, shards: Path, out: Path) -> TrainingProcess:
    """How a part is pretrained in one of the ``WAYS``."""
    output = out / "pretrain" / f"{part.title}-{way}"
    words = [*part.words, f"engine.steps={part.steps}", *WAYS[way], f"modalities=[{','.join(part.sensors)}]"]
    words += ["pictures=0", "workers=0", "engine.log_every=10", f"shards={shards}", f"output={output}"]
    # The last of the encoders is written when the others are there.
    finished = f"encoders/{part.sensors[-1]}/config.json"
    title = f"{part.title}, {way}"
    return TrainingProcess(title, "bocage pretrain", ("bocage", "pretrain"), tuple(words), output, finished, part.steps)
