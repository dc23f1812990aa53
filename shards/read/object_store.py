"""Download files from ``s3://``, ``hf://`` and ``http(s)://`` through fsspec, with retries and resume."""

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

_REQUEST_BYTES = 16 << 20  # bytes per range request; an interrupted download loses at most this much
_MAX_BACKOFF = 30.0
_MAX_READ_BYTES = 1 << 30

_INSTALL_COMMANDS = {
    "s3": "pip install 'bocage[remote]'",
    "http": "pip install 'bocage[remote]'",
    "https": "pip install 'bocage[remote]'",
    "hf": "pip install huggingface_hub",
}


def is_remote(location: str) -> bool:
    """Whether ``location`` is a remote address rather than a local folder."""
    return re.match(r"(?i:(?!file:)[a-z][a-z0-9+]*://)", location) is not None


@dataclass(frozen=True, kw_only=True)
class RetryPolicy:
    """Retries of failed requests.

    Attributes:
        attempts: consecutive failed attempts without progress before giving up.
        backoff: seconds before the second attempt. The wait doubles before each further attempt, up to 30 s; a random
            factor between 0.5 and 1 scales it.
        timeout: seconds without data after which an attempt fails.
    """

    attempts: int = 6
    backoff: float = 1.0
    timeout: float = 30.0


