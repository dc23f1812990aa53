"""Simulated patches in FLAIR-HUB's own format, for tests, the quickstart and benchmarks.

The content is physically coherent: one landscape, lit by one sun and lived through one year, is seen by every sensor of
the registry. See ``landscape`` (what lies where), ``crops`` (the year of a parcel), ``scene_surfaces`` and
``scene_spectra`` (what light and radar meet), ``scene_ground`` (rasters) and ``scene_sensors`` (what is recorded).
"""

from __future__ import annotations

import datetime
import hashlib
import itertools
import json
import math
import multiprocessing
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path

import numpy as np

from bocage.shards.errors import InputError
from bocage.shards.files import written_atomically
from bocage.shards.modality import FLAIR_HUB, PATCH_SIZE, Modality, Registry
from bocage.shards.simulate.files import write_raster, write_table
from bocage.shards.simulate.ground import rasterise
from bocage.shards.simulate.landscape import landscape
from bocage.shards.simulate.noise import generator
from bocage.shards.simulate.regions import REGIONS
from bocage.shards.simulate.sensors import Scene, Sky, Weather, image, label, series, sun_at
from bocage.shards.source.metadata import FOLDER, SPLIT_FILE

PARAMETERS_FILE = "sample.json"
"""Written first, in the tree's root: the parameters that the tree is a function of."""

SPLITS = ("split_1", "split_2", "split_3", "split_4", "split_5", "split_flairchallenge", "split_toy")

_GRID = 2  # a ROI holds _GRID x _GRID patches
_PIXEL = {"now": 0.2, "then": 0.4}
_FORMAT = 1


@dataclass(frozen=True)
class Domain:
    """A département in the year of its aerial survey: region of ``REGIONS`` and a Lambert-93 point in its middle."""

    name: str
    region: str
    x: float
    y: float

    @property
    def year(self) -> int:
        """The image year."""
        return int(self.name[-4:])


DOMAINS = (
    Domain("D035-2020", "bocage", 352_000.0, 6_790_000.0),
    Domain("D083-2020", "vineyards", 965_000.0, 6_260_000.0),
    Domain("D031-2019", "hills", 560_000.0, 6_255_000.0),
    Domain("D077-2021", "suburb", 690_000.0, 6_838_000.0),
    Domain("D004-2021", "mountain", 958_000.0, 6_340_000.0),
    Domain("D061-2020", "bocage", 480_000.0, 6_835_000.0),
    Domain("D051-2019", "openfield", 790_000.0, 6_880_000.0),
    Domain("D034-2021", "vineyards", 735_000.0, 6_275_000.0),
)
"""Simulated domains, in the order in which ROIs are spread over them. D061 and D083 are test domains of FLAIR-HUB."""

_TEST_DOMAINS = ("D061-2020", "D083-2020")


