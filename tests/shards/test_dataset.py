"""Read shards as batches: order, resume, evaluation, damaged shards, and interoperability with webdataset."""

import json
import shutil
from collections import Counter
from collections.abc import Callable, Generator
from pathlib import Path

import numpy as np
import pytest
import rasterio
import webdataset
from hypothesis import given, settings
from hypothesis import strategies as st
from real_series import pastis_tree, treesat_tree

from bocage.shards.errors import InputError
from bocage.shards.format.codec import decode
from bocage.shards.format.manifest import Manifest
from bocage.shards.read.dataset import TrainingStream, days_since_may, evaluation_batches
from bocage.shards.read.sampler import DistributedBatchSampler, GlobalShuffle
from bocage.shards.source.flair_hub.tree import FlairHubCatalogue
from bocage.shards.write.writer import write_shards

REAL = Path(__file__).parents[1] / "data" / "flairhub_real"


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    """Three real patches, one per shard."""
    return write_shards(FlairHubCatalogue.open(REAL), tmp_path_factory.mktemp("shards") / "real", samples_per_shard=1)


def make_order(count: int, shards: int, seed: int) -> GlobalShuffle:
    rows = np.arange(count) * 3 + 1
    return GlobalShuffle(rows, np.sort(np.random.default_rng(0).integers(0, shards, 3 * count)).astype(np.int32), seed)


@settings(max_examples=50, deadline=None)
@given(count=st.integers(1, 200), shards=st.integers(1, 20), seed=st.integers(0, 2**31), epoch=st.integers(0, 1000))
def test_an_epoch_holds_every_row_once(count: int, shards: int, seed: int, epoch: int) -> None:
    order = make_order(count, shards, seed)
    assert sorted(order.epoch(epoch)) == list(np.arange(count) * 3 + 1)
    assert np.array_equal(order.epoch(epoch), make_order(count, shards, seed).epoch(epoch))


def test_epochs_and_seeds_give_different_orders_that_mix_shards() -> None:
    order = make_order(400, 20, seed=0)
    assert not np.array_equal(order.epoch(0), order.epoch(1))
    assert not np.array_equal(order.epoch(0), make_order(400, 20, seed=1).epoch(0))
    first = order.epoch(0)[:80]
    assert len(np.unique(np.searchsorted(np.arange(0, 1200, 60), first))) >= 4


@settings(max_examples=30, deadline=None)
@given(
    batch=st.integers(1, 7),
    before=st.sampled_from([1, 2, 3]),
    after=st.sampled_from([1, 2, 3, 4]),
    cut=st.integers(0, 9),
)
def test_resume_on_another_number_of_ranks_continues_the_order(batch: int, before: int, after: int, cut: int) -> None:
    order = make_order(23, 5, seed=3)

    def taken(position: int, world: int, rounds: int) -> list[tuple[int, int]]:
        ranks = [iter(DistributedBatchSampler(order, batch, position, rank, world)) for rank in range(world)]
        samples = []
        for _ in range(rounds):
            batches = [next(rank) for rank in ranks]
            samples += [batches[rank].samples[index] for index in range(batch) for rank in range(world)]
        return samples

    head = taken(0, before, cut)
    tail = taken(len(head), after, 6)
    assert head + tail == [order.at(position) for position in range(len(head) + len(tail))]


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_do_not_depend_on_workers_or_resume(real: Manifest, workers: int) -> None:
    modalities = list(real.registry.values())

    def stream(count: int) -> TrainingStream:
        return TrainingStream(real, np.arange(3), modalities, batch_size=2, window=51.2, seed=5, workers=count)

    reference = stream(0).batches(0, 0, 1)
    expected = [next(reference) for _ in range(5)]
    resumed = stream(workers).batches(4, 0, 1)
    for reference_batch in expected[2:]:
        batch = next(resumed)
        assert batch.keys == reference_batch.keys
        assert np.array_equal(batch.seeds, reference_batch.seeds)
        assert np.array_equal(batch.windows, reference_batch.windows)
        for name in reference_batch.values:
            assert np.array_equal(batch.values[name], reference_batch.values[name])
    assert isinstance(resumed, Generator)
    resumed.close()


@pytest.mark.parametrize("world", [1, 2, 4])
def test_evaluation_reads_every_whole_patch_once(real: Manifest, world: int) -> None:
    name = "AERIAL_RGBI"
    keys: Counter[str] = Counter()
    for rank in range(world):
        for batch in evaluation_batches(
            real, np.arange(3), [real.registry[name]], batch_size=2, rank=rank, world=world
        ):
            assert batch.values[name].shape[1:] == (4, 512, 512)
            assert set(batch.values) == {name}
            keys.update(batch.keys)
    assert keys == Counter(real.column("key").to_pylist())


