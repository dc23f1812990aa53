"""Draft the description of a dataset from a folder.

The draft comes from all file names, and from headers and values of a sample of the files. What a sample cannot decide
becomes a comment.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Hashable, Sequence
from pathlib import Path

from bocage.shards.draft.names import FileGroup, group_files
from bocage.shards.draft.rasters import Choices, draft_rasters
from bocage.shards.draft.survey import read_header
from bocage.shards.draft.table import draft_tables
from bocage.shards.draft.yaml import Draft
from bocage.shards.errors import InputError, counted
from bocage.shards.source.described.file_patterns import RASTER_EXTENSIONS, check_name, choose_rasters, list_files
from bocage.shards.source.flair_hub.scan import has_flair_hub_names
from bocage.shards.source.raster import RasterError

_INDEX = ".vrt"  # usually combines the other rasters
_TABLES = (".parquet",)
_MAX_SHOWN = 5


def draft_folder(root: Path) -> Draft:
    """Draft the description of a folder.

    Args:
        root: folder of rasters, or of Parquet tables.

    Raises:
        InputError: the folder holds nothing that can be described, or is FLAIR-HUB, or a name is not UTF-8.
    """
    paths = list(list_files(root))
    rasters = choose_rasters(paths)
    tables = [path for path in paths if path.lower().endswith(_TABLES)]
    for path in tables:
        check_name(path)
    if has_flair_hub_names(root):
        raise InputError(
            f"{root}: holds folders or zips of FLAIR-HUB, which needs no description; run bocage shard {root} OUT"
        )
    if tables and not rasters:
        return draft_tables(root, tables)
    if not rasters:
        raise InputError(f"{root}: holds no {', '.join(RASTER_EXTENSIONS)} or .parquet file{_explain_others(paths)}")
    indexes = [path for path in rasters if path.lower().endswith(_INDEX)]
    if len(indexes) < len(rasters):
        rasters = [path for path in rasters if path not in set(indexes)]
    draft = draft_rasters(root, group_files(rasters, lambda path: _form(root / path)), Choices())
    if indexes and indexes[0] not in rasters:
        draft.notes.append(f"{counted(len(indexes), 'VRT file')} beside other rasters left out, e.g. {indexes[0]}")
    if tables:
        draft.notes.append(f"{counted(len(tables), 'Parquet file')} left out; tables need a folder without rasters")
    return draft


def draft_images(images: Path, labels: Path | None, choices: Choices) -> Draft:
    """Draft the description of a folder of images and a folder of their labels.

    Args:
        images: folder of images of one kind.
        labels: folder of label rasters with the names of the images; None for none.
        choices: what the user has decided.

    Raises:
        InputError: a folder holds no rasters or several kinds, the folders have no folder in common, no label has the
            name of an image, or the bands are unknown.
    """
    root, prefixes = _common_root(images, labels)
    groups = [_single_group(root, prefix, option) for option, prefix in prefixes.items()]
    draft = draft_rasters(root, groups, choices, roles=[option == "--labels" for option in prefixes])
    if labels is not None and "labels" not in draft.values:
        raise InputError(f"--labels {labels}: {'; '.join(draft.notes)}")
    bands = next(iter(draft.values["sensors"].values()))["bands"]
    if not choices.bands and (unknown := [name for name, value in bands.items() if value == "other"]):
        raise InputError(
            f"--images {images}: the files do not say what {', '.join(unknown)} of {counted(len(bands), 'band')} mean; "
            "name all in order, e.g. --bands R,G,B,NIR"
        )
    return draft


def _common_root(images: Path, labels: Path | None) -> tuple[Path, dict[str, str]]:
    """Deepest folder that holds both folders, and the path of each below it, by option."""
    for option, folder in (("--images", images), ("--labels", labels)):
        if folder is not None and not folder.is_dir():
            raise InputError(f"{option} {folder}: no such folder")
    if labels is None:
        return images, {"--images": ""}
    first, second = images.resolve(), labels.resolve()
    root = next(parent for parent in (first, *first.parents) if second.is_relative_to(parent))
    if root in (first, second):
        raise InputError(f"--images {images} and --labels {labels}: give two folders, neither inside the other")
    if root == Path(root.anchor):
        raise InputError(f"--images {images} and --labels {labels}: have no folder in common; link them into one")
    prefixes = {"--images": first.relative_to(root).as_posix(), "--labels": second.relative_to(root).as_posix()}
    return root, prefixes


def _single_group(root: Path, prefix: str, option: str) -> FileGroup:
    """The only kind of rasters below a folder."""
    folder = root / prefix
    names = list(list_files(folder))
    paths = [f"{prefix}/{name}" if prefix else name for name in choose_rasters(names)]
    if not paths:
        raise InputError(f"{option} {folder}: holds no {', '.join(RASTER_EXTENSIONS)} file{_explain_others(names)}")
    groups = group_files(paths, lambda path: _form(root / path))
    if len(groups) > 1:
        examples = " and ".join(group.example for group in groups[:2])
        raise InputError(
            f"{option} {folder}: holds {len(groups)} kinds of files, e.g. {examples}; draft a description with "
            "bocage describe instead"
        )
    return groups[0]


def _explain_others(paths: Sequence[str]) -> str:
    counts = Counter(Path(path).suffix.lower() or "without an extension" for path in paths)
    found = ", ".join(f"{count} {extension}" for extension, count in counts.most_common(_MAX_SHOWN))
    return f"; it has {found}" if found else "; it is empty"


def _form(path: Path) -> tuple[Hashable, Hashable] | None:
    """What differs between the rasters of two sensors: bands and dtype, and the pixel to a factor of two."""
    try:
        header = read_header(path)
    except RasterError:
        return None
    pixel = None if header.pixel is None else round(math.log2(header.pixel))
    return (header.bands, header.dtypes[0]), pixel
