"""Detect dead or hanging ranks with heartbeats, and name them when a collective fails."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from bocage.shards.errors import InputError
from bocage.ssl.engine.parallel.distributed import rank_and_world

_INTERVAL = 2.0  # seconds between heartbeats
_MISSED = 3  # missed heartbeats after which a rank counts as lost


class RankHeartbeat:
    """Heartbeats of all ranks: a thread of each rank writes to the store of the process group every 2 s.

    Attributes:
        step: step that this rank works on; the trainer sets it.
    """

    def __init__(self) -> None:
        self.step = 0
        self._rank, self._world = rank_and_world()
        self._ended = threading.Event()

    @contextmanager
    def watch(self) -> Iterator[None]:
        """Context that names the lost rank if a collective fails. Other errors pass unchanged.

        Raises:
            InputError: a collective failed because another rank is dead or hangs.
        """
        if self._world == 1:
            yield
            return
        store = torch.distributed.PrefixStore("bocage/peers", torch.distributed.distributed_c10d._get_default_store())
        threading.Thread(target=self._send, args=(store,), daemon=True).start()
        try:
            yield
        except torch.OutOfMemoryError:  # an error of this rank
            raise
        except RuntimeError as error:  # gloo and NCCL raise no more specific class
            answers: list[str] = []
            # In a thread, because a store on a stopped host never answers.
            query = threading.Thread(target=lambda: answers.append(self._find_lost(store)), daemon=True)
            query.start()
            query.join((2 * _MISSED + 1) * _INTERVAL)
            cause = answers[0] if answers else "the rank that holds the store of the process group does not answer"
            if cause:
                raise InputError(
                    f"{cause}; this is rank {self._rank}, in step {self.step}. Read that rank's own messages (memory, "
                    "network, engine.rank_timeout); the same command resumes from the newest checkpoint, if any"
                ) from error
            raise
        finally:
            self._ended.set()

    def _send(self, store: Any) -> None:
        count, host = 0, socket.gethostname()
        while True:
            count += 1
            try:
                store.set(str(self._rank), f"{count} {self.step} {host}")
            except RuntimeError:  # the rank that holds the store is gone; the main thread will notice
                return
            if self._ended.wait(_INTERVAL):
                return

    def _find_lost(self, store: Any) -> str:
        """Describe ranks without a heartbeat, else ranks that are behind; empty if there are none."""
        try:
            before = self._read(store)
            time.sleep(_MISSED * _INTERVAL)
            after = self._read(store)
        except RuntimeError:
            return "the rank that holds the store of the process group is gone"
        silent = [rank for rank in before if before[rank][0] == after[rank][0] and rank != self._rank]
        if silent:
            names = ", ".join(f"{rank} (on {after[rank][2]}, last seen in step {after[rank][1]})" for rank in silent)
            return f"no sign of life from rank {names}"
        behind = [rank for rank in after if after[rank][1] < self.step]
        names = ", ".join(f"{rank} (on {after[rank][2]}, in step {after[rank][1]})" for rank in behind)
        return f"the other ranks wait for rank {names}" if behind else ""

    def _read(self, store: Any) -> dict[int, tuple[int, int, str]]:
        """Count, step and host of the latest heartbeat of each rank."""
        beats = {}
        for rank in range(self._world):
            # A rank may fail before its first heartbeat.
            text = store.get(str(rank)).decode() if store.check([str(rank)]) else "0 0 ?"
            count, step, host = text.split(" ", 2)
            beats[rank] = (int(count), int(step), host)
        return beats
