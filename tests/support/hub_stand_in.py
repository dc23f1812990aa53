"""A local stand-in for the Hugging Face hub, for the calls of huggingface_hub's client that publishing makes.

It implements a part of the hub's HTTP API (https://huggingface.co/docs/hub/api): create a repository or a branch,
validate the header of a card, upload small files in a commit and large files with git LFS, list and download files.
All data stay in memory, and ``requests`` records every request.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote


class Hub(ThreadingHTTPServer):
    """HTTP server of the hub; a ``refuse`` other than 0 is the status of every response."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repositories: dict[str, dict[str, Any]] = {}
        self.collections: dict[str, list[str]] = {}
        self.objects: dict[str, bytes] = {}
        self.requests: list[str] = []
        self.refuse = 0
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

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
            return self._respond({"error": "refused"}, self.server.refuse, {"X-Error-Message": "refused"})
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
    r"POST /api/collections": _Handler._collection,
    rf"POST /api/collections/{_NAME}/items?": _Handler._item,
}
