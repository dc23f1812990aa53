"""Group the files of a folder by sensor and label, and find patterns of their names."""

from __future__ import annotations

import datetime
import re
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

from bocage.shards.source.described.file_patterns import FilePattern

LABEL_WORDS = frozenset(
    "annot annotation annotations classes ground_truth groundtruth gt label labels lbl mask masks msk reference seg "
    "segmentation target targets truth".split()
)
IMAGE_WORDS = frozenset("image images img imgs".split())
_BAND_WORDS = frozenset(
    "aerial blue chm cir dem dsm dtm green height hyperspectral infrared irrg lidar ms multispectral ndsm nir optical "
    "ortho pan radar red rgb rgbi rgbn sar swir thermal tir vh vv".split()
)
_BAND_NAME = re.compile(r"b\d{1,2}a?")
_SPLIT_NAMES = {"train": "train", "training": "train", "val": "valid", "valid": "valid", "validation": "valid"}
_SPLIT_NAMES |= {"dev": "valid", "test": "test", "testing": "test"}

_SEPARATORS = re.compile(r"([_\-. ]+)")
_NUMBER = re.compile(r"[A-Za-z]{0,3}\d+")
_DATE = re.compile(r"(?<!\d)(?:19|20)\d\d([-_.]?)(?:0[1-9]|1[0-2])\1(?:0[1-9]|[12]\d|3[01])(T\d{6})?(?!\d)")
_MAX_SENSORS = 12  # values of a part of the names that may be names of sensors
_SHARED = 0.5  # fraction of names that two groups must share to be rasters of the same patches
_FOLDER_FIELDS = ("site", "area", "group", "set")
_GRID_FIELDS = (("tile",), ("x", "y"), ("x", "y", "z"))

Look = Callable[[str], tuple[Hashable, Hashable] | None]
"""Function that returns the content of a file, such as its bands, and its resolution; see ``group_files``."""


@dataclass(frozen=True)
class FileGroup:
    """Files of one sensor or label, whose names have the same form.

    Attributes:
        paths: paths relative to the source folder, sorted.
        parts: parts of each path, folder by folder: text that all files share, or a variable part.
        extension: extension with its dot.
        words: words of the names that say what the files are, in lower case, such as ``label`` or ``rgb``.
    """

    paths: tuple[str, ...]
    parts: tuple[tuple[_Part, ...], ...]
    extension: str
    words: tuple[str, ...]

    @property
    def is_label(self) -> bool:
        """Whether a word says that these are labels."""
        return not LABEL_WORDS.isdisjoint(self.words)

    @property
    def example(self) -> str:
        """Path of the first file."""
        return self.paths[0]


@dataclass(frozen=True)
class _Part:
    """Text that is the same in all names, or, if ``text`` is None, one value of each file."""

    text: str | None
    values: tuple[str, ...] = ()


@dataclass(frozen=True)
class NamedGroup:
    """Files of one sensor or label, with the pattern of their names.

    Attributes:
        group: the files.
        pattern: pattern of their paths, see ``file_patterns``.
        fields: value of each field of the pattern for each file.
        matched: number of files with the key of a file of the first group.
    """

    group: FileGroup
    pattern: str
    fields: dict[str, tuple[str, ...]]
    matched: int


@dataclass(frozen=True)
class NameLayout:
    """Patterns of the names of all groups.

    Attributes:
        groups: the groups; the first is the reference that the others are compared with.
        key: template of the key; empty if all fields make the key.
        date_format: format of the field ``date``; empty without dates.
        repeated: whether files of the first group have the same key, so that the key is not unique.
        series: positions of the groups that have several dates of a key.
    """

    groups: tuple[NamedGroup, ...]
    key: str = ""
    date_format: str = ""
    repeated: bool = False
    series: frozenset[int] = field(default_factory=frozenset)


def split_value(name: str) -> str | None:
    """``train``, ``valid`` or ``test`` for the name of a folder that says so; None for others."""
    return _SPLIT_NAMES.get(name.lower())


def group_files(paths: Sequence[str], look: Look) -> list[FileGroup]:
    """Group files by sensor and label.

    Words such as ``image`` and ``mask`` separate groups. So does a part of the names if the files of its values have
    different content, such as ``optical/1.tif`` and ``thermal/1.tif``.

    Args:
        paths: paths relative to the source folder.
        look: function that returns the content of a file, such as its bands and dtype, and its resolution; None if the
            file cannot be read. Resolutions count only if the other parts of the names are the same.

    Returns:
        The groups, those with most files first.
    """
    groups: list[FileGroup] = []
    waiting = [(group, frozenset[str]()) for group in _by_form(sorted(paths), frozenset())]
    while waiting:
        group, known = waiting.pop()
        words = _sensor_words(group, look) - known
        if words:
            waiting += [(part, known | words) for part in _by_form(group.paths, known | words)]
        else:
            groups.append(group)
    return sorted(groups, key=lambda group: (-len(group.paths), group.example))