@dataclass(frozen=True)
class SimulatedPatch:
    """One patch: where it stands in the dataset and on the ground. A function of (seed, number of the ROI, cell)."""

    seed: int
    number: int
    cell: int

    @property
    def domain(self) -> Domain:
        """Its domain."""
        return DOMAINS[self.number % len(DOMAINS)]

    @property
    def names(self) -> tuple[object, ...]:
        """What random draws shared by the ROI depend on."""
        return (self.seed, self.domain.name, self.number // len(DOMAINS))

    @property
    def roi(self) -> str:
        """Identifier of the ROI, e.g. ``AF-S1-27``."""
        random = generator(*self.names, "identifier")
        letters = "".join(random.choice(list("AFNU"), 2))
        return f"{letters}-S{random.integers(1, 3)}-{self.number // len(DOMAINS) + 1}"

    @property
    def position(self) -> tuple[int, int]:
        """Row and column in the ROI, from 0."""
        return divmod(self.cell, _GRID)

    @cached_property
    def indices(self) -> str:
        """Row and column as they stand in file names."""
        first = generator(*self.names, "indices").integers(0, 20, 2)
        return f"{first[0] + self.position[0]}-{first[1] + self.position[1]}"

    @property
    def key(self) -> str:
        """The patch id, e.g. ``D012-2019_AF-S1-27_5-10``."""
        return f"{self.domain.name}_{self.roi}_{self.indices}"

    @cached_property
    def corner(self) -> tuple[float, float]:
        """Lambert-93 coordinates of the upper-left corner, metres: ROIs stand apart on the grid of patches."""
        random = generator(*self.names, "corner")
        row, column = self.position
        # Places on a coarse grid by number, jittered, row after row: two ROIs of a domain never overlap.
        place = self.number // len(DOMAINS)
        x = self.domain.x + 3000 * (place % 20 - 10) + float(random.integers(0, 2000))
        y = self.domain.y + 3000 * (place // 20 - 10) + float(random.integers(0, 2000))
        return round(x + column * PATCH_SIZE, 1), round(y - row * PATCH_SIZE, 1)

    def path(self, root: Path, modality: Modality) -> Path:
        """The file of ``modality``."""
        year = "195X" if modality.historical else str(self.domain.year)
        folder = f"{self.domain.name[:-4]}{year}_{modality.name}"
        return root / folder / self.roi / f"{folder}_{self.roi}_{self.indices}.tif"

    def split(self, name: str) -> str:
        """``train``, ``valid`` or ``test``. Test domains are whole in ``split_1``; ROIs are never divided."""
        cycle, place = divmod(self.number, len(DOMAINS))
        shift = SPLITS.index(name)
        test = self.domain.name in _TEST_DOMAINS if shift == 0 else (place + shift) % len(DOMAINS) in (1, 5)
        if test:
            return "test"
        return "valid" if (3 * cycle + place) % 4 == (2 + shift) % 4 else "train"


def plan_patches(patches: int, seed: int) -> list[SimulatedPatch]:
    """The patches of a sample: spread over the domains first, then over the cells of ROIs."""
    rois = max(math.ceil(patches / _GRID**2), min(patches, len(DOMAINS)))
    return [SimulatedPatch(seed, index % rois, index // rois) for index in range(patches)]


def image_date(patch: SimulatedPatch, modality: Modality) -> datetime.date:
    """Date of an image, the same for the whole ROI: aerial surveys in summer, other images from spring to autumn."""
    random = generator(*patch.names, modality.name, "date")
    year = int(random.integers(1947, 1966)) if modality.historical else patch.domain.year
    summer = modality.gsd < 1.0
    day = int(random.integers(160, 250) if summer else random.integers(100, 290))
    return datetime.date(year, 1, 1) + datetime.timedelta(days=day - 1)


def series_dates(patch: SimulatedPatch, modality: Modality, count: tuple[int, int]) -> list[datetime.date]:
    """Irregular dates of a series over the domain's year, on the sensor's own grid of passes, shared by the ROI."""
    random = generator(*patch.names, modality.name, "dates")
    wanted = int(random.integers(count[0], count[1] + 1))
    step = max(1, min(5 if random.random() < 0.8 else 6, 365 // wanted))
    passes = np.arange(random.integers(0, step), 365, step)
    chosen = np.sort(random.choice(passes, min(wanted, len(passes)), replace=False))
    return [datetime.date(patch.domain.year, 1, 1) + datetime.timedelta(days=int(day)) for day in chosen]


def _day(date: datetime.date) -> int:
    return date.timetuple().tm_yday


def _missing(patch: SimulatedPatch, registry: Registry, gaps: float) -> set[str]:
    """Modalities that the patch lacks; masks go with their series, and one input at least stays."""
    draws = {m.name: generator(*patch.names, patch.cell, m.name, "gap").random() for m in registry.inputs}
    missing = {name for name, draw in draws.items() if draw < gaps}
    if len(missing) == len(draws) > 0:
        missing.remove(max(draws, key=lambda name: draws[name]))
    return missing | {m.name for m in registry.by_role("mask") if m.mask_of in missing}


def _aerial_day(patch: SimulatedPatch, registry: Registry) -> int:
    """Day of the year of the finest image of today: labels and heights show the land on that day."""
    images = [m for m in registry.by_role("image") if not m.historical and m.dates_table is not None]
    return _day(image_date(patch, min(images, key=lambda m: m.gsd))) if images else 200


@lru_cache(maxsize=4)
def _region(patch: SimulatedPatch) -> tuple:
    """Landscape and weather of a patch's ROI; cached by ``Patch(seed, number, 0)``."""
    region = REGIONS[patch.domain.region]
    return landscape(region, _GRID * PATCH_SIZE, *patch.names), Weather.draw(region.winter, *patch.names)


def _scene(patch: SimulatedPatch, day: int, eras: set[str]) -> Scene:
    place, weather = _region(SimulatedPatch(patch.seed, patch.number, 0))
    row, column = patch.position
    left, top = column * PATCH_SIZE, row * PATCH_SIZE
    grounds = {
        era: rasterise(place, era, left, top, round(PATCH_SIZE / pixel), pixel, day, *patch.names)
        for era, pixel in _PIXEL.items()
        if era in eras
    }
    return Scene(place, weather, grounds, left, top, (*patch.names, patch.cell), patch.names)


def render(
    patch: SimulatedPatch, registry: Registry, names: set[str], dates: tuple[int, int]
) -> Iterator[tuple[Modality, np.ndarray]]:
    """The rasters of a patch.

    Args:
        patch: which.
        registry: the modalities of the whole sample; dates and orbits depend on it.
        names: modalities wanted.
        dates: least and greatest number of dates of a series.

    Yields:
        Modality and array: (C, H, W), or (T, C, H, W) for series and masks.
    """
    day = _aerial_day(patch, registry)
    scene = _scene(patch, day, {"then" if registry[name].historical else "now" for name in names})
    radars = [m.name for m in registry.inputs if m.bands[0].quantity.startswith("backscatter")]
    for modality in registry.values():
        if modality.name not in names:
            continue
        # Radars take turns in looking from the west (even) and from the east (odd), as Sentinel-1's orbits do.
        orbit = radars.index(modality.name) if modality.name in radars else 0
        if modality.role == "label":
            yield modality, label(modality, scene, day)
        elif modality.role == "image":
            taken = _day(image_date(patch, modality)) if modality.dates_table is not None else day
            hours = generator(*patch.names, modality.name, "hour").uniform(-0.7, 0.7)
            yield modality, image(modality, scene, taken, sun_at(taken, hours), orbit)
        else:
            source = registry[modality.mask_of] if modality.mask_of is not None else modality
            days = np.array([_day(date) for date in series_dates(patch, source, dates)])
            sky = Sky.draw(len(days), scene.place.region.cloudiness, _GRID * PATCH_SIZE, *patch.names, source.name)
            yield modality, series(modality, scene, days, sky, orbit)


def _write_patch(root: Path, patch: SimulatedPatch, registry: Registry, gaps: float, dates: tuple[int, int]) -> None:
    """Write the rasters of a patch that are not there yet."""
    missing = _missing(patch, registry, gaps)
    wanted = {m.name for m in registry.values() if m.name not in missing and not patch.path(root, m).exists()}
    if not wanted:
        return
    # One thread compresses and waits for the disk while the next raster is drawn.
    with ThreadPoolExecutor(1) as writer:
        writes = []
        for modality, array in render(patch, registry, wanted, dates):
            path = patch.path(root, modality)
            path.parent.mkdir(parents=True, exist_ok=True)
            bands = array.reshape(-1, *array.shape[-2:])
            writes.append(writer.submit(write_raster, path, bands, modality.gsd, *patch.corner))
        for write in writes:
            write.result()


def _write_patches(
    root: Path, patches: list[SimulatedPatch], registry: Registry, gaps: float, dates: tuple[int, int]
) -> int:
    for patch in patches:
        _write_patch(root, patch, registry, gaps, dates)
    return len(patches)


def _date_text(patch: SimulatedPatch, modality: Modality) -> str:
    """An image's date; the day of some historical ones is unknown."""
    text = image_date(patch, modality).strftime("%Y%m%d")
    unknown = modality.historical and generator(*patch.names, modality.name, "unknown day").random() < 0.4
    return text[:6] + "00" if unknown else text


def _write_metadata(root: Path, patches: list[SimulatedPatch], registry: Registry, dates: tuple[int, int]) -> None:
    folder = root / FOLDER
    folder.mkdir(exist_ok=True)
    corners = [patch.corner for patch in patches]
    keys = [patch.key for patch in patches]
    for modality in registry.inputs:
        if modality.dates_table is None:
            continue
        if modality.has_dates:
            name, values = "acquisition_dates", []
            for patch in patches:
                taken = series_dates(patch, modality, dates)
                values.append(json.dumps({str(n): date.strftime("%Y%m%d") for n, date in enumerate(taken, start=1)}))
        else:
            name, values = "date", [_date_text(patch, modality) for patch in patches]
        path = folder / f"GLOBAL_{modality.dates_table}_MTD_DATES.gpkg"
        write_table(path, corners, {"patch_id": keys, name: values})
    splits = {name: [patch.split(name) for patch in patches] for name in SPLITS}
    write_table(folder / SPLIT_FILE, corners, {"patch_id": keys, **splits})


def _claim(out: Path, parameters: dict[str, object]) -> None:
    """Make ``out`` the tree of these parameters, or check that it already is."""
    path = out / PARAMETERS_FILE
    text = json.dumps(parameters, indent=2) + "\n"
    if path.is_file():
        if path.read_text(encoding="utf-8") != text:
            raise InputError(
                f"{out} holds a sample of other parameters (see {path}): give an empty folder, or remove it"
            )
        return
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f"{out} exists and is not a sample made by bocage: give an empty or a new folder")
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{out}: cannot be made: {error.strerror}; give another folder") from error
    with written_atomically(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_tree(
    out: Path,
    *,
    patches: int,
    seed: int,
    registry: Registry = FLAIR_HUB,
    gaps: float = 0.0,
    dates: tuple[int, int] = (20, 35),
    workers: int = 1,
    progress: Callable[[int], None] | None = None,
) -> None:
    """Write a tree of simulated patches in FLAIR-HUB's on-disk format.

    The content of a patch depends on the seed, its domain, its ROI and its place there: not on the number of patches
    or workers. An interrupted run continues where it stopped when called again with the same parameters; the metadata
    in ``GLOBAL_ALL_MTD`` comes last.

    Args:
        out: a new or empty folder, or one that holds the same sample, whole or in part.
        patches: how many.
        seed: of everything.
        registry: the modalities to write. A modality that shares a patch with one already known needs nothing else.
        gaps: probability that a patch lacks an input modality, 0..1.
        dates: least and greatest number of dates of a series (FLAIR-HUB itself has about 90).
        workers: processes.
        progress: called with the number of patches finished since the last call.

    Raises:
        InputError: a parameter out of range, or ``out`` holds something else.
    """
    if patches < 1:
        raise InputError(f"patches={patches}: a sample has one patch at least")
    if not 0.0 <= gaps <= 1.0:
        raise InputError(f"gaps={gaps}: a probability lies between 0 and 1")
    if not 1 <= dates[0] <= dates[1] <= 365:
        raise InputError(f"dates={dates}: give least and greatest number of dates between 1 and 365")
    if workers < 1:
        raise InputError(f"workers={workers}: at least one process has to work")
    fingerprint = hashlib.sha256(json.dumps([m.to_json() for m in registry.values()]).encode()).hexdigest()[:16]
    _claim(
        out,
        {
            "bocage_sample": _FORMAT,
            "patches": patches,
            "seed": seed,
            "gaps": gaps,
            "dates": list(dates),
            "registry": fingerprint,
        },
    )
    planned = plan_patches(patches, seed)
    by_roi = sorted(planned, key=lambda patch: (patch.number, patch.cell))
    groups = [list(group) for _, group in itertools.groupby(by_roi, key=lambda patch: patch.number)]
    report = progress or (lambda count: None)
    if workers == 1:
        for patch in by_roi:
            _write_patch(out, patch, registry, gaps, dates)
            report(1)
    else:
        with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
            jobs = [pool.submit(_write_patches, out, group, registry, gaps, dates) for group in groups]
            for job in as_completed(jobs):
                report(job.result())
    _write_metadata(out, planned, registry, dates)
