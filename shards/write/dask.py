"""Run the shard tasks of a plan on the workers of a Dask ``distributed`` cluster."""

from __future__ import annotations

import socket
import uuid
from collections.abc import Generator
from pathlib import Path
from typing import Any

from bocage.shards.errors import InputError
from bocage.shards.format.shard_files import PARTS_FOLDER
from bocage.shards.pool import ProgressCallback
from bocage.shards.write.packing import ManifestPart, ShardTask
from bocage.shards.write.plan import describe_library_differences, library_versions
from bocage.shards.write.tasks import ShardTasks, run_task

_CONNECT_TIMEOUT = 30  # seconds to wait for the scheduler, and for its first worker
_POLL_INTERVAL = 0.5  # seconds
_RESUME_HINT = "finished shards are kept; run the same command to resume"


def run_on_cluster(
    address: str, tasks: ShardTasks, missing: list[int], on_progress: ProgressCallback
) -> Generator[ManifestPart, None, None]:
    """Write the shards ``missing`` on the workers of a cluster and yield their parts as they finish, in any order.

    Workers need bocage with the same library versions, and must see the source and the output folder under the same
    paths as this process. At most two tasks per worker thread are looked up and submitted at a time.

    Raises:
        InputError: a task fails (see ``tasks.run_task``), ``distributed`` is not installed, no scheduler answers at
            ``address``, it has no workers, or the scheduler or the workers of a task are lost.
    """
    if not missing:
        return
    # Workers stop a task when this file disappears: that is how they notice that this process has ended.
    run_file = tasks.out / PARTS_FOLDER / f"run-{uuid.uuid4().hex}"
    client = _connect(address)
    try:
        run_file.touch()
        yield from _run_tasks(client, address, tasks, missing, run_file, on_progress)
    finally:
        run_file.unlink(missing_ok=True)
        client.close()


def _connect(address: str) -> Any:
    try:
        from distributed import Client
    except ImportError as error:
        raise InputError(
            f"--scheduler {address}: needs Dask's distributed, here and on the workers: pip install 'bocage[cluster]'"
        ) from error
    try:
        client = Client(address, timeout=_CONNECT_TIMEOUT, set_as_default=False)
    except (OSError, ValueError, TypeError) as error:
        raise InputError(
            f"--scheduler {address}: no Dask scheduler answers there; start one with `dask scheduler` and pass the "
            f"address it prints"
        ) from error
    try:
        client.wait_for_workers(1, timeout=_CONNECT_TIMEOUT)
    except OSError as error:
        client.close()
        raise InputError(
            f"--scheduler {address}: the scheduler has no workers; start some with `dask worker {address}`"
        ) from error
    return client


def _run_tasks(
    client: Any, address: str, tasks: ShardTasks, missing: list[int], run_file: Path, on_progress: ProgressCallback
) -> Generator[ManifestPart, None, None]:
    from distributed import CancelledError, KilledWorker, wait

    remaining = iter(missing)
    running: dict[Any, int] = {}
    exhausted = False
    while True:
        max_running = 2 * sum(client.nthreads().values())  # workers may join and leave
        while not exhausted and len(running) < max_running:
            index = next(remaining, None)
            if index is None:
                exhausted = True
                break
            task = tasks[index]
            versions, key = library_versions(), f"{run_file.name}-{index}"
            future = client.submit(_run_on_worker, task, tasks.catalogue.root, versions, run_file, key=key, pure=False)
            running[future] = index
        if not running and exhausted:
            return
        finished: Any = ()
        try:
            with client.as_current():  # ``wait`` uses the current client
                finished = wait(list(running), timeout=_POLL_INTERVAL, return_when="FIRST_COMPLETED").done
        except TimeoutError:
            on_progress(0, 0)
        except CancelledError:
            finished = [future for future in running if future.cancelled()]
        if client.status != "running":
            raise InputError(f"--scheduler {address}: the scheduler was lost; {_RESUME_HINT}")
        for future in finished:
            index = running.pop(future)
            try:
                part: ManifestPart = future.result()
            except KilledWorker as error:
                shard = tasks[index].shard_path.name
                raise InputError(
                    f"--scheduler {address}: workers were killed while writing {shard}, possibly out of memory; "
                    f"{_RESUME_HINT}"
                ) from error
            except CancelledError as error:
                raise InputError(f"--scheduler {address}: the scheduler was lost; {_RESUME_HINT}") from error
            path = tasks[index].shard_path
            if not path.is_file():
                raise InputError(
                    f"{path}: a worker wrote it but it does not exist here; workers must share this folder"
                )
            on_progress(tasks.plan.count_patches(range(index, index + 1)), part.shard.bytes)
            yield part


def _run_on_worker(task: ShardTask, root: Path, versions: dict[str, str], run_file: Path) -> ManifestPart:
    """Write one shard; called on a worker."""
    differences = describe_library_differences(versions)
    if differences:
        raise InputError(
            f"the Dask worker on {socket.gethostname()} has other library versions than the client: {differences}"
        )

    def stop_with_client(patches: int, written: int) -> None:
        if not run_file.exists():
            raise InputError(f"{task.out}: the run of this shard has ended")

    return run_task(task, root, stop_with_client)
