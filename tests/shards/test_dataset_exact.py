"""Every sample exactly once and in one global order, whatever the number of ranks and reading processes."""

from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch.multiprocessing
from hypothesis import given, settings
from hypothesis import strategies as st
from small_tree import write_tree

from bocage.shards.batch import Batch
from bocage.shards.errors import InputError
from bocage.shards.format.codec import encode
from bocage.shards.format.manifest import Manifest
from bocage.shards.read.dataset import TrainingStream, evaluation_batches
from bocage.shards.source.catalogue import Catalogue
from bocage.shards.write.writer import write_shards

SERIES = "SENTINEL1-ASC_TS"
COUNT = 42

pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create 3 worker processes")


class Recorded:
    """Shards that remember what was read and announced."""

    def __init__(self, manifest: Manifest) -> None:
        self.files, self.read_bytes, self.announced = manifest.files, list[tuple[int, int, int]](), list[list[int]]()

    def name(self, shard: int) -> str:
        return self.files.name(shard)

    def read(self, shard: int, offset: int, length: int) -> bytes:
        self.read_bytes.append((shard, offset, length))
        return self.files.read(shard, offset, length)

    def prefetch(self, shards: Sequence[int]) -> None:
        self.announced.append(list(shards))


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    """42 patches in six shards, the last of two."""
    folder = tmp_path_factory.mktemp("exact")
    keys = [f"D001-2020_AA-S1-1_0-{column}" for column in range(COUNT)]
    write_tree(folder / "tree", keys, [SERIES])
    return write_shards(Catalogue.open(folder / "tree"), folder / "shards", samples_per_shard=8)


def keys_of(manifest: Manifest, rows: Sequence[int] | np.ndarray) -> list[str]:
    return [manifest.index.key(int(row)) for row in rows]


def evaluated(manifest: Manifest, rows: np.ndarray, world: int, workers: int, batch_size: int = 4) -> list[list[Batch]]:
    modalities = [manifest.registry[SERIES]]
    return [
        list(
            evaluation_batches(
                manifest, rows, modalities, batch_size=batch_size, workers=workers, rank=rank, world=world
            )
        )
        for rank in range(world)
    ]


def streams(manifest: Manifest, position: int, world: int, workers: int, batch_size: int) -> list[Iterator[Batch]]:
    source = TrainingStream(
        manifest, np.arange(COUNT), [manifest.registry[SERIES]], batch_size=batch_size, seed=11, workers=workers
    )
    return [source.batches(position, rank, world) for rank in range(world)]


def taken(ranks: list[Iterator[Batch]], rounds: int) -> list[str]:
    """Keys of some rounds of batches in the global order; then the readers are ended."""
    found = []
    for _ in range(rounds):
        batches = [next(rank) for rank in ranks]
        found += [batch.keys[index] for index in range(len(batches[0])) for batch in batches]
    for rank in ranks:
        rank.close()  # type: ignore[attr-defined]
    return found


@pytest.mark.parametrize("workers", [0, 1, 3])
@pytest.mark.parametrize("world", [1, 2, 3])
def test_evaluation_delivers_every_sample_once_in_the_order_given(manifest: Manifest, world: int, workers: int) -> None:
    rows = np.random.default_rng(world).permutation(COUNT)
    ranks = [[key for batch in batches for key in batch.keys] for batches in evaluated(manifest, rows, world, workers)]
    assert Counter(key for keys in ranks for key in keys) == Counter(keys_of(manifest, range(COUNT)))
    # Batches are those of one rank, in turn.
    alone = [batch.keys for batch in evaluated(manifest, rows, 1, workers=0)[0]]
    assert [key for keys in alone for key in keys] == keys_of(manifest, rows)
    assert ranks == [[key for keys in alone[rank::world] for key in keys] for rank in range(world)]


