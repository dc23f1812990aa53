"""W&B and TensorBoard behind one key: opening a run there, again when it is resumed, and links to what it left."""

from __future__ import annotations

import importlib.util
import netrc
import os
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

from accelerate import Accelerator

from bocage.shards.errors import InputError
from bocage.ssl.engine.logging.provenance import flat, plain

TrackerName = Literal["none", "wandb", "tensorboard"]
_WANDB_MODES = ("online", "offline", "disabled", "shared")


def check_tracker(tracker: TrackerName) -> None:
    """Check that the package of a tracker is installed.

    Raises:
        InputError: it is missing.
    """
    packages = {"none": (), "wandb": ("wandb",), "tensorboard": ("tensorboard", "tensorboardX")}[tracker]
    if packages and not any(importlib.util.find_spec(package) for package in packages):
        raise InputError(f"engine.tracker={tracker} needs a package that is missing: pip install {packages[0]}")


def start_tracker(
    accelerator: Accelerator,
    tracker: TrackerName,
    output: Path,
    project: str,
    run: str,
    config: Mapping[str, Any],
    reported_step: int,
) -> str:
    """Open the run where it is tracked; a resumed one goes on there.

    Args:
        accelerator: which keeps the tracker.
        tracker: which one.
        output: the folder of the run, where files of the tracker go.
        project: its name there, also of TensorBoard's folder.
        run: identity of the run, the same when it is resumed.
        config: what it runs with; secrets are replaced.
        reported_step: the last step recorded; TensorBoard shows none after it from before.

    Returns:
        What the user should know of it; empty where that is nothing.

    Raises:
        InputError: W&B cannot be reached, or refuses.
    """
    if tracker == "wandb":
        with _wandb_faults():
            options = {**_wandb_options(output, run, offline=not has_wandb_key()), "name": output.name}
            accelerator.init_trackers(project, config=plain(config), init_kwargs={"wandb": options})
        if options["mode"] == "offline":
            return f"W&B is offline; afterwards: wandb sync {output}/wandb/offline-run-*"
    elif tracker == "tensorboard":
        settings = {
            name: value if isinstance(value, bool | int | float | str) else str(value)
            for name, value in flat(plain(config)).items()
        }
        options = {"purge_step": reported_step + 1}
        accelerator.init_trackers(project, config=settings, init_kwargs={"tensorboard": options})
    return ""


def link(trackers: Iterable[Any], step: int, name: str, place: str) -> None:
    """Say in a run that is open where something lies: in W&B's summary, as a text of TensorBoard.

    Args:
        trackers: Accelerate's.
        step: at which.
        name: of what lies there, e.g. ``checkpoint``.
        place: path or address.
    """
    for tracker in trackers:
        if tracker.name == "wandb":
            tracker.tracker.summary[name] = place
        else:
            tracker.tracker.add_text(name, place, step)


def link_afterwards(
    tracker: TrackerName, output: Path, project: str, run: str, step: int, places: Mapping[str, str]
) -> None:
    """``link`` in a run that has ended, and was tracked: it is opened once more, offline where it was so.

    Args:
        tracker: of the run; with ``none`` nothing happens.
        output: the folder of the run.
        project: as the run had it.
        run: its identity.
        step: its last.
        places: path or address by name.

    Raises:
        InputError: the tracker's package is missing, W&B cannot be reached, or the folder cannot be written.
    """
    check_tracker(tracker)
    if tracker == "wandb":
        online, offline = (any((output / "wandb").glob(f"{kind}-*-{run}")) for kind in ("run", "offline-run"))
        if not online and not offline:
            return
        import wandb

        with _wandb_faults():
            options = _wandb_options(output, run, offline=not online or not has_wandb_key())
            with wandb.init(project=project, **options) as opened:
                opened.summary.update(dict(places))
    elif tracker == "tensorboard" and (output / project).is_dir():
        from torch.utils.tensorboard import SummaryWriter

        try:
            with SummaryWriter(str(output / project)) as writer:
                for name, place in places.items():
                    writer.add_text(name, place, step)
        except OSError as error:
            raise InputError(f"{output / project} cannot be written: {error.strerror}") from error


def finish(trackers: Iterable[Any], *, failed: bool) -> None:
    """End a run where it is tracked; W&B marks one that failed."""
    for tracker in trackers:
        if tracker.name == "wandb" and failed:
            tracker.tracker.finish(exit_code=1)
        else:
            tracker.finish()


@contextmanager
def _wandb_faults() -> Iterator[None]:
    import wandb

    try:
        yield
    except (wandb.Error, OSError) as error:
        what = " ".join(str(error).split()) or type(error).__name__
        raise InputError(
            f"W&B: {what}; WANDB_MODE=offline keeps the run here, engine.tracker=none does without"
        ) from error


def _wandb_options(output: Path, run: str, *, offline: bool) -> dict[str, Any]:
    import wandb

    mode = os.environ.get("WANDB_MODE") or ("offline" if offline else "online")
    if mode not in _WANDB_MODES:
        raise InputError(f"WANDB_MODE={mode} is not one of {', '.join(_WANDB_MODES)}")
    # W&B notes the command line with its metadata; it may not when that holds a secret.
    secret = plain({"words": sys.argv})["words"] != sys.argv
    settings = wandb.Settings(console="off", silent=True, x_disable_meta=secret)
    return {"id": run, "resume": "allow", "dir": str(output), "mode": mode, "settings": settings}


def has_wandb_key() -> bool:
    """Whether W&B would find credentials (their presence only), so that nobody without an account is asked for one."""
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    host = urlsplit(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname
    try:
        return host is not None and netrc.netrc(os.environ.get("NETRC")).authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False
