"""What is missing, repeated, unreadable or not understood in a FLAIR-HUB tree."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

_EXAMPLES = 5
_UNREADABLE_LISTED = 100  # each a file that somebody has to download again


@dataclass
class Report:
    """What a tree holds and what is wrong with it. Lists of examples are bounded, whatever the tree holds.

    Attributes:
        patches: number of patches.
        present: by modality, patches that have it.
        missing_examples: by modality that some patches have and some lack, keys of a few that lack it.
        undated: by series and mask, files left out because the metadata give no dates for them.
        lone: by mask, files left out because their patch lacks the series.
        orphans: historical files whose place has no patch of any year.
        unparsable: files and folders inside modality folders and zips whose names do not follow the pattern.
        examples: a few of these, relative to the root.
        duplicates: rasters found a second time; a folder counts before a zip, then the first by name.
        duplicate_examples: a few of these.
        empty: files of 0 bytes. They stay in the catalogue, where reading them fails.
        empty_examples: a few of these.
        unreadable: folders and zips that cannot be read, and are left out as a whole.
        unreadable_examples: a sentence on each, up to 100.
        unknown_folders: folders and zips named like a modality's that the registry does not list.
        duplicate_rows: metadata rows about a patch that already had one; the first counts.
        unreadable_dates: metadata rows whose dates cannot be parsed.
    """

    patches: int = 0
    present: dict[str, int] = field(default_factory=dict)
    missing_examples: dict[str, list[str]] = field(default_factory=dict)
    undated: dict[str, int] = field(default_factory=dict)
    lone: dict[str, int] = field(default_factory=dict)
    orphans: int = 0
    unparsable: int = 0
    examples: list[str] = field(default_factory=list)
    duplicates: int = 0
    duplicate_examples: list[str] = field(default_factory=list)
    empty: int = 0
    empty_examples: list[str] = field(default_factory=list)
    unreadable: int = 0
    unreadable_examples: list[str] = field(default_factory=list)
    unknown_folders: list[str] = field(default_factory=list)
    duplicate_rows: int = 0
    unreadable_dates: int = 0

    @property
    def missing(self) -> dict[str, int]:
        """By modality, patches that lack it."""
        return {name: self.patches - count for name, count in self.present.items()}

    def to_json(self) -> dict[str, Any]:
        """All of it, JSON-serialisable."""
        return {**asdict(self), "missing": self.missing}

    def remarks(self) -> list[str]:
        """A sentence on everything that is not as in a complete tree; none when all is well."""
        total, missing = self.patches, self.missing
        remarks = [f"{count} of {total} patches without {name}" for name, count in missing.items() if 0 < count < total]
        absent = [name for name, count in missing.items() if count == total]
        remarks += [f"no patch has {', '.join(absent)}"] if absent else []
        remarks += [f"left out: {sentence}" for sentence in self.unreadable_examples]
        if self.unreadable > len(self.unreadable_examples):
            remarks.append(f"left out: {self.unreadable - len(self.unreadable_examples)} more that cannot be read")
        if self.empty:
            remarks.append(f"{self.empty} files are empty, e.g. {', '.join(self.empty_examples)}")
        if self.duplicates:
            remarks.append(f"{self.duplicates} rasters are there twice, e.g. {', '.join(self.duplicate_examples)}")
        remarks += [f"{count} files of {name} left out: no dates known" for name, count in self.undated.items()]
        remarks += [f"{count} files of {name} left out: no series beside them" for name, count in self.lone.items()]
        if self.unparsable:
            remarks.append(f"{self.unparsable} names not understood, e.g. {', '.join(self.examples)}")
        if self.unknown_folders:
            remarks.append(f"unknown modalities: {', '.join(self.unknown_folders)}")
        if self.orphans:
            remarks.append(f"{self.orphans} historical images without a patch")
        if self.duplicate_rows:
            remarks.append(f"{self.duplicate_rows} repeated metadata rows ignored")
        if self.unreadable_dates:
            remarks.append(f"{self.unreadable_dates} metadata rows without readable dates")
        return remarks

    def not_understood(self, name: str) -> None:
        """Counts a name that does not follow the pattern."""
        self.unparsable += 1
        _keep(self.examples, name)

    def found_again(self, count: int, names: list[str]) -> None:
        """Counts rasters found a second time; ``names`` may hold only the first few."""
        self.duplicates += count
        for name in names:
            _keep(self.duplicate_examples, name)

    def found_empty(self, name: str) -> None:
        """Counts a file of 0 bytes."""
        self.empty += 1
        _keep(self.empty_examples, name)

    def cannot_be_read(self, sentence: str) -> None:
        """Counts a folder or zip that is left out."""
        self.unreadable += 1
        _keep(self.unreadable_examples, sentence, _UNREADABLE_LISTED)


def _keep(examples: list[str], text: str, most: int = _EXAMPLES) -> None:
    if len(examples) < most:
        # One line that any terminal and any JSON can take, whatever bytes a file name holds.
        text = text.encode("utf-8", "replace").decode("utf-8")
        examples.append("".join(character if character.isprintable() else "?" for character in text))
