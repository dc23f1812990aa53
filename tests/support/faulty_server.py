"""HTTP server of a folder with injected faults."""

import socket
import struct
import threading
import time
from collections import Counter
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit


class FaultyServer(ThreadingHTTPServer):
    """Serve ``folder``; each request for a file consumes one of its faults.

    Attributes:
        faults: faults of the next requests by file name: 503, 403, reset, stall, truncate or flip.
        sent: bytes of content sent, by file name.
        queries: query string of every request.
        pause: seconds between chunks of 64 KiB.
    """

    daemon_threads = True

    def __init__(self, folder: Path, *, ranges: bool = True) -> None:
        super().__init__(("127.0.0.1", 0), partial(_Handler, folder, ranges))
        self.faults: dict[str, list[str]] = {}
        self.sent: Counter[str] = Counter()
        self.queries: list[str] = []
        self.pause = 0.0
        threading.Thread(target=self.serve_forever, daemon=True, kwargs={"poll_interval": 0.02}).start()

    def __exit__(self, *_: object) -> None:
        self.shutdown()
        self.server_close()

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def handle_error(self, request: Any, client_address: Any) -> None:
        pass  # some tests close connections on purpose


class _Handler(BaseHTTPRequestHandler):
    server: FaultyServer
    protocol_version = "HTTP/1.1"

    def __init__(self, folder: Path, ranges: bool, *args: Any) -> None:
        self.folder, self.ranges = folder, ranges
        super().__init__(*args)

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        url = urlsplit(self.path)
        self.server.queries.append(url.query)
        path = self.folder / url.path.lstrip("/")
        faults = self.server.faults.get(path.name, [])
        fault = faults.pop(0) if faults and self.command == "GET" else ""
        if fault in ("503", "403") or not path.is_file():
            self.send_response(int(fault or 404))
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        data, start = path.read_bytes(), 0
        size = len(data)
        requested = self.headers.get("Range", "")
        if self.ranges and requested:
            first, last = requested.removeprefix("bytes=").split("-")
            start = int(first)
            data = data[start : int(last) + 1]
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {start}-{start + len(data) - 1}/{size}")
        else:
            self.send_response(200)
        if self.ranges:
            self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command == "HEAD":
            return
        if fault == "flip":
            data = data[:1000] + bytes([data[1000] ^ 4]) + data[1001:]
        if fault in ("reset", "stall", "truncate"):
            self._send(path.name, data[: len(data) // 2])
            if fault == "stall":
                time.sleep(3)
            if fault == "reset":
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.close_connection = True
            self.connection.close()
            return
        self._send(path.name, data)

    def _send(self, name: str, data: bytes) -> None:
        for start in range(0, len(data), 1 << 16):
            chunk = data[start : start + (1 << 16)]
            self.wfile.write(chunk)
            self.server.sent[name] += len(chunk)
            if self.server.pause:
                time.sleep(self.server.pause)
