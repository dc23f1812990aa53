"""A local stand-in for the Hugging Face hub, for the calls of huggingface_hub's client that bocage makes.

It implements a part of the hub's HTTP API (https://huggingface.co/docs/hub/api): create a repository or a branch,
validate the header of a card, upload small files in a commit and large files with git LFS, list and download files.
Files of datasets are served as on the hub: a redirect to another host, which answers range requests. All data stay in
memory, and ``requests`` records every request.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import socket
import struct
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit


class Hub(ThreadingHTTPServer):
    """HTTP server of the hub.

    Attributes:
        repositories: repositories of models.
        datasets: files of the datasets, contents by path, by name of the dataset.
        refuse: status of every response, unless it is 0.
        error_code: header ``X-Error-Code`` of refused requests, by which the client tells reasons apart.
        faults: faults of the next downloads by file name: 503, 404, reset, truncate, stall, flip, or whole, which
            ignores the range.
        ranges: file name and first byte of every download.
        tokens: header ``Authorization`` of the downloads, which the client must not send to the other host.
        pause: seconds between pieces of 64 KiB.
        page: number of entries in a page of a listing.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.datasets: dict[str, dict[str, bytes]] = {}
        self.error_code = ""
        self.faults: dict[str, list[str]] = {}
        self.ranges: list[tuple[str, int]] = []
        self.tokens: list[str | None] = []
        self.pause = 0.0
        self.page = 1000
        self.repositories: dict[str, dict[str, Any]] = {}
        self.collections: dict[str, list[str]] = {}
        self.objects: dict[str, bytes] = {}
        self.requests: list[str] = []
        self.refuse = 0
        threading.Thread(target=self.serve_forever, daemon=True, kwargs={"poll_interval": 0.02}).start()

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def handle_error(self, request: Any, client_address: Any) -> None: ...  # faults close connections

    def files(self, repository: str, branch: str = "main") -> dict[str, bytes]:
        """Return the files of a branch: contents by name."""
        return dict(self.repositories[repository]["branches"][branch])


