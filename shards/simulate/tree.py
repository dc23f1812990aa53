"""Write simulated patches in the format of FLAIR-HUB, for tests, the quickstart and benchmarks.

All sensors of the registry observe the same landscape, sun and weather, so their rasters agree with each other. See
``landscape`` (vector plans), ``crop_calendar`` (plant cover over the year), ``surfaces`` and ``spectra`` (reflectance
and backscatter), ``ground`` (rasters of the landscape) and ``sensors`` (stored values).
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
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from pathlib import Path

import numpy as np

from bocage.shards.errors import InputError
from bocage.shards.files import atomic_write
from bocage.shards.modality import FLAIR_HUB, Modality, Registry
from bocage.shards.simulate.geo_files import write_raster, write_table
from bocage.shards.simulate.ground import PATCH_SIZE, rasterise_patch
from bocage.shards.simulate.landscape import build_landscape
from bocage.shards.simulate.noise import generator
from bocage.shards.simulate.regions import REGIONS
from bocage.shards.simulate.sensors import (
    CloudCover,
    Scene,
    Weather,
    render_image,
    render_label,
    render_series,
    sun_position,
)
from bocage.shards.source.flair_hub.metadata import METADATA_FOLDER, SPLIT_FILE

PARAMETERS_FILE = "sample.json"
"""File in the root of the tree, written first, with the parameters that determine the tree."""

SPLITS = ("split_1", "split_2", "split_3", "split_4", "split_5", "split_flairchallenge", "split_toy")

_GRID = 2  # a ROI has _GRID x _GRID patches
_PIXEL_SIZE = {"now": 0.2, "then": 0.4}  # metres, by era; "then" is the 1950s
_FORMAT_VERSION = 2


@dataclass(frozen=True)
class Domain:
    """A département in the year of its aerial survey.

    Attributes:
        name: name of the domain, e.g. ``D035-2020``.
        region: key of ``REGIONS``.
        x: Lambert-93 x of its centre, in metres.
        y: Lambert-93 y of its centre, in metres.
        season: delay of its seasons against those of the region, in days.
        haze: haze of its images; see ``Region``.
        afternoon: mean hour angle of the sun in its images; see ``Region``.
    """

    name: str
    region: str
    x: float
    y: float
    season: float = 0.0
    haze: float = 1.0
    afternoon: float = 0.0

    @property
    def year(self) -> int:
        """Year of the aerial survey."""
        return int(self.name[-4:])


DOMAINS = (
    Domain("D035-2020", "bocage", 352_000.0, 6_790_000.0),
    Domain("D083-2020", "vineyards", 965_000.0, 6_260_000.0, season=-8.0, haze=1.3, afternoon=0.4),
    Domain("D031-2019", "hills", 560_000.0, 6_255_000.0),
    Domain("D077-2021", "suburb", 690_000.0, 6_838_000.0),
    Domain("D004-2021", "mountain", 958_000.0, 6_340_000.0),
    Domain("D061-2020", "bocage", 480_000.0, 6_835_000.0, season=8.0, haze=1.3, afternoon=0.4),
    Domain("D051-2019", "openfield", 790_000.0, 6_880_000.0),
    Domain("D034-2021", "vineyards", 735_000.0, 6_275_000.0),
)
"""Simulated domains; ROIs are assigned to them in turn. D061 and D083 are test domains of FLAIR-HUB: their seasons,
their haze and their sun differ from those of the others."""

_TEST_DOMAINS = ("D061-2020", "D083-2020")


@dataclass(frozen=True)
class SimulatedPatch:
    """Name, position and split of one patch, determined by its attributes.

    Attributes:
        seed: seed of the tree.
        roi_number: number of the ROI, from 0.
        cell: position of the patch in the ROI, row by row, from 0.
    """

    seed: int
    roi_number: int
    cell: int

    @property
    def domain(self) -> Domain:
        """Domain of the patch."""
        return DOMAINS[self.roi_number % len(DOMAINS)]

    @property
    def roi_seed_names(self) -> tuple[object, ...]:
        """Names that seed the random numbers shared by the ROI."""
        return (self.seed, self.domain.name, self.roi_number // len(DOMAINS))

    @property
    def roi(self) -> str:
        """Identifier of the ROI, e.g. ``AF-S1-27``."""
        random = generator(*self.roi_seed_names, "identifier")
        letters = "".join(random.choice(list("AFNU"), 2))
        return f"{letters}-S{random.integers(1, 3)}-{self.roi_number // len(DOMAINS) + 1}"

    @property
    def position(self) -> tuple[int, int]:
        """Row and column in the ROI, from 0."""
        return divmod(self.cell, _GRID)

    @cached_property
    def grid_indices(self) -> str:
        """Row and column in file names, e.g. ``5-10``."""
        first = generator(*self.roi_seed_names, "indices").integers(0, 20, 2)
        return f"{first[0] + self.position[0]}-{first[1] + self.position[1]}"

    @property
    def key(self) -> str:
        """The patch id, e.g. ``D012-2019_AF-S1-27_5-10``."""
        return f"{self.domain.name}_{self.roi}_{self.grid_indices}"

    @cached_property
    def corner(self) -> tuple[float, float]:
        """Lambert-93 coordinates of the upper-left corner, in metres."""
        random = generator(*self.roi_seed_names, "corner")
        row, column = self.position
        # ROIs lie on a coarse jittered grid, row by row, so two ROIs of a domain never overlap.
        grid_index = self.roi_number // len(DOMAINS)
        x = self.domain.x + 3000 * (grid_index % 20 - 10) + float(random.integers(0, 2000))
        y = self.domain.y + 3000 * (grid_index // 20 - 10) + float(random.integers(0, 2000))
        return round(x + column * PATCH_SIZE, 1), round(y - row * PATCH_SIZE, 1)

    def path(self, root: Path, modality: Modality) -> Path:
        """Path of the file of ``modality``."""
        year = "195X" if modality.historical else str(self.domain.year)
        folder = f"{self.domain.name[:-4]}{year}_{modality.name}"
        return root / folder / self.roi / f"{folder}_{self.roi}_{self.grid_indices}.tif"

    def split(self, name: str) -> str:
        """``train``, ``valid`` or ``test``, the same for all patches of a ROI. ``split_1`` tests on whole domains."""
        cycle, domain_index = divmod(self.roi_number, len(DOMAINS))
        shift = SPLITS.index(name)
        test = self.domain.name in _TEST_DOMAINS if shift == 0 else (domain_index + shift) % len(DOMAINS) in (1, 5)
        if test:
            return "test"
        return "valid" if (3 * cycle + domain_index) % 4 == (2 + shift) % 4 else "train"


def plan_patches(patches: int, seed: int) -> list[SimulatedPatch]:
    """List the patches of a tree: spread over domains first, then over the cells of ROIs."""
    rois = max(math.ceil(patches / _GRID**2), min(patches, len(DOMAINS)))
    return [SimulatedPatch(seed, index % rois, index // rois) for index in range(patches)]


def image_date(patch: SimulatedPatch, modality: Modality) -> datetime.date:
    """Date of an image, shared by the ROI: in summer for aerial surveys, from spring to autumn for other images."""
    random = generator(*patch.roi_seed_names, modality.name, "date")
    year = int(random.integers(1947, 1966)) if modality.historical else patch.domain.year
    summer = modality.gsd < 1.0
    day = int(random.integers(160, 250) if summer else random.integers(100, 290))
    return datetime.date(year, 1, 1) + datetime.timedelta(days=day - 1)


def series_dates(patch: SimulatedPatch, modality: Modality, count: tuple[int, int]) -> list[datetime.date]:
    """Irregular dates of a time series in the domain's year, a subset of regular passes; shared by the ROI."""
    random = generator(*patch.roi_seed_names, modality.name, "dates")
    length = int(random.integers(count[0], count[1] + 1))
    step = max(1, min(5 if random.random() < 0.8 else 6, 365 // length))
    passes = np.arange(random.integers(0, step), 365, step)
    chosen = np.sort(random.choice(passes, min(length, len(passes)), replace=False))
    return [datetime.date(patch.domain.year, 1, 1) + datetime.timedelta(days=int(day)) for day in chosen]


def _day_of_year(date: datetime.date) -> int:
    return date.timetuple().tm_yday


def _missing_modalities(patch: SimulatedPatch, registry: Registry, gaps: float) -> set[str]:
    """Draw the missing modalities of a patch. A mask is missing with its series; at least one input remains."""
    draws = {m.name: generator(*patch.roi_seed_names, patch.cell, m.name, "gap").random() for m in registry.inputs}
    missing = {name for name, draw in draws.items() if draw < gaps}
    if len(missing) == len(draws) > 0:
        missing.remove(max(draws, key=lambda name: draws[name]))
    return missing | {m.name for m in registry.by_role("mask") if m.mask_of in missing}


def _label_day(patch: SimulatedPatch, registry: Registry) -> int:
    """Day of the year of the finest present-day image; labels and heights refer to that day."""
    images = [m for m in registry.by_role("image") if not m.historical and m.dates_table is not None]
    return _day_of_year(image_date(patch, min(images, key=lambda m: m.gsd))) if images else 200


@lru_cache(maxsize=4)
def _landscape_and_weather(patch: SimulatedPatch) -> tuple:
    """Landscape and weather of a ROI, given its first patch (cell 0) so that the cache holds one entry per ROI."""
    domain = patch.domain
    region = REGIONS[domain.region]
    region = replace(region, delay=region.delay + domain.season, haze=domain.haze, afternoon=domain.afternoon)
    return build_landscape(region, _GRID * PATCH_SIZE, *patch.roi_seed_names), Weather.draw(
        region.snow_probability, *patch.roi_seed_names
    )


def _build_scene(patch: SimulatedPatch, day: int, eras: set[str]) -> Scene:
    landscape, weather = _landscape_and_weather(SimulatedPatch(patch.seed, patch.roi_number, 0))
    row, column = patch.position
    left, top = column * PATCH_SIZE, row * PATCH_SIZE
    grounds = {
        era: rasterise_patch(landscape, era, left, top, round(PATCH_SIZE / pixel), pixel, day, *patch.roi_seed_names)
        for era, pixel in _PIXEL_SIZE.items()
        if era in eras
    }
    return Scene(landscape, weather, grounds, left, top, (*patch.roi_seed_names, patch.cell), patch.roi_seed_names)


def render_patch(
    patch: SimulatedPatch, registry: Registry, names: set[str], dates: tuple[int, int]
) -> Iterator[tuple[Modality, np.ndarray]]:
    """Render rasters of a patch.

    Args:
        patch: patch to render.
        registry: modalities of the whole tree; dates and orbits depend on it.
        names: names of the modalities to render.
        dates: minimal and maximal number of dates of a time series.

    Yields:
        modality: modality of the raster.
        array: stored values, (C, H, W), or (T, C, H, W) for time series and masks.
    """
    day = _label_day(patch, registry)
    scene = _build_scene(patch, day, {"then" if registry[name].historical else "now" for name in names})
    radars = [m.name for m in registry.inputs if m.bands[0].quantity.startswith("backscatter")]
    for modality in registry.values():
        if modality.name not in names:
            continue
        # Radars look alternately from the west (even) and from the east (odd), as the orbits of Sentinel-1 do.
        orbit = radars.index(modality.name) if modality.name in radars else 0
        if modality.role == "label":
            yield modality, render_label(modality, scene, day)
        elif modality.role == "image":
            image_day = _day_of_year(image_date(patch, modality)) if modality.dates_table is not None else day
            hour_angle = generator(*patch.roi_seed_names, modality.name, "hour").uniform(-0.7, 0.7)
            hour_angle += scene.landscape.region.afternoon
            yield modality, render_image(modality, scene, image_day, sun_position(image_day, hour_angle), orbit)
        else:
            source = registry[modality.mask_of] if modality.mask_of is not None else modality
            days = np.array([_day_of_year(date) for date in series_dates(patch, source, dates)])
            clouds = CloudCover.draw(
                len(days), scene.landscape.region.cloudiness, _GRID * PATCH_SIZE, *patch.roi_seed_names, source.name
            )
            yield modality, render_series(modality, scene, days, clouds, orbit)


def _write_patch(root: Path, patch: SimulatedPatch, registry: Registry, gaps: float, dates: tuple[int, int]) -> None:
    """Write the rasters of a patch that do not exist yet."""
    missing = _missing_modalities(patch, registry, gaps)
    names = {m.name for m in registry.values() if m.name not in missing and not patch.path(root, m).exists()}
    if not names:
        return
    # A second thread compresses and writes while the next raster is rendered.
    with ThreadPoolExecutor(1) as writer:
        writes = []
        for modality, array in render_patch(patch, registry, names, dates):
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


def _format_date(patch: SimulatedPatch, modality: Modality) -> str:
    """Date of an image as YYYYMMDD; some historical images have the unknown day 00."""
    text = image_date(patch, modality).strftime("%Y%m%d")
    unknown_day = modality.historical and generator(*patch.roi_seed_names, modality.name, "unknown day").random() < 0.4
    return text[:6] + "00" if unknown_day else text


def _write_metadata(root: Path, patches: list[SimulatedPatch], registry: Registry, dates: tuple[int, int]) -> None:
    folder = root / METADATA_FOLDER
    folder.mkdir(exist_ok=True)
    corners = [patch.corner for patch in patches]
    keys = [patch.key for patch in patches]
    for modality in registry.inputs:
        if modality.dates_table is None:
            continue
        if modality.has_time_axis:
            name, values = "acquisition_dates", []
            for patch in patches:
                acquired = series_dates(patch, modality, dates)
                values.append(json.dumps({str(n): date.strftime("%Y%m%d") for n, date in enumerate(acquired, start=1)}))
        else:
            name, values = "date", [_format_date(patch, modality) for patch in patches]
        path = folder / f"GLOBAL_{modality.dates_table}_MTD_DATES.gpkg"
        write_table(path, corners, {"patch_id": keys, name: values})
    splits = {name: [patch.split(name) for patch in patches] for name in SPLITS}
    write_table(folder / SPLIT_FILE, corners, {"patch_id": keys, **splits})


def _record_parameters(out: Path, parameters: dict[str, object]) -> None:
    """Record the parameters in a new folder ``out``, or check that ``out`` records the same ones."""
    path = out / PARAMETERS_FILE
    text = json.dumps(parameters, indent=2) + "\n"
    if path.is_file():
        if path.read_text(encoding="utf-8") != text:
            raise InputError(
                f"{out} holds a sample with other parameters (see {path}): give an empty folder, or remove it"
            )
        return
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f"{out} exists but is not a sample written by bocage: give a new or empty folder")
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{out}: cannot be created: {error.strerror}; give another folder") from error
    with atomic_write(path) as temporary:
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
    """Write a tree of simulated patches in the on-disk format of FLAIR-HUB.

    The content of a patch depends on the seed and on its domain, ROI and cell, not on the number of patches or workers.
    After an interruption, the same call resumes. The metadata in ``GLOBAL_ALL_MTD`` is written last.

    Args:
        out: new or empty folder, or a folder that holds the same sample, complete or partial.
        patches: number of patches.
        seed: random seed.
        registry: modalities to write.
        gaps: probability in 0..1 that a patch lacks an input modality.
        dates: minimal and maximal number of dates of a time series (FLAIR-HUB has about 90).
        workers: number of processes.
        progress: callback with the number of patches finished since the last call.

    Raises:
        InputError: a parameter is out of range, or ``out`` holds something else.
    """
    if patches < 1:
        raise InputError(f"patches={patches}: give at least 1")
    if not 0.0 <= gaps <= 1.0:
        raise InputError(f"gaps={gaps}: give a probability between 0 and 1")
    if not 1 <= dates[0] <= dates[1] <= 365:
        raise InputError(f"dates={dates}: give the minimal and maximal number of dates, between 1 and 365")
    if workers < 1:
        raise InputError(f"workers={workers}: give at least 1")
    fingerprint = hashlib.sha256(json.dumps([m.to_json() for m in registry.values()]).encode()).hexdigest()[:16]
    _record_parameters(
        out,
        {
            "bocage_sample": _FORMAT_VERSION,
            "patches": patches,
            "seed": seed,
            "gaps": gaps,
            "dates": list(dates),
            "registry": fingerprint,
        },
    )
    planned = plan_patches(patches, seed)
    by_roi = sorted(planned, key=lambda patch: (patch.roi_number, patch.cell))
    groups = [list(group) for _, group in itertools.groupby(by_roi, key=lambda patch: patch.roi_number)]
    on_progress = progress or (lambda count: None)
    if workers == 1:
        for patch in by_roi:
            _write_patch(out, patch, registry, gaps, dates)
            on_progress(1)
    else:
        with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
            jobs = [pool.submit(_write_patches, out, group, registry, gaps, dates) for group in groups]
            for job in as_completed(jobs):
                on_progress(job.result())
    _write_metadata(out, planned, registry, dates)
