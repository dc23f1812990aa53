"""Tables of what ``bocage shard --dry-run`` has understood of a source."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from rich.table import Table

from bocage.shards.source.catalogue import Catalogue

_DOMAINS_SHOWN, _CLASSES_SHOWN = 20, 10
_WAVELENGTHS_SHOWN = 5  # bands of a sensor up to which their wavelengths fit into the table


def catalogue_tables(catalogue: Catalogue) -> Iterator[Table]:
    """Tables of the sensors, the labels, and the patches by domain and by split."""
    yield _sensor_table(catalogue)
    if catalogue.registry.labels:
        yield _label_table(catalogue)
    yield _domain_table(catalogue)
    if catalogue.splits:
        yield _split_table(catalogue)


def _sensor_table(catalogue: Catalogue) -> Table:
    present = catalogue.report().present
    table = Table(title="sensors", title_justify="left")
    for name in ("name", "dtype", "bands", "pixels", "codec"):
        table.add_column(name, no_wrap=name != "bands")
    table.add_column("patches", justify="right")
    for name, item in catalogue.registry.items():
        if item.role != "label":
            bands = [band.name for band in item.bands]
            if len(bands) <= _WAVELENGTHS_SHOWN:
                bands = [f"{band.name} {band.wavelength:g}" if band.wavelength else band.name for band in item.bands]
            pixels = f"{item.size} x {item.gsd:.4g} m"
            table.add_row(name, item.dtype, ", ".join(bands), pixels, item.codec, str(present[name]))
    return table


def _label_table(catalogue: Catalogue) -> Table:
    present = catalogue.report().present
    table = Table(title="labels", title_justify="left")
    for name in ("name", "pixels", "classes"):
        table.add_column(name, no_wrap=name != "classes")
    table.add_column("patches", justify="right")
    for item in catalogue.registry.labels:
        for scheme in item.schemes:
            shown = ", ".join(scheme.classes[:_CLASSES_SHOWN]) + (", ..." if len(scheme) > _CLASSES_SHOWN else "")
            pixels = f"{item.size} x {item.gsd:.4g} m"
            name = item.name if len(item.schemes) == 1 else f"{item.name}: {scheme.name}"
            table.add_row(name, pixels, f"{len(scheme)}: {shown}", str(present[item.name]))
    return table


def _domain_table(catalogue: Catalogue) -> Table:
    domain_ids, region_ids = catalogue.domain_and_roi_ids()
    table = Table("domain", title="patches by domain", title_justify="left")
    for name in ("regions", "patches"):
        table.add_column(name, justify="right")
    counts = np.bincount(domain_ids, minlength=len(catalogue.domains))
    for domain in np.argsort(-counts, kind="stable")[:_DOMAINS_SHOWN].tolist():
        regions = len(np.unique(region_ids[domain_ids == domain]))
        table.add_row(catalogue.domains[domain], str(regions), str(counts[domain]))
    if len(counts) > _DOMAINS_SHOWN:
        table.add_row(f"all {len(counts)}", str(len(np.unique(region_ids))), str(len(catalogue)))
    return table


def _split_table(catalogue: Catalogue) -> Table:
    counts = {
        name: {str(item["values"]): int(item["counts"]) for item in column.drop_null().value_counts().to_pylist()}
        for name, column in catalogue.splits.items()
    }
    values = sorted({value for found in counts.values() for value in found}, key=_split_order)
    table = Table("split", title="patches by split", title_justify="left")
    for name in (*values, "in none"):
        table.add_column(name, justify="right")
    for name, found in counts.items():
        left = len(catalogue) - sum(found.values())
        table.add_row(name, *(str(found.get(value, 0)) for value in values), str(left))
    return table


def _split_order(value: str) -> tuple[int, str]:
    """Order of the columns: train, valid, test, then others."""
    usual = ("train", "valid", "test")
    return usual.index(value) if value in usual else len(usual), value
