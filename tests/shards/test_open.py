"""Open shards over HTTP, S3 and the hub: equal epochs, retries, resume, and error messages."""

import json
import os
import pickle
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
import torch
from faulty_server import FaultyServer

from bocage.shards.batch import Batch
from bocage.shards.errors import InputError
from bocage.shards.format.manifest import Manifest
from bocage.shards.read import object_store
from bocage.shards.read.cache import CacheConfig
from bocage.shards.read.dataset import TrainingStream, evaluation_batches
from bocage.shards.read.object_store import ObjectStore, RetryPolicy, is_remote
from bocage.shards.read.open import open_shards
from bocage.shards.source.flair_hub.tree import FlairHubCatalogue
from bocage.shards.write.writer import write_shards

pytestmark = pytest.mark.filterwarnings("ignore:cache.size")  # these caches are small on purpose

REAL = Path(__file__).parents[1] / "data" / "flairhub_real"
QUICK = RetryPolicy(attempts=3, backoff=0.01, timeout=0.5)


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    """Three real patches, one per shard."""
    return write_shards(FlairHubCatalogue.open(REAL), tmp_path_factory.mktemp("shards") / "real", samples_per_shard=1)


def cache_of(folder: Path, local: Manifest, count: float = 2) -> CacheConfig:
    """Cache with room for ``count`` shards of the largest size."""
    largest = max(shard.bytes for shard in local.shards)
    return CacheConfig(folder=str(folder / "cache"), size=str(int(count * largest)))


def same(first: Batch, second: Batch) -> bool:
    def flat(value: object) -> list[object]:
        if isinstance(value, torch.Tensor):
            return [value.dtype, value.shape, value.numpy().tobytes()]
        if isinstance(value, dict):
            return [(key, flat(item)) for key, item in value.items()]
        return [value]

    return all(flat(getattr(first, item.name)) == flat(getattr(second, item.name)) for item in fields(first))


def assert_same_epochs(local: Manifest, remote: Manifest, workers: int) -> None:
    modalities, rows = list(local.registry.values()), np.arange(len(local))
    pairs = [
        [
            list(evaluation_batches(manifest, rows, modalities, batch_size=2, workers=workers))
            for manifest in (local, remote)
        ]
    ]
    streams = [
        TrainingStream(manifest, rows, modalities, batch_size=1, window=51.2, seed=4, workers=workers).batches(0, 0, 1)
        for manifest in (local, remote)
    ]
    pairs.append([[next(stream) for _ in range(6)] for stream in streams])
    for stream in streams:
        stream.close()  # type: ignore[attr-defined]
    for local_batches, remote_batches in pairs:
        assert len(local_batches) == len(remote_batches) > 0
        assert all(same(first, second) for first, second in zip(local_batches, remote_batches))


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("ranges", [True, False])
def test_http_epochs_equal_local_ones(local: Manifest, tmp_path: Path, workers: int, ranges: bool) -> None:
    with FaultyServer(local.path, ranges=ranges) as server:
        remote = open_shards(server.address, cache_of(tmp_path, local), QUICK)
        assert remote.digest == local.digest
        assert_same_epochs(local, remote, workers)
    cached = sum(path.stat().st_size for path in (tmp_path / "cache").glob("*/*.tar*"))
    assert 0 < cached <= cache_of(tmp_path, local).bytes < sum(shard.bytes for shard in local.shards)


