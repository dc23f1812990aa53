"""Catalogue of a described dataset: keys, regions, dates and splits of its patches."""

from __future__ import annotations

import hashlib
import json
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa

from bocage.shards.dataset_info import DatasetInfo
from bocage.shards.errors import InputError, counted
from bocage.shards.sample_seed import sample_seed
from bocage.shards.source.catalogue import Catalogue, Patch, PatchSource
from bocage.shards.source.described.description import DatasetDescription, SplitDescription
from bocage.shards.source.described.file_patterns import fill_template, plain_name, plain_path
from bocage.shards.source.report import CatalogueReport

_MAX_SHOWN = 5  # names in a message
_FIELD_LENGTH = 200  # of a key or region in the index


@dataclass(frozen=True)
class PatchNames:
    """Names of the patches of a described dataset, sorted by domain, region and key.

    Attributes:
        keys: key of each patch.
        domains: names of the domains, sorted.
        regions: names of the regions, ``DOMAIN/REGION`` or the domain, sorted.
        domain_ids: index into ``domains`` of each patch, (patches,) int64.
        region_ids: index into ``regions`` of each patch, (patches,) int64.
        order: position of each patch in the sequence that was given, (patches,) int64.
    """

    keys: pa.StringArray
    domains: list[str]
    regions: list[str]
    domain_ids: np.ndarray
    region_ids: np.ndarray
    order: np.ndarray


@dataclass(frozen=True)
class DescribedCatalogue(Catalogue):
    """Patches of a described dataset; subclasses know where the rasters are."""

    description: DatasetDescription
    names: PatchNames
    _presence: dict[str, np.ndarray]  # by modality: (patches,) bool
    _report: CatalogueReport

    @property
    def dataset(self) -> DatasetInfo:
        """Name, licence and origin of the dataset."""
        return self.description.info

    @property
    def domains(self) -> list[str]:
        """Names of the domains by their id."""
        return self.names.domains

    def __len__(self) -> int:
        return len(self.names.keys)

    def keys(self) -> list[str]:
        """Keys of all patches, in the order of the catalogue."""
        return self.names.keys.to_pylist()

    def domain_and_roi_ids(self) -> tuple[np.ndarray, np.ndarray]:
        """Domain id and region id of each patch, (patches,) int64 each."""
        return self.names.domain_ids, self.names.region_ids

    def report(self) -> CatalogueReport:
        """Counts by modality, and files that the description does not cover."""
        return self._report

    def patch(self, index: int) -> Patch[PatchSource]:
        """Patch at ``index``."""
        return Patch(
            key=self.names.keys[index].as_py(),
            domain=self.names.domains[self.names.domain_ids[index]],
            roi=self.names.regions[self.names.region_ids[index]],
            sources={name: self.source(name, index) for name in self.registry if self._presence[name][index]},
            dates={name: days for name in self.registry if (days := self.dates(name, index)) is not None},
            splits={name: column[index].as_py() for name, column in self.splits.items()},
        )

    @abstractmethod
    def source(self, modality: str, index: int) -> PatchSource:
        """Source of a raster that the patch has."""

    @abstractmethod
    def dates(self, modality: str, index: int) -> np.ndarray | None:
        """Dates of a raster, int32 days since 1970-01-01; None if the patch lacks it or it has no dates."""

    @abstractmethod
    def layout_digest(self) -> bytes:
        """Hash of where the rasters are and of their dates, relative to the root."""

    def fingerprint(self) -> str:
        """SHA-256 of keys, modalities, dates, splits and of how files are read; the same for any location."""
        digest = hashlib.sha256()
        sensors = {name: asdict(item) for name, item in self.description.sensors.items()}
        labels = {name: asdict(item) for name, item in self.description.labels.items()}
        digest.update(json.dumps([sensors, labels]).encode())
        registry = [modality.to_json() for modality in self.registry.values()]
        digest.update(json.dumps([self.dataset.to_json(), registry, self.domains, self.names.regions]).encode())
        digest.update(json.dumps(self.keys()).encode())
        for array in (*self.domain_and_roi_ids(), *self._presence.values()):
            digest.update(array.tobytes())
        for name, column in self.splits.items():
            digest.update(json.dumps([name, column.to_pylist()]).encode())
        digest.update(self.layout_digest())
        return digest.hexdigest()


