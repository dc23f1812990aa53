"""Which patch goes into which shard, slices, claims, and folders of other plans."""

import json
import multiprocessing
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from small_shards import SMALL, contents, small
from small_tree import write_tree

from bocage.shards.errors import InputError
from bocage.shards.format.manifest import Manifest
from bocage.shards.locks import FileLock
from bocage.shards.source.catalogue import Catalogue
from bocage.shards.write.plan import cut, order_rows
from bocage.shards.write.writer import Sharding, write_shards


@pytest.fixture(scope="module")
def domains(tmp_path_factory: pytest.TempPathFactory) -> Catalogue:
    """30 patches of one domain in five ROIs of 2, 3, 4, 9 and 12, and ten of another in one ROI; empty files."""
    root = tmp_path_factory.mktemp("domains")
    for domain, roi, count in (
        *(("D012-2019", f"AF-S1-{number}", count) for number, count in enumerate((2, 3, 4, 9, 12), start=1)),
        ("D031-2019", "UF-S1-1", 10),
    ):
        folder = root / f"{domain}_SPOT_RGBI" / roi
        folder.mkdir(parents=True)
        for column in range(count):
            (folder / f"{domain}_SPOT_RGBI_{roi}_0-{column}.tif").touch()
    return Catalogue.open(root)


def test_stratified_order_gives_every_beginning_its_share_of_domains(domains: Catalogue) -> None:
    rows = order_rows(domains, "stratified", 0)
    assert sorted(rows) == list(range(40))
    second = domains.places()[0][rows] == domains.places()[0][-1]
    for count in range(1, 41):
        assert abs(second[:count].sum() - count / 4) <= 1
    assert not np.array_equal(rows, order_rows(domains, "stratified", 1))
    assert np.array_equal(rows, order_rows(domains, "stratified", 0))


@pytest.mark.parametrize("size", [1, 4, 5, 10, 13, 40, 100])
def test_roi_order_cuts_only_rois_that_are_larger_than_a_shard(domains: Catalogue, size: int) -> None:
    rows = order_rows(domains, "roi", 0)
    bounds = cut(domains, rows, "roi", size)
    assert (bounds[0], bounds[-1]) == (0, 40)
    assert (np.diff(bounds) > 0).all() and (np.diff(bounds) <= size).all()
    rois = domains.places()[1][rows]
    for roi in np.unique(rois):
        (places,) = np.nonzero(rois == roi)
        holding = np.unique(np.searchsorted(bounds, places, side="right"))
        if len(places) <= size:
            assert len(holding) == 1


def test_slices_write_disjoint_shards_and_merge_to_the_same_bytes(tmp_path: Path) -> None:
    catalogue = small(tmp_path)
    write_shards(catalogue, tmp_path / "whole", samples_per_shard=1)
    sharding = Sharding(catalogue, tmp_path / "out", samples_per_shard=1)
    with pytest.raises(InputError, match="no slice was written here"):
        sharding.merge()
    assert [sharding.write_slice(number, 4) for number in (4, 1)] == [range(4, 6), range(1)]
    with pytest.raises(InputError, match=r"3 of 6 shards are not written yet: 1-3, in slices 2-3 of 4; run these"):
        sharding.merge()
    with pytest.raises(InputError, match="not finished"):
        Manifest.open(tmp_path / "out")
    written = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("*.tar")}
    assert [sharding.write_slice(number, 4) for number in (2, 3, 4)] == [range(1, 3), range(3, 4), range(4, 6)]
    merged = sharding.merge()
    assert len(merged) == 6
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    assert written.items() <= {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("*.tar")}.items()
    assert len(sharding.merge()) == 6
    with pytest.raises(InputError, match="is complete"):
        sharding.write_slice(1, 4)


def test_more_slices_than_shards_leave_some_empty(tmp_path: Path) -> None:
    sharding = Sharding(small(tmp_path, patches=2), tmp_path / "out", samples_per_shard=1)
    assert [len(sharding.write_slice(number, 5)) for number in range(1, 6)] == [0, 0, 1, 0, 1]
    assert len(sharding.merge()) == 2


