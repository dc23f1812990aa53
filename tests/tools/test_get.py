"""``bocage get`` against a stand-in of the hub: choice of zips, resume, faults of network and disk, interruptions."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from full_tree import zip_folders
from hub_stand_in import Hub
from huggingface_hub import constants
from small_disk import remount, tmpfs
from small_shards import KEYS, SMALL, contents
from small_tree import write_tree

from bocage.shards.errors import InputError
from bocage.shards.format.manifest import Manifest
from bocage.shards.source.flair_hub import download
from bocage.shards.source.flair_hub import toy as toy_module
from bocage.shards.source.flair_hub.download import (
    PARTIAL_SUFFIX,
    download_zips,
    inspect_folder,
    locked_folder,
)
from bocage.shards.source.flair_hub.hub import REPOSITORY, RemoteZip, choose_zips, list_zips
from bocage.tools.main import main

SIZE = 400_000
TOY = "FLAIR-HUB_TOY_DATASET.zip"
METADATA = "GLOBAL_ALL_MTD.zip"
IMAGE, HEIGHT, HISTORICAL = "D012-2019_AERIAL_RGBI.zip", "D012-2019_DEM_ELEV.zip", "D012-195X_AERIAL-RLT_PAN.zip"
OTHER = ["D004-2021_AERIAL_RGBI.zip", "D004-2021_DEM_ELEV.zip", "D004-195X_AERIAL-RLT_PAN.zip"]
NAMES = sorted([METADATA, IMAGE, HEIGHT, HISTORICAL, *OTHER])
SECRET = "hf_secretsecretsecret"


def dataset() -> dict[str, bytes]:
    """Files of the repository: zips, one of them outside of LFS, and others."""
    files = {f"data/{name}": np.random.default_rng(seed).bytes(SIZE) for seed, name in enumerate(NAMES)}
    files[f"data/{HISTORICAL}"] = b"a small file"
    return {"README.md": b"# FLAIR-HUB", "data/notes.zip": b"no modality", **files}


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with Hub() as hub:
        hub.datasets[REPOSITORY] = dataset()
        use_endpoint(hub.address, monkeypatch)
        # The client writes in pieces of this size; smaller ones let small files be cut.
        monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1 << 14)
        monkeypatch.setenv("HF_TOKEN", SECRET)
        yield hub
        hub.shutdown()


def use_endpoint(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Set what the client reads from HF_ENDPOINT when it is imported."""
    monkeypatch.setattr(constants, "ENDPOINT", address)
    template = address + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)


def get(out: Path, *options: str) -> int:
    return main(["get", str(out), *options])


def zips_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if not path.name.startswith("."))


def assert_complete(hub: Hub, out: Path, names: list[str] = NAMES) -> None:
    assert zips_in(out) == sorted(names)
    for name in names:
        assert (out / name).read_bytes() == hub.datasets[REPOSITORY][f"data/{name}"], name


def names_of(zips: list[RemoteZip]) -> list[str]:
    return [item.name for item in zips]


def only(name: str) -> list[RemoteZip]:
    return [item for item in list_zips() if item.name == name]


def test_the_listing_has_several_pages_and_other_files(hub: Hub) -> None:
    hub.page = 3
    zips = list_zips()
    assert names_of(zips) == [METADATA, *(name for name in NAMES if name != METADATA)]
    assert {(item.size, len(item.digest)) for item in zips} == {(SIZE, 64), (12, 40)}
    assert {item.domain for item in zips} == {"", "D004-2021", "D004-195X", "D012-2019", "D012-195X"}


