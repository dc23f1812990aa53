"""Every sample is read exactly once and in one global order, for any number of ranks and workers."""

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
from bocage.shards.source.flair_hub.tree import FlairHubCatalogue
from bocage.shards.write.writer import write_shards

SERIES = "SENTINEL1-ASC_TS"
COUNT = 42

pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create 3 worker processes")


class RecordingShards:
    """Shards that record reads and prefetched shards."""

    def __init__(self, manifest: Manifest) -> None:
        self.files, self.read_bytes, self.prefetched = manifest.files, list[tuple[int, int, int]](), list[list[int]]()

    def name(self, shard: int) -> str:
        return self.files.name(shard)

    def read(self, shard: int, offset: int, length: int) -> bytes:
        self.read_bytes.append((shard, offset, length))
        return self.files.read(shard, offset, length)

    def prefetch(self, shards: Sequence[int]) -> None:
        self.prefetched.append(list(shards))


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    """42 patches in six shards, the last of two."""
    folder = tmp_path_factory.mktemp("exact")
    keys = [f"D001-2020_AA-S1-1_0-{column}" for column in range(COUNT)]
    write_tree(folder / "tree", keys, [SERIES])
    return write_shards(FlairHubCatalogue.open(folder / "tree"), folder / "shards", samples_per_shard=8)


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
    """Keys of ``rounds`` batches per rank, in the global order; closes the readers."""
    keys = []
    for _ in range(rounds):
        batches = [next(rank) for rank in ranks]
        keys += [batch.keys[index] for index in range(len(batches[0])) for batch in batches]
    for rank in ranks:
        rank.close()  # type: ignore[attr-defined]
    return keys


@pytest.mark.parametrize("workers", [0, 1, 3])
@pytest.mark.parametrize("world", [1, 2, 3])
def test_evaluation_reads_every_sample_once_in_order(manifest: Manifest, world: int, workers: int) -> None:
    rows = np.random.default_rng(world).permutation(COUNT)
    ranks = [[key for batch in batches for key in batch.keys] for batches in evaluated(manifest, rows, world, workers)]
    assert Counter(key for keys in ranks for key in keys) == Counter(keys_of(manifest, range(COUNT)))
    # Ranks take the batches of a single rank in turn.
    alone = [batch.keys for batch in evaluated(manifest, rows, 1, workers=0)[0]]
    assert [key for keys in alone for key in keys] == keys_of(manifest, rows)
    assert ranks == [[key for keys in alone[rank::world] for key in keys] for rank in range(world)]