def test_unreadable_patches_of_all_slices_count_together(tmp_path: Path) -> None:
    catalogue = small(tmp_path)
    for path in [*(tmp_path / "tree").glob("*SPOT_RGBI/*/*.tif")][:2]:
        path.write_bytes(b"")
    sharding = Sharding(catalogue, tmp_path / "out", samples_per_shard=1)
    for number in range(1, 7):
        sharding.write_slice(number, 6)
    with pytest.raises(InputError, match="2 patches cannot be read where 1 are tolerated"):
        sharding.merge()


def test_a_tree_of_unreadable_patches_is_named_before_anything_is_written(domains: Catalogue, tmp_path: Path) -> None:
    with pytest.raises(
        InputError, match=r"^none of the 8 patches that were tried can be read, e\.g\. .*: it is empty$"
    ):
        write_shards(domains, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def _hold(path: Path, shards: range, held: Any) -> None:
    with FileLock(path, shards, path.parent.parent):
        held.set()
        time.sleep(300)


# A process starts. It is killed in the end, as by a scheduler: its claim must not outlive it.
def test_two_runs_of_the_same_shards_refuse_each_other(tmp_path: Path) -> None:
    catalogue = small(tmp_path)
    sharding = Sharding(catalogue, tmp_path / "out", samples_per_shard=1)
    sharding.write_slice(1, 6)
    context = multiprocessing.get_context("spawn")
    held = context.Event()
    holder = context.Process(target=_hold, args=(tmp_path / "out" / "parts" / "claims", range(4, 6), held))
    holder.start()
    try:
        assert held.wait(60)
        for refused in (sharding.write, sharding.merge, lambda: sharding.write_slice(3, 3)):
            with pytest.raises(InputError, match=f"{tmp_path / 'out'}: another run is writing there"):
                refused()
        assert sharding.write_slice(2, 3) == range(2, 4)
    finally:
        holder.kill()
        holder.join(60)
    assert len(sharding.write()) == 6


def test_a_folder_begun_with_other_libraries_or_formats_is_not_gone_on_with(tmp_path: Path) -> None:
    sharding = Sharding(small(tmp_path, patches=2), tmp_path / "out", samples_per_shard=1)
    sharding.write_slice(1, 2)
    path = tmp_path / "out" / "parts" / "plan.json"
    recorded = json.loads(path.read_text())
    for change, sentence in (
        ({"libraries": recorded["plan"]["libraries"] | {"pcodec": "0.0.1"}}, r"begun with pcodec 0\.0\.1 \(here "),
        ({"format": 1}, "begun in format 1 of shards, but this bocage writes 2"),
        ({"codecs": {"SPOT_RGBI": "plain"}}, r"another plan \(other: the encoding of SPOT_RGBI\)"),
        ({"seed": 3, "catalogue": ""}, r"another plan \(other: seed, the patches or modalities\)"),
    ):
        path.write_text(json.dumps(recorded | {"plan": recorded["plan"] | change}))
        with pytest.raises(InputError, match=sentence):
            sharding.write()
    path.write_text("[")
    with pytest.raises(InputError, match="cannot be read"):
        sharding.write()


def test_estimate_tells_what_a_run_will_do_and_writes_nothing(tmp_path: Path) -> None:
    keys = [f"D012-2019_AF-S1-27_{row}-{column}" for row in range(5) for column in range(8)]
    catalogue = Catalogue.open(write_tree(tmp_path / "tree", keys, SMALL))
    sharding = Sharding(catalogue, tmp_path / "out", shard_bytes=1_500_000)
    estimate = sharding.estimate()
    assert not (tmp_path / "out").exists()
    assert (estimate.patches, estimate.waiting) == (40, 40)
    assert estimate.seconds > 0
    sharding.write_slice(1, 2)
    before = contents(tmp_path / "out")
    half = sharding.estimate()
    assert half.shards == estimate.shards
    assert 0 < half.waiting < 40
    assert contents(tmp_path / "out") == before
    manifest = sharding.write()
    assert manifest.shard_count == estimate.shards
    assert estimate.bytes == pytest.approx(sum(shard.bytes for shard in manifest.shards), rel=0.1)
    assert sharding.estimate().waiting == 0
