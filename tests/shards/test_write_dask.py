"""Sharding on a local Dask cluster of processes."""

import builtins
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from small_shards import KEYS, contents, small
from small_tree import raster_path

from bocage.shards.errors import InputError
from bocage.shards.modality import FLAIR_HUB
from bocage.shards.write.writer import DatasetWriter, write_shards
from bocage.tools.main import main


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """A scheduler here and two worker processes."""
    distributed = pytest.importorskip("distributed")
    with distributed.LocalCluster(
        n_workers=2, threads_per_worker=1, processes=True, dashboard_address=":0", host="127.0.0.1"
    ) as cluster:
        yield cluster


# Two worker processes start and import the codecs.
def test_a_cluster_writes_the_same_bytes_and_reports_faults(
    cluster: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    address = cluster.scheduler_address
    catalogue = small(tmp_path)
    whole = contents(write_shards(catalogue, tmp_path / "whole", samples_per_shard=1).path)
    done_counts: list[int] = []
    writer = DatasetWriter(catalogue, tmp_path / "out", samples_per_shard=1)
    writer.write(scheduler=address, progress=lambda done, total, written: done_counts.append(done))
    assert contents(tmp_path / "out") == whole
    assert (done_counts[0], done_counts[-1]) == (0, 6)
    assert done_counts == sorted(done_counts)
    assert main(["shard", str(tmp_path / "tree"), str(tmp_path / "command"), "--scheduler", address]) == 0
    assert "note" not in capsys.readouterr().out

    (tmp_path / "out" / "shard-000003.tar").unlink()
    writer.write(scheduler=address)
    assert contents(tmp_path / "out") == whole

    raster_path(tmp_path / "tree", FLAIR_HUB["SPOT_RGBI"], KEYS[4]).write_bytes(b"")
    strict = DatasetWriter(catalogue, tmp_path / "strict", samples_per_shard=1, max_bad=0)
    with pytest.raises(InputError, match=r"1 unreadable patch, but --max-bad allows 0: .*_1-1\.tif"):
        strict.write(scheduler=address)
    (tmp_path / "tree").rename(tmp_path / "moved")
    lenient = DatasetWriter(catalogue, tmp_path / "strict", samples_per_shard=1, max_bad=1)
    with pytest.raises(InputError, match=rf"^{tmp_path / 'tree'}: the source is gone"):
        lenient.write(scheduler=address)
    (tmp_path / "moved").rename(tmp_path / "tree")
    assert len(lenient.write(scheduler=address)) == 5


class _StopError(Exception):
    pass


def test_workers_stop_when_the_run_ends(cluster: Any, tmp_path: Path) -> None:
    catalogue = small(tmp_path)
    writer = DatasetWriter(catalogue, tmp_path / "out", samples_per_shard=1)

    def stop(done: int, total: int, written: int) -> None:
        if done:
            raise _StopError

    with pytest.raises(_StopError):
        writer.write(scheduler=cluster.scheduler_address, progress=stop)
    parts = tmp_path / "out" / "parts"
    assert not list(parts.glob("run-*"))
    time.sleep(0.5)
    assert len(list(parts.glob("*.parquet"))) < 6
    assert len(writer.write()) == 6


def test_missing_scheduler_workers_or_library_are_input_errors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    distributed = pytest.importorskip("distributed")
    monkeypatch.setattr("bocage.shards.write.dask._CONNECT_TIMEOUT", 1)
    writer = DatasetWriter(small(tmp_path, patches=2), tmp_path / "out")
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
    with pytest.raises(InputError, match=rf"tcp://127.0.0.1:{port}: no Dask scheduler answers there; start one"):
        writer.write(scheduler=f"tcp://127.0.0.1:{port}")
    with pytest.raises(InputError, match=r"--scheduler nonsense://x: no Dask scheduler answers there; start"):
        writer.write(scheduler="nonsense://x")
    with (
        distributed.LocalCluster(n_workers=0, processes=True, dashboard_address=":0", host="127.0.0.1") as empty,
        pytest.raises(InputError, match="the scheduler has no workers; start some with `dask worker tcp:"),
    ):
        writer.write(scheduler=empty.scheduler_address)
    real_import = builtins.__import__

    def import_without_distributed(name: str, *rest: Any) -> Any:
        if name == "distributed":
            raise ImportError(name)
        return real_import(name, *rest)

    monkeypatch.setattr(builtins, "__import__", import_without_distributed)
    with pytest.raises(InputError, match=r"needs Dask's distributed, here and on the workers: pip install 'bocage"):
        writer.write(scheduler="tcp://head:8786")
