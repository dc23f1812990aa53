"""Draft the description of rasters: find sensors and labels, and fill the keys of each."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from bocage.shards.draft.bands import DraftBands, guess_bands
from bocage.shards.draft.grid import (
    DraftGrid,
    DraftItem,
    are_tiles,
    choose_grid,
    describe_pixel,
    describe_position,
)
from bocage.shards.draft.names import FileGroup, NamedGroup, NameLayout, find_layout
from bocage.shards.draft.splits import propose_splits, round_blocks
from bocage.shards.draft.survey import (
    ImageValues,
    LabelValues,
    RasterHeader,
    Survey,
    read_images,
    read_labels,
    survey,
)
from bocage.shards.draft.yaml import Draft, Keys
from bocage.shards.errors import InputError, counted
from bocage.shards.source.described.description import DTYPES, UNUSED
from bocage.shards.source.described.file_patterns import plain_name
from bocage.shards.source.raster import is_integer

_MAX_LABEL_VALUES = 32  # distinct values of classes, if no word of the names says that these are labels
_BLOCK_PATCHES = (10, 7, 5, 3, 2)  # side of a ground block in patches, the best first
_SITE_FIELDS = ("site", "area", "group", "set", "part", "date")  # not names of single rasters of a mosaic
_MISSING_VALUES: dict[str, tuple[float, ...]] = {
    "int16": (-32768, -9999),
    "uint16": (65535,),
    "float32": (-9999, -99999, -32768, float(np.finfo(np.float32).min)),
}
_MAX_SHOWN = 5


@dataclass(frozen=True)
class Choices:
    """What the user has decided, so that the draft need not guess it.

    Attributes:
        bands: bands of the images; empty to guess them.
        classes: name of each class by value; empty to number the values that occur.
        ignore: values without a class; None to guess them.
    """

    bands: dict[str, Any] = field(default_factory=dict)
    classes: dict[int, str] = field(default_factory=dict)
    ignore: list[int] | None = None


@dataclass
class _Image(DraftItem):
    """Files of an image sensor, with the values of a sample of them."""

    values: ImageValues = field(kw_only=True)
    bands: DraftBands = field(kw_only=True)


@dataclass
class _Label(DraftItem):
    """Files of a label, with the values of a sample of them."""

    values: LabelValues = field(kw_only=True)


def draft_rasters(
    root: Path, groups: Sequence[FileGroup], choices: Choices, roles: Sequence[bool] | None = None
) -> Draft:
    """Draft the description of groups of rasters.

    Args:
        root: source folder.
        groups: files of each sensor and label.
        choices: what the user has decided.
        roles: whether each group is of labels; None to find out.

    Raises:
        InputError: no group is of images that can be described, or a choice contradicts the files.
    """
    draft = Draft(root, {"name": plain_name(root.resolve().name) or "dataset", "licence": "", "attribution": ""})
    draft.comments[("licence",)] = "licence of the data, such as CC-BY-4.0"
    draft.comments[("attribution",)] = "credit that the licence demands"
    images, labels = _classify(root, groups, choices, roles, draft)
    # Names are compared with those of the sensor that has most files; pixels with those of the finest sensor.
    reference = max(images, key=lambda image: len(image.group.paths))
    ordered: list[DraftItem] = [reference, *(image for image in images if image is not reference), *labels]
    layout = find_layout([item.group for item in ordered])
    named = {item.name: group for item, group in zip(ordered, layout.groups, strict=True)}
    _pair_labels(draft, images, labels, named)
    draft.sampled = (
        f"the names of {counted(sum(len(group.paths) for group in groups), 'raster')}, "
        f"{counted(sum(len(item.found.headers) for item in ordered), 'header')} and the values of "
        f"{counted(sum(image.values.files for image in images), 'image')}"
    )
    if labels:
        draft.sampled += f" and {counted(sum(label.values.files for label in labels), 'label raster')}"
    grid = choose_grid(draft, [*images, *labels])
    _fill_dataset(draft, grid, layout, images, labels)
    splits = _propose_splits(draft, grid, images, named[reference.name], [named[label.name] for label in labels])
    draft.values["sensors"] = {}
    for image in images:
        is_series = layout.groups.index(named[image.name]) in layout.series
        keys = _file_keys(draft, image, named[image.name], grid, ("sensors", image.name))
        draft.values["sensors"][image.name] = {
            **({"role": "series"} if is_series else {}),
            "files": keys["files"],
            **_sensor_values(draft, image, choices),
            **{key: value for key, value in keys.items() if key != "files"},
            **_nodata(draft, image, choices),
        }
    if labels:
        draft.values["labels"] = {
            label.name: _file_keys(draft, label, named[label.name], grid, ("labels", label.name))
            | _label_values(draft, label, choices)
            for label in labels
        }
    if splits:
        draft.values["splits"] = splits
    return draft


# Sensors and labels --------------------------------------------------------------------------------------------------


def _classify(
    root: Path, groups: Sequence[FileGroup], choices: Choices, roles: Sequence[bool] | None, draft: Draft
) -> tuple[list[_Image], list[_Label]]:
    """Images, those with the finest pixels first, and labels; groups that are neither become notes."""
    images: list[_Image] = []
    labels: list[_Label] = []
    undecided: list[tuple[_Image, _Label]] = []
    unreadable: list[str] = []
    for index, group in enumerate(groups):
        found = survey(root, group.paths)
        unreadable += found.unreadable
        if not found.headers:
            continue
        header = _usual_header(draft, group, found)
        if group.is_label if roles is None else roles[index]:
            label = _read_label(draft, group, found, header)
            labels += [] if label is None else [label]
            continue
        image = _read_image(draft, group, found, header, choices)
        if image is None:
            continue
        label = _few_values(image) if roles is None else None
        if label is None:
            images.append(image)
        else:
            undecided.append((image, label))
    for image, label in undecided:  # one band of few values holds labels only if there are images beside it
        if images:
            labels.append(label)
        else:
            images.append(image)
    if unreadable:
        draft.notes.append(f"{counted(len(unreadable), 'sampled file')} left out as unreadable, e.g. {unreadable[0]}")
    if not images:
        raise InputError(f"{root}: holds no images that can be described: {'; '.join(draft.notes) or 'labels only'}")
    images.sort(key=lambda image: image.found.pixels[len(image.found.pixels) // 2] if image.found.pixels else math.inf)
    _give_names([(image, image.bands.name) for image in images])
    _give_names([(label, _label_name(label.group)) for label in labels], {image.name for image in images})
    return images, labels


def _usual_header(draft: Draft, group: FileGroup, found: Survey) -> RasterHeader:
    """A header with the usual bands and dtype; files with others become a note."""
    forms = found.values(lambda header: (header.bands, header.dtypes[0]))
    usual = forms.most_common(1)[0][0]
    if others := sum(forms.values()) - forms[usual]:
        draft.notes.append(
            f"most files beside {group.example} have {counted(usual[0], 'band')} of {usual[1]}, but not {others} of "
            f"{counted(len(found.headers), 'sampled file')}; one description cannot read both"
        )
    return next(header for header in found.headers.values() if (header.bands, header.dtypes[0]) == usual)


def _read_image(draft: Draft, group: FileGroup, found: Survey, header: RasterHeader, choices: Choices) -> _Image | None:
    """The group as an image; None if its dtype cannot be described."""
    if header.dtypes[0] not in DTYPES:
        draft.notes.append(
            f"{group.example} has the dtype {header.dtypes[0]}, which is none of {', '.join(DTYPES)}: convert "
            f"{counted(len(group.paths), 'such file')}, e.g. with gdal_translate -ot Float32"
        )
        return None
    if choices.bands and len(choices.bands) != header.bands:
        raise InputError(
            f"--bands names {counted(len(choices.bands), 'band')}, but {found.root / group.example} has "
            f"{header.bands}; name all in order, and those to leave out as unused, e.g. A=unused for alpha"
        )
    values = read_images(found)
    return _Image(group, found, header, values=values, bands=guess_bands(header, values, group.words))


def _read_label(draft: Draft, group: FileGroup, found: Survey, header: RasterHeader) -> _Label | None:
    """The group as a label; None if it has other values than class numbers."""
    problem = _label_problem(header)
    if problem is None:
        values = read_labels(found)
        if values.pixels:
            return _Label(group, found, header, values=values)
        problem = "more values than there can be classes" if values.files else "values that cannot be read"
    draft.notes.append(
        f"{group.example} seems to be a label but has {problem}: convert {counted(len(group.paths), 'such file')} to "
        "one band of class numbers"
    )
    return None


def _label_problem(header: RasterHeader) -> str | None:
    """Why rasters cannot be labels; None if they can."""
    if header.bands != 1:
        return counted(header.bands, "band")
    if not is_integer(header.dtypes[0]):
        return f"the dtype {header.dtypes[0]}"
    return None


def _few_values(image: _Image) -> _Label | None:
    """The image as a label if it is one band of few integers; else None."""
    if _label_problem(image.header) is not None:
        return None
    values = read_labels(image.found)
    if not 0 < len(values.pixels) <= _MAX_LABEL_VALUES:
        return None
    return _Label(image.group, image.found, image.header, values=values)


def _label_name(group: FileGroup) -> str:
    return group.words[-1].upper() if group.words else "LABEL"


def _give_names(items: Sequence[tuple[DraftItem, str]], taken: set[str] | None = None) -> None:
    """Name items; repeated names get a number."""
    used = set(taken or ())
    for item, wanted in items:
        base = name = plain_name(wanted)
        number = 1
        while name in used:
            number += 1
            name = f"{base}_{number}"
        used.add(name)
        item.name = name


def _pair_labels(draft: Draft, images: Sequence[_Image], labels: list[_Label], named: Mapping[str, NamedGroup]) -> None:
    """Leave out labels that no image has the name of, and note how many files have no image.

    Rasters that are cut into patches pair by position instead.
    """
    if not are_tiles(images) and all(item.found.pixels for item in (*images, *labels)):
        return
    for label in list(labels):
        matched, count = named[label.name].matched, len(label.group.paths)
        if matched == 0:
            draft.notes.append(
                f"{label.group.example} seems to be a label, but no image has such a name: "
                f"{counted(count, 'such file')} left out"
            )
            labels.remove(label)
        elif matched < count:
            draft.notes.append(
                f"no image for {count - matched:,} of {counted(count, 'label')} such as {label.group.example}"
            )


# Keys ----------------------------------------------------------------------------------------------------------------


def _fill_dataset(
    draft: Draft, grid: DraftGrid, layout: NameLayout, images: Sequence[_Image], labels: Sequence[_Label]
) -> None:
    """Add the keys of the dataset as a whole."""
    draft.values["kind"] = "tiles" if grid.is_tiled else "rasters"
    draft.values["patch"] = f"{grid.patch_pixels} px"
    draft.comments[("patch",)] = f"{grid.side:.4g} m on the ground"
    pixel_keys = [f"sensors.{image.name}.pixel" for image in images]
    describe_position(draft, images, pixel_keys + [f"labels.{label.name}.pixel" for label in labels])
    if layout.key and grid.is_tiled:
        draft.values["key"] = layout.key
    if layout.date_format not in ("", "%Y%m%d"):
        draft.values["date_format"] = layout.date_format
    if layout.repeated and not grid.is_mosaic:
        draft.notes.append("several files have the same fields in their names: add fields to files and key")


def _propose_splits(
    draft: Draft, grid: DraftGrid, images: Sequence[_Image], reference: NamedGroup, labels: Sequence[NamedGroup]
) -> dict[str, Any]:
    """Add domain and blocks to the draft; returns the splits."""
    headers = [header for image in images for header in image.found.headers.values()]
    centres = [header.centre for header in headers if header.centre is not None]
    names = [name for name in reference.fields if name != "date"]
    is_labelled = np.zeros(len(reference.group.paths), bool)
    for label in labels:
        shared = [name for name in names if name in label.fields]
        keys = set(zip(*(label.fields[name] for name in shared)))
        is_labelled |= [key in keys for key in zip(*(reference.fields[name] for name in shared))]
    sides = [round_blocks(patches * grid.side) for patches in _BLOCK_PATCHES]
    has_positions = len(centres) == len(headers)
    return propose_splits(draft, reference.fields, is_labelled.tolist(), centres if has_positions else None, sides)


def _file_keys(draft: Draft, item: DraftItem, named: NamedGroup, grid: DraftGrid, keys: Keys) -> dict[str, Any]:
    """The keys ``files``, ``pixel`` and ``pixel_tolerance``."""
    pattern = named.pattern
    if grid.is_mosaic:
        for name in named.fields:
            if name not in _SITE_FIELDS:
                pattern = pattern.replace(f"{{{name}}}", "*")
    draft.comments[(*keys, "files")] = counted(len(item.group.paths), "file")
    return {"files": pattern} | describe_pixel(draft, item, grid.pixels[item.name], keys)


def _sensor_values(draft: Draft, image: _Image, choices: Choices) -> dict[str, Any]:
    """The keys ``bands``, ``dtype`` and ``representation``."""
    keys: Keys = ("sensors", image.name)
    values: dict[str, Any] = {"bands": dict(choices.bands or image.bands.bands), "dtype": image.header.dtypes[0]}
    if not choices.bands:
        for band, remark in image.bands.remarks.items():
            draft.comments[(*keys, "bands", band)] = remark
        if unknown := [band for band, value in image.bands.bands.items() if value == "other"]:
            draft.notes.append(
                f"{image.name}: the files do not say what {', '.join(unknown)} measure; name these bands"
            )
        if image.bands.representation != "linear":
            values["representation"] = image.bands.representation
    finite = [value for value in (*image.values.lowest, *image.values.highest) if math.isfinite(value)]
    if finite:
        draft.comments[(*keys, "dtype")] = (
            f"values {min(finite):g} to {max(finite):g} in {counted(image.values.files, 'file')}"
        )
    return values


def _nodata(draft: Draft, image: _Image, choices: Choices) -> dict[str, list[float]]:
    """The key ``nodata``: declared values, NaN if it occurs, and extreme values that usually mark missing pixels.

    A value that would mark all sampled pixels as missing becomes a note.
    """
    dtype = np.dtype(image.header.dtypes[0])
    declared = {header.nodata for header in image.found.headers.values() if header.nodata is not None}
    values = {value for value in declared if _can_occur(value, dtype)}
    ends = {*image.values.lowest, *image.values.highest}
    guesses = {float(guess) for guess in _MISSING_VALUES.get(dtype.name, ()) if float(guess) in ends} - values
    bands = (choices.bands or image.bands.bands).values()
    ranges = [
        (lowest, highest)
        for band, lowest, highest in zip(bands, image.values.lowest, image.values.highest, strict=True)
        if band != UNUSED and math.isfinite(lowest)
    ]
    hiding = {value for value in values | guesses if all(_is_marked(value, *limits) for limits in ranges)}
    for value in sorted(hiding):
        draft.notes.append(f"{image.name}: {_explain_hiding(value, ranges, value in declared)}")
    values, guesses = values - hiding, guesses - hiding
    remarks = ["the files declare it"] if values else []
    for value in sorted(values | guesses):
        lowest, highest = min(low for low, _ in ranges), max(high for _, high in ranges)
        if lowest < value <= 0 or 0 < value < highest:
            limit = f"lower values, down to {lowest:g}," if value <= 0 else f"higher values, up to {highest:g},"
            remarks.append(f"{value:g} also marks the {limit} as missing")
    if guesses:
        remarks.append(f"{', '.join(f'{guess:g}' for guess in sorted(guesses))} occurs: does it mark missing pixels?")
    if image.values.nan:
        remarks.append(f"NaN in {image.values.nan} of {counted(image.values.files, 'file')}")
    if image.values.infinite:
        draft.notes.append(f"{image.name}: infinite values in {counted(image.values.infinite, 'sampled file')}")
    found = sorted(values | guesses)
    alphas = [index for index, name in enumerate(image.bands.bands) if image.bands.remarks.get(name) == "alpha"]
    if not found and any(0.0 in (image.values.few[index] or ()) for index in alphas):
        found = [0.0]
        remarks.append("transparent pixels get it, and opaque pixels of this value count as missing, too")
    found += [math.nan] if image.values.nan or any(map(math.isnan, declared)) else []
    if remarks:
        draft.comments[("sensors", image.name, "nodata")] = "; ".join(remarks)
    return {"nodata": found} if found else {}


def _is_marked(nodata: float, lowest: float, highest: float) -> bool:
    """Whether a value of ``nodata`` marks all values of a range: it also marks those beyond it, away from 0."""
    return highest <= nodata if nodata <= 0 else lowest >= nodata


def _explain_hiding(value: float, ranges: Sequence[tuple[float, float]], is_declared: bool) -> str:
    """Why a nodata value is left out that would mark all pixels as missing, and what to do."""
    if not ranges:
        return (
            f"all sampled pixels have the nodata value {value:g} that the files declare, so it is left out of nodata; "
            "if it is a valid value, remove it from the files with gdal_edit.py -unsetnodata"
        )
    lowest, highest = min(low for low, _ in ranges), max(high for _, high in ranges)
    if not is_declared:
        return f"all sampled pixels are {value:g}, so it is left out of nodata"
    side = "lower" if value <= 0 else "higher"
    return (
        f"as nodata, {value:g}, which the files declare, would also mark all {side} values, {lowest:g} to {highest:g}, "
        "so it is left out; give the files a nodata value outside the data, or NaN"
    )


def _can_occur(value: float, dtype: np.dtype[Any]) -> bool:
    """Whether an array of a dtype can have a value; not for NaN."""
    if dtype.kind == "f":
        return not math.isnan(value)
    return value.is_integer() and np.iinfo(dtype).min <= value <= np.iinfo(dtype).max


def _label_values(draft: Draft, label: _Label, choices: Choices) -> dict[str, Any]:
    """The keys ``classes`` and ``ignore``."""
    keys: Keys = ("labels", label.name)
    found = list(label.values.pixels)
    ignore = _ignored(draft, label) if choices.ignore is None and not choices.classes else choices.ignore or []
    classes = dict(choices.classes) or {value: f"class {value}" for value in found if value not in ignore}
    if unknown := [value for value in found if value not in classes and value not in ignore]:
        raise InputError(
            f"{label.values.examples[unknown[0]]}: values that are neither in --classes nor in --ignore: "
            f"{', '.join(map(str, unknown[:_MAX_SHOWN]))}"
        )
    for value in classes:
        share = label.values.share(value)
        if choices.classes and not share:
            draft.notes.append(
                f"{label.name}: class {value} {classes[value]} does not occur in "
                f"{counted(label.values.files, 'sampled file')}"
            )
        text = (
            f"{100 * share:.2g} % of the pixels" if share else f"not in {counted(label.values.files, 'sampled file')}"
        )
        draft.comments[(*keys, "classes", str(value))] = text
    if not choices.classes:
        count = len(label.group.paths)
        draft.comments[(*keys, "classes")] = f"found in {label.values.files} of {counted(count, 'file')}; name them"
    if ignore:
        share = sum(map(label.values.share, ignore))
        draft.comments[(*keys, "ignore")] = f"{100 * share:.2g} % of the pixels"
    return {"classes": classes} | ({"ignore": ignore} if ignore else {})


def _ignored(draft: Draft, label: _Label) -> list[int]:
    """255 and the declared nodata value, if two classes remain."""
    declared = {header.nodata for header in label.found.headers.values()}
    ignore = [value for value in label.values.pixels if value == 255 or value in declared]
    if len(label.values.pixels) - len(ignore) >= 2:
        return ignore
    if ignore:
        values = ", ".join(map(str, ignore))
        draft.notes.append(f"{label.name}: if {values} marks pixels without a label, move it to ignore")
    return []
