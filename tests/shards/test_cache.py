"""The cache of remote shards: size limit, removal, concurrent processes, resume, and prefetch."""

import errno
import fcntl
import hashlib
import multiprocessing
import os
import pickle
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from faulty_server import FaultyServer

from bocage.shards.errors import InputError
from bocage.shards.format.manifest import Shard
from bocage.shards.read import cache as cache_module
from bocage.shards.read import object_store
from bocage.shards.read.cache import Cache, CacheConfig, RemoteFile
from bocage.shards.read.object_store import ObjectStore, RetryPolicy
from bocage.shards.read.open import RemoteShards

SIZE = 200_000
QUICK = RetryPolicy(attempts=3, backoff=0.01, timeout=1.0)
# Tests with processes take some seconds, because each process imports the reader.
SPAWN = multiprocessing.get_context("spawn")


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[RemoteFile]]:
    """Folder with eight files of random bytes, and their sizes and hashes."""
    folder, files = tmp_path_factory.mktemp("origin"), []
    for index in range(8):
        data = np.random.default_rng(index).bytes(SIZE)
        (folder / f"s{index}.tar").write_bytes(data)
        files.append(RemoteFile(f"s{index}.tar", SIZE, hashlib.sha256(data).hexdigest()))
    return folder, files


@pytest.fixture
def server(shards: tuple[Path, list[RemoteFile]]) -> Iterator[FaultyServer]:
    with FaultyServer(shards[0]) as server:
        yield server


SUPPORT = Path(__file__).parents[1] / "support"


def make_cache(server: FaultyServer, folder: Path, count: float = 3, digest: str = "d" * 64) -> Cache:
    return Cache(
        ObjectStore(server.address, QUICK), CacheConfig(folder=str(folder), size=str(int(count * SIZE))), digest
    )


def occupied(folder: Path) -> int:
    """Bytes that shards occupy on disk."""
    total = 0
    for path in folder.glob("*/*.tar*"):
        try:
            total += path.stat().st_blocks * 512
        except FileNotFoundError:
            continue
    return total


class SizeMonitor(threading.Thread):
    """Thread that records the largest size of the folder."""

    def __init__(self, folder: Path) -> None:
        super().__init__(daemon=True)
        self.folder, self.most, self.samples, self.ended = folder, 0, 0, threading.Event()

    def run(self) -> None:
        while not self.ended.is_set():
            self.most, self.samples = max(self.most, occupied(self.folder)), self.samples + 1
            time.sleep(0.001)

    def __enter__(self) -> "SizeMonitor":
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.ended.set()
        self.join()


@pytest.mark.parametrize(
    ("size", "expected"), [("100GB", 10**11), ("1.5 MiB", 3 << 19), ("123", 123), ("2tb", 2 * 10**12)]
)
def test_sizes_are_parsed(size: str, expected: int) -> None:
    assert CacheConfig(size=size).bytes == expected


def test_invalid_size_is_refused() -> None:
    with pytest.raises(ValueError, match="size='much'"):
        CacheConfig(size="much")


def test_default_folder_is_the_user_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert CacheConfig().path == tmp_path / "bocage" / "shards"


def test_shard_is_downloaded_once(server: FaultyServer, shards: tuple[Path, list[RemoteFile]], tmp_path: Path) -> None:
    cache = make_cache(server, tmp_path)
    for offset in (0, 77, SIZE - 5):
        assert cache.read(shards[1][0], offset, 5) == (shards[0] / "s0.tar").read_bytes()[offset : offset + 5]
    assert server.sent["s0.tar"] == SIZE
    assert make_cache(server, tmp_path).read(shards[1][0], 3, 4)
    assert server.sent["s0.tar"] == SIZE


def test_least_recently_used_shard_is_removed_and_size_is_bounded(
    server: FaultyServer, shards: tuple[Path, list[RemoteFile]], tmp_path: Path
) -> None:
    cache = make_cache(server, tmp_path)
    with SizeMonitor(tmp_path) as monitor:
        for index in (0, 1, 2, 0, 3):
            cache.read(shards[1][index], 0, 10)
    assert sorted(path.name for path in cache.folder.iterdir()) == ["s0.tar", "s2.tar", "s3.tar"]
    assert 2 * SIZE < monitor.most <= 3 * (SIZE + 4096) and monitor.samples > 3