def name_patches(
    description: DatasetDescription, keys: Sequence[str], fields: Sequence[Mapping[str, str]]
) -> PatchNames:
    """Names of patches from their keys and the fields of their files.

    Args:
        description: description of the dataset, with the templates of domain and region.
        keys: key of each patch, unique.
        fields: fields of each patch, including ``block`` if there are blocks.

    Raises:
        InputError: a template names an unknown field, or two domains or regions get the same name.
    """
    default_domain = plain_name(description.name)
    domains, regions = [], []
    texts: dict[str, dict[str, str]] = {"domain": {}, "region": {}}  # by name in the shards
    for patch_fields in fields:
        known = dict(patch_fields)
        template = description.domain or ("{domain}" if "domain" in known else "")
        domain, text = default_domain, fill_template(template, known, "domain")
        if text:
            domain = plain_name(text)
            _check_text("domain", domain, text, texts["domain"])
        known["domain"] = domain
        template = description.region or next((f"{{{name}}}" for name in ("region", "block") if name in known), "")
        text = fill_template(template, known, "region")
        region = f"{domain}/{plain_path(text)}" if text else domain
        _check_text("region", region, text, texts["region"])
        domains.append(domain)
        regions.append(region)
    for name in (*keys, *regions):
        if len(name) > _FIELD_LENGTH:
            raise InputError(f"{name[:50]}...: names of keys and regions have at most {_FIELD_LENGTH} characters")
    order = np.array(sorted(range(len(keys)), key=lambda row: (domains[row], regions[row], keys[row])), np.int64)
    domain_names, domain_ids = np.unique(np.array(domains)[order], return_inverse=True)
    region_names, region_ids = np.unique(np.array(regions)[order], return_inverse=True)
    return PatchNames(
        keys=pa.array([keys[row] for row in order], pa.string()),
        domains=[str(name) for name in domain_names],
        regions=[str(name) for name in region_names],
        domain_ids=domain_ids.astype(np.int64),
        region_ids=region_ids.astype(np.int64),
        order=order,
    )


def _check_text(what: str, name: str, text: str, texts: dict[str, str]) -> None:
    """Refuse two texts with one name in the shards: their patches would count as one place."""
    if (first := texts.setdefault(name, text)) != text:
        raise InputError(
            f"{what}: {first!r} and {text!r} both become {plain_path(text)!r} in shards, whose names have letters, "
            f"digits, - and _ only; rename one of them, or name another field in {what}"
        )


def assign_splits(
    description: DatasetDescription,
    names: PatchNames,
    fields: Sequence[Mapping[str, str]],
    folder: Path,
    report: CatalogueReport,
) -> dict[str, pa.DictionaryArray]:
    """Value of each patch in each split, a string or null.

    Args:
        description: description of the dataset.
        names: names of the patches.
        fields: fields of each patch, in the order of ``names``.
        folder: folder that paths of key lists are relative to.
        report: report that counts the listed keys that are not in the dataset.

    Raises:
        InputError: a value names nothing in the dataset, a list cannot be read, or a region gets two values.
    """
    splits = {}
    for name, split in description.splits.items():
        if split.by == "file":
            values = _values_of_lists(name, split, names, folder, report)
        else:
            values = _values_of_units(name, split, _units(name, split, names, fields))
        if not split.allow_mixed_regions:
            _check_regions(name, values, names)
        splits[name] = pa.array(values, pa.string()).dictionary_encode()
    return splits


def _units(name: str, split: SplitDescription, names: PatchNames, fields: Sequence[Mapping[str, str]]) -> list[str]:
    """What is assigned as a whole, by patch: name of its domain, region, key, or value of a field."""
    if split.by == "domain":
        return [names.domains[index] for index in names.domain_ids]
    if split.by == "region":
        return [names.regions[index] for index in names.region_ids]
    if split.by == "key":
        return names.keys.to_pylist()
    missing = [row for row, patch_fields in enumerate(fields) if split.by not in patch_fields]
    if missing:
        known = ", ".join(["domain", "region", "key", *fields[missing[0]]])
        raise InputError(f"splits.{name}: by={split.by} is no field of {names.keys[missing[0]]}; fields: {known}")
    return [patch_fields[split.by] for patch_fields in fields]


