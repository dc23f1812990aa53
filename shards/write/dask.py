"""The jobs of a plan on the workers of a Dask ``distributed`` cluster."""

from __future__ import annotations

import socket
import uuid
from collections.abc import Generator
from pathlib import Path
from typing import Any

from bocage.shards.errors import InputError
from bocage.shards.format.shard_files import PARTS_FOLDER
from bocage.shards.pool import Tick
from bocage.shards.write.jobs import ShardTasks, run_job
from bocage.shards.write.packing import ShardPart, ShardTask
from bocage.shards.write.plan import differing_libraries, libraries

_PATIENCE = 30  # seconds to wait for the scheduler, and for its first worker
_POLL = 0.5  # seconds
_KEPT = "finished shards are kept, the same command resumes"


def run_cluster(address: str, jobs: ShardTasks, missing: list[int], tick: Tick) -> Generator[ShardPart, None, None]:
    """Parts of the shards ``missing`` as the cluster's workers finish them, in any order.

    Workers need bocage with the same libraries, and must see the source and the folder of the shards under the same
    paths as this process. At most two jobs a thread of theirs are looked up and under way.

    Raises:
        InputError: as ``jobs.run_job``; or ``distributed`` is not installed, no scheduler answers at ``address``, it
            has no workers, or it or a job's workers are lost.
    """
    if not missing:
        return
    # A job goes on only while this file is there: that is how workers learn that this process has ended.
    run_file = jobs.out / PARTS_FOLDER / f"run-{uuid.uuid4().hex}"
    client = _connected(address)
    try:
        run_file.touch()
        yield from _results(client, address, jobs, missing, run_file, tick)
    finally:
        run_file.unlink(missing_ok=True)
        client.close()


def _connected(address: str) -> Any:
    try:
        from distributed import Client
    except ImportError as error:
        raise InputError(
            f"--scheduler {address}: needs Dask's distributed, here and on the workers: pip install 'bocage[cluster]'"
        ) from error
    try:
        client = Client(address, timeout=_PATIENCE, set_as_default=False)
    except (OSError, ValueError, TypeError) as error:
        raise InputError(
            f"--scheduler {address}: no Dask scheduler answers there; start one with `dask scheduler` and give the "
            f"address it prints"
        ) from error
    try:
        client.wait_for_workers(1, timeout=_PATIENCE)
    except OSError as error:
        client.close()
        raise InputError(
            f"--scheduler {address}: the scheduler has no workers; start some with `dask worker {address}`"
        ) from error
    return client


def _results(
    client: Any, address: str, jobs: ShardTasks, missing: list[int], run_file: Path, tick: Tick
) -> Generator[ShardPart, None, None]:
    from distributed import CancelledError, KilledWorker, wait

    waiting = iter(missing)
    running: dict[Any, int] = {}
    exhausted = False
    while True:
        room = 2 * sum(client.nthreads().values())  # workers may come and go
        while not exhausted and len(running) < room:
            index = next(waiting, None)
            if index is None:
                exhausted = True
                break
            job = jobs[index]
            future = client.submit(
                _work, job, jobs.catalogue.root, libraries(), run_file, key=f"{run_file.name}-{index}", pure=False
            )
            running[future] = index
        if not running and exhausted:
            return
        finished: Any = ()
        try:
            with client.as_current():  # ``wait`` asks the current client
                finished = wait(list(running), timeout=_POLL, return_when="FIRST_COMPLETED").done
        except TimeoutError:
            tick(0, 0)
        except CancelledError:
            finished = [future for future in running if future.cancelled()]
        if client.status != "running":
            raise InputError(f"--scheduler {address}: the scheduler was lost; {_KEPT}")
        for future in finished:
            index = running.pop(future)
            try:
                part: ShardPart = future.result()
            except KilledWorker as error:
                raise InputError(
                    f"--scheduler {address}: workers were killed over {jobs[index].shard.name}, perhaps for want of "
                    f"memory; {_KEPT}"
                ) from error
            except CancelledError as error:
                raise InputError(f"--scheduler {address}: the scheduler was lost; {_KEPT}") from error
            shard = jobs[index].shard
            if not shard.is_file():
                raise InputError(f"{shard}: a worker wrote it but it is not here; workers must share this folder")
            tick(jobs.plan.patches(range(index, index + 1)), part.shard.bytes)
            yield part


def _work(job: ShardTask, root: Path, versions: dict[str, str], run_file: Path) -> ShardPart:
    """Runs on a worker."""
    differing = differing_libraries(versions)
    if differing:
        raise InputError(f"the Dask worker on {socket.gethostname()} has other libraries than the client: {differing}")

    def tick(patches: int, written: int) -> None:
        if not run_file.exists():
            raise InputError(f"{job.out}: the run of this shard has ended")

    return run_job(job, root, tick)