@pytest.mark.parametrize(
    ("domains", "modalities", "expected"),
    [
        (None, None, NAMES),
        (["D012-2019"], None, [METADATA, IMAGE, HEIGHT, HISTORICAL]),
        (None, ["DEM_ELEV"], [METADATA, HEIGHT, OTHER[1]]),
        (["D012-2019", "D004-2021"], ["AERIAL_RGBI"], [METADATA, IMAGE, OTHER[0]]),
        (["D004-2021"], ["AERIAL-RLT_PAN", "DEM_ELEV"], [METADATA, *OTHER[1:]]),
    ],
)
def test_domains_and_modalities_choose_zips(
    hub: Hub, domains: list[str] | None, modalities: list[str] | None, expected: list[str]
) -> None:
    assert sorted(names_of(choose_zips(list_zips(), domains, modalities))) == sorted(expected)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--domains", "d012"], "unknown domain 'd012'; did you mean D012-2019?"),
        (["--domains", "D012-195X"], "unknown domain 'D012-195X'; did you mean D012-2019?"),
        (["--domains", "Paris"], "unknown domain 'Paris'; known ones: D004-2021, D012-2019"),
        (["--modalities", "aerial_rgb"], "unknown modality 'aerial_rgb'; did you mean AERIAL_RGBI?"),
        (["--modalities", "GLOBAL_ALL_MTD"], "unknown modality 'GLOBAL_ALL_MTD'; known ones: "),
        (["--repo", "IGNF/other"], "IGNF/other: no such dataset on the hub, or a private one; check its name"),
        (["--repo", "a/b/c"], "'a/b/c' is no name of a repository; give org/name, e.g. IGNF/FLAIR-HUB"),
        (["--revision", "v9"], "IGNF/FLAIR-HUB at v9: the repository has no such revision"),
    ],
)
def test_wrong_choices_are_named(
    hub: Hub, tmp_path: Path, options: list[str], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert get(tmp_path / "out", *options) == 2
    errors = capsys.readouterr().err
    assert errors.startswith(f"bocage: error: {sentence}") and errors.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_a_choice_without_zips_is_named(hub: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    del hub.datasets[REPOSITORY][f"data/{HEIGHT}"]
    assert get(tmp_path, "--domains", "D012-2019", "--modalities", "DEM_ELEV") == 2
    assert "no zip of DEM_ELEV in D012-2019; choose others" in capsys.readouterr().err
    hub.datasets[REPOSITORY] = {"README.md": b"", "data/notes.zip": b""}
    assert get(tmp_path) == 2
    assert "IGNF/FLAIR-HUB: holds no zips like D012-2019_AERIAL_RGBI.zip" in capsys.readouterr().err


def test_zips_lie_flat_and_a_second_run_downloads_nothing(
    hub: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "new" / "out"
    assert get(out) == 0
    assert_complete(hub, out)
    assert sorted(hub.ranges) == [(name, 0) for name in NAMES]
    printed = capsys.readouterr()
    assert printed.out == f"7 zips in {out}, 2.4 MB; 7 downloaded now\n"
    assert "downloading: 2 of 2 MB" in printed.err and "7 zips done" in printed.err
    # The token stays with the hub, and out of all output.
    assert set(hub.tokens) == {None}
    assert SECRET not in printed.out + printed.err
    assert all(SECRET.encode() not in path.read_bytes() for path in out.iterdir())
    assert get(out) == 0
    assert len(hub.ranges) == len(NAMES)
    assert "0 downloaded now" in capsys.readouterr().out


def test_a_later_run_may_want_more(hub: Hub, tmp_path: Path) -> None:
    assert get(tmp_path, "--domains", "D012-2019", "--workers", "1") == 0
    assert_complete(hub, tmp_path, [METADATA, IMAGE, HEIGHT, HISTORICAL])
    assert get(tmp_path, "--revision", "main") == 0
    assert_complete(hub, tmp_path)
    assert len(hub.ranges) == len(NAMES)


def test_a_dry_run_writes_nothing(hub: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert get(tmp_path / "out", "--dry-run") == 0
    rows = [[cell.strip() for cell in line.strip("│").split("│")] for line in capsys.readouterr().out.splitlines()]
    assert ["AERIAL_RGBI", "2", "0.8 MB", "0.8 MB"] in rows
    assert ["AERIAL-RLT_PAN", "2", "0.4 MB", "0.4 MB"] in rows
    assert ["GLOBAL_ALL_MTD", "1", "0.4 MB", "0.4 MB"] in rows
    assert ["all", "7", "2.4 MB", "2.4 MB"] in rows
    assert rows[-1][0].startswith("free disk space: ")
    assert not list(tmp_path.iterdir()) and not hub.ranges
    # Zips and parts of zips that are in the folder count.
    (tmp_path / IMAGE).write_bytes(hub.datasets[REPOSITORY][f"data/{IMAGE}"])
    (tmp_path / (HEIGHT + PARTIAL_SUFFIX)).write_bytes(bytes(SIZE // 4))
    before = contents(tmp_path)
    assert get(tmp_path, "--dry-run", "--domains", "D012-2019") == 0
    assert "unfinished zips, to be resumed: 0.1 MB" in capsys.readouterr().out
    assert contents(tmp_path) == before and not hub.ranges


@pytest.mark.parametrize("fault", ["503", "reset", "truncate", "stall"])
def test_a_failed_transfer_is_resumed(
    hub: Hub, tmp_path: Path, fault: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_DOWNLOAD_TIMEOUT", 1)
    hub.faults = {IMAGE: [fault]}
    assert get(tmp_path) == 0
    assert_complete(hub, tmp_path)
    first, second = [start for name, start in hub.ranges if name == IMAGE]
    assert first == 0
    assert second == 0 if fault == "503" else 0 < second <= SIZE // 2
    assert len(hub.ranges) == len(NAMES) + 1


def test_a_server_without_ranges_starts_over(hub: Hub, tmp_path: Path) -> None:
    hub.faults = {IMAGE: ["truncate", "whole"]}
    assert get(tmp_path) == 0
    assert_complete(hub, tmp_path)


def test_a_server_error_that_lasts_is_named_and_a_rerun_resumes(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(download, "_ATTEMPTS", 2)
    hub.faults = {IMAGE: ["reset", "503", "503"]}
    assert get(tmp_path, "--modalities", "AERIAL_RGBI", "--domains", "D012-2019") == 2
    errors = capsys.readouterr().err
    assert f"bocage: {IMAGE}: connection lost (" in errors and "); trying again in 1 s\n" in errors
    assert errors.endswith(f"bocage: error: {IMAGE}: HTTP status 503; run the same command again later\n")
    assert zips_in(tmp_path) == [IMAGE + PARTIAL_SUFFIX, METADATA]
    kept = (tmp_path / (IMAGE + PARTIAL_SUFFIX)).stat().st_size
    assert kept > 0
    assert get(tmp_path) == 0
    assert (IMAGE, kept) in hub.ranges
    assert_complete(hub, tmp_path)


@pytest.mark.parametrize("name", [IMAGE, HISTORICAL])
def test_a_damaged_zip_is_downloaded_again(hub: Hub, tmp_path: Path, name: str) -> None:
    hub.faults = {name: ["flip", "flip"]}
    assert get(tmp_path) == 0
    assert_complete(hub, tmp_path)
    assert [start for file, start in hub.ranges if file == name] == [0, 0, 0]


def test_a_zip_that_is_always_damaged_is_named_and_the_others_are_complete(
    hub: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hub.faults = {IMAGE: ["flip"] * 3, OTHER[0]: ["flip"] * 3}
    assert get(tmp_path, "--workers", "1") == 2
    sentence = f"{OTHER[0]}, {IMAGE}: not the hash of the hub after 3 downloads; the others are complete; run the same"
    assert sentence in capsys.readouterr().err
    assert_complete(hub, tmp_path, [name for name in NAMES if name not in (IMAGE, OTHER[0])])
    assert get(tmp_path) == 0
    assert_complete(hub, tmp_path)


def test_zips_from_elsewhere_are_checked_once(
    hub: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    files = hub.datasets[REPOSITORY]
    (tmp_path / IMAGE).write_bytes(files[f"data/{IMAGE}"])
    (tmp_path / HISTORICAL).write_bytes(files[f"data/{HISTORICAL}"])
    (tmp_path / HEIGHT).write_bytes(files[f"data/{HEIGHT}"][:-1] + b"?")
    (tmp_path / OTHER[0]).write_bytes(files[f"data/{OTHER[0]}"][:1000])
    (tmp_path / (IMAGE + PARTIAL_SUFFIX)).write_bytes(b"left over")
    assert get(tmp_path) == 0
    assert_complete(hub, tmp_path)
    assert {name for name, _ in hub.ranges} == set(NAMES) - {IMAGE, HISTORICAL}
    errors = capsys.readouterr().err
    for name in (HEIGHT, OTHER[0]):
        assert f"note: {tmp_path / name} differs from the hub and is downloaded again" in errors
    # Zips in the record are not read again, until they change.
    zips = list_zips()
    read: list[int] = []
    assert not inspect_folder(tmp_path, zips, progress=lambda *numbers: read.append(numbers[2])).missing and not read
    os.utime(tmp_path / IMAGE)
    assert not inspect_folder(tmp_path, zips, progress=lambda *numbers: read.append(numbers[2])).missing
    assert read == [1]
    (tmp_path / ".bocage-get.json").write_text("[")
    assert not inspect_folder(tmp_path, zips, progress=lambda *numbers: read.append(numbers[2])).missing
    assert read == [1, *range(1, 8)]


def test_a_new_version_on_the_hub_replaces_a_zip(hub: Hub, tmp_path: Path) -> None:
    assert get(tmp_path) == 0
    hub.datasets[REPOSITORY][f"data/{IMAGE}"] = bytes(SIZE)
    assert get(tmp_path) == 0
    assert_complete(hub, tmp_path)
    assert hub.ranges[len(NAMES) :] == [(IMAGE, 0)]


def test_the_start_of_another_file_is_no_start(hub: Hub, tmp_path: Path) -> None:
    (tmp_path / (IMAGE + PARTIAL_SUFFIX)).write_bytes(bytes(SIZE // 2))
    (tmp_path / (HEIGHT + PARTIAL_SUFFIX)).write_bytes(bytes(SIZE + 1))
    (tmp_path / (METADATA + PARTIAL_SUFFIX)).write_bytes(hub.datasets[REPOSITORY][f"data/{METADATA}"])
    assert get(tmp_path) == 0
    assert_complete(hub, tmp_path)
    assert [start for name, start in hub.ranges if name == IMAGE] == [SIZE // 2, 0]
    assert [start for name, start in hub.ranges if name == HEIGHT] == [0]
    assert METADATA not in {name for name, _ in hub.ranges}


@pytest.mark.parametrize(
    ("status", "code", "sentence"),
    [
        (401, "", "access refused (HTTP status 401); check HF_TOKEN, or log in with `hf auth login`"),
        (401, "RepoNotFound", "no such dataset on the hub, or a private one; check its name, or set HF_TOKEN"),
        (403, "", "access refused (HTTP status 403); check HF_TOKEN"),
        (403, "GatedRepo", "access is restricted; accept the terms on its page, and set HF_TOKEN"),
        (404, "RepoNotFound", "no such dataset on the hub"),
        (404, "", "not found on the server; check that it still exists"),
    ],
)
def test_refused_access_is_one_sentence(
    hub: Hub, tmp_path: Path, status: int, code: str, sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (item,) = only(IMAGE)
    hub.refuse, hub.error_code = status, code
    if code or status != 401:  # the client takes a 401 of its API for a missing repository
        assert get(tmp_path / "out") == 2
        errors = capsys.readouterr().err
        assert errors.startswith(f"bocage: error: {REPOSITORY}: {sentence}") and errors.count("\n") == 1
    with pytest.raises(InputError) as raised:
        download_zips(inspect_folder(tmp_path, [item]))
    assert str(raised.value).startswith(f"{IMAGE}: {sentence}")
    assert SECRET not in str(raised.value) and "http" not in str(raised.value)


def test_a_zip_that_is_gone_is_named(hub: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    hub.faults = {IMAGE: ["404"]}
    assert get(tmp_path) == 2
    assert f"bocage: error: {IMAGE}: not found on the server; " in capsys.readouterr().err


# About 4 s: three attempts.
def test_no_network_is_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        use_endpoint(f"http://127.0.0.1:{unused.getsockname()[1]}", monkeypatch)
        assert get(tmp_path / "out") == 2
    sentence = f"{REPOSITORY}: the server cannot be reached: no network, or a wrong HF_ENDPOINT"
    first, second, last = capsys.readouterr().err.splitlines()
    assert first == f"bocage: {sentence}; trying again in 1 s" and second == f"bocage: {sentence}; trying again in 2 s"
    assert last == f"bocage: error: {sentence}; run the same command again later"
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert get(tmp_path / "out") == 2
    assert capsys.readouterr().err == f"bocage: error: {REPOSITORY}: HF_HUB_OFFLINE is set; unset it to download\n"
    assert not list(tmp_path.iterdir())


def test_a_small_disk_is_refused_before_any_download(
    hub: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with tmpfs(tmp_path / "disk", "2m") as disk:
        out = disk / "out"
        assert get(out) == 2
        error = f"{out}: 2.4 MB are needed to download, but only 2.1 MB are free: choose another"
        assert error in capsys.readouterr().err
        assert not zips_in(out) and not hub.ranges
        remount(disk, "size=2600k")
        # Complete zips in the folder need no space.
        for name in NAMES[:3]:
            (out / name).write_bytes(hub.datasets[REPOSITORY][f"data/{name}"])
        assert get(out) == 0
        assert_complete(hub, out)


def test_a_disk_that_fills_up_is_one_sentence(hub: Hub, tmp_path: Path) -> None:
    with tmpfs(tmp_path / "disk", "3m") as disk:
        local = inspect_folder(disk / "out", list_zips())
        hub.pause = 0.05

        def fill(done: int, total: int, count: int) -> None:
            if not (disk / "filler").exists():
                (disk / "filler").write_bytes(bytes(1 << 20))

        with (
            pytest.raises(InputError, match="the disk is full; free space and run the same command again"),
            locked_folder(disk / "out"),
        ):
            download_zips(local, progress=fill)
        (disk / "filler").unlink()
        assert get(disk / "out") == 0
        assert_complete(hub, disk / "out")


def test_a_folder_that_cannot_be_made_is_named(hub: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").touch()
    assert get(tmp_path / "file" / "out") == 2
    assert "cannot be read or written: Not a directory" in capsys.readouterr().err


def _hold_lock(folder: Path, locked: Any) -> None:
    with locked_folder(folder):
        locked.set()
        time.sleep(300)


# A process starts and is killed at the end, because a process does not exclude itself.
def test_a_folder_into_which_another_run_downloads_is_not_even_inspected(
    hub: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / IMAGE).write_bytes(hub.datasets[REPOSITORY][f"data/{IMAGE}"])
    context = multiprocessing.get_context("spawn")
    locked = context.Event()
    holder = context.Process(target=_hold_lock, args=(tmp_path, locked))
    holder.start()
    try:
        assert locked.wait(60)
        assert get(tmp_path) == 2
        assert f"{tmp_path}: another run is writing there" in capsys.readouterr().err
        assert zips_in(tmp_path) == [IMAGE] and not (tmp_path / ".bocage-get.json").exists()
    finally:
        holder.kill()
        holder.join(60)


# About 5 s: two processes, one of them while another downloads.
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGKILL, -9)])
def test_an_interrupted_process_resumes(hub: Hub, tmp_path: Path, number: int, code: int) -> None:
    hub.datasets[REPOSITORY] = {f"data/{name}": np.random.default_rng(1).bytes(30_000_000) for name in NAMES[:2]}
    hub.pause = 0.005
    environment = os.environ | {"HF_ENDPOINT": hub.address, "HF_HUB_DISABLE_XET": "1"}
    command = [sys.executable, "-m", "bocage", "get", str(tmp_path), "--workers", "2"]
    process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
    partials = [tmp_path / (name + PARTIAL_SUFFIX) for name in NAMES[:2]]
    while not all(path.exists() and path.stat().st_size for path in partials):
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)
    # Another run must not write to the same files.
    assert get(tmp_path) == 2
    process.send_signal(number)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == code
    name = signal.Signals(number).name
    assert errors == (
        "" if number == signal.SIGKILL else f"bocage: interrupted by {name}; run the same command to resume\n"
    )
    kept = {path.name.removesuffix(PARTIAL_SUFFIX): path.stat().st_size for path in partials}
    assert all(0 < size < 30_000_000 for size in kept.values())
    hub.pause = 0
    assert get(tmp_path) == 0
    assert_complete(hub, tmp_path, NAMES[:2])
    assert sorted(hub.ranges[2:]) == sorted(kept.items())


# Some 10 s: patches are simulated, and sharded twice.
def test_from_the_hub_to_shards_without_zips(hub: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tree, served, out = tmp_path / "tree", tmp_path / "served", tmp_path / "out"
    modalities = ["SPOT_RGBI", "SENTINEL2_TS", "SENTINEL2_MSK-SC", "AERIAL-RLT_PAN", "ALL_LABEL-LPIS"]
    assert main(["sample", str(tree), "--patches", "6", "--modalities", *modalities]) == 0
    assert main(["shard", str(tree), str(tmp_path / "expected")]) == 0
    shutil.copytree(tree, served)
    zip_folders(served)
    hub.datasets[REPOSITORY] = {f"data/{path.name}": path.read_bytes() for path in served.glob("*.zip")}
    unfinished = next(name for name in sorted(zips_in(served)) if "SPOT" in name)
    hub.faults = {unfinished: ["404"]}
    assert get(out, "--workers", "1") == 2
    assert main(["shard", str(out), str(tmp_path / "shards")]) == 2
    assert f"{out / unfinished}{PARTIAL_SUFFIX}: unfinished download" in capsys.readouterr().err
    assert get(out) == 0
    assert zips_in(out) == sorted(path.name for path in served.glob("*.zip"))
    (out / "notes.txt").touch()
    assert main(["shard", str(out), str(tmp_path / "shards"), "--delete-source"]) == 0
    assert contents(tmp_path / "shards") == contents(tmp_path / "expected")
    assert zips_in(out) == [METADATA, "notes.txt"]


@pytest.fixture
def toy(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Serve the toy subset of a small tree; returns the tree."""
    tree = write_tree(tmp_path / "wrapped" / "FLAIR-HUB_TOY", KEYS[:3], SMALL)
    (tree / "FLAIR-HUB_TOY_TRAIN.csv").write_text("a list")
    archive = shutil.make_archive(str(tmp_path / "archive"), "zip", tree.parent)
    hub.datasets["IGN/toy"] = {TOY: Path(archive).read_bytes()}
    Path(archive).unlink()
    monkeypatch.setattr(toy_module, "TOY_URL", f"http://localhost:{hub.server_address[1]}/cdn/IGN/toy/{TOY}")
    return tree


def test_the_toy_subset_is_unpacked(hub: Hub, toy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    size = f"{len(hub.datasets['IGN/toy'][TOY]) / 1e6:.1f} MB"
    assert get(out, "--toy", "--dry-run") == 0
    assert size in capsys.readouterr().out and not out.exists()
    (out / "D012-2019_SPOT_RGBI" / "AF-S1-27").mkdir(parents=True)  # of an interrupted run
    interrupted = {"size": 1, "names": ["D012-2019_SPOT_RGBI"], "is_complete": False}
    (out / ".bocage-toy.json").write_text(json.dumps(interrupted))
    hub.faults = {TOY: ["truncate", "flip"]}
    assert get(out, "--toy") == 0
    assert capsys.readouterr().out == f"5 folders and files of the toy subset in {out}\n"
    assert {name: digest for name, digest in contents(out).items() if name[0] != "."} == contents(toy)
    assert hub.tokens and set(hub.tokens) == {None}
    assert main(["shard", str(out), str(tmp_path / "shards")]) == 0
    assert len(Manifest.open(tmp_path / "shards")) == 3
    capsys.readouterr()
    requests = len(hub.ranges)
    assert get(out, "--toy") == 0
    assert capsys.readouterr().out == f"the toy subset is in {out} already\n"
    assert len(hub.ranges) == requests == 3


def test_the_toy_subset_needs_space_for_its_zip_and_its_files(
    hub: Hub, toy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    size = len(hub.datasets["IGN/toy"][TOY])
    kilobytes = size * 3 // 2 // 1024
    with tmpfs(tmp_path / "disk", f"{kilobytes}k") as disk:
        assert get(disk / "out", "--toy") == 2
        assert f"{2 * size / 1e6:.1f} MB are needed to download and unpack, but only" in capsys.readouterr().err
        assert not hub.ranges
        # Its files may be larger than the zip.
        remount(disk, f"size={kilobytes * 2}k")
        archive = Path(shutil.make_archive(str(tmp_path / "zeros"), "zip", toy.parent))
        with zipfile.ZipFile(archive, "a", zipfile.ZIP_DEFLATED) as file:
            file.writestr(f"{toy.name}/zeros.tif", bytes(4 * size))
        hub.datasets["IGN/toy"][TOY] = archive.read_bytes()
        assert get(disk / "out", "--toy") == 2
        assert f"MB are needed to unpack {TOY}, but only" in capsys.readouterr().err
        assert zips_in(disk / "out") == [TOY]


def test_the_toy_subset_replaces_no_other_data(
    hub: Hub, toy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    folder = next(path.name for path in toy.iterdir() if path.is_dir())
    (out / folder).mkdir(parents=True)
    (out / folder / "mine.tif").touch()
    assert get(out, "--toy") == 2
    assert f"{out / folder}: exists and is not of the toy subset" in capsys.readouterr().err
    assert (out / folder / "mine.tif").exists()
    shutil.rmtree(out / folder)
    assert get(out, "--toy") == 0


def test_a_toy_subset_of_another_layout_is_named(
    hub: Hub, toy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "other"
    (folder / "a").mkdir(parents=True)
    (folder / "a" / "b.tif").write_bytes(bytes(100))
    hub.datasets["IGN/toy"][TOY] = Path(shutil.make_archive(str(tmp_path / "new"), "zip", folder)).read_bytes()
    assert get(tmp_path / "out", "--toy") == 2
    assert f"{tmp_path / 'out' / TOY}: has no folder like D012-2019_AERIAL_RGBI" in capsys.readouterr().err
    assert get(tmp_path / "out", "--toy", "--domains", "D012-2019") == 2
    assert "--toy: is one file; drop --domains" in capsys.readouterr().err
    del hub.datasets["IGN/toy"]
    hub.refuse = 404
    assert get(tmp_path / "out", "--toy") == 2
    assert f"{TOY}: not found on the server; check that it still exists" in capsys.readouterr().err
