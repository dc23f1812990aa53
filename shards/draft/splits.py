"""Propose domains, ground blocks and splits for the draft of a description."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

from bocage.shards.draft.names import split_value
from bocage.shards.draft.yaml import Draft
from bocage.shards.errors import counted
from bocage.shards.source.described.file_patterns import plain_name

FRACTIONS = {"train": 0.7, "valid": 0.15, "test": 0.15}
_MAX_DOMAINS = 100
_FEW_DOMAINS = 10  # below, sites are listed; from here on, fractions of them are drawn
_BLOCKS = 20  # blocks that a division needs, to have some in each part
_MAX_SHOWN = 6
_NEIGHBOURS = "a split keeps the patches of a block together"


def propose_splits(
    draft: Draft,
    fields: dict[str, tuple[str, ...]],
    labelled: Sequence[bool],
    centres: Sequence[tuple[float, float]] | None,
    block_sides: Sequence[float],
) -> dict[str, Any]:
    """Add domain, region and blocks to a draft, and propose splits.

    Args:
        draft: the draft; its values and comments are changed.
        fields: value of each field of the file names for each image.
        labelled: whether each image has a label.
        centres: ground coordinates of a sample of the images, in metres; None if the files have no position.
        block_sides: sides of ground blocks that suit the dataset, in metres, the best first.

    Returns:
        The key ``splits``.
    """
    sites = fields.get("site")
    counts = Counter(sites or ())
    has_domains = sites is not None and 1 < len(counts) <= _MAX_DOMAINS
    if has_domains:
        draft.values["domain"] = "{site}"
        draft.comments[("domain",)] = _shown(counts)
    elif len(counts) > _MAX_DOMAINS:
        draft.values["region"] = "{site}"
        draft.comments[("region",)] = counted(len(counts), "site")
    splits: dict[str, Any] = {}
    if "part" in fields:
        return {"split_given": _given_split(draft, sorted(set(fields["part"])))}
    if has_domains:
        splits["split_site"] = _site_split(draft, sites or (), labelled)
    by = "region"
    if "region" not in draft.values:
        if centres is not None:
            draft.values["blocks"] = _block_side(centres, block_sides)
            draft.comments[("blocks",)] = f"metres; {_NEIGHBOURS}"
        elif not has_domains:
            by = "key"
    if by == "key" or centres is not None or "region" in draft.values:
        name = {"key": "split_random", "region": "split_blocks" if centres is not None else "split_regions"}[by]
        splits[name] = {"by": by, **FRACTIONS}
        if by == "key":
            splits[name]["allow_mixed_regions"] = True
            draft.comments[("splits", name)] = (
                "random, because the files have no position: scores are too high if images are neighbours"
            )
    return splits


def _shown(counts: Counter[str]) -> str:
    shown = [f"{name} {count}" for name, count in counts.most_common(_MAX_SHOWN)]
    return ", ".join(shown) + (", ..." if len(counts) > _MAX_SHOWN else "")


def _given_split(draft: Draft, parts: Sequence[str]) -> dict[str, Any]:
    """Split by the folders ``train``, ``val`` and ``test``."""
    split: dict[str, Any] = {"by": "part"}
    for value in ("train", "valid", "test"):
        if names := [part for part in parts if split_value(part) == value]:
            split[value] = names
    missing = [value for value in ("train", "valid", "test") if value not in split]
    split["allow_mixed_regions"] = True
    comment = "the folders of the source; neighbours may be in two of them"
    if missing:
        comment += f"; there is no {' and no '.join(missing)}"
    draft.comments[("splits", "split_given")] = comment
    return split


def _site_split(draft: Draft, sites: Sequence[str], labelled: Sequence[bool]) -> dict[str, Any]:
    """Split by site: fractions of many sites; of a few, the largest is for training, the smallest for validation."""
    counts = Counter(sites)
    if len(counts) >= _FEW_DOMAINS:
        return {"by": "domain", **FRACTIONS}
    with_labels = Counter(site for site, is_labelled in zip(sites, labelled, strict=True) if is_labelled)
    scored = [site for site, _ in (with_labels or counts).most_common()]
    train = [site for site in counts if site not in scored]
    train.append(scored[0])
    test, valid = scored[1:2], scored[-1:] if len(scored) > 2 else []
    train += [site for site in scored[2:] if site not in valid]
    split: dict[str, Any] = {"by": "domain", "train": sorted(map(plain_name, train))}
    for value, part in (("valid", valid), ("test", test)):
        if part:
            split[value] = list(map(plain_name, part))
    if not test:
        draft.comments[("splits", "split_site")] = "labels are of one site only"
    elif not valid:
        draft.comments[("splits", "split_site")] = "two sites leave none for validation"
    return split


def _block_side(centres: Sequence[tuple[float, float]], sides: Sequence[float]) -> float:
    """The best side with which a division has some blocks in each part."""
    for side in sides:
        if len({(math.floor(x / side), math.floor(y / side)) for x, y in centres}) >= _BLOCKS:
            return side
    return sides[-1]


def round_blocks(metres: float) -> float:
    """The nearest of 1, 2, 2.5 and 5 times a power of ten."""
    power = 10.0 ** math.floor(math.log10(metres))
    steps = [factor * power for factor in (1.0, 2.0, 2.5, 5.0, 10.0)]
    return float(f"{min(steps, key=lambda step: abs(math.log(step / metres))):.6g}")
