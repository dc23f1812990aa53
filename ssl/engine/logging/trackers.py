"""Start, resume, link and finish runs in W&B and TensorBoard."""

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
        InputError: the package is missing.
    """
    packages = {"none": (), "wandb": ("wandb",), "tensorboard": ("tensorboard", "tensorboardX")}[tracker]
    if packages and not any(importlib.util.find_spec(package) for package in packages):
        raise InputError(f"engine.tracker={tracker} needs a package that is missing: pip install {packages[0]}")


def start_tracker(
    accelerator: Accelerator,
    tracker: TrackerName,
    output: Path,
    project: str,
    run_id: str,
    config: Mapping[str, Any],
    reported_step: int,
) -> str:
    """Start the run in its tracker, or resume it there.

    Args:
        accelerator: Accelerator that keeps the tracker.
        tracker: name of the tracker.
        output: folder of the run, in which the tracker writes.
        project: name of W&B's project and of TensorBoard's folder.
        run_id: identifier of the run, the same after every resume.
        config: configuration to show; secrets are replaced.
        reported_step: last recorded step; TensorBoard hides older records of later steps.

    Returns:
        A notice for the user, or an empty string.

    Raises:
        InputError: W&B cannot be reached or refuses the run.
    """
    if tracker == "wandb":
        with _wandb_faults():
            options = {**_wandb_options(output, run_id, offline=not has_wandb_key()), "name": output.name}
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


def link(trackers: Iterable[Any], step: int, name: str, location: str) -> None:
    """Show a location in an open run: in W&B's summary, or as a text of TensorBoard.

    Args:
        trackers: trackers of Accelerate.
        step: step at which TensorBoard shows the text.
        name: name of what is at the location, e.g. ``checkpoint``.
        location: path or address.
    """
    for tracker in trackers:
        if tracker.name == "wandb":
            tracker.tracker.summary[name] = location
        else:
            tracker.tracker.add_text(name, location, step)


def link_afterwards(
    tracker: TrackerName, output: Path, project: str, run_id: str, step: int, locations: Mapping[str, str]
) -> None:
    """Reopen a finished run in its tracker and show locations there; a run that W&B has offline stays offline.

    Args:
        tracker: tracker of the run; ``none`` does nothing.
        output: folder of the run.
        project: project of the run.
        run_id: identifier of the run.
        step: last step of the run.
        locations: paths or addresses by name.

    Raises:
        InputError: the tracker's package is missing, W&B cannot be reached, or the folder cannot be written.
    """
    check_tracker(tracker)
    if tracker == "wandb":
        online, offline = (any((output / "wandb").glob(f"{kind}-*-{run_id}")) for kind in ("run", "offline-run"))
        if not online and not offline:
            return
        import wandb

        with _wandb_faults():
            options = _wandb_options(output, run_id, offline=not online or not has_wandb_key())
            with wandb.init(project=project, **options) as opened:
                opened.summary.update(dict(locations))
    elif tracker == "tensorboard" and (output / project).is_dir():
        from torch.utils.tensorboard import SummaryWriter

        try:
            with SummaryWriter(str(output / project)) as writer:
                for name, location in locations.items():
                    writer.add_text(name, location, step)
        except OSError as error:
            raise InputError(f"{output / project} cannot be written: {error.strerror}") from error


def finish_trackers(trackers: Iterable[Any], *, failed: bool) -> None:
    """Finish the run in its trackers; W&B marks a failed run."""
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
        message = " ".join(str(error).split()) or type(error).__name__
        raise InputError(
            f"W&B: {message}; set WANDB_MODE=offline to keep the run here, or engine.tracker=none to go without W&B"
        ) from error


def _wandb_options(output: Path, run_id: str, *, offline: bool) -> dict[str, Any]:
    import wandb

    mode = os.environ.get("WANDB_MODE") or ("offline" if offline else "online")
    if mode not in _WANDB_MODES:
        raise InputError(f"WANDB_MODE={mode} is not one of {', '.join(_WANDB_MODES)}")
    # W&B's metadata include the command line, so they are disabled if it holds a secret.
    secret = plain({"argv": sys.argv})["argv"] != sys.argv
    settings = wandb.Settings(console="off", silent=True, x_disable_meta=secret)
    return {"id": run_id, "resume": "allow", "dir": str(output), "mode": mode, "settings": settings}


def has_wandb_key() -> bool:
    """Whether W&B would find credentials; without any, a run is offline and W&B does not ask for an account."""
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    host = urlsplit(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname
    try:
        return host is not None and netrc.netrc(os.environ.get("NETRC")).authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False