def _by_form(paths: Sequence[str], words: frozenset[str]) -> list[FileGroup]:
    """Group paths whose names are the same but for variable parts; ``words`` are not variable."""
    forms: dict[Hashable, list[tuple[str, list[list[tuple[str, bool]]]]]] = {}
    found: dict[Hashable, tuple[str, tuple[str, ...]]] = {}
    form: Hashable
    divided: dict[str, list[tuple[str, bool]]] = {}
    for path in paths:
        *folders, name = path.split("/")
        stem, dot, ending = name.rpartition(".")
        for folder in folders:
            if folder not in divided:
                divided[folder] = _segments(folder, words, is_stem=False)
        components = [*(divided[folder] for folder in folders), _segments(stem, words, is_stem=True)]
        extension = dot + ending
        shape = tuple(tuple(text if fixed else None for text, fixed in part) for part in components)
        form = (shape, extension.lower())
        forms.setdefault(form, []).append((path, components))
        if form not in found:
            texts = [text.lower() for part in components for text, fixed in part if fixed]
            found[form] = (extension, tuple(text for text in texts if not _SEPARATORS.fullmatch(text)))
    groups = []
    for form, files in forms.items():
        columns = zip(*(components for _, components in files))
        parts = tuple(tuple(_join_column(segment) for segment in zip(*column)) for column in columns)
        extension, found_words = found[form]
        groups.append(FileGroup(tuple(path for path, _ in files), parts, extension, found_words))
    return groups


def _join_column(segment: Sequence[tuple[str, bool]]) -> _Part:
    text, fixed = segment[0]
    return _Part(text) if fixed else _Part(None, tuple(value for value, _ in segment))


def _segments(text: str, words: frozenset[str], *, is_stem: bool) -> list[tuple[str, bool]]:
    """Divide a folder or file name into words, with their separators, and variable parts between them.

    In file names, only the first and the last token can be words.

    Returns:
        Texts in order, and whether each is fixed.
    """
    if text.lower() in words or _is_role(text):
        return [(text, True)]
    tokens = _SEPARATORS.split(text)
    places = {0, len(tokens) - 1} if is_stem else set(range(0, len(tokens), 2))
    roles = {place for place in places if _is_role(tokens[place]) or (is_stem and tokens[place].lower() in words)}
    if not roles:
        return [(text, False)]
    segments: list[tuple[str, bool]] = []
    for index, token in enumerate(tokens):
        fixed = index in roles
        if segments and not fixed and not segments[-1][1]:
            segments[-1] = (segments[-1][0] + token, False)
        else:
            segments.append((token, fixed))
    return list(_free_separators(segments))


def _free_separators(segments: list[tuple[str, bool]]) -> Iterator[tuple[str, bool]]:
    """Make separators beside words fixed segments."""
    for text, fixed in segments:
        if fixed or not text:
            yield from [(text, fixed)] if text else []
            continue
        inner = text.strip("_-. ")
        start = text.index(inner) if inner else len(text)
        yield from [(text[:start], True)] if start else []
        yield from [(inner, False)] if inner else []
        yield from [(text[start + len(inner) :], True)] if text[start + len(inner) :] else []


def _is_role(token: str) -> bool:
    return token.lower() in LABEL_WORDS or token.lower() in IMAGE_WORDS


def _sensor_words(group: FileGroup, look: Look) -> frozenset[str]:
    """Values of a part of the names that separate sensors; empty if no part does."""
    count = len(group.paths)
    for remove, values in _candidates(group):
        distinct = sorted(set(values))
        if not 2 <= len(distinct) <= _MAX_SENSORS:
            continue
        if any(value.isdigit() or _DATE.fullmatch(value) or split_value(value) for value in distinct):
            continue
        rests: dict[str, set[str]] = {}
        for path, value in zip(group.paths, values):
            rests.setdefault(remove(path), set()).add(value)
        repeated = sum(len(found) for found in rests.values() if len(found) > 1)
        is_shared = repeated >= _SHARED * count
        lower = frozenset(value.lower() for value in distinct)
        if is_shared and all(value in _BAND_WORDS or _BAND_NAME.fullmatch(value) for value in lower):
            return lower
        if count < 2 * len(distinct):  # single files are no sensors
            continue
        first = {value: path for path, value in zip(reversed(group.paths), reversed(values))}
        looks = [found for path in first.values() if (found := look(path)) is not None]
        contents = {content for content, _ in looks}
        # One site may have other bands than the rest: unless the names are shared, every value needs its own content.
        if len(set(looks)) > 1 if is_shared else len(contents) == len(looks) > 1:
            return lower
    return frozenset()