def _values_of_units(name: str, split: SplitDescription, units: list[str]) -> list[str | None]:
    counts: dict[str, int] = {}
    for unit in units:
        counts[unit] = counts.get(unit, 0) + 1
    # A region is ``DOMAIN/REGION``; its second part suffices if it is unique.
    short: dict[str, list[str]] = {}
    for unit in counts:
        short.setdefault(unit.partition("/")[2], []).append(unit)
    value_of: dict[str, str] = {}
    for value, part in split.parts.items():
        for item in part if isinstance(part, list) else []:
            listed = str(item)
            matches = [listed] if listed in counts else short.get(listed, [])
            if len(matches) != 1:
                known = ", ".join(sorted(counts)[:_MAX_SHOWN]) + (", ..." if len(counts) > _MAX_SHOWN else "")
                problem = "is not unique" if matches else "is not in the dataset"
                if not matches and not isinstance(item, str):
                    problem += f", and YAML read it as {type(item).__name__}: write it in quotes"
                raise InputError(f"splits.{name}: {split.by} {listed!r} {problem}; it has {known}")
            if value_of.setdefault(matches[0], value) != value:
                raise InputError(f"splits.{name}: {listed} is listed as {value_of[matches[0]]} and as {value}")
    _draw_fractions(split, counts, value_of)
    rest = next((value for value, part in split.parts.items() if part == "rest"), None)
    return [value_of.get(unit, rest) for unit in units]


def _draw_fractions(split: SplitDescription, counts: Mapping[str, int], value_of: dict[str, str]) -> None:
    """Give free units the values whose parts are fractions, each to the part that lacks most patches.

    If the fractions add up to 1, every unit gets a value; otherwise units that would overfill a part get none.
    """
    total = sum(counts.values())
    wanted = {value: part * total for value, part in split.parts.items() if isinstance(part, int | float)}
    if not wanted:
        return
    takes_all = sum(wanted.values()) > (1 - 1e-9) * total
    free = [unit for unit in counts if unit not in value_of]
    free.sort(key=lambda unit: sample_seed(split.seed, 0, unit))
    for unit in free:
        value = max(wanted, key=lambda item: wanted[item])
        if not takes_all and wanted[value] < counts[unit] / 2:
            continue  # nearer to the fractions without this unit
        value_of[unit] = value
        wanted[value] -= counts[unit]


def _values_of_lists(
    name: str, split: SplitDescription, names: PatchNames, folder: Path, report: CatalogueReport
) -> list[str | None]:
    rows = {key: row for row, key in enumerate(names.keys.to_pylist())}
    values: list[str | None] = [None] * len(rows)
    for value, part in split.parts.items():
        path = folder / part
        try:
            lines = path.read_text(encoding="utf-8-sig").split("\n")
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"splits.{name}: {path}: cannot be read: {error}") from error
        listed = [line.strip() for line in lines if line.strip()]
        known = [key for key in listed if key in rows]
        if not known:
            raise InputError(f"splits.{name}: {path}: none of its {counted(len(listed), 'key')} is in the dataset")
        report.add_unknown_keys(path, listed, rows)
        for key in known:
            if values[rows[key]] not in (None, value):
                raise InputError(f"splits.{name}: {path}: {key} is listed as {values[rows[key]]} and as {value}")
            values[rows[key]] = value
    return values


def _check_regions(name: str, values: Sequence[str | None], names: PatchNames) -> None:
    """Refuse a region with two values: its patches are neighbours, so scores would be too high."""
    seen: dict[int, str] = {}
    for value, region in zip(values, names.region_ids.tolist()):
        if value is not None and seen.setdefault(region, value) != value:
            raise InputError(
                f"splits.{name}: region {names.regions[region]} is in {seen[region]} and in {value}: its patches are "
                "neighbours; assign whole regions, or set allow_mixed_regions: true"
            )