def test_shards_of_other_versions_count_and_are_removed_first(
    server: FaultyServer, shards: tuple[Path, list[RemoteFile]], tmp_path: Path
) -> None:
    old, new = make_cache(server, tmp_path, 2, "a" * 64), make_cache(server, tmp_path, 2, "b" * 64)
    for index in (0, 1):
        old.read(shards[1][index], 0, 1)
    new.read(shards[1][0], 0, 1)
    assert server.sent["s0.tar"] == 2 * SIZE
    assert [path.name for path in old.folder.iterdir()] == ["s1.tar"]


def test_shard_being_read_is_not_removed(
    server: FaultyServer, shards: tuple[Path, list[RemoteFile]], tmp_path: Path
) -> None:
    import fcntl

    cache = make_cache(server, tmp_path, 2)
    for index in (0, 1):
        cache.read(shards[1][index], 0, 1)
    with cache_module._locked(cache.folder / "s0.tar", os.O_RDONLY, fcntl.LOCK_SH):
        cache.read(shards[1][2], 0, 1)
        assert sorted(path.name for path in cache.folder.iterdir()) == ["s0.tar", "s2.tar"]


def _read_all(address: str, folder: Path, files: list[RemoteFile], seed: int, results: object) -> None:
    cache = Cache(ObjectStore(address, QUICK), CacheConfig(folder=str(folder), size=str(3 * SIZE)), "d" * 64)
    random, is_equal = np.random.default_rng(seed), True
    for _ in range(60):
        index, offset = int(random.integers(len(files))), int(random.integers(SIZE - 100))
        is_equal &= cache.read(files[index], offset, 100) == np.random.default_rng(index).bytes(SIZE)[offset:][:100]
    results.put(is_equal)  # type: ignore[attr-defined]


def test_two_processes_share_a_small_cache(
    server: FaultyServer, shards: tuple[Path, list[RemoteFile]], tmp_path: Path
) -> None:
    results = SPAWN.Queue()
    readers = [
        SPAWN.Process(target=_read_all, args=(server.address, tmp_path, shards[1], seed, results)) for seed in (1, 2)
    ]
    with SizeMonitor(tmp_path) as monitor:
        for reader in readers:
            reader.start()
        assert [results.get(timeout=60) for _ in readers] == [True, True]
        for reader in readers:
            reader.join(timeout=10)
    assert [reader.exitcode for reader in readers] == [0, 0]
    assert sum(server.sent.values()) > 8 * SIZE  # some shards were removed and downloaded again
    assert monitor.samples > 50 and monitor.most <= 3 * (SIZE + 4096)


def _read_one(address: str, folder: Path, file: RemoteFile) -> None:
    cache = Cache(ObjectStore(address, QUICK), CacheConfig(folder=str(folder), size=str(3 * SIZE)), "d" * 64)
    cache.read(file, 0, 10)


def test_concurrent_readers_download_a_shard_once(
    server: FaultyServer, shards: tuple[Path, list[RemoteFile]], tmp_path: Path
) -> None:
    server.pause = 0.1
    readers = [SPAWN.Process(target=_read_one, args=(server.address, tmp_path, shards[1][0])) for _ in range(2)]
    for reader in readers:
        reader.start()
    for reader in readers:
        reader.join(timeout=30)
    assert [reader.exitcode for reader in readers] == [0, 0]
    assert server.sent["s0.tar"] == SIZE