def _candidates(group: FileGroup) -> Iterator[tuple[Callable[[str], str], tuple[str, ...]]]:
    """Parts of the names that may name sensors: a function that removes the part from a path, and its values."""
    for index, parts in enumerate(group.parts[:-1]):
        if len(parts) == 1 and parts[0].text is None:

            def without_folder(path: str, index: int = index) -> str:
                return "/".join(name for place, name in enumerate(path.split("/")) if place != index)

            yield without_folder, parts[0].values
    stems = [path.rpartition("/")[2].rpartition(".")[0] for path in group.paths]
    for position in (-1, 0):

        def without_token(path: str, position: int = position) -> str:
            folder, _, name = path.rpartition("/")
            tokens = _SEPARATORS.split(name.rpartition(".")[0])
            tokens[position] = ""
            return f"{folder}/{''.join(tokens)}"

        yield without_token, tuple(_SEPARATORS.split(stem)[position] for stem in stems)


# Patterns ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _Slot:
    """A variable part of the names of a group.

    Attributes:
        values: value of each file.
        in_folder: whether the part is in the name of a folder.
        place: position among the slots of the folders, or of the file name.
    """

    values: tuple[str, ...]
    in_folder: bool
    place: int

    @cached_property
    def distinct(self) -> frozenset[str]:
        """Values without repetitions."""
        return frozenset(self.values)

    @cached_property
    def date_format(self) -> str:
        """Format of the values if all are dates, else an empty text."""
        formats = {_date_format(value) for value in self.distinct}
        return formats.pop() if len(formats) == 1 else ""


_Pieces = list["str | _Slot"]
"""A pattern as literal texts and slots; ``/`` is a literal."""


def _date_format(text: str) -> str:
    match = _DATE.fullmatch(text)
    if match is None:
        return ""
    form = "%Y{0}%m{0}%d".format(match[1]) + ("T%H%M%S" if match[2] else "")
    try:
        datetime.datetime.strptime(text, form)
    except ValueError:
        return ""
    return form


def find_layout(groups: Sequence[FileGroup]) -> NameLayout:
    """Find patterns under which files of the same patch get the same key.

    Args:
        groups: groups of files; the first is the reference, whose variable parts become fields.
    """
    ways = [list(_strategies(group)) for group in groups]
    best: NameLayout | None = None
    # A division in which nothing varies has no advantage over the whole name.
    references = [pieces for pieces in ways[0] if any(len(slot.distinct) > 1 for slot in _slots(pieces))]
    for reference in references or ways[0][-1:]:
        layout = _layout(groups, ways, reference)
        if layout is not None and (best is None or _quality(layout) > _quality(best)):
            best = layout
            if _quality(best) == (True, sum(len(group.paths) for group in groups)):
                break
    assert best is not None  # the whole name is always a field
    return best


def _quality(layout: NameLayout) -> tuple[bool, int]:
    return not layout.repeated, sum(group.matched for group in layout.groups)


def _strategies(group: FileGroup) -> Iterator[_Pieces]:
    """Ways to divide the names of a group into slots, the most detailed first."""
    for divide in (_divide_tokens, _divide_dates, _keep_whole):
        pieces: _Pieces = []
        folder_place = 0
        regular = True
        for index, parts in enumerate(group.parts):
            in_folder = index < len(group.parts) - 1
            pieces += ["/"] if index else []
            stem_place = 0
            for part in parts:
                if part.text is not None:
                    pieces.append(part.text)
                elif in_folder:
                    pieces.append(_Slot(part.values, True, folder_place))
                    folder_place += 1
                else:
                    columns = divide(part.values)
                    if columns is None:
                        regular = False
                        break
                    for column in columns:
                        if isinstance(column, str):
                            pieces.append(column)
                        else:
                            pieces.append(_Slot(column, False, stem_place))
                            stem_place += 1
        if regular:
            yield [*pieces, group.extension]


_Columns = list["str | tuple[str, ...]"]