class ObjectStore:
    """A folder at a remote address.

    It is picklable and usable after a fork, because each process opens its own connections.

    Args:
        address: ``s3://bucket/prefix``, ``hf://datasets/org/name/...`` or ``http(s)://host/path``. The query string of
            an HTTP address, such as a signature, is sent with every request. The environment holds the credentials
            and the endpoint of S3 (``AWS_ENDPOINT_URL`` etc.).
        retry_policy: when to retry and when to give up.

    Attributes:
        redacted_url: the address without user, password and query string, for messages.

    Raises:
        InputError: the address has another scheme, or the package for its scheme is missing.
    """

    def __init__(self, address: str, retry_policy: RetryPolicy | None = None) -> None:
        try:
            self._parts = urlsplit(address)
            host = self._parts.netloc.rpartition("@")[2]
        except ValueError as error:
            raise InputError("shards: not a valid address") from error
        path = self._parts.path.rstrip("/")
        self.redacted_url = urlunsplit((self._parts.scheme, host, path, "", ""))
        if self._parts.scheme not in _INSTALL_COMMANDS:
            raise InputError(
                f"{self.redacted_url}: shards are read from a folder, file://, s3://, hf://, http:// or https://"
            )
        self._retry_policy = retry_policy or RetryPolicy()
        self._connection: tuple[int, Any] | None = None  # process id and fsspec file system
        self._filesystem()  # report a missing package here rather than in a DataLoader worker

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_connection": None}

    def redacted_file_url(self, file: str) -> str:
        """Address of a file for messages, without secrets."""
        return f"{self.redacted_url}/{file}"

    def _address(self, file: str) -> str:
        path = f"{self._parts.path.rstrip('/')}/{file}"
        if self._parts.scheme in ("http", "https"):
            return urlunsplit(self._parts._replace(path=path, fragment=""))
        return f"{self._parts.scheme}://{self._parts.netloc}{path}"

    def _filesystem(self) -> Any:
        """fsspec file system of this process."""
        if self._connection is None or self._connection[0] != os.getpid():
            scheme, timeout = self._parts.scheme, self._retry_policy.timeout
            options: dict[str, Any] = {}
            try:
                if scheme == "s3":
                    # botocore must not retry: a retry here can resume the download.
                    retries = {"max_attempts": 1, "mode": "standard"}
                    options = {
                        "config_kwargs": {"read_timeout": timeout, "connect_timeout": timeout, "retries": retries}
                    }
                elif scheme in ("http", "https"):
                    import aiohttp

                    client_timeout = aiohttp.ClientTimeout(total=None, sock_connect=timeout, sock_read=timeout)
                    options = {"client_kwargs": {"timeout": client_timeout}}
                system = fsspec.filesystem(scheme, skip_instance_cache=True, **options)
            except ImportError as error:
                raise InputError(
                    f"{self.redacted_url}: {scheme}:// needs a package: {_INSTALL_COMMANDS[scheme]}"
                ) from error
            if scheme == "s3":
                system.retries = 1
            self._connection = (os.getpid(), system)
        return self._connection[1]

    def read(self, file: str) -> bytes:
        """Read a small file completely.

        Raises:
            InputError: the file does not exist, access is refused, or all retries failed.
        """
        content: list[bytes] = []

        def attempt() -> bool:
            content.append(self._filesystem().cat_file(self._address(file), start=0, end=_MAX_READ_BYTES))
            return True

        self._retry(file, attempt)
        return content[-1]

    def download(self, file: str, size: int, out: BinaryIO) -> None:
        """Download a file, or the rest of it, into ``out``.

        Args:
            file: name of the file.
            size: size of the file, in bytes.
            out: unbuffered local file. Its content counts as the beginning of the download. If the server does not
                support range requests, the download starts over. ``out`` never grows beyond ``size``.

        Raises:
            InputError: the file does not exist, access is refused, or all retries failed.
            OSError: writing to ``out`` failed.
        """
        sink = _Sink(out, size)
        use_ranges = True

        def attempt() -> bool:
            nonlocal use_ranges
            system, address, start = self._filesystem(), self._address(file), sink.position
            if use_ranges:
                end = min(start + _REQUEST_BYTES, size)
                data = system.cat_file(address, start=start, end=end)
                if len(data) <= end - start:
                    sink.write(data)
                    if len(data) < end - start:
                        raise EOFError("truncated")
                    return sink.position == size
                use_ranges = False  # the server sent more than the requested range
            sink.restart()
            system.get_file(address, sink)
            if sink.position < size:
                raise EOFError("truncated")
            return True

        if size > sink.position:
            self._retry(file, attempt, lambda: sink.furthest, sink)

    def _retry(
        self,
        file: str,
        attempt: Callable[[], bool],
        progress: Callable[[], int] = lambda: 0,
        sink: _Sink | None = None,
    ) -> None:
        """Call ``attempt`` until it returns True; False means that it made progress and is not done."""
        failures, reached = 0, progress()
        while True:
            try:
                if attempt():
                    return
                failures, reached = 0, progress()
                continue
            except TypeError:  # a bug in our own call, not a network failure
                raise
            except Exception as error:  # exceptions of the transports share no base class
                if sink is not None and sink.error is not None:
                    raise sink.error from None
                # The text of a transport error may hold the full address with its secrets: never show or chain it.
                reason, is_final = _classify_error(error)
            failures = 1 if progress() > reached else failures + 1
            reached = progress()
            if is_final:
                raise InputError(f"{self.redacted_file_url(file)}: {reason}")
            if failures >= self._retry_policy.attempts:
                raise InputError(f"{self.redacted_file_url(file)}: given up after {failures} attempts: {reason}")
            wait = min(self._retry_policy.backoff * 2 ** (failures - 1), _MAX_BACKOFF)
            time.sleep(wait * random.uniform(0.5, 1.0))  # the global generator is fine here: no sample depends on it


class _Sink:
    """File-like wrapper that a transport writes to: it never exceeds ``size`` and keeps its own write errors."""

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

    def tell(self) -> int:  # fsspec accepts an object as a file only if it has ``tell`` and ``read``
        return self.position

    def read(self) -> bytes:
        raise OSError("write only")

    def close(self) -> None:
        """Does nothing: the caller that opened the file closes it."""


def _classify_error(error: Exception) -> tuple[str, bool]:
    """Reason of a failed attempt, without secrets, and whether a retry is futile."""
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
    """HTTP status of an error of aiohttp, httpx or botocore, or of its cause."""
    while error is not None:
        response = getattr(error, "response", None)
        status = getattr(error, "status", None) or getattr(response, "status_code", None)
        if status is None and isinstance(response, dict):
            status = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
        if isinstance(status, int):
            return status
        error = error.__cause__
    return None