def test_partial_download_of_a_killed_process_is_resumed(
    server: FaultyServer, shards: tuple[Path, list[RemoteFile]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.pause = 0.2
    reader = SPAWN.Process(target=_read_one_in_small_requests, args=(server.address, tmp_path, shards[1][0]))
    reader.start()
    part = tmp_path / ("d" * 32) / f"s0.tar.{SIZE}.part"
    deadline = time.monotonic() + 30
    while not (part.exists() and part.stat().st_size > 60_000):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    os.kill(reader.pid or 0, signal.SIGKILL)
    reader.join()
    partial = part.stat().st_size
    assert 0 < partial < SIZE
    time.sleep(0.5)  # until the server notices the closed connection
    server.pause, before = 0.0, server.sent["s0.tar"]
    assert make_cache(server, tmp_path).read(shards[1][0], 0, 50) == (shards[0] / "s0.tar").read_bytes()[:50]
    assert server.sent["s0.tar"] - before == SIZE - partial
    assert not part.exists()


def _read_one_in_small_requests(address: str, folder: Path, file: RemoteFile) -> None:
    object_store._REQUEST_BYTES = 30_000
    _read_one(address, folder, file)


@pytest.mark.parametrize("damage", ["flip", "cut"])
def test_shard_damaged_in_the_cache_is_downloaded_again(
    server: FaultyServer, shards: tuple[Path, list[RemoteFile]], tmp_path: Path, damage: str
) -> None:
    cache = make_cache(server, tmp_path)
    cache.read(shards[1][0], 0, 1)
    path = cache.folder / "s0.tar"
    status = path.stat()
    with path.open("rb+") as file:
        if damage == "cut":
            file.truncate(1000)
        else:
            file.write(b"\x00" * 50)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))  # damage on disk does not change the timestamps
    time.sleep(0.01)
    assert make_cache(server, tmp_path).read(shards[1][0], 0, 50) == (shards[0] / "s0.tar").read_bytes()[:50]
    assert server.sent["s0.tar"] == 2 * SIZE


def test_shard_damaged_at_its_origin_is_named(
    server: FaultyServer, shards: tuple[Path, list[RemoteFile]], tmp_path: Path
) -> None:
    cache = make_cache(server, tmp_path)
    with pytest.raises(InputError, match=r"http://127.*/s0\.tar: damaged"):
        cache.read(RemoteFile("s0.tar", SIZE, "0" * 64), 0, 1)
    assert server.sent["s0.tar"] == 2 * SIZE and not list(cache.folder.iterdir())


def make_remote(cache: Cache, files: list[RemoteFile]) -> RemoteShards:
    return RemoteShards(cache, [Shard(item.name, 1, item.bytes, item.sha256) for item in files])


def test_upcoming_shards_are_prefetched(
    server: FaultyServer, shards: tuple[Path, list[RemoteFile]], tmp_path: Path
) -> None:
    server.pause = 0.05
    files = make_remote(make_cache(server, tmp_path), shards[1])
    started = time.monotonic()
    files.prefetch([4, 5, 6, 7])  # four shards, but the cache has room for three
    assert time.monotonic() - started < 0.1
    assert files.read(5, 0, 20) == (shards[0] / "s5.tar").read_bytes()[:20]
    deadline = time.monotonic() + 10
    while sorted(path.name for path in tmp_path.glob("*/*.tar")) != ["s4.tar", "s5.tar", "s6.tar"]:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    assert {server.sent[f"s{index}.tar"] for index in (4, 5, 6)} == {SIZE} and not server.sent["s7.tar"]


def _fetch_in_the_background(files: RemoteShards) -> None:
    files.prefetch([0, 1, 2])
    files.read(0, 0, 1)
    files.prefetch([3, 4, 5])


@pytest.mark.parametrize("start", ["fork", "spawn"])
def test_process_exits_during_prefetch(
    server: FaultyServer, shards: tuple[Path, list[RemoteFile]], tmp_path: Path, start: str
) -> None:
    server.pause = 0.3
    files = make_remote(make_cache(server, tmp_path), shards[1])
    files.prefetch([7])  # gives the parent a thread, a connection and a lock
    time.sleep(0.1)
    pickle.loads(pickle.dumps(files))
    context: Any = multiprocessing.get_context(start)  # the type of a context from a variable lacks Process
    reader = context.Process(target=_fetch_in_the_background, args=(files,))
    reader.start()
    reader.join(timeout=30)
    assert reader.exitcode == 0


def _fetch_for_ever(files: RemoteShards) -> None:
    files.prefetch([1, 2])
    files.read(0, 0, 1)


def test_process_that_waits_for_a_shard_ends_on_sigterm(
    server: FaultyServer, shards: tuple[Path, list[RemoteFile]], tmp_path: Path
) -> None:
    server.pause = 5.0
    files = make_remote(make_cache(server, tmp_path), shards[1])
    reader = multiprocessing.get_context("fork").Process(target=_fetch_for_ever, args=(files,))
    reader.start()
    deadline = time.monotonic() + 30
    while not list(tmp_path.glob("*/s0.tar.*.part")):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    reader.terminate()
    reader.join(timeout=2)
    assert reader.exitcode == -signal.SIGTERM


