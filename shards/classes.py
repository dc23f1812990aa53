"""Class schemes of the label rasters: names, official colours, scored classes, the LPIS hierarchy, and groupings.

Names and colours follow IGN's FLAIR-HUB documentation. The parent of an LPIS class is inferred from the names: IGN
publishes the three levels as three bands, never as a table.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class ClassScheme:
    """What the values of one label band mean.

    ``classes`` and ``colours`` (``rrggbb``) are indexed by the value. ``unscored`` values exist in the rasters but are
    left out of the official mean IoU and out of the loss (official loss weight 0). ``background`` is the value of
    unlabelled ground, when there is one. ``parents`` gives, for each class, its class one level up.

    Raises:
        ValueError: there are not as many colours, or parents, as classes.
    """

    name: str
    classes: tuple[str, ...]
    colours: tuple[str, ...]
    unscored: tuple[int, ...] = ()
    background: int | None = None
    parents: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        if len(self.classes) != len(self.colours):
            raise ValueError(f"{self.name}: {len(self.classes)} classes but {len(self.colours)} colours")
        if self.parents is not None and len(self.parents) != len(self.classes):
            raise ValueError(f"{self.name}: {len(self.classes)} classes but {len(self.parents)} parents")

    def __len__(self) -> int:
        return len(self.classes)

    @property
    def scored(self) -> tuple[int, ...]:
        """Values that count in the loss and in the official metrics."""
        return tuple(value for value in range(len(self.classes)) if value not in self.unscored)


COSIA = ClassScheme(
    name="COSIA",
    classes=(
        "building",
        "greenhouse",
        "swimming pool",
        "impervious",
        "pervious",
        "bare soil",
        "water",
        "snow",
        "herbaceous",
        "agricultural",
        "plowed",
        "vineyard",
        "deciduous",
        "coniferous",
        "brushwood",
        "clear cut",
        "ligneous",
        "mixed",
        "undefined",
    ),
    colours=tuple(
        (
            "db0e9a 9999ff 3de6eb f80c00 938e7b a97101 1553ae ffffff 55ff00 fff30d "
            "e4df7c 660082 46e483 194a26 f3a60d 8ab3a0 c5dc42 6b714f 000000"
        ).split()
    ),
    unscored=(15, 16, 17, 18),
)

FLAIR_CHALLENGE = ClassScheme(
    name="FLAIR challenge",
    classes=tuple(
        (
            "building/pervious/impervious/bare soil/water/coniferous/deciduous/brushwood/vineyard/herbaceous/"
            "agricultural/plowed/other"
        ).split("/")
    ),
    colours=tuple("db0e9a 938e7b f80c00 a97101 1553ae 194a26 46e483 f3a60d 660082 55ff00 fff30d e4df7c 000000".split()),
    unscored=(12,),
)


@dataclass(frozen=True, kw_only=True)
class Grouping:
    """The classes of a scheme put together into those of another.

    Attributes:
        source: the scheme of the label raster.
        scheme: the classes that take its place.
        groups: for each class of ``source``, its class in ``scheme``.

    Raises:
        ValueError: ``groups`` does not give each class of ``source`` one of ``scheme``.
    """

    source: ClassScheme
    scheme: ClassScheme
    groups: tuple[int, ...]

    def __post_init__(self) -> None:
        if len(self.groups) != len(self.source) or not set(self.groups) <= set(range(len(self.scheme))):
            raise ValueError(f"{self.scheme.name}: {len(self.groups)} groups of {len(self.source)} classes")


def _named_alike(source: ClassScheme, scheme: ClassScheme, rest: str) -> Grouping:
    """Classes of one name are one class; all others become ``rest``."""
    names = {name: value for value, name in enumerate(scheme.classes)}
    return Grouping(source=source, scheme=scheme, groups=tuple(names.get(name, names[rest]) for name in source.classes))


# The 13 classes, 12 of them scored, of the challenges FLAIR #1 (arXiv 2211.12979) and FLAIR #2 (arXiv 2305.14467):
# greenhouses, swimming pools, snow, clear cuts, ligneous, mixed and undefined ground are "other".
GROUPINGS = {"flair_challenge": _named_alike(COSIA, FLAIR_CHALLENGE, "other")}
"""By name, what the classes of a label can be grouped into."""

LPIS_1 = ClassScheme(
    name="LPIS level 1",
    classes=tuple(
        (
            "grasses wheat barley maize other-cereals rice flax/hemp/tobacco sunflower rapeseed other-oilseed soy "
            "other-protein fodder-legumes beetroots potatoes other-arable vineyard olive fruit-orchards nut-orchards "
            "other-permanent mixed background"
        ).split()
    ),
    colours=tuple(
        (
            "92d050 d7e600 e0e000 fff100 ffff00 e8e8e8 dceaf7 d29ead d29ed0 ffbe99 ffc000 ff9000 009999 808000 "
            "a7a700 89896d f2cfee 6f6633 ac8141 996633 80c1d7 000000 000000"
        ).split()
    ),
    background=22,
)


def _below(parent: ClassScheme, name: str, classes: str, parents: tuple[int, ...]) -> ClassScheme:
    """A level of the hierarchy that shows each class in its parent's colour; the last class is the background."""
    names = tuple(classes.split())
    return ClassScheme(
        name=name,
        classes=names,
        colours=tuple(parent.colours[index] for index in parents),
        background=len(names) - 1,
        parents=parents,
    )


LPIS_2 = _below(
    LPIS_1,
    "LPIS level 2",
    "grasses wheat barley maize sorghum/millet other-winter-cereals other-spring-cereals other-cereals rice "
    "hemp/tobacco flax sunflower rapeseed other-oilseed soy other-protein alfalfa other-fodder-legumes beetroots "
    "potatoes fruits+vegetables aromatic/medicinal other-arable vineyard olive fruit-orchards nut-orchards lavandin "
    "other-permanent mixed background",
    (0, 1, 2, 3, 4, 4, 4, 4, 5, 6, 6, 7, 8, 9, 10, 11, 12, 12, 13, 14, 15, 15, 15, 16, 17, 18, 19, 20, 20, 21, 22),
)

LPIS_3 = _below(
    LPIS_2,
    "LPIS level 3",
    "grasses-mono grasses-mix winter-wheat spring-wheat winter-barley spring-barley maize sorghum millet winter-durum "
    "triticale winter-oat winter-rye spring-oat other-spring-cereals other-cereals rice hemp/tobacco fiber-flax "
    "other-flax sunflower rapeseed mustard other-oilseed soy spring-peas winter-protein other-protein alfalfa clover "
    "other-fodder beetroots potatoes fruits+vegetables aromatic/medicinal buckwheat other-arable vineyard olive "
    "fruit-orchards nut-orchards lavandin berries other-permanent mixed background",
    (
        *(0, 0, 1, 1, 2, 2, 3, 4, 4, 1, 5, 5, 5, 6, 6, 7, 8, 9, 10, 10, 11, 12, 13, 13, 14, 15, 15, 15),
        *(16, 17, 17, 18, 19, 20, 21, 22, 22, 23, 24, 25, 26, 27, 28, 28, 29, 30),
    ),
)