def test_batch_has_the_pixels_of_the_geotiff(real: Manifest) -> None:
    for batch in evaluation_batches(real, np.arange(3), list(real.registry.values()), batch_size=1):
        domain, roi, tile = batch.keys[0].split("_")
        for name, values in batch.values.items():
            path = REAL / f"{domain}_{name}" / roi / f"{domain}_{name}_{roi}_{tile}.tif"
            with rasterio.open(path) as source:
                assert np.array_equal(source.read(), values[0].numpy())


@pytest.mark.parametrize(("make", "patches"), [(treesat_tree, 1), (pastis_tree, 18)])
def test_batch_has_the_pixels_of_real_series(
    tmp_path: Path, make: Callable[[Path], dict[tuple[str, str], np.ndarray]], patches: int
) -> None:
    """Real series of Sentinel-1 and -2 are unchanged, bit by bit."""
    written = make(tmp_path / "tree")
    manifest = write_shards(FlairHubCatalogue.open(tmp_path / "tree"), tmp_path / "shards")
    assert len(manifest) == patches
    compared = 0
    modalities = list(manifest.registry.values())
    for batch in evaluation_batches(manifest, np.arange(patches), modalities, batch_size=1):
        for modality in modalities:
            expected = written[batch.keys[0], modality.name]
            values = batch.values[modality.name][0].numpy()
            assert values.dtype == expected.dtype
            assert values.shape == expected.shape
            assert values.tobytes() == expected.tobytes()
            compared += 1
    assert compared == len(written)


def test_stock_webdataset_reads_the_shards(real: Manifest) -> None:
    keys = []
    for index in range(real.shard_count):
        for sample in webdataset.WebDataset(str(real.shard_path(index)), shardshuffle=False):
            keys.append(sample["__key__"])
            members = {field for field in sample if not field.startswith("__")}
            # webdataset converts field names to lower case.
            assert members == {"aerial_rgbi.bin", "aerial_label-cosia.bin", "json"}
            assert decode(sample["aerial_rgbi.bin"]).shape == (4, 512, 512)
            assert json.loads(sample["json"])["key"] == sample["__key__"]
    assert sorted(keys) == sorted(real.column("key").to_pylist())


def test_damaged_shard_is_named(real: Manifest, tmp_path: Path) -> None:
    folder = tmp_path / "damaged"
    shutil.copytree(real.path, folder)
    manifest = Manifest.open(folder)
    offset = manifest.row(0)["offset.AERIAL_RGBI"]
    shard = manifest.shard_path(manifest.row(0)["shard"])
    content = bytearray(shard.read_bytes())
    content[offset + 5000] ^= 0x10
    shard.write_bytes(content)
    modality = [manifest.registry["AERIAL_RGBI"]]
    for workers in (0, 1):
        with pytest.raises(InputError, match=rf"^{shard}: AERIAL_RGBI of {manifest.row(0)['key']} is damaged: .*$"):
            list(evaluation_batches(manifest, np.array([0]), modality, batch_size=1, workers=workers))
    shard.write_bytes(content[: offset + 100])
    with pytest.raises(InputError, match=f"{shard.name}: truncated"):
        list(evaluation_batches(manifest, np.array([0]), modality, batch_size=1))
    shard.unlink()
    manifest = Manifest.open(folder)  # the first manifest keeps the file open
    with pytest.raises(InputError, match=f"{shard.name}: cannot be opened"):
        list(evaluation_batches(manifest, np.array([0]), modality, batch_size=1))
    shard.mkdir()
    manifest = Manifest.open(folder)
    with pytest.raises(InputError, match=f"{shard.name}: cannot be read: Is a directory"):
        list(evaluation_batches(manifest, np.array([0]), modality, batch_size=1))
    assert len(list(evaluation_batches(manifest, np.array([1, 2]), modality, batch_size=1))) == 2


def test_training_without_rows_is_refused(real: Manifest) -> None:
    with pytest.raises(InputError, match="no sample to train on"):
        TrainingStream(real, np.zeros(0, np.int64), list(real.registry.values()), batch_size=1)


def test_days_since_15_may_of_the_same_year() -> None:
    dates = np.array(["2021-05-15", "2021-01-01", "2020-12-31", "1955-05-16"], "datetime64[D]")
    assert days_since_may(dates.astype("int64")).tolist() == [0, -134, 230, 1]