class _Handler(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None: ...

    def _respond(self, content: Any = None, status: int = 200, headers: dict[str, str] | None = None) -> None:
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _handle(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.headers.get("Transfer-Encoding") == "chunked":
            body = b""
            while size := int(self.rfile.readline(), 16):
                body += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
        path = unquote(self.path.partition("?")[0])
        self.server.requests.append(f"{self.command} {path}")
        if self.server.refuse:
            headers = {"X-Error-Message": "refused", "X-Error-Code": self.server.error_code}
            return self._respond({"error": "refused"}, self.server.refuse, headers)
        for pattern, method in _ROUTES.items():
            if match := re.fullmatch(pattern, f"{self.command} {path}"):
                return method(self, body, *match.groups())
        return self._respond({"error": f"{self.command} {path}"}, 404)

    do_GET = do_POST = do_PUT = do_HEAD = _handle  # noqa: N815

    def _create(self, body: bytes) -> None:
        request = json.loads(body)
        name = "/".join(filter(None, (request.get("organization"), request["name"])))
        if name in self.server.repositories:
            return self._respond({"error": "You already created this model repo", "url": name}, 409)
        self.server.repositories[name] = {
            "private": request.get("visibility") == "private",
            "branches": {"main": {}},
            "commits": [],
        }
        return self._respond({"url": f"{self.server.address}/{name}", "id": name})

    def _branch(self, body: bytes, name: str, branch: str) -> None:
        branches = self.server.repositories[name]["branches"]
        if branch in branches:
            return self._respond({"error": "Reference already exists"}, 409)
        branches[branch] = dict(branches["main"])
        return self._respond({})

    def _validate(self, body: bytes) -> None:
        self._respond({"errors": [], "warnings": []})

    def _preupload(self, body: bytes, name: str, branch: str) -> None:
        files = json.loads(body)["files"]
        modes = [
            {
                "path": file["path"],
                "uploadMode": "lfs" if file["path"].endswith(".safetensors") else "regular",
                "shouldIgnore": False,
            }
            for file in files
        ]
        self._respond({"files": modes})

    def _batch(self, body: bytes, name: str) -> None:
        objects = [
            {
                "oid": item["oid"],
                "size": item["size"],
                "actions": {"upload": {"href": f"{self.server.address}/objects/{item['oid']}"}},
            }
            for item in json.loads(body)["objects"]
        ]
        self._respond({"transfer": "basic", "objects": objects}, headers={"Content-Type": "application/json"})

    def _store(self, body: bytes, oid: str) -> None:
        assert hashlib.sha256(body).hexdigest() == oid
        self.server.objects[oid] = body
        self._respond({})

    def _commit(self, body: bytes, name: str, branch: str) -> None:
        repository = self.server.repositories[name]
        files = repository["branches"][branch]
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "header":
                repository["commits"].append(value["summary"])
            elif line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.server.objects[value["oid"]]
            elif line["key"] == "deletedFile":
                del files[value["path"]]
        oid = self._oid(name, branch)
        self._respond({"success": True, "commitOid": oid, "commitUrl": f"{self.server.address}/{name}/commit/{oid}"})

    def _oid(self, name: str, branch: str) -> str:
        return hashlib.sha1(repr(sorted(self.server.files(name, branch).items())).encode()).hexdigest()

    def _branch_at(self, name: str, revision: str) -> str:
        branches = self.server.repositories[name]["branches"]
        return revision if revision in branches else next(b for b in branches if self._oid(name, b) == revision)

    def _info(self, body: bytes, name: str, revision: str) -> None:
        branch = self._branch_at(name, revision)
        siblings = [{"rfilename": path} for path in self.server.files(name, branch)]
        self._respond({"id": name, "modelId": name, "sha": self._oid(name, branch), "siblings": siblings, "tags": []})

    def _tree(self, body: bytes, name: str, revision: str) -> None:
        files = self.server.files(name, self._branch_at(name, revision))
        entries = [
            {"type": "file", "path": path, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
            for path, content in files.items()
        ]
        self._respond(entries)

    def _resolve(self, body: bytes, name: str, revision: str, path: str) -> None:
        branch = self._branch_at(name, revision)
        content = self.server.files(name, branch)[path]
        etag = f'"{hashlib.sha256(content).hexdigest()}"'
        self._respond(content, headers={"ETag": etag, "X-Repo-Commit": self._oid(name, branch)})

    def _dataset(self, name: str) -> dict[str, bytes] | None:
        """Files of a dataset; sends the hub's answer if there is none."""
        files = self.server.datasets.get(name)
        if files is None:
            self._respond({"error": "Repository not found"}, 404, {"X-Error-Code": "RepoNotFound"})
        return files

    def _dataset_info(self, body: bytes, name: str, revision: str | None = None) -> None:
        if self._dataset(name) is None:
            return None
        if revision not in (None, "main", _DATASET_COMMIT):
            return self._respond({"error": "Invalid rev id"}, 404, {"X-Error-Code": "RevisionNotFound"})
        return self._respond({"id": name, "sha": _DATASET_COMMIT, "siblings": [], "tags": []})

    def _dataset_tree(self, body: bytes, name: str, revision: str) -> None:
        files = self._dataset(name)
        if files is None:
            return
        assert revision == _DATASET_COMMIT
        start = int(parse_qs(urlsplit(self.path).query).get("cursor", ["0"])[0])
        entries: list[dict[str, Any]] = [{"type": "directory", "path": "data", "oid": "0" * 40, "size": 0}]
        for path, content in files.items():
            entry = {"type": "file", "path": path, "size": len(content), "oid": _git_hash(content)}
            if len(content) > _LFS_BYTES:
                digest = hashlib.sha256(content).hexdigest()
                entry["lfs"] = {"oid": digest, "size": len(content), "pointerSize": 134}
            entries.append(entry)
        end = start + self.server.page
        following = f"{self.server.address}/api/datasets/{name}/tree/{revision}?recursive=true&cursor={end}"
        headers = {"Link": f'<{following}>; rel="next"'} if end < len(entries) else {}
        self._respond(entries[start:end], headers=headers)

    def _dataset_file(self, body: bytes, name: str, revision: str, path: str) -> None:
        if self._dataset(name) is not None:
            other_host = f"http://localhost:{self.server.server_address[1]}"
            self._respond(b"", 302, {"Location": f"{other_host}/cdn/{name}/{path}"})

    def _download(self, body: bytes, name: str, path: str) -> None:
        content, file = self.server.datasets[name][path], path.rpartition("/")[2]
        if self.command == "HEAD":
            return self._respond(content)
        self.server.tokens.append(self.headers.get("Authorization"))
        first = int((re.findall(r"bytes=(\d+)-", self.headers.get("Range", "")) or [0])[0])
        self.server.ranges.append((file, first))
        faults = self.server.faults.get(file, [])
        fault = faults.pop(0) if faults else ""
        if fault.isdecimal():
            return self._respond(b"", int(fault))
        if fault == "whole":
            first = 0
        size = len(content)
        if fault == "flip":
            content = content[:-1] + bytes([content[-1] ^ 1])
        content = content[first:]
        self.send_response(206 if first else 200)
        if first:
            self.send_header("Content-Range", f"bytes {first}-{size - 1}/{size}")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if fault in ("reset", "truncate", "stall"):
            content = content[: len(content) // 2]
        for start in range(0, len(content), _PIECE):
            self.wfile.write(content[start : start + _PIECE])
            time.sleep(self.server.pause)
        if fault == "stall":
            time.sleep(3)
        if fault == "reset":
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        if fault in ("reset", "truncate", "stall"):
            self.close_connection = True
            self.connection.close()
        return None

    def _collection(self, body: bytes) -> None:
        request = json.loads(body)
        slug = f"{request['namespace']}/{request['title'].lower()}"
        self.server.collections.setdefault(slug, [])
        self._respond(self._collection_json(slug, request["title"]))

    def _collection_json(self, slug: str, title: str) -> dict[str, Any]:
        return {
            "slug": slug,
            "title": title,
            "owner": {"name": slug.partition("/")[0]},
            "items": [],
            "lastUpdated": "2026-01-01T00:00:00.000Z",
            "position": 0,
            "private": True,
            "theme": "blue",
            "upvotes": 0,
        }

    def _item(self, body: bytes, slug: str) -> None:
        self.server.collections[slug].append(json.loads(body)["item"]["id"])
        self._respond(self._collection_json(slug, slug))


def _git_hash(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


_DATASET_COMMIT = "c" * 40
_LFS_BYTES = 1000  # larger files of datasets are in git LFS
_PIECE = 1 << 16
_NAME = r"([\w.-]+/[\w.-]+)"
_ROUTES: dict[str, Callable[..., None]] = {
    r"POST /api/repos/create": _Handler._create,
    r"POST /api/validate-yaml": _Handler._validate,
    rf"POST /api/models/{_NAME}/branch/(\S+)": _Handler._branch,
    rf"POST /api/models/{_NAME}/preupload/(\S+)": _Handler._preupload,
    rf"POST /{_NAME}\.git/info/lfs/objects/batch": _Handler._batch,
    r"PUT /objects/(\w+)": _Handler._store,
    rf"POST /api/models/{_NAME}/commit/(\S+)": _Handler._commit,
    rf"GET /api/models/{_NAME}/revision/(\S+)": _Handler._info,
    rf"GET /api/models/{_NAME}/tree/(\S+)": _Handler._tree,
    rf"(?:GET|HEAD) /{_NAME}/resolve/([^/]+)/(\S+)": _Handler._resolve,
    rf"GET /api/datasets/{_NAME}": _Handler._dataset_info,
    rf"GET /api/datasets/{_NAME}/revision/(\S+)": _Handler._dataset_info,
    rf"GET /api/datasets/{_NAME}/tree/(\S+)": _Handler._dataset_tree,
    rf"(?:GET|HEAD) /datasets/{_NAME}/resolve/([^/]+)/(\S+)": _Handler._dataset_file,
    rf"(?:GET|HEAD) /cdn/{_NAME}/(\S+)": _Handler._download,
    r"POST /api/collections": _Handler._collection,
    rf"POST /api/collections/{_NAME}/items?": _Handler._item,
}
