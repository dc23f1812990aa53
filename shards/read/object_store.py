"""Files at an address (``s3://``, ``hf://``, ``http(s)://``), fetched through fsspec, retried and resumed."""

from __future__ import annotations

import os
import random
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, BinaryIO
from urllib.parse import urlsplit, urlunsplit

import fsspec

from bocage.shards.errors import InputError

_REQUEST = 16 << 20  # bytes asked for at once: what an interrupted download loses at most
_LONGEST_WAIT = 30.0
_DESCRIPTION = 1 << 30  # bytes that a description may have at most

_NEEDS = {
    "s3": "pip install 'bocage[remote]'",
    "http": "pip install 'bocage[remote]'",
    "https": "pip install 'bocage[remote]'",
    "hf": "pip install huggingface_hub",
}


def is_remote(where: str) -> bool:
    """Whether ``where`` is an address of another machine, not a local folder."""
    return re.match(r"(?i:(?!file:)[a-z][a-z0-9+]*://)", where) is not None


@dataclass(frozen=True, kw_only=True)
class RetryPolicy:
    """When a place is given up.

    Attributes:
        attempts: failures in a row, without a byte gained, after which it is.
        wait: seconds before the second attempt; doubled before each further one, at most 30, and drawn by half.
        stall: seconds without a byte after which an attempt has failed.
    """

    attempts: int = 6
    wait: float = 1.0
    stall: float = 30.0


class ObjectStore:
    """A folder at an address. Picklable and usable after a fork: connections are made by the process that uses them.

    Args:
        address: ``s3://bucket/prefix``, ``hf://datasets/org/name/...`` or ``http(s)://host/path``; the query string of
            an HTTP address, a signature say, is sent with every file. Credentials and endpoint of S3 come from the
            environment (``AWS_ENDPOINT_URL`` and the like).
        patience: when to give up.

    Raises:
        InputError: an address of another kind, or the package for it is missing.
    """

    def __init__(self, address: str, patience: RetryPolicy | None = None) -> None:
        try:
            self._parts = urlsplit(address)
            host = self._parts.netloc.rpartition("@")[2]
        except ValueError as error:
            raise InputError("shards: not a valid address") from error
        path = self._parts.path.rstrip("/")
        self.name = urlunsplit((self._parts.scheme, host, path, "", ""))
        """The address without user, password and query string."""
        if self._parts.scheme not in _NEEDS:
            raise InputError(f"{self.name}: shards are read from a folder, file://, s3://, hf://, http:// or https://")
        self._patience = patience or RetryPolicy()
        self._system: tuple[int, Any] | None = None
        self._connected()  # a missing package is told here, not by a reading process

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_system": None}

    def name_of(self, file: str) -> str:
        """Address of a file for messages: it holds no secret."""
        return f"{self.name}/{file}"

    def _address(self, file: str) -> str:
        path = f"{self._parts.path.rstrip('/')}/{file}"
        if self._parts.scheme in ("http", "https"):
            return urlunsplit(self._parts._replace(path=path, fragment=""))
        return f"{self._parts.scheme}://{self._parts.netloc}{path}"

    def _connected(self) -> Any:
        if self._system is None or self._system[0] != os.getpid():
            scheme, stall = self._parts.scheme, self._patience.stall
            options: dict[str, Any] = {}
            try:
                if scheme == "s3":
                    # Retrying is done here, where it can resume.
                    retries = {"max_attempts": 1, "mode": "standard"}
                    options = {"config_kwargs": {"read_timeout": stall, "connect_timeout": stall, "retries": retries}}
                elif scheme in ("http", "https"):
                    import aiohttp

                    timeout = aiohttp.ClientTimeout(total=None, sock_connect=stall, sock_read=stall)
                    options = {"client_kwargs": {"timeout": timeout}}
                system = fsspec.filesystem(scheme, skip_instance_cache=True, **options)
            except ImportError as error:
                raise InputError(f"{self.name}: {scheme}:// needs a package: {_NEEDS[scheme]}") from error
            if scheme == "s3":
                system.retries = 1
            self._system = (os.getpid(), system)
        return self._system[1]

    def read(self, file: str) -> bytes:
        """The whole of a small file.

        Raises:
            InputError: it is not there, may not be read, or could not be had in bounded time.
        """
        content: list[bytes] = []

        def attempt() -> bool:
            content.append(self._connected().cat_file(self._address(file), start=0, end=_DESCRIPTION))
            return True

        self._persist(file, attempt)
        return content[-1]

    def download(self, file: str, size: int, out: BinaryIO) -> None:
        """Append to ``out`` what it lacks of a file of ``size`` bytes.

        Args:
            out: unbuffered; what it holds is taken for the beginning of the file. A server without ranges makes it
                start again. It never grows over ``size``.

        Raises:
            InputError: the file is not there, may not be read, or could not be had in bounded time.
            OSError: of ``out``.
        """
        sink = _Sink(out, size)
        ranges = True

        def attempt() -> bool:
            nonlocal ranges
            system, address, start = self._connected(), self._address(file), sink.position
            if ranges:
                end = min(start + _REQUEST, size)
                data = system.cat_file(address, start=start, end=end)
                if len(data) <= end - start:
                    sink.write(data)
                    if len(data) < end - start:
                        raise EOFError("truncated")
                    return sink.position == size
                ranges = False  # the server sent more than was asked for
            sink.restart()
            system.get_file(address, sink)
            if sink.position < size:
                raise EOFError("truncated")
            return True

        if size > sink.position:
            self._persist(file, attempt, lambda: sink.furthest, sink)

    def _persist(
        self,
        file: str,
        attempt: Callable[[], bool],
        progress: Callable[[], int] = lambda: 0,
        sink: _Sink | None = None,
    ) -> None:
        """Call ``attempt`` until it says that all is done."""
        failures, reached = 0, progress()
        while True:
            try:
                if attempt():
                    return
                failures, reached = 0, progress()
                continue
            except TypeError:  # a call that fits no signature is a fault of ours, not of the network
                raise
            except Exception as error:  # the transports share no base class
                if sink is not None and sink.error is not None:
                    raise sink.error from None
                # The text of a transport's error may hold the whole address: it is never shown or chained.
                reason, final = _reason(error)
            failures = 1 if progress() > reached else failures + 1
            reached = progress()
            if final:
                raise InputError(f"{self.name_of(file)}: {reason}")
            if failures >= self._patience.attempts:
                raise InputError(f"{self.name_of(file)}: given up after {failures} attempts: {reason}")
            wait = min(self._patience.wait * 2 ** (failures - 1), _LONGEST_WAIT)
            time.sleep(wait * random.uniform(0.5, 1.0))  # nothing about samples depends on it