def _divide_tokens(values: tuple[str, ...]) -> _Columns | None:
    """Columns of tokens if all names have the same separators; None otherwise."""
    rows = [_tokens_with_dates(value) for value in values]
    if len({len(row) for row in rows}) != 1 or len({tuple(row[1::2]) for row in rows}) != 1 or len(rows[0]) == 1:
        return None
    columns: _Columns = []
    free = []  # columns that vary, without dates
    for index, column in enumerate(zip(*rows)):
        if index % 2:
            columns.append(column[0])
            continue
        columns.append(column)
        distinct = set(column)
        if len(distinct) > 1 and not all(map(_date_format, distinct)):
            free.append(distinct)
    words = [distinct for distinct in free if not all(map(_NUMBER.fullmatch, distinct))]
    if len(free) - len(words) > len(_GRID_FIELDS) or len(words) > 1:
        return None
    return columns


def _tokens_with_dates(value: str) -> list[str]:
    """Tokens and separators in turn; a date is one token."""
    if _DATE.search(value) is None:
        return _SEPARATORS.split(value)
    tokens: list[str] = []
    position = 0
    for match in [*_DATE.finditer(value), None]:
        end = len(value) if match is None else match.start()
        between = _SEPARATORS.split(value[position:end])
        if tokens and between and between[0] == "" and len(between) > 1:
            tokens += between[1:]
        elif tokens:
            tokens[-1] += between[0]
            tokens += between[1:]
        else:
            tokens = between
        if match is not None:
            tokens[-1] += match[0]
            position = match.end()
    return tokens


def _divide_dates(values: tuple[str, ...]) -> _Columns | None:
    """Columns before, of and after the date if every name has one date; None otherwise."""
    matches = [list(_DATE.finditer(value)) for value in values]
    if any(len(match) != 1 for match in matches):
        return None
    heads = tuple(value[: match[0].start()] for value, match in zip(values, matches))
    tails = tuple(value[match[0].end() :] for value, match in zip(values, matches))
    columns: _Columns = []
    for texts, strip_left in ((heads, False), (tails, True)):
        if strip_left:
            columns.append(tuple(match[0][0] for match in matches))
        if not any(texts):
            continue
        if not all(texts):
            return None
        separators = {(text[0] if strip_left else text[-1]) for text in texts}
        separator = separators.pop() if len(separators) == 1 else ""
        if not _SEPARATORS.fullmatch(separator):
            return None
        inner = tuple(text[1:] if strip_left else text[:-1] for text in texts)
        columns += [separator, inner] if strip_left else [inner, separator]
    return columns


def _keep_whole(values: tuple[str, ...]) -> _Columns | None:
    return [values]


def _slots(pieces: _Pieces) -> list[_Slot]:
    return [piece for piece in pieces if isinstance(piece, _Slot)]


def _layout(groups: Sequence[FileGroup], ways: Sequence[Sequence[_Pieces]], reference: _Pieces) -> NameLayout | None:
    """Layout for one division of the names of the reference; None if its pattern does not give its parts back.

    Args:
        groups: groups of files, the reference first.
        ways: divisions of the names of each group.
        reference: division of the names of the reference.
    """
    names = _name_slots(reference, len(groups[0].paths))
    fields = {name: slot for slot, name in names.items()}
    first = _named(groups[0], reference, names, matched=len(groups[0].paths))
    if first is None:
        return None
    date_format = fields["date"].date_format if "date" in fields else ""
    named = [first]
    for group, divisions in zip(groups[1:], ways[1:], strict=True):
        options = []
        for pieces in divisions:
            matches = _match_slots(pieces, fields, date_format)
            shared = [name for name in first.fields if name in matches.values() and name != "date"]
            option = _named(group, pieces, matches, matched=0)
            if option is None or not shared:
                continue
            known = set(zip(*(first.fields[name] for name in shared)))
            matched = sum(key in known for key in zip(*(option.fields[name] for name in shared)))
            options.append(replace(option, matched=matched))
        unmatched = _named(group, divisions[-1], _name_slots(divisions[-1], len(group.paths)), matched=0)
        assert unmatched is not None
        named.append(max(options, key=lambda option: option.matched, default=unmatched))
        date_format = date_format or _any_date_format(named[-1])
    return _with_key(tuple(named), date_format)


def _any_date_format(group: NamedGroup) -> str:
    return _date_format(group.fields["date"][0]) if "date" in group.fields else ""


