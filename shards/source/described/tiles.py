"""Catalogue of a folder of equal tiles: one file a patch and sensor, with optional masks beside them."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa

from bocage.shards.errors import InputError, counted
from bocage.shards.modality import Registry
from bocage.shards.source.catalogue import PatchSource
from bocage.shards.source.described.catalogue import DescribedCatalogue, assign_splits, name_patches
from bocage.shards.source.described.description import DatasetDescription, build_registry
from bocage.shards.source.described.file_patterns import fill_template, plain_name
from bocage.shards.source.described.files import explain_empty, find_files
from bocage.shards.source.described.ground import ground_block
from bocage.shards.source.described.rasters import (
    RasterRules,
    TileSource,
    open_raster,
    position_of,
    raster_rules,
    sidecar_environment,
)
from bocage.shards.source.raster import RasterError
from bocage.shards.source.report import CatalogueReport

_RESERVED = ("block",)
_UNKNOWN_BLOCK = "unknown"


@dataclass(frozen=True)
class TileCatalogue(DescribedCatalogue):
    """Patches of a folder of tiles."""

    _files: dict[str, pa.ListArray]  # by modality: paths of each patch, in the order of their dates
    _days: dict[str, pa.ListArray]  # by dated modality: days since 1970-01-01 of these files
    _rules: dict[str, RasterRules]
    _problems: dict[int, str]  # by patch: why its block is unknown, which reading it reports

    @classmethod
    def open(cls, root: Path, description: DatasetDescription, folder: Path) -> TileCatalogue:
        """Open the catalogue of the tiles below ``root``.

        Args:
            root: folder of the tiles.
            description: description of the dataset.
            folder: folder that paths of the description are relative to.

        Raises:
            InputError: no file matches, a key occurs twice, a date cannot be read, or the description contradicts
                itself.
        """
        registry = build_registry(description)
        report = CatalogueReport()
        tiles = _scan(root, description, report)
        inputs = [name for name in registry if registry[name].is_input]
        keys = sorted({key for name in inputs for key in tiles.files[name]})
        if not keys:
            raise InputError(explain_empty(root, description, report))
        for name in registry:
            if not registry[name].is_input:
                without_sensor = sorted(set(tiles.files[name]) - set(keys))
                if without_sensor:
                    report.add_without_input(name, without_sensor)
        for mask in registry.by_role("mask"):
            _match_dates(tiles, mask.name, str(mask.mask_of), keys, report)
        rules = raster_rules(description)
        problems: dict[str, str] = {}
        if description.blocks:
            for key in keys:
                files = {name: root / tiles.files[name][key][0][1] for name in registry if key in tiles.files[name]}
                try:
                    tiles.fields[key]["block"] = _block(files, rules, description.blocks)
                except RasterError as error:
                    tiles.fields[key]["block"], problems[key] = _UNKNOWN_BLOCK, str(error)
            if len(problems) == len(keys):
                raise InputError(next(iter(problems.values())))
            if problems:
                first = next(iter(problems.values()))
                report.notes.append(f"{counted(len(problems), 'patch')} without a block cannot be read, e.g. {first}")
        names = name_patches(description, keys, [tiles.fields[key] for key in keys])
        ordered = [keys[row] for row in names.order]
        files, days, presence = {}, {}, {}
        for name in registry:
            found = [sorted(tiles.files[name].get(key, [])) for key in ordered]
            files[name] = pa.array([[path for _, path in patch] for patch in found], pa.list_(pa.string()))
            presence[name] = np.array([bool(patch) for patch in found])
            report.present[name] = int(presence[name].sum())
            if registry[name].dates_table or registry[name].has_time_axis:
                days[name] = pa.array([[day for day, _ in patch] for patch in found], pa.list_(pa.int32()))
        report.patches = len(keys)
        occurring = [name for name in registry if report.present[name]]
        return cls(
            root=root,
            registry=Registry(tuple(registry[name] for name in occurring)),
            splits=assign_splits(description, names, [tiles.fields[key] for key in ordered], folder, report),
            description=description,
            names=names,
            _presence={name: presence[name] for name in occurring},
            _report=report,
            _files={name: files[name] for name in occurring},
            _days={name: days[name] for name in occurring if name in days},
            _rules=rules,
            _problems={row: problems[key] for row, key in enumerate(ordered) if key in problems},
        )

    def source(self, modality: str, index: int) -> PatchSource:
        """Source of a raster that the patch has."""
        paths = self._files[modality][index].as_py()
        problem = self._problems.get(index, "")
        return TileSource(tuple(self.root / path for path in paths), self._rules[modality], problem)

    def dates(self, modality: str, index: int) -> np.ndarray | None:
        """Dates of a raster, int32 days since 1970-01-01; None if the patch lacks it or it has no dates."""
        if modality not in self._days or not self._presence[modality][index]:
            return None
        return self._days[modality][index].values.to_numpy(zero_copy_only=False)

    def layout_digest(self) -> bytes:
        """Hash of the paths and dates of the tiles."""
        digest = hashlib.sha256()
        for columns in (self._files, self._days):
            for name, column in columns.items():
                digest.update(name.encode())
                for buffer in column.flatten().buffers() + column.buffers():
                    digest.update(buffer or b"")
        return digest.digest()


@dataclass(frozen=True)
class _Tiles:
    """Files found: by modality and key, (day, path) of each; and the fields of the files of each key."""

    files: dict[str, dict[str, list[tuple[int, str]]]]
    fields: dict[str, dict[str, str]]


def _scan(root: Path, description: DatasetDescription, report: CatalogueReport) -> _Tiles:
    series = {name for name, sensor in description.sensors.items() if sensor.role != "image"}
    tiles = _Tiles({name: {} for name in (*description.sensors, *description.labels)}, {})
    for file in find_files(root, description, report, _RESERVED):
        name, path, fields, day = file.name, file.path, file.fields, file.day
        key = _key(description, fields, file.date)
        if not key:
            raise InputError(f"{path}: its key is empty: name a field in the pattern of {name}, such as {{tile}}")
        known = tiles.fields.setdefault(key, {})
        files = tiles.files[name].setdefault(key, [])
        if files and (name not in series or day in [known_day for known_day, _ in files]):
            raise InputError(f"key {key} occurs twice for {name}: {files[0][1]} and {path}; see key in the description")
        clash = next((field for field in fields if known.get(field, fields[field]) != fields[field]), None)
        if clash is not None:
            raise InputError(
                f"key {key} stands for two patches: {clash} is {known[clash]!r}, and {fields[clash]!r} for {path}; "
                "name the field in key, or write * for it in the patterns"
            )
        known.update(fields)
        files.append((day, path))
    return tiles


def _match_dates(tiles: _Tiles, mask: str, series: str, keys: Sequence[str], report: CatalogueReport) -> None:
    """Keep the files of a mask on the dates of its series, and none for a patch whose mask lacks some of these dates.

    Shards hold masks by position, so a mask without some dates of its series would not say which dates it masks.
    """
    unused: list[str] = []
    lacking: list[str] = []
    masks = tiles.files[mask]
    for key in keys:
        if key in masks and key not in tiles.files[series]:
            report.masks_without_series[mask] = report.masks_without_series.get(mask, 0) + len(masks.pop(key))
        elif key in masks:
            days, masked = ({day for day, _ in tiles.files[name][key]} for name in (series, mask))
            unused += [path for day, path in masks[key] if day not in days]
            masks[key] = [file for file in masks[key] if file[0] in days]
            if not days <= masked:
                del masks[key]
                lacking.append(next(path for day, path in tiles.files[series][key] if day not in masked))
    if lacking:
        report.notes.append(
            f"{counted(len(lacking), 'patch')} without {mask}, which lacks dates of {series}, e.g. that of {lacking[0]}"
        )
    if unused:
        report.notes.append(
            f"{counted(len(unused), 'file')} of {mask} left out: {series} has no image of the date, e.g. {unused[0]}"
        )


def _key(description: DatasetDescription, fields: Mapping[str, str], date: str | None) -> str:
    """Key of the patch of a file; a template may also name the date, for patches with images of several dates."""
    template = description.key or ("{key}" if "key" in fields else "_".join(f"{{{name}}}" for name in fields))
    dated = fields if date is None or not description.key else {**fields, "date": date}
    return plain_name(fill_template(template, dated, "key"))


def _block(files: Mapping[str, Path], rules: Mapping[str, RasterRules], side: float) -> str:
    """Name of the ground block of a patch, by the first of its files, by sensor or label, that has a position.

    Raises:
        RasterError: a file cannot be read, or none has a position that can be used.
    """
    for name, path in files.items():
        with sidecar_environment(), open_raster(path) as file:
            position = position_of(path, file, rules[name])
            if position.is_known:
                x = position.left + position.pixel * file.width / 2
                y = position.top - position.pixel * file.height / 2
                return ground_block(position.crs, x, y, position.scale, side)
    raise RasterError(f"{next(iter(files.values()))}: has no position, so blocks of {side:g} m cannot be made")