@pytest.mark.parametrize("workers", [0, 1, 3])
@pytest.mark.parametrize("world", [1, 2, 3])
def test_training_epoch_reads_every_sample_once_in_order(manifest: Manifest, world: int, workers: int) -> None:
    keys = taken(streams(manifest, 0, world, workers, batch_size=COUNT // 7 // world), 7)
    assert Counter(keys) == Counter(keys_of(manifest, range(COUNT)))
    order = TrainingStream(manifest, np.arange(COUNT), [manifest.registry[SERIES]], batch_size=1, seed=11).order
    assert keys == keys_of(manifest, order.epoch(0))


@pytest.mark.parametrize("ranks", [4, 50])
def test_ranks_without_a_sample_get_no_batch(manifest: Manifest, ranks: int) -> None:
    rows = np.array([5, 3])
    batches = evaluated(manifest, rows, ranks, workers=0)
    assert [[batch.keys for batch in rank] for rank in batches] == [[keys_of(manifest, rows)]] + [[]] * (ranks - 1)


# The run stops after any number of steps and resumes with another number of ranks and workers.
@settings(max_examples=12, deadline=None)
@given(
    before=st.tuples(st.integers(1, 3), st.sampled_from([0, 0, 2])),
    after=st.tuples(st.integers(1, 3), st.sampled_from([0, 0, 2])),
    batch_size=st.integers(1, 5),
    rounds=st.integers(0, 12),
)
def test_resumed_run_continues_the_order(
    manifest: Manifest, before: tuple[int, int], after: tuple[int, int], batch_size: int, rounds: int
) -> None:
    head = taken(streams(manifest, 0, before[0], before[1], batch_size), rounds)
    tail = taken(streams(manifest, len(head), after[0], after[1], batch_size), 4)
    whole = taken(streams(manifest, 0, 1, 0, 1), len(head) + len(tail))
    assert head + tail == whole


def test_spawned_and_forked_workers_give_the_same_batches(manifest: Manifest) -> None:
    rows = np.arange(12)
    usual = torch.multiprocessing.get_start_method()
    results = {}
    try:
        for method in ("fork", "spawn"):
            torch.multiprocessing.set_start_method(method, force=True)
            [results[method]] = evaluated(manifest, rows, 1, workers=1)
    finally:
        torch.multiprocessing.set_start_method(usual, force=True)
    [expected] = evaluated(manifest, rows, 1, workers=0)
    for batches in results.values():
        assert [batch.keys for batch in batches] == [batch.keys for batch in expected]
        for batch, reference in zip(batches, expected):
            assert torch.equal(batch.seeds, reference.seeds) and torch.equal(batch.windows, reference.windows)
            for field in ("values", "present", "dates", "padding"):
                assert torch.equal(getattr(batch, field)[SERIES], getattr(reference, field)[SERIES])


def test_worker_batch_is_one_block_of_shared_memory(manifest: Manifest) -> None:
    [batch, *_] = evaluated(manifest, np.arange(8), 1, workers=1)[0]
    tensors = [batch.seeds, batch.windows]
    tensors += [getattr(batch, field)[SERIES] for field in ("values", "present", "dates", "padding")]
    assert all(tensor.is_shared() for tensor in tensors)
    assert len({tensor.untyped_storage().data_ptr() for tensor in tensors}) == 1
    assert batch.values[SERIES].is_contiguous()


def test_upcoming_shards_are_prefetched(manifest: Manifest) -> None:
    files = RecordingShards(manifest)
    opened = Manifest.open(manifest.path)
    opened.files = files
    modalities = [opened.registry[SERIES]]
    rows = np.arange(COUNT)
    list(evaluation_batches(opened, rows, modalities, batch_size=4))
    assert files.prefetched[0] == [0, 1, 2, 3, 4, 5]
    assert files.prefetched[-1] == [5]
    used = list(dict.fromkeys(shard for shard, _, _ in files.read_bytes))
    assert used == [0, 1, 2, 3, 4, 5]

    files.prefetched.clear()
    files.read_bytes.clear()
    batches = TrainingStream(opened, rows, modalities, batch_size=2, seed=3).batches(0, 0, 1)
    for _ in range(3 * COUNT // 2):
        before = len(files.read_bytes)
        next(batches)
        # Every shard of a batch was prefetched.
        assert {shard for shard, _, _ in files.read_bytes[before:]} <= set(files.prefetched[-1])
    assert files.prefetched[0][0] == files.read_bytes[0][0]
    # The next block is prefetched too, across epochs.
    assert all(len(shards) >= 2 for shards in files.prefetched)


def test_only_needed_members_are_read_and_neighbours_in_one_read(tmp_path: Path) -> None:
    names = ["SENTINEL2_TS", SERIES, "SENTINEL1-DESC_TS", "ALL_LABEL-LPIS"]
    write_tree(tmp_path / "tree", ["D001-2020_AA-S1-1_0-0"], names)
    manifest = write_shards(FlairHubCatalogue.open(tmp_path / "tree"), tmp_path / "shards")
    row = manifest.row(0)
    spans = {name: (0, row[f"offset.{name}"], row[f"length.{name}"]) for name in names}

    def reads(*chosen: str) -> list[tuple[int, int, int]]:
        files = manifest.files = RecordingShards(Manifest.open(manifest.path))
        modalities = [manifest.registry[name] for name in chosen]
        [batch] = evaluation_batches(manifest, np.arange(1), modalities, batch_size=1)
        assert set(batch.values) == set(chosen)
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
def test_array_of_wrong_shape_is_named_and_never_broadcast(
    manifest: Manifest, stored: np.ndarray, message: str
) -> None:
    class Swapped(RecordingShards):
        def read(self, shard: int, offset: int, length: int) -> bytes:
            return encode(stored, manifest.registry[SERIES].codec)

    opened = Manifest.open(manifest.path)
    opened.files = Swapped(manifest)
    with pytest.raises(InputError, match=rf"shard-000000\.tar: {SERIES} of {opened.index.key(0)} {message}"):
        list(evaluation_batches(opened, np.arange(1), [opened.registry[SERIES]], batch_size=1))
