"""``bocage doctor``: check this machine, its packages and, on request, shards. Nothing is changed."""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import platform
import resource
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from packaging.requirements import Requirement
from rich.console import Console

from bocage.shards.errors import InputError, counted

State = Literal["ok", "note", "fault"]
_STYLES: dict[State, str] = {"ok": "green", "note": "yellow", "fault": "bold red"}
_GIGABYTE = 1e9
_MIN_FREE, _MIN_SHARED = 10.0, 1.0  # GB
_MIN_OPEN_FILES = 1024


@dataclass(frozen=True)
class Finding:
    """One line of the report: the subject, its state, and details with advice unless the state is ``ok``."""

    subject: str
    state: State
    text: str


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command."""
    parser.add_argument("--shards", metavar="SHARDS", help="also check these shards: a folder or an address")
    parser.add_argument(
        "--output",
        type=Path,
        default=Path(),
        metavar="FOLDER",
        help="folder for runs, whose disk is checked (default: the current one)",
    )


def run(arguments: argparse.Namespace) -> int:
    """Print the findings; return 1 if there is a fault, else 0."""
    checks: list[Callable[[], Iterator[Finding]]] = [
        _python,
        _packages,
        _devices,
        lambda: _disks(arguments.output),
        _limits,
        _tokens,
    ]
    if arguments.shards:
        checks.append(lambda: _shards(arguments.shards))
    found = [finding for check in checks for finding in check()]
    console = Console()
    width = max(len(finding.subject) for finding in found)
    for finding in found:  # unwrapped lines, so that other programs can search them
        console.print(f"{finding.state:<5}", style=_STYLES[finding.state], end="  ")
        console.print(f"{finding.subject:<{width}}  {finding.text}", markup=False, highlight=False, soft_wrap=True)
    faults = sum(finding.state == "fault" for finding in found)
    print(counted(faults, "fault"))
    return 1 if faults else 0


def _python() -> Iterator[Finding]:
    from bocage.ssl.engine.logging.provenance import git_revision

    yield Finding("python", "ok", f"{platform.python_version()}, {platform.platform()}, {sys.executable}")
    revision = git_revision()
    yield Finding("bocage", "ok", importlib.metadata.version("bocage") + (f", commit {revision}" if revision else ""))


def _packages() -> Iterator[Finding]:
    """Compare installed packages with the requirements of bocage."""
    wrong = []
    requirements = [Requirement(text) for text in importlib.metadata.requires("bocage") or ()]
    needed = [item for item in requirements if item.marker is None or item.marker.evaluate({"extra": ""})]
    for item in needed:
        try:
            version = importlib.metadata.version(item.name)
        except importlib.metadata.PackageNotFoundError:
            wrong.append(f"{item.name} is missing")
            continue
        if not item.specifier.contains(version, prereleases=True):
            wrong.append(f"{item.name} {version} is not {item.specifier}")
    if wrong:
        yield Finding("packages", "fault", f"{'; '.join(wrong)}: pip install --upgrade bocage")
        return
    main = ", ".join(
        f"{name} {importlib.metadata.version(name)}" for name in ("torch", "timm", "accelerate", "rasterio")
    )
    yield Finding("packages", "ok", f"all {len(needed)} required packages, e.g. {main}")


def _devices() -> Iterator[Finding]:
    import torch

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()  # macOS has none
    yield Finding("CPU", "ok", f"{cores} cores for this process, {torch.get_num_threads()} threads of PyTorch")
    if not torch.cuda.is_available():
        other = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        text = f"no CUDA device{f'; {other} is available' if other else ': full-size recipes need GPUs'}"
        yield Finding("GPU", "note", text)
        return
    for number in range(torch.cuda.device_count()):
        facts = torch.cuda.get_device_properties(number)
        half = "bf16" if torch.cuda.is_bf16_supported() else "no bf16: engine.precision=fp16"
        yield Finding(f"GPU {number}", "ok", f"{facts.name}, {facts.total_memory / _GIGABYTE:.0f} GB, {half}")
    nccl = torch.distributed.is_available() and torch.distributed.is_nccl_available()
    yield Finding(
        "NCCL", "ok" if nccl else "fault", "available" if nccl else "missing: several GPUs cannot train together"
    )


def _disks(output: Path) -> Iterator[Finding]:
    from huggingface_hub.constants import HF_HUB_CACHE

    for subject, folder in (
        ("output", output),
        ("temporary files", Path(tempfile.gettempdir())),
        ("hub cache", Path(HF_HUB_CACHE)),
    ):
        existing = folder.absolute()
        while not existing.exists():
            existing = existing.parent
        free = shutil.disk_usage(existing).free / _GIGABYTE
        if not existing.is_dir():
            yield Finding(subject, "fault", f"{existing} is a file")
        elif not os.access(existing, os.W_OK):
            yield Finding(subject, "fault", f"{existing} cannot be written")
        elif free < _MIN_FREE:
            yield Finding(subject, "note", f"{free:.1f} GB free at {folder}: checkpoints need more")
        else:
            yield Finding(subject, "ok", f"{free:.0f} GB free at {folder}")
    shared = Path("/dev/shm")
    if shared.is_dir():
        size = shutil.disk_usage(shared).total / _GIGABYTE
        few = size < _MIN_SHARED
        advice = ": DataLoader workers need more; in a container use --shm-size=8g, or set workers=0" if few else ""
        yield Finding("shared memory", "note" if few else "ok", f"{size:.1f} GB at {shared}{advice}")


def _limits() -> Iterator[Finding]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    few = soft != resource.RLIM_INFINITY and soft < _MIN_OPEN_FILES
    yield Finding(
        "open files", "note" if few else "ok", f"{soft} at a time{f': ulimit -n {hard} before a run' if few else ''}"
    )


def _tokens() -> Iterator[Finding]:
    """Report whether tokens exist; never print them."""
    from bocage.ssl.encoders.hub import has_token
    from bocage.ssl.engine.logging.trackers import has_wandb_key

    hub = has_token()
    yield Finding("hub token", "ok" if hub else "note", "available" if hub else "none: publishing is a dry run")
    wandb, mode = has_wandb_key(), os.environ.get("WANDB_MODE")
    key = "available" if wandb else "none: runs are recorded offline"
    yield Finding(
        "W&B key", "ok" if wandb else "note", f"{key}{f'; WANDB_MODE={mode} takes precedence' if mode else ''}"
    )


def _shards(where: str) -> Iterator[Finding]:
    from bocage.shards.read.open import is_remote, open_shards

    try:
        manifest = open_shards(where)
        rows = len(manifest.index)  # reads and checks the index
    except InputError as error:
        yield Finding("shards", "fault", str(error))
        return
    size = sum(shard.bytes for shard in manifest.shards) / _GIGABYTE
    names = ", ".join(manifest.registry)
    yield Finding(
        "shards", "ok", f"{counted(rows, 'patch')} in {counted(len(manifest.shards), 'tar')}, {size:.1f} GB: {names}"
    )
    splits = ", ".join(manifest.splits) or "none: set split=all in recipes"
    yield Finding("splits", "ok" if manifest.splits else "note", splits)
    if is_remote(where):
        return
    wrong = [
        shard.name
        for shard in manifest.shards
        if not (path := manifest.path / shard.name).is_file() or path.stat().st_size != shard.bytes
    ]
    if wrong:
        shown = ", ".join(wrong[:3]) + (", ..." if len(wrong) > 3 else "")
        yield Finding("tars", "fault", f"{len(wrong)} missing or of the wrong size ({shown}): copy or write them again")
    else:
        yield Finding(
            "tars", "ok", f"all present, with the recorded sizes; `bocage verify {where}` checks their content"
        )
