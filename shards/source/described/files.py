"""Find the files of a described dataset: sensor or label, fields and date of each."""

from __future__ import annotations

import datetime
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

from bocage.shards.errors import InputError
from bocage.shards.source.described.description import DatasetDescription
from bocage.shards.source.described.file_patterns import FilePattern, list_files, match_patterns
from bocage.shards.source.report import CatalogueReport

_EPOCH = datetime.date(1970, 1, 1)
_DATE = "date"
# Files beside a raster that hold its position, mask or overviews; they are read with it.
_SIDECARS = (".aux.xml", ".ovr", ".msk", ".prj", ".wld", ".tfw", ".tifw", ".pgw", ".pngw", ".jgw", ".jpgw")


@dataclass(frozen=True)
class DescribedFile:
    """One file of a sensor or label.

    Attributes:
        name: name of the sensor or label.
        path: path relative to the source folder, with ``/`` between folders.
        fields: fields of the path, without the date.
        date: text of the date in the path; None without a date.
        day: the date, in days since 1970-01-01; 0 without a date.
    """

    name: str
    path: str
    fields: dict[str, str]
    date: str | None
    day: int


def find_files(
    root: Path, description: DatasetDescription, report: CatalogueReport, reserved: Collection[str]
) -> Iterator[DescribedFile]:
    """Find the files below ``root`` that match a pattern of the description, in the order of their paths.

    World files, masks and overviews beside the rasters are left out. Folders that no pattern names are not searched;
    each counts as one name that matches no pattern.

    Args:
        root: source folder.
        description: description of the dataset.
        report: report that counts the files that match no pattern.
        reserved: names of computed fields, which patterns cannot use.

    Raises:
        InputError: a pattern is wrong or uses a reserved field, a series has no date, a date cannot be read, a name
            is not UTF-8, or a folder cannot be read.
    """
    patterns = {name: FilePattern(sensor.files) for name, sensor in description.sensors.items()}
    patterns |= {name: FilePattern(label.files) for name, label in description.labels.items()}
    for name, pattern in patterns.items():
        if taken := [field for field in pattern.fields if field in reserved]:
            raise InputError(f"{name}: files: the field {taken[0]} is computed; give it another name")
    for name, sensor in description.sensors.items():
        if sensor.role != "image" and _DATE not in patterns[name].fields:
            raise InputError(
                f"sensors.{name}: a series has a file for each date: add {{date}} to {patterns[name].text!r}"
            )
    for path in list_files(root, {pattern.folder for pattern in patterns.values()}):
        if path.lower().endswith(_SIDECARS):
            continue
        matches = match_patterns(patterns, path)
        for name, fields in matches.items():
            date = fields.pop(_DATE, None)
            day = 0 if date is None else parse_day(path, date, description.date_format)
            yield DescribedFile(name, path, fields, date, day)
        if not matches:
            report.add_unparsable(path)


def explain_empty(root: Path, description: DatasetDescription, report: CatalogueReport) -> str:
    """Message about a folder in which no file matches a sensor."""
    patterns = ", ".join(repr(sensor.files) for sensor in description.sensors.values())
    examples = (
        f"; files here: {', '.join(report.unparsable_examples)}" if report.unparsable else "; the folder is empty"
    )
    return f"{root}: no file matches {patterns}{examples}"


def parse_day(where: str, text: str, date_format: str) -> int:
    """Days since 1970-01-01 of a date in the form of the description.

    Raises:
        InputError: the text has another form; ``where`` begins the message.
    """
    try:
        return (datetime.datetime.strptime(text, date_format).date() - _EPOCH).days
    except ValueError:
        raise InputError(f"{where}: date {text!r} is not of the form {date_format}; see date_format") from None