_READ_ONTO_A_FULL_DISK = """
import sys
from pathlib import Path
from test_cache import QUICK, SIZE, Cache, CacheConfig, InputError, ObjectStore, RemoteFile

address, folder, digest = sys.argv[1:]
cache = Cache(ObjectStore(address, QUICK), CacheConfig(folder=folder, size="1MB"), "d" * 64)
try:
    cache.read(RemoteFile("s0.tar", SIZE, digest), 0, 1)
except InputError as error:
    print(error, [path.name for path in cache.folder.iterdir()])
"""


def test_full_disk_is_named_and_leaves_no_partial_file(
    server: FaultyServer, shards: tuple[Path, list[RemoteFile]], tmp_path: Path
) -> None:
    mount = 'mount -t tmpfs -o size=100k none "$0" && exec "$@"'
    inside = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", mount, str(tmp_path)]
    if shutil.which("unshare") is None or subprocess.run([*inside, "true"], capture_output=True).returncode:
        pytest.skip("needs a mount namespace")
    command = [sys.executable, "-c", _READ_ONTO_A_FULL_DISK, server.address, str(tmp_path), shards[1][0].sha256]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join((str(SUPPORT), str(Path(__file__).parent)))}
    process = subprocess.run([*inside, *command], env=environment, capture_output=True, text=True, timeout=60)
    expected = f"{tmp_path}: the disk of the cache is full; lower cache.size or move cache.folder []"
    assert process.stdout.strip() == expected, process.stderr


def test_recipes_have_keys_for_the_cache() -> None:
    from bocage import recipes
    from bocage.finetune.finetune_config import FinetuneConfig
    from bocage.ssl.pretrain_config import PretrainConfig

    overrides = ["cache.size=2GB", "cache.folder=/somewhere"]
    assert recipes.resolve(PretrainConfig, ["recipe=quickstart", *overrides]).cache.bytes == 2 * 10**9
    name = next(name for name in recipes.list_recipes() if name.startswith("finetune"))
    assert recipes.resolve(FinetuneConfig, [f"recipe={name}", *overrides]).cache.path == Path("/somewhere")
    with pytest.raises(InputError, match=r"size='much' is not a size such as 100GB"):
        recipes.resolve(PretrainConfig, ["recipe=quickstart", "cache.size=much"])
    assert recipes.resolve(PretrainConfig, ["recipe=quickstart", "cache.size=123456"]).cache.bytes == 123456


def test_shard_is_verified_once_with_whole_second_timestamps(
    server: FaultyServer, shards: tuple[Path, list[RemoteFile]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Lustre and ext3 store whole seconds; SMB stores 100 ns."""
    precise, digest, verified = os.utime, hashlib.file_digest, []

    def coarse(path: int | Path, ns: tuple[int, int] | None = None) -> None:
        precise(path, ns=tuple(value // 10**9 * 10**9 for value in ns or (time.time_ns(),) * 2))  # type: ignore[arg-type]

    def counted(file: object, name: str) -> object:
        verified.append(file)
        return digest(file, name)  # type: ignore[arg-type]

    monkeypatch.setattr(os, "utime", coarse)
    monkeypatch.setattr(hashlib, "file_digest", counted)
    file = shards[1][0]
    make_cache(server, tmp_path).read(file, 0, 10)
    time.sleep(1.0)
    again = make_cache(server, tmp_path)
    for _ in range(10):
        again.read(file, 0, 10)
    assert len(verified) == 2  # after the download, and by the second cache


def test_shards_are_removed_on_nfs(
    server: FaultyServer, shards: tuple[Path, list[RemoteFile]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On NFS, an exclusive lock needs a file that is open for writing."""
    flock = fcntl.flock

    def as_nfs(descriptor: int, operation: int) -> None:
        if operation & fcntl.LOCK_EX and fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY:
            raise OSError(errno.EBADF, os.strerror(errno.EBADF))
        flock(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", as_nfs)
    cache = make_cache(server, tmp_path, count=1)
    for file in shards[1][:3]:
        assert len(cache.read(file, 0, 10)) == 10
