"""Which rank is missing, when ranks that wait for each other give up."""

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

_INTERVAL = 2.0  # seconds between signs of life
_PATIENCE = 3  # intervals without one


class RankHeartbeat:
    """Signs of life of all ranks: each tells the store of the process group every two seconds, from a thread.

    Attributes:
        step: that this rank works on; set by the loop.
    """

    def __init__(self) -> None:
        self.step = 0
        self._rank, self._world = rank_and_world()
        self._ended = threading.Event()

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Context that tells which rank is to blame when a collective fails. Other errors pass as they are.

        Raises:
            InputError: a collective failed because a rank, which is named, is gone or hangs.
        """
        if self._world == 1:
            yield
            return
        store = torch.distributed.PrefixStore("bocage/peers", torch.distributed.distributed_c10d._get_default_store())
        threading.Thread(target=self._tell, args=(store,), daemon=True).start()
        try:
            yield
        except torch.OutOfMemoryError:  # this rank's own
            raise
        except RuntimeError as error:  # gloo's and NCCL's errors have no class of their own
            answer: list[str] = []
            # In a thread: a store whose host is stopped never answers.
            asking = threading.Thread(target=lambda: answer.append(self._missing(store)), daemon=True)
            asking.start()
            asking.join((2 * _PATIENCE + 1) * _INTERVAL)
            who = answer[0] if answer else "the rank that holds the store of the process group does not answer"
            if who:
                raise InputError(
                    f"{who}; this is rank {self._rank}, in step {self.step}. Look at that rank's own messages (memory, "
                    "network, engine.rank_timeout); the same command resumes from the newest checkpoint, if any"
                ) from error
            raise
        finally:
            self._ended.set()

    def _tell(self, store: Any) -> None:
        count, host = 0, socket.gethostname()
        while True:
            count += 1
            try:
                store.set(str(self._rank), f"{count} {self.step} {host}")
            except RuntimeError:  # whoever holds the store is gone; the main thread will notice
                return
            if self._ended.wait(_INTERVAL):
                return

    def _missing(self, store: Any) -> str:
        """Who shows no sign of life, or is behind; empty when nobody is."""
        try:
            before = self._signs(store)
            time.sleep(_PATIENCE * _INTERVAL)
            after = self._signs(store)
        except RuntimeError:
            return "the rank that holds the store of the process group is gone"
        silent = [rank for rank in before if before[rank][0] == after[rank][0] and rank != self._rank]
        if silent:
            hosts = ", ".join(f"{rank} (on {after[rank][2]}, last seen in step {after[rank][1]})" for rank in silent)
            return f"no sign of life from rank {hosts}"
        behind = [rank for rank in after if after[rank][1] < self.step]
        hosts = ", ".join(f"{rank} (on {after[rank][2]}, in step {after[rank][1]})" for rank in behind)
        return f"the others wait for rank {hosts}" if behind else ""

    def _signs(self, store: Any) -> dict[int, tuple[int, int, str]]:
        signs = {}
        for rank in range(self._world):
            # A rank may fail before it has told anything.
            text = store.get(str(rank)).decode() if store.check([str(rank)]) else "0 0 ?"
            count, step, host = text.split(" ", 2)
            signs[rank] = (int(count), int(step), host)
        return signs
