"""Report on the files of a dataset: counts by modality, and missing, duplicate, unreadable or unparsable files."""

from __future__ import annotations

from collections.abc import Container, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from bocage.shards.errors import counted

_MAX_EXAMPLES = 5
_MAX_UNREADABLE_LISTED = 100  # more than other examples, because somebody has to download each file again


@dataclass
class CatalogueReport:
    """Counts of the files of a tree and of its problems, with a bounded number of examples.

    Attributes:
        patches: number of patches.
        present: patches that have a modality, by modality.
        missing_examples: keys of a few patches that lack a modality, by modality that other patches have.
        undated: files left out because the metadata hold no dates for them, by series and mask.
        masks_without_series: files left out because their patch lacks the series, by mask.
        historical_without_patch: historical files whose location has no patch of any year.
        unparsable: files whose names do not follow a pattern, and folders inside FLAIR-HUB's modality folders.
        unparsable_examples: a few of these, relative to the root.
        without_input: files left out because no image or series has their key, by label or mask.
        without_input_examples: keys of a few of these.
        duplicates: further files of the same raster; a folder takes precedence over a zip, then the first by name.
        duplicate_examples: a few of these.
        empty: files of 0 bytes; they stay in the catalogue, and reading them fails.
        empty_examples: a few of these.
        unreadable: folders and zips that cannot be read; they are left out completely.
        unreadable_examples: one message for each of these, up to 100.
        unknown_folders: folders and zips named like those of a modality that the registry does not list.
        duplicate_rows: metadata rows about a patch that already had one; the first row counts.
        unreadable_dates: metadata rows whose dates cannot be parsed.
        notes: other messages, such as that rasters are resampled.
    """

    patches: int = 0
    present: dict[str, int] = field(default_factory=dict)
    missing_examples: dict[str, list[str]] = field(default_factory=dict)
    undated: dict[str, int] = field(default_factory=dict)
    masks_without_series: dict[str, int] = field(default_factory=dict)
    historical_without_patch: int = 0
    unparsable: int = 0
    unparsable_examples: list[str] = field(default_factory=list)
    without_input: dict[str, int] = field(default_factory=dict)
    without_input_examples: list[str] = field(default_factory=list)
    duplicates: int = 0
    duplicate_examples: list[str] = field(default_factory=list)
    empty: int = 0
    empty_examples: list[str] = field(default_factory=list)
    unreadable: int = 0
    unreadable_examples: list[str] = field(default_factory=list)
    unknown_folders: list[str] = field(default_factory=list)
    duplicate_rows: int = 0
    unreadable_dates: int = 0
    notes: list[str] = field(default_factory=list)

    @property
    def missing(self) -> dict[str, int]:
        """Patches that lack a modality, by modality."""
        return {name: self.patches - count for name, count in self.present.items()}

    def to_json(self) -> dict[str, Any]:
        """The report as a JSON-serialisable dictionary."""
        return {**asdict(self), "missing": self.missing}

    def warnings(self) -> list[str]:
        """One message for each way in which the tree is not complete; empty for a complete tree."""
        total, missing = self.patches, self.missing
        messages = [
            f"{count:,} of {counted(total, 'patch')} without {name}"
            for name, count in missing.items()
            if 0 < count < total
        ]
        absent = [name for name, count in missing.items() if count == total]
        messages += [f"no patch has {', '.join(absent)}"] if absent else []
        messages += [f"left out: {message}" for message in self.unreadable_examples]
        if self.unreadable > len(self.unreadable_examples):
            messages.append(f"left out: {self.unreadable - len(self.unreadable_examples)} more that cannot be read")
        if self.empty:
            messages.append(f"{counted(self.empty, 'empty file')}, e.g. {', '.join(self.empty_examples)}")
        if self.duplicates:
            messages.append(
                f"{counted(self.duplicates, 'duplicate raster')} ignored, e.g. {', '.join(self.duplicate_examples)}"
            )
        messages += [
            f"{counted(count, 'file')} of {name} left out: no dates known" for name, count in self.undated.items()
        ]
        messages += [
            f"{counted(count, 'file')} of {name} left out: the series is missing"
            for name, count in self.masks_without_series.items()
        ]
        if self.without_input:
            counts = ", ".join(f"{count} of {name}" for name, count in self.without_input.items())
            examples = ", ".join(self.without_input_examples)
            messages.append(f"files without an image or series of the same key left out: {counts}, e.g. {examples}")
        if self.unparsable:
            messages.append(
                f"{counted(self.unparsable, 'name')} not understood, e.g. {', '.join(self.unparsable_examples)}"
            )
        if self.unknown_folders:
            messages.append(f"unknown modalities: {', '.join(self.unknown_folders)}")
        if self.historical_without_patch:
            messages.append(f"{counted(self.historical_without_patch, 'historical image')} without a patch")
        if self.duplicate_rows:
            messages.append(f"{counted(self.duplicate_rows, 'repeated metadata row')} ignored")
        if self.unreadable_dates:
            messages.append(f"{counted(self.unreadable_dates, 'metadata row')} without readable dates")
        return [*messages, *self.notes]

    def add_unparsable(self, name: str) -> None:
        """Count a name that does not follow the pattern."""
        self.unparsable += 1
        _append_example(self.unparsable_examples, name)

    def add_without_input(self, name: str, keys: list[str]) -> None:
        """Count files of a label or mask whose key no image or series has."""
        self.without_input[name] = len(keys)
        for key in keys[:_MAX_EXAMPLES]:
            _append_example(self.without_input_examples, key)

    def add_duplicates(self, count: int, names: list[str]) -> None:
        """Count duplicate rasters; ``names`` may hold only the first few."""
        self.duplicates += count
        for name in names:
            _append_example(self.duplicate_examples, name)

    def add_empty(self, name: str) -> None:
        """Count a file of 0 bytes."""
        self.empty += 1
        _append_example(self.empty_examples, name)

    def add_unknown_keys(self, path: str | Path, listed: Sequence[str], known: Container[str]) -> None:
        """Count the listed keys of a split that the dataset lacks, which may be misspelt."""
        if unknown := [key for key in listed if key not in known]:
            examples: list[str] = []
            for key in unknown[:_MAX_EXAMPLES]:
                _append_example(examples, key)
            shown = ", ".join(examples)
            self.notes.append(f"{len(unknown)} of {len(listed)} keys of {path} are not in the dataset, e.g. {shown}")

    def add_unreadable(self, message: str) -> None:
        """Count a folder or zip that is left out."""
        self.unreadable += 1
        _append_example(self.unreadable_examples, message, _MAX_UNREADABLE_LISTED)


def _append_example(examples: list[str], text: str, limit: int = _MAX_EXAMPLES) -> None:
    if len(examples) < limit:
        # File names may hold any bytes: replace those that a terminal or JSON could not take.
        text = text.encode("utf-8", "replace").decode("utf-8")
        examples.append("".join(character if character.isprintable() else "?" for character in text))
