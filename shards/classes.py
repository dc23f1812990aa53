"""Class schemes of the label rasters: names, official colours, scored classes, the LPIS hierarchy, and groupings.

Names and colours follow IGN's FLAIR-HUB documentation. The parents of LPIS classes are inferred from the names, because
IGN publishes the three levels as three bands, without a table.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class ClassScheme:
    """Classes of one label band.

    Attributes:
        name: name of the scheme.
        classes: name of each class, indexed by pixel value.
        colours: colour ``rrggbb`` of each class.
        unscored: values that the rasters contain, but that neither the official mean IoU nor the loss counts
            (official loss weight 0).
        background: value of unlabelled ground, if the scheme has one.
        parents: class one level up of each class, for schemes in a hierarchy.

    Raises:
        ValueError: the number of colours or parents differs from the number of classes.
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
        """Values that the loss and the official metrics count."""
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
    """Mapping of the classes of one scheme to the classes of a coarser one.

    Attributes:
        source: scheme of the label raster.
        scheme: scheme after grouping.
        groups: class in ``scheme`` of each class in ``source``.

    Raises:
        ValueError: ``groups`` does not map each class of ``source`` to a class of ``scheme``.
    """

    source: ClassScheme
    scheme: ClassScheme
    groups: tuple[int, ...]

    def __post_init__(self) -> None:
        if len(self.groups) != len(self.source) or not set(self.groups) <= set(range(len(self.scheme))):
            raise ValueError(
                f"{self.scheme.name}: groups {self.groups} do not map the {len(self.source)} classes of "
                f"{self.source.name} to the {len(self.scheme)} of {self.scheme.name}"
            )


def _group_by_name(source: ClassScheme, scheme: ClassScheme, default: str) -> Grouping:
    """Map each class to the class of the same name, and classes without one to ``default``."""
    values = {name: value for value, name in enumerate(scheme.classes)}
    groups = tuple(values.get(name, values[default]) for name in source.classes)
    return Grouping(source=source, scheme=scheme, groups=groups)


# The 13 classes, 12 of them scored, of the challenges FLAIR #1 (arXiv 2211.12979) and FLAIR #2 (arXiv 2305.14467):
# greenhouses, swimming pools, snow, clear cuts, ligneous, mixed and undefined ground are "other".
GROUPINGS = {"flair_challenge": _group_by_name(COSIA, FLAIR_CHALLENGE, "other")}
"""Groupings by name, as recipes refer to them."""

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


def _child_scheme(parent: ClassScheme, name: str, classes: str, parents: tuple[int, ...]) -> ClassScheme:
    """Scheme one level below ``parent``. Each class has its parent's colour; the last class is the background."""
    names = tuple(classes.split())
    return ClassScheme(
        name=name,
        classes=names,
        colours=tuple(parent.colours[index] for index in parents),
        background=len(names) - 1,
        parents=parents,
    )


LPIS_2 = _child_scheme(
    LPIS_1,
    "LPIS level 2",
    "grasses wheat barley maize sorghum/millet other-winter-cereals other-spring-cereals other-cereals rice "
    "hemp/tobacco flax sunflower rapeseed other-oilseed soy other-protein alfalfa other-fodder-legumes beetroots "
    "potatoes fruits+vegetables aromatic/medicinal other-arable vineyard olive fruit-orchards nut-orchards lavandin "
    "other-permanent mixed background",
    (0, 1, 2, 3, 4, 4, 4, 4, 5, 6, 6, 7, 8, 9, 10, 11, 12, 12, 13, 14, 15, 15, 15, 16, 17, 18, 19, 20, 20, 21, 22),
)

LPIS_3 = _child_scheme(
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
