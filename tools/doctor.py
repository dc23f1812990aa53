"""``bocage doctor``: what this machine has and lacks, and whether shards are healthy, without changing anything."""

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

from bocage.shards.errors import InputError

State = Literal["ok", "note", "fault"]
_STYLES: dict[State, str] = {"ok": "green", "note": "yellow", "fault": "bold red"}
_GIGABYTE = 1e9
_LEAST_FREE, _LEAST_SHARED = 10.0, 1.0  # GB
_LEAST_FILES = 1024


@dataclass(frozen=True)
class Finding:
    """One line of the report: what was looked at, what there is, and what to do where it is not ``ok``."""

    subject: str
    state: State
    text: str


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command."""
    parser.add_argument("--shards", metavar="SHARDS", help="also look at these shards, or their address")
    parser.add_argument("--output", type=Path, default=Path(), metavar="FOLDER", help="where runs go (default: here)")


def run(arguments: argparse.Namespace) -> int:
    """Print what was found; 1 where something is at fault, else 0."""
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
    for finding in found:  # lines as they are, which other programs can search
        console.print(f"{finding.state:<5}", style=_STYLES[finding.state], end="  ")
        console.print(f"{finding.subject:<{width}}  {finding.text}", markup=False, highlight=False, soft_wrap=True)
    faults = sum(finding.state == "fault" for finding in found)
    print(f"{faults} faults" if faults != 1 else "1 fault")
    return 1 if faults else 0


def _python() -> Iterator[Finding]:
    from bocage.ssl.engine.logging.provenance import git_revision

    yield Finding("python", "ok", f"{platform.python_version()}, {platform.platform()}, {sys.executable}")
    revision = git_revision()
    yield Finding("bocage", "ok", importlib.metadata.version("bocage") + (f", commit {revision}" if revision else ""))


def _packages() -> Iterator[Finding]:
    """What bocage requires, against what is installed."""
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
    yield Finding("packages", "ok", f"all {len(needed)} that bocage requires, e.g. {main}")


def _devices() -> Iterator[Finding]:
    import torch

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()  # macOS has none
    yield Finding("CPU", "ok", f"{cores} cores for this process, {torch.get_num_threads()} threads of PyTorch")
    if not torch.cuda.is_available():
        other = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        text = f"none that CUDA finds{f'; {other} is there' if other else ': full-size recipes need GPUs'}"
        yield Finding("GPU", "note", text)
        return
    for number in range(torch.cuda.device_count()):
        facts = torch.cuda.get_device_properties(number)
        half = "bf16" if torch.cuda.is_bf16_supported() else "no bf16: engine.precision=fp16"
        yield Finding(f"GPU {number}", "ok", f"{facts.name}, {facts.total_memory / _GIGABYTE:.0f} GB, {half}")
    nccl = torch.distributed.is_available() and torch.distributed.is_nccl_available()
    yield Finding("NCCL", "ok" if nccl else "fault", "there" if nccl else "missing: GPUs cannot train together")


def _disks(output: Path) -> Iterator[Finding]:
    from huggingface_hub.constants import HF_HUB_CACHE

    for subject, folder in (
        ("output", output),
        ("temporary files", Path(tempfile.gettempdir())),
        ("hub cache", Path(HF_HUB_CACHE)),
    ):
        there = folder.absolute()
        while not there.exists():
            there = there.parent
        free = shutil.disk_usage(there).free / _GIGABYTE
        if not there.is_dir():
            yield Finding(subject, "fault", f"{there} is a file")
        elif not os.access(there, os.W_OK):
            yield Finding(subject, "fault", f"{there} cannot be written")
        elif free < _LEAST_FREE:
            yield Finding(subject, "note", f"{free:.1f} GB free at {folder}: little for checkpoints")
        else:
            yield Finding(subject, "ok", f"{free:.0f} GB free at {folder}")
    shared = Path("/dev/shm")
    if shared.is_dir():
        size = shutil.disk_usage(shared).total / _GIGABYTE
        few = size < _LEAST_SHARED
        advice = ": readers of batches need more; in a container, --shm-size=8g, or workers=0" if few else ""
        yield Finding("shared memory", "note" if few else "ok", f"{size:.1f} GB at {shared}{advice}")


def _limits() -> Iterator[Finding]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    few = soft != resource.RLIM_INFINITY and soft < _LEAST_FILES
    yield Finding(
        "open files", "note" if few else "ok", f"{soft} at a time{f': ulimit -n {hard} before a run' if few else ''}"
    )


def _tokens() -> Iterator[Finding]:
    """Whether there are tokens; never what they are."""
    from bocage.ssl.encoders.hub import may_upload
    from bocage.ssl.engine.logging.trackers import has_wandb_key

    hub = may_upload()
    yield Finding("hub token", "ok" if hub else "note", "there" if hub else "none: publishing is a dry run")
    wandb, mode = has_wandb_key(), os.environ.get("WANDB_MODE")
    told = "there" if wandb else "none: runs are recorded offline"
    yield Finding("W&B key", "ok" if wandb else "note", f"{told}{f'; WANDB_MODE={mode} rules' if mode else ''}")


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
    yield Finding("shards", "ok", f"{rows:,} patches in {len(manifest.shards):,} tars, {size:.1f} GB: {names}")
    splits = ", ".join(manifest.splits) or "none: recipes need split=all"
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
        yield Finding("tars", "fault", f"{len(wrong)} missing or of another size ({shown}): copy or shard them again")
    else:
        yield Finding("tars", "ok", f"all there, of the size they were written with; `bocage verify {where}` reads all")