def test_server_without_ranges_sends_shards_larger_than_a_request(
    local: Manifest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(object_store, "_REQUEST_BYTES", 10_000)
    with FaultyServer(local.path, ranges=False) as server:
        assert_same_epochs(local, open_shards(server.address, cache_of(tmp_path, local), QUICK), workers=0)


@pytest.fixture(scope="module")
def s3(local: Manifest) -> Iterator[str]:
    """Address of the shards on an S3 server in another process; sets its endpoint and credentials."""
    pytest.importorskip("s3fs")
    pytest.importorskip("moto.server")
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    endpoint = f"http://127.0.0.1:{port}"
    environment = {
        "AWS_ENDPOINT_URL": endpoint,
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "secret-of-the-test",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        try:
            with pytest.MonkeyPatch.context() as patch:
                for key, value in environment.items():
                    patch.setenv(key, value)
                import s3fs

                system = s3fs.S3FileSystem(skip_instance_cache=True)
                deadline = time.monotonic() + 60
                while True:
                    try:
                        system.mkdir("bucket")
                        break
                    except OSError:
                        assert time.monotonic() < deadline and process.poll() is None
                        time.sleep(0.2)
                for path in local.path.iterdir():
                    if path.is_file():
                        system.put_file(str(path), f"bucket/some/prefix/{path.name}")
                yield "s3://bucket/some/prefix"
        finally:
            process.terminate()


@pytest.mark.parametrize("workers", [0, 2])
def test_s3_epochs_equal_local_ones(local: Manifest, s3: str, tmp_path: Path, workers: int) -> None:
    # 5 to 8 s: starts an S3 server, and a client in every DataLoader worker.
    assert_same_epochs(local, open_shards(s3, cache_of(tmp_path, local), QUICK), workers)


def test_one_fault_of_an_s3_server_is_retried(local: Manifest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("s3fs")
    (tmp_path / "origin" / "bucket").mkdir(parents=True)
    (tmp_path / "origin" / "bucket" / "prefix").symlink_to(local.path)
    name = local.shards[0].name
    with FaultyServer(tmp_path / "origin") as server:  # reading an object is a plain GET of its path
        monkeypatch.setenv("AWS_ENDPOINT_URL", server.address)
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "hidden")
        server.faults["dataset.json"] = ["503", "truncate"]
        remote = open_shards("s3://bucket/prefix", cache_of(tmp_path, local), QUICK)
        assert remote.digest == local.digest and server.faults["dataset.json"] == []
        for fault in ("503", "reset", "stall", "truncate", "flip"):
            server.faults[name] = [fault]
            assert remote.files.read(0, 512, 4096) == local.files.read(0, 512, 4096), fault
            assert server.faults[name] == []
            assert (remote.path / name).read_bytes() == local.shard_path(0).read_bytes()
            (remote.path / name).unlink()
        server.faults[name] = ["403"]
        with pytest.raises(InputError, match=rf"^s3://bucket/prefix/{name}: access refused"):
            remote.files.read(0, 0, 1)


def test_missing_s3_files_and_credentials_are_named(s3: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = CacheConfig(folder=str(tmp_path))
    for address in (f"{s3}/nowhere", "s3://another-bucket/x"):
        with pytest.raises(InputError, match=rf"{address}/dataset\.json: there is no such file$"):
            open_shards(address, config, QUICK)
    for key in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(key)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    with pytest.raises(InputError, match="no credentials; set AWS_ACCESS_KEY_ID"):
        open_shards(s3, config, QUICK)


@pytest.mark.parametrize("name", ["dataset.json", "index.arrow", "tar"])
@pytest.mark.parametrize("fault", ["503", "reset", "stall", "truncate"])
def test_one_fault_of_a_server_is_retried(local: Manifest, tmp_path: Path, fault: str, name: str) -> None:
    tar = local.shards[0]
    name = tar.name if name == "tar" else name
    with FaultyServer(local.path) as server:
        server.faults[name] = [fault]
        remote = open_shards(server.address, cache_of(tmp_path, local), QUICK)
        assert remote.files.read(0, 512, 4096) == local.files.read(0, 512, 4096)
        assert server.faults[name] == []
        assert (remote.path / tar.name).read_bytes() == local.shard_path(0).read_bytes()


@pytest.mark.parametrize("fault", ["503", "reset", "stall", "truncate"])
def test_download_without_ranges_starts_over_after_a_fault(local: Manifest, tmp_path: Path, fault: str) -> None:
    with FaultyServer(local.path, ranges=False) as server:
        server.faults[local.shards[0].name] = [fault]
        remote = open_shards(server.address, cache_of(tmp_path, local), QUICK)
        assert remote.files.read(0, 512, 4096) == local.files.read(0, 512, 4096)


def test_interrupted_download_resumes(local: Manifest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(object_store, "_REQUEST_BYTES", 100_000)
    tar = local.shards[0]
    assert tar.bytes > 400_000
    with FaultyServer(local.path) as server:
        server.faults[tar.name] = ["", "", "reset"]
        open_shards(server.address, cache_of(tmp_path, local), QUICK).files.read(0, 0, 1)
        assert tar.bytes < server.sent[tar.name] <= tar.bytes + 100_000


@pytest.mark.parametrize("name", ["index.arrow", "manifest.parquet", "tar"])
def test_file_with_wrong_hash_is_downloaded_twice_then_refused(local: Manifest, tmp_path: Path, name: str) -> None:
    name = local.shards[0].name if name == "tar" else name
    with FaultyServer(local.path) as server:
        server.faults[name] = ["flip"]
        remote = open_shards(server.address, cache_of(tmp_path, local), QUICK)
        assert remote.files.read(0, 512, 4096) == local.files.read(0, 512, 4096)
        assert remote.table.equals(local.table)
        shutil.rmtree(tmp_path / "cache")
        server.faults[name] = ["flip"] * 2
        with pytest.raises(InputError, match=rf"127.*/{name}: damaged: its SHA-256"):
            open_shards(server.address, cache_of(tmp_path, local), QUICK).files.read(0, 0, 1)


def test_unreachable_server_is_given_up(local: Manifest, tmp_path: Path) -> None:
    with FaultyServer(local.path) as server:
        server.faults["dataset.json"] = ["503"] * 3
        with pytest.raises(InputError, match=r"/dataset\.json: given up after 3 attempts: HTTP status 503$"):
            open_shards(server.address, cache_of(tmp_path, local), QUICK)
        address = server.address
    with pytest.raises(InputError, match=r"/dataset\.json: given up after 3 attempts: "):
        open_shards(address, cache_of(tmp_path, local), QUICK)


def test_messages_hold_no_secret_and_refusals_are_final(local: Manifest, tmp_path: Path) -> None:
    with FaultyServer(local.path) as server:
        address = server.address.replace("http://", "http://someone:hidden@") + "/?signature=hidden"
        assert open_shards(address, cache_of(tmp_path, local), QUICK).files.name(0).startswith(server.address)
        assert set(server.queries) == {"signature=hidden"}
        messages = []
        for fault in ("403", "503", "reset", "truncate"):
            server.faults["dataset.json"] = [fault] * 3
            with pytest.raises(InputError) as caught:
                open_shards(address, cache_of(tmp_path, local), QUICK)
            messages.append(str(caught.value))
            assert caught.value.__cause__ is None
            assert len(server.faults["dataset.json"]) == (2 if fault == "403" else 0)
        assert messages[0].endswith("/dataset.json: access refused; check the credentials")
        with pytest.raises(InputError, match=r"/nowhere/dataset\.json: there is no such file$") as caught:
            open_shards(address.replace("/?", "/nowhere?"), cache_of(tmp_path, local), QUICK)
        assert not any("hidden" in text for text in [*messages, str(caught.value)])


def test_versions_at_the_same_address_are_not_mixed(local: Manifest, tmp_path: Path) -> None:
    origin = tmp_path / "origin"
    shutil.copytree(local.path, origin)
    with FaultyServer(origin) as server:
        first = open_shards(server.address, cache_of(tmp_path, local), QUICK)
        description = json.loads((origin / "dataset.json").read_text())
        description["shards"][0]["sha256"] = "0" * 64
        (origin / "dataset.json").write_text(json.dumps(description))
        second = open_shards(server.address, cache_of(tmp_path, local), QUICK)
        assert first.path != second.path and first.digest == local.digest != second.digest
        first.files.read(0, 0, 1)
        with pytest.raises(InputError, match="damaged"):
            second.files.read(0, 0, 1)


def test_cache_smaller_than_a_shard_is_refused(local: Manifest, tmp_path: Path) -> None:
    with (
        FaultyServer(local.path) as server,
        pytest.raises(InputError, match=r"^cache\.size=\d+ is less than one shard"),
    ):
        open_shards(server.address, cache_of(tmp_path, local, 0.9), QUICK)


def test_local_folders_are_read_in_place(local: Manifest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for location in (local.path, str(local.path), local.path.as_uri()):
        opened = open_shards(location)
        assert opened.path == local.path and opened.files.name(0) == str(local.shard_path(0))
    assert not (tmp_path / "cache").exists()
    with pytest.raises(InputError, match="shards= is not set"):
        open_shards("")
    assert not is_remote("C:/shards") and not is_remote("a/b")
    assert is_remote("HTTPS://user:secret@host/path") and not is_remote("file:///a")


def test_unknown_schemes_and_missing_packages_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match=r"^ftp://host/x: shards are read from a folder, file://, s3://"):
        ObjectStore("ftp://someone:hidden@host/x")
    monkeypatch.setitem(sys.modules, "s3fs", None)
    monkeypatch.delitem(sys.modules["fsspec.registry"]._registry, "s3", raising=False)
    with pytest.raises(InputError, match=r"s3:// needs a package: pip install 'bocage\[remote\]'"):
        ObjectStore("s3://bucket/x")


def test_offline_hub_is_named(tmp_path: Path) -> None:
    # 2 s: needs a new process, because the hub's client reads its settings once.
    script = (
        "from bocage.shards.read.open import open_shards\nfrom bocage.shards.read.cache import CacheConfig\n"
        f"open_shards('hf://datasets/org/name/shards', CacheConfig(folder={str(tmp_path)!r}))"
    )
    process = subprocess.run(
        [sys.executable, "-c", script], env={**os.environ, "HF_HUB_OFFLINE": "1"}, capture_output=True, text=True
    )
    assert "hf://datasets/org/name/shards/dataset.json: HF_HUB_OFFLINE is set" in process.stderr.splitlines()[-1]


def test_remote_dataset_can_be_pickled(local: Manifest, tmp_path: Path) -> None:
    with FaultyServer(local.path) as server:
        files = open_shards(server.address, cache_of(tmp_path, local), QUICK).files
        files.prefetch([0, 1])
        copy = pickle.loads(pickle.dumps(files))
        assert copy.read(2, 0, 512) == local.files.read(2, 0, 512)