def _name_slots(pieces: _Pieces, count: int) -> dict[_Slot, str]:
    """Name of each slot that varies in ``count`` files. If none does, the file name becomes a field."""
    names: dict[_Slot, str] = {}
    taken: dict[tuple[str, ...], str] = {}
    slots = _slots(pieces)
    varying = [slot for slot in slots if len(slot.distinct) > 1]
    if all(slot.date_format for slot in varying):
        free = [slot for slot in slots if slot not in varying]
        named = [slot for slot in free if not slot.date_format] or free
        varying += [slot for slot in named if not slot.in_folder][-1:] or named[-1:]
    count //= max((len(slot.distinct) for slot in varying if slot.date_format), default=1)  # files of one date
    grid = [
        slot
        for slot in varying
        if not slot.in_folder and not slot.date_format and all(map(_NUMBER.fullmatch, slot.distinct))
    ]
    grid_names = dict(zip(grid, _GRID_FIELDS[len(grid) - 1])) if grid else {}
    for slot in varying:
        if slot.values in taken:
            names[slot] = taken[slot.values]
            continue
        if slot.date_format and "date" not in names.values():
            name = "date"
        elif slot in grid_names:
            name = grid_names[slot]
        elif slot.in_folder and all(split_value(value) for value in slot.distinct):
            name = "part"
        elif slot.in_folder and len(slot.distinct) > count / 2 and len(slot.distinct) > 2:
            name = "patch"
        elif slot.in_folder or 2 * len(slot.distinct) <= count:
            name = next((name for name in _FOLDER_FIELDS if name not in names.values()), "level")
        else:
            name = "tile"
        while name in names.values():
            name += "_2"
        names[slot] = taken[slot.values] = name
    return names


def _match_slots(pieces: _Pieces, fields: Mapping[str, _Slot], date_format: str) -> dict[_Slot, str]:
    """Field of the reference for each slot that has mostly values of it; dates are always the date."""
    slots = _slots(pieces)
    names: dict[_Slot, str] = {}
    for name, wanted in fields.items():
        if name == "date":
            continue
        free = [slot for slot in slots if slot not in names]
        fitting = [slot for slot in free if len(slot.distinct & wanted.distinct) >= _SHARED * len(slot.distinct)]
        fitting.sort(key=lambda slot: (slot.in_folder, slot.place) != (wanted.in_folder, wanted.place))
        if fitting:
            names[fitting[0]] = name
    values = {slot.values: name for slot, name in names.items()}
    for slot in slots:
        if slot in names:
            continue
        if slot.values in values and len(slot.distinct) > 1:
            names[slot] = values[slot.values]
        elif slot.date_format and (not date_format or slot.date_format == date_format) and "date" not in names.values():
            names[slot] = "date"
    return names


def _named(group: FileGroup, pieces: _Pieces, names: Mapping[_Slot, str], *, matched: int) -> NamedGroup | None:
    """The group with its pattern; None if the pattern does not give the slots back."""
    text = ""
    fields: dict[str, tuple[str, ...]] = {}
    for piece in pieces:
        if isinstance(piece, str):
            text += _literal(piece)
        elif piece in names:
            text += f"{{{names[piece]}}}"
            fields.setdefault(names[piece], piece.values)
        elif len(piece.distinct) == 1:
            text += _literal(piece.values[0])
        else:
            text += "*"
    text = re.sub(r"\*(?:[^/{}A-Za-z0-9]*\*)+", "*", text)
    pattern = FilePattern(text)
    for row, path in enumerate(group.paths):
        if pattern.match(path) != {name: values[row] for name, values in fields.items()}:
            return None
    return NamedGroup(group, text, fields, matched)


def _literal(text: str) -> str:
    """Text of a pattern that matches ``text``; ``*`` stands for characters that patterns or UTF-8 do not have."""
    return re.sub("[{}*\ud800-\udfff]+", "*", text)


def _with_key(named: tuple[NamedGroup, ...], date_format: str) -> NameLayout:
    """Choose the fields that make the key, and the groups with several dates of a key."""
    first = named[0]
    own = [name for name in first.fields if name != "date"]
    paired = [group for group in named[1:] if group.matched >= _SHARED * len(group.group.paths)]
    shared = [name for name in own if all(name in group.fields for group in paired)]
    has_more = any(set(group.fields) - {"date"} != set(shared) for group in (first, *paired))
    key = "_".join(f"{{{name}}}" for name in shared) if has_more and shared else ""
    series = set()
    repeated = False
    for index, group in enumerate(named):
        names = shared if group is first or group in paired else [name for name in group.fields if name != "date"]
        keys = list(zip(*(group.fields[name] for name in names))) or [()] * len(group.group.paths)
        if len(set(keys)) < len(keys):
            dated = list(zip(keys, group.fields.get("date", [""] * len(keys))))
            if "date" in group.fields and len(set(dated)) == len(dated):
                series.add(index)
            else:
                repeated = True
    return NameLayout(named, key, date_format, repeated, frozenset(series))
