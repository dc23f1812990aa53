"""``bocage inspect SHARDS``: summarise shards, and draw one patch in all its modalities."""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from rich.table import Table

from bocage.shards.errors import InputError
from bocage.shards.format.manifest import Manifest
from bocage.shards.inspect.summary import most_complete_row, summarize
from bocage.shards.read.open import open_shards
from bocage.tools.cli.reports import text_console, write_json

_MEGABYTE = 1e6


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command."""
    parser.add_argument("shards", metavar="SHARDS", help="folder written by `bocage shard`, or its address")
    parser.add_argument(
        "--picture", type=Path, metavar="FILE.png", help="draw a patch in all its modalities, with legends"
    )
    parser.add_argument(
        "--key", metavar="KEY", help="key of the patch (default: the first patch with the most modalities)"
    )
    parser.add_argument("--rows", action="store_true", help="print the patch's row of the manifest")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the summary as JSON")


def run(arguments: argparse.Namespace) -> int:
    """Print the tables; return the exit status."""
    manifest = open_shards(arguments.shards)
    if len(manifest) == 0:
        raise InputError(f"{arguments.shards}: the shards hold no patch: all were skipped")
    row = most_complete_row(manifest) if arguments.key is None else _row(manifest, arguments.key)
    numbers = {"path": arguments.shards, **summarize(manifest)}
    if arguments.json is not None:
        write_json(arguments.json, numbers)
    console = text_console()
    for table in _tables(numbers):
        console.print(table)
    if arguments.rows:
        console.print(_row_table(manifest, row))
    if arguments.picture is not None:
        from bocage.shards.inspect.contact_sheet import contact_sheet, save_sheet  # imports matplotlib

        save_sheet(contact_sheet(manifest, row), arguments.picture)
        print(f"{manifest.index.key(row)}: {arguments.picture}")
    return 0


def _row(manifest: Manifest, key: str) -> int:
    row = pc.index(manifest.index.keys, pa.scalar(key)).as_py()
    if row < 0:
        raise InputError(f"{manifest.path}: no patch {key!r}; keys look like {manifest.index.key(0)}")
    return int(row)


def _tables(numbers: dict[str, Any]) -> list[Table]:
    patches = numbers["patches"]
    overview = Table(title=numbers["path"], title_justify="left", show_header=False)
    overview.add_column("what")
    overview.add_column("value", justify="right")
    overview.add_row("patches", str(patches))
    overview.add_row("skipped as unreadable", str(numbers["skipped"]))
    overview.add_row("shards", str(numbers["shards"]))
    overview.add_row("size", f"{numbers['bytes'] / _MEGABYTE:.1f} MB")
    overview.add_row("size relative to the source", f"{numbers['bytes'] / max(numbers['source_bytes'], 1):.3f}")
    overview.add_row("domains, regions of interest", f"{len(numbers['domains'])}, {numbers['rois']}")
    tables = [overview, _modality_table(numbers["modalities"], patches), _channel_table(numbers["modalities"])]
    tables.append(_counts("patches by domain", ("domain",), [((name,), n) for name, n in numbers["domains"].items()]))
    splits = [((name, value), count) for name, values in numbers["splits"].items() for value, count in values.items()]
    if splits:
        tables.append(_counts("patches by split", ("split", "value"), splits))
    if numbers["dates"]:
        dates = Table("series", "min", "median", "max", title="dates of a series", title_justify="left")
        for name, spread in numbers["dates"].items():
            dates.add_row(name, str(spread["min"]), f"{spread['median']:g}", str(spread["max"]))
        tables.append(dates)
    for name, shares in numbers["classes"].items():
        table = Table("class", "% of pixels", title=name, title_justify="left")
        for label, part in sorted(shares.items(), key=lambda item: -item[1]):
            if part:
                table.add_row(label, f"{100 * part:.2f}")
        tables.append(table)
    return tables


def _modality_table(modalities: dict[str, Any], patches: int) -> Table:
    table = Table(title="modalities", title_justify="left")
    table.add_column("name", no_wrap=True)
    for name in ("dtype", "bands", "pixels"):
        table.add_column(name, no_wrap=True)
    for name in ("patches", "%", "kB"):
        table.add_column(name, justify="right")
    for name, item in modalities.items():
        present = item["present"]
        each = item["bytes"] / max(present, 1) / 1e3
        pixels = f"{item['pixels']} x {item['gsd']:g} m"
        share = f"{100 * present / patches:.1f}"
        table.add_row(name, item["dtype"], str(len(item["bands"])), pixels, str(present), share, f"{each:.1f}")
    return table


def _channel_table(modalities: dict[str, Any]) -> Table:
    table = Table(title="statistics by channel", title_justify="left")
    table.add_column("modality")
    table.add_column("channel")
    for name in ("mean", "std"):
        table.add_column(name, justify="right")
    for name, item in modalities.items():
        for channel, mean, std in zip(item.get("channels", ()), item.get("mean", ()), item.get("std", ())):
            table.add_row(name, channel, *("none" if value is None else f"{value:.3f}" for value in (mean, std)))
    return table


def _counts(title: str, columns: tuple[str, ...], rows: Iterable[tuple[tuple[str, ...], int]]) -> Table:
    table = Table(*columns, title=title, title_justify="left")
    table.add_column("patches", justify="right")
    for cells, count in rows:
        table.add_row(*cells, str(count))
    return table


def _row_table(manifest: Manifest, row: int) -> Table:
    place = 0
    for batch in manifest.batches():
        if row < place + len(batch):
            break
        place += len(batch)
    values = batch.slice(row - place, 1).to_pylist()[0]
    table = Table("column", "value", title=f"row {row}: {values['key']}", title_justify="left")
    for name, value in values.items():
        if name.startswith("dates.") and value is not None:
            value = ", ".join(np.array(value, "datetime64[D]").astype(str))
        table.add_row(name, str(value))
    return table
