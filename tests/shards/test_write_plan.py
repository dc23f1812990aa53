"""Planning of shards: orders, slices, locks, recorded plans and the estimate."""

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
from bocage.shards.source.flair_hub.tree import FlairHubCatalogue
from bocage.shards.write.plan import order_rows, shard_bounds
from bocage.shards.write.writer import DatasetWriter, write_shards


@pytest.fixture(scope="module")
def domains(tmp_path_factory: pytest.TempPathFactory) -> FlairHubCatalogue:
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
    return FlairHubCatalogue.open(root)


def test_every_prefix_of_the_stratified_order_has_proportional_domains(domains: FlairHubCatalogue) -> None:
    rows = order_rows(domains, "stratified", 0)
    assert sorted(rows) == list(range(40))
    second = domains.domain_and_roi_ids()[0][rows] == domains.domain_and_roi_ids()[0][-1]
    for count in range(1, 41):
        assert abs(second[:count].sum() - count / 4) <= 1
    assert not np.array_equal(rows, order_rows(domains, "stratified", 1))
    assert np.array_equal(rows, order_rows(domains, "stratified", 0))


@pytest.mark.parametrize("size", [1, 4, 5, 10, 13, 40, 100])
def test_roi_order_splits_only_rois_larger_than_a_shard(domains: FlairHubCatalogue, size: int) -> None:
    rows = order_rows(domains, "roi", 0)
    bounds = shard_bounds(domains, rows, "roi", size)
    assert (bounds[0], bounds[-1]) == (0, 40)
    assert (np.diff(bounds) > 0).all() and (np.diff(bounds) <= size).all()
    rois = domains.domain_and_roi_ids()[1][rows]
    for roi in np.unique(rois):
        (positions,) = np.nonzero(rois == roi)
        roi_shards = np.unique(np.searchsorted(bounds, positions, side="right"))
        if len(positions) <= size:
            assert len(roi_shards) == 1


def test_slices_write_disjoint_shards_and_merge_to_the_same_bytes(tmp_path: Path) -> None:
    catalogue = small(tmp_path)
    write_shards(catalogue, tmp_path / "whole", samples_per_shard=1)
    writer = DatasetWriter(catalogue, tmp_path / "out", samples_per_shard=1)
    with pytest.raises(InputError, match="holds no slices to merge"):
        writer.merge()
    assert [writer.write_slice(number, 4) for number in (4, 1)] == [range(4, 6), range(1)]
    with pytest.raises(InputError, match=r"3 of 6 shards not written yet: 1-3, in slices 2-3 of 4; run these"):
        writer.merge()
    with pytest.raises(InputError, match="not finished"):
        Manifest.open(tmp_path / "out")
    written = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("*.tar")}
    assert [writer.write_slice(number, 4) for number in (2, 3, 4)] == [range(1, 3), range(3, 4), range(4, 6)]
    merged = writer.merge()
    assert len(merged) == 6
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    assert written.items() <= {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("*.tar")}.items()
    assert len(writer.merge()) == 6
    with pytest.raises(InputError, match="is complete"):
        writer.write_slice(1, 4)


def test_more_slices_than_shards_leave_some_empty(tmp_path: Path) -> None:
    writer = DatasetWriter(small(tmp_path, patches=2), tmp_path / "out", samples_per_shard=1)
    assert [len(writer.write_slice(number, 5)) for number in range(1, 6)] == [0, 0, 1, 0, 1]
    assert len(writer.merge()) == 2


def test_unreadable_patches_of_all_slices_count_together(tmp_path: Path) -> None:
    catalogue = small(tmp_path)
    for path in [*(tmp_path / "tree").glob("*SPOT_RGBI/*/*.tif")][:2]:
        path.write_bytes(b"")
    writer = DatasetWriter(catalogue, tmp_path / "out", samples_per_shard=1)
    for number in range(1, 7):
        writer.write_slice(number, 6)
    with pytest.raises(InputError, match="2 unreadable patches, but --max-bad allows 1"):
        writer.merge()


def test_a_tree_of_unreadable_patches_is_rejected_before_writing(domains: FlairHubCatalogue, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"^none of 8 sampled patches can be read, e\.g\. .*: it is empty$"):
        write_shards(domains, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def _hold_lock(path: Path, shards: range, locked: Any) -> None:
    with FileLock(path, shards, path.parent.parent):
        locked.set()
        time.sleep(300)


# A process starts and is killed at the end, as a scheduler does: its lock must end with it.
def test_two_runs_cannot_write_the_same_shards(tmp_path: Path) -> None:
    catalogue = small(tmp_path)
    writer = DatasetWriter(catalogue, tmp_path / "out", samples_per_shard=1)
    writer.write_slice(1, 6)
    context = multiprocessing.get_context("spawn")
    locked = context.Event()
    holder = context.Process(target=_hold_lock, args=(tmp_path / "out" / "parts" / "lock", range(4, 6), locked))
    holder.start()
    try:
        assert locked.wait(60)
        for call in (writer.write, writer.merge, lambda: writer.write_slice(3, 3)):
            with pytest.raises(InputError, match=f"{tmp_path / 'out'}: another run is writing there"):
                call()
        assert writer.write_slice(2, 3) == range(2, 4)
    finally:
        holder.kill()
        holder.join(60)
    assert len(writer.write()) == 6


def test_a_folder_of_other_libraries_formats_or_settings_is_rejected(tmp_path: Path) -> None:
    writer = DatasetWriter(small(tmp_path, patches=2), tmp_path / "out", samples_per_shard=1)
    writer.write_slice(1, 2)
    path = tmp_path / "out" / "parts" / "plan.json"
    recorded = json.loads(path.read_text())
    for change, message in (
        ({"libraries": recorded["plan"]["libraries"] | {"pcodec": "0.0.1"}}, r"started with pcodec 0\.0\.1 \(here "),
        ({"format": 1}, "started in shard format 1, but this bocage writes format 3"),
        ({"codecs": {"SPOT_RGBI": "plain"}}, r"another plan \(different: the encoding of SPOT_RGBI\)"),
        ({"seed": 3, "catalogue": ""}, r"another plan \(different: seed, the patches or modalities\)"),
    ):
        path.write_text(json.dumps(recorded | {"plan": recorded["plan"] | change}))
        with pytest.raises(InputError, match=message):
            writer.write()
    path.write_text("[")
    with pytest.raises(InputError, match="cannot be read"):
        writer.write()


def test_the_estimate_matches_the_run_and_writes_nothing(tmp_path: Path) -> None:
    keys = [f"D012-2019_AF-S1-27_{row}-{column}" for row in range(5) for column in range(8)]
    catalogue = FlairHubCatalogue.open(write_tree(tmp_path / "tree", keys, SMALL))
    writer = DatasetWriter(catalogue, tmp_path / "out", shard_bytes=1_500_000)
    estimate = writer.estimate()
    assert not (tmp_path / "out").exists()
    assert (estimate.patches, estimate.remaining) == (40, 40)
    assert estimate.seconds > 0
    writer.write_slice(1, 2)
    before = contents(tmp_path / "out")
    half = writer.estimate()
    assert half.shards == estimate.shards
    assert 0 < half.remaining < 40
    assert contents(tmp_path / "out") == before
    manifest = writer.write()
    assert manifest.shard_count == estimate.shards
    assert estimate.bytes == pytest.approx(sum(shard.bytes for shard in manifest.shards), rel=0.1)
    assert writer.estimate().remaining == 0