class _Sink:
    """A file that a transport writes to and that never grows over its size; remembers its own errors."""

    def __init__(self, out: BinaryIO, size: int) -> None:
        self._out, self._size = out, size
        self.position = out.seek(0, os.SEEK_END)
        if self.position > size:
            self.restart()
        self.furthest = self.position
        self.error: OSError | None = None

    def restart(self) -> None:
        self._out.truncate(0)
        self.position = self._out.seek(0)

    def write(self, data: bytes) -> int:
        view = memoryview(data)[: self._size - self.position]
        try:
            while view:
                written = self._out.write(view)
                self.position += written
                view = view[written:]
        except OSError as error:
            self.error = error
            raise
        self.furthest = max(self.furthest, self.position)
        return len(data)

    def tell(self) -> int:  # fsspec asks for this and for ``read`` before it believes that this is a file
        return self.position

    def read(self) -> bytes:
        raise OSError("write only")

    def close(self) -> None:
        """It is closed by whoever opened it."""


def _reason(error: Exception) -> tuple[str, bool]:
    """Why an attempt failed, in words without secrets, and whether another one is futile."""
    status = _status(error)
    if isinstance(error, FileNotFoundError) or status in (404, 410):
        return "there is no such file", True
    if isinstance(error, PermissionError) or status in (401, 403):
        return "access refused; check the credentials", True
    kind = type(error).__name__
    if kind in ("NoCredentialsError", "PartialCredentialsError"):
        return "no credentials; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or FSSPEC_S3_ANON=true", True
    if kind == "OfflineModeIsEnabled":
        return "HF_HUB_OFFLINE is set, so nothing is fetched from the hub", True
    if status is not None:
        return f"HTTP status {status}", 400 <= status < 500 and status not in (408, 425, 429)
    if isinstance(error, TimeoutError) or "Timeout" in kind:
        return "no answer in time", False
    if isinstance(error, EOFError) or kind in ("ClientPayloadError", "IncompleteReadError", "ResponseStreamingError"):
        return "the response was cut short", False
    if isinstance(error, OSError) and error.errno is not None and error.errno > 0:
        return os.strerror(error.errno), False
    return f"connection failed ({kind})", False


def _status(error: BaseException | None) -> int | None:
    """HTTP status of an error of aiohttp, httpx or botocore, or of what caused it."""
    while error is not None:
        response = getattr(error, "response", None)
        found = getattr(error, "status", None) or getattr(response, "status_code", None)
        if found is None and isinstance(response, dict):
            found = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
        if isinstance(found, int):
            return found
        error = error.__cause__
    return None