@pytest.mark.parametrize("workers", [0, 1, 3])
@pytest.mark.parametrize("world", [1, 2, 3])
def test_an_epoch_of_training_delivers_every_sample_once_in_one_order(
    manifest: Manifest, world: int, workers: int
) -> None:
    found = taken(streams(manifest, 0, world, workers, batch_size=COUNT // 7 // world), 7)
    assert Counter(found) == Counter(keys_of(manifest, range(COUNT)))
    order = TrainingStream(manifest, np.arange(COUNT), [manifest.registry[SERIES]], batch_size=1, seed=11).order
    assert found == keys_of(manifest, order.epoch(0))


@pytest.mark.parametrize("ranks", [4, 50])
def test_ranks_without_a_sample_get_no_batch(manifest: Manifest, ranks: int) -> None:
    rows = np.array([5, 3])
    batches = evaluated(manifest, rows, ranks, workers=0)
    assert [[batch.keys for batch in rank] for rank in batches] == [[keys_of(manifest, rows)]] + [[]] * (ranks - 1)


# A run that ends after any number of steps, and goes on with any other number of ranks and readers.
@settings(max_examples=12, deadline=None)
@given(
    before=st.tuples(st.integers(1, 3), st.sampled_from([0, 0, 2])),
    after=st.tuples(st.integers(1, 3), st.sampled_from([0, 0, 2])),
    batch_size=st.integers(1, 5),
    rounds=st.integers(0, 12),
)
def test_a_run_that_was_stopped_goes_on_in_the_same_order(
    manifest: Manifest, before: tuple[int, int], after: tuple[int, int], batch_size: int, rounds: int
) -> None:
    head = taken(streams(manifest, 0, before[0], before[1], batch_size), rounds)
    tail = taken(streams(manifest, len(head), after[0], after[1], batch_size), 4)
    whole = taken(streams(manifest, 0, 1, 0, 1), len(head) + len(tail))
    assert head + tail == whole


def test_spawned_readers_deliver_what_forked_ones_do(manifest: Manifest) -> None:
    rows = np.arange(12)
    usual = torch.multiprocessing.get_start_method()
    found = {}
    try:
        for method in ("fork", "spawn"):
            torch.multiprocessing.set_start_method(method, force=True)
            [found[method]] = evaluated(manifest, rows, 1, workers=1)
    finally:
        torch.multiprocessing.set_start_method(usual, force=True)
    [expected] = evaluated(manifest, rows, 1, workers=0)
    for batches in found.values():
        assert [batch.keys for batch in batches] == [batch.keys for batch in expected]
        for batch, wanted in zip(batches, expected):
            assert torch.equal(batch.seeds, wanted.seeds) and torch.equal(batch.windows, wanted.windows)
            for field in ("values", "present", "dates", "padding"):
                assert torch.equal(getattr(batch, field)[SERIES], getattr(wanted, field)[SERIES])


def test_a_batch_from_a_reading_process_is_one_block_of_shared_memory(manifest: Manifest) -> None:
    [batch, *_] = evaluated(manifest, np.arange(8), 1, workers=1)[0]
    tensors = [batch.seeds, batch.windows]
    tensors += [getattr(batch, field)[SERIES] for field in ("values", "present", "dates", "padding")]
    assert all(tensor.is_shared() for tensor in tensors)
    assert len({tensor.untyped_storage().data_ptr() for tensor in tensors}) == 1
    assert batch.values[SERIES].is_contiguous()


def test_readers_are_told_which_shards_come_next(manifest: Manifest) -> None:
    files = Recorded(manifest)
    opened = Manifest.open(manifest.path)
    opened.files = files
    modalities = [opened.registry[SERIES]]
    rows = np.arange(COUNT)
    list(evaluation_batches(opened, rows, modalities, batch_size=4))
    assert files.announced[0] == [0, 1, 2, 3, 4, 5]
    assert files.announced[-1] == [5]
    used = list(dict.fromkeys(shard for shard, _, _ in files.read_bytes))
    assert used == [0, 1, 2, 3, 4, 5]

    files.announced.clear(), files.read_bytes.clear()
    batches = TrainingStream(opened, rows, modalities, batch_size=2, seed=3).batches(0, 0, 1)
    for _ in range(3 * COUNT // 2):
        before = len(files.read_bytes)
        next(batches)
        # What a batch reads was announced before, and what the first batches read stands first.
        assert {shard for shard, _, _ in files.read_bytes[before:]} <= set(files.announced[-1])
    assert files.announced[0][0] == files.read_bytes[0][0]
    # The block after the one that is being read is known, into the next epoch too.
    assert all(len(shards) >= 2 for shards in files.announced)


def test_only_the_wanted_members_are_read_and_neighbours_at_once(tmp_path: Path) -> None:
    names = ["SENTINEL2_TS", SERIES, "SENTINEL1-DESC_TS", "ALL_LABEL-LPIS"]
    write_tree(tmp_path / "tree", ["D001-2020_AA-S1-1_0-0"], names)
    manifest = write_shards(Catalogue.open(tmp_path / "tree"), tmp_path / "shards")
    row = manifest.row(0)
    spans = {name: (0, row[f"offset.{name}"], row[f"length.{name}"]) for name in names}

    def reads(*wanted: str) -> list[tuple[int, int, int]]:
        files = manifest.files = Recorded(Manifest.open(manifest.path))
        [batch] = evaluation_batches(manifest, np.arange(1), [manifest.registry[name] for name in wanted], batch_size=1)
        assert set(batch.values) == set(wanted)
        return files.read_bytes

    for name in names:
        assert reads(name) == [spans[name]]
    assert reads(names[3], names[0]) == [spans[names[0]], spans[names[3]]]
    first, last = (row[f"offset.{name}"] for name in (names[0], names[2]))
    assert reads(*names[:3]) == [(0, first, last + row[f"length.{names[2]}"] - first)]


@pytest.mark.parametrize(
    ("stored", "message"),
    [
        (
            np.zeros((3, 1, 10, 10), np.float32),
            r"is float32 of shape \(3, 1, 10, 10\), not float32 of \(3, 2,",
        ),
        (np.zeros((3, 2, 10, 10), np.float64), r"is float64 of shape"),
        (np.zeros((4, 2, 10, 10), np.float32), r"has 4 dates in its shard but 3 in the index"),
    ],
)
def test_an_array_that_does_not_fit_is_named_and_never_spread(
    manifest: Manifest, stored: np.ndarray, message: str
) -> None:
    class Swapped(Recorded):
        def read(self, shard: int, offset: int, length: int) -> bytes:
            return encode(stored, manifest.registry[SERIES].codec)

    opened = Manifest.open(manifest.path)
    opened.files = Swapped(manifest)
    with pytest.raises(InputError, match=rf"shard-000000\.tar: {SERIES} of {opened.index.key(0)} {message}"):
        list(evaluation_batches(opened, np.arange(1), [opened.registry[SERIES]], batch_size=1))
