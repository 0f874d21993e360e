"""A Hugging Face hub on this machine, with as much of its HTTP interface as uploads and downloads of models need."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

OWNER, READER = "hf_owner", "hf_reader"  # tokens: one that may write, one that may read
Files = dict[str, bytes]


class Hub(ThreadingHTTPServer):
    """repositories: name -> commits, oldest first. tags: (name, revision) -> commit. private: readable with a token.

    downloads: "name/file" of every file whose content was sent. stored: large files by their sha256.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.repositories: dict[str, dict[str, Files]] = {}
        self.tags: dict[tuple[str, str], str] = {}
        self.private: set[str] = set()
        self.downloads: list[str] = []
        self.stored: Files = {}
        self.is_down = False
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def commit(self, name: str, files: Mapping[str, bytes], tag: str | None = None) -> str:
        """Add or replace files in a repository, which is made if it does not exist. Returns the commit."""
        commits = self.repositories.setdefault(name, {})
        newest = {**list(commits.values())[-1], **files} if commits else dict(files)
        sha = hashlib.sha1(f"{name} {len(commits)}".encode()).hexdigest()
        commits[sha] = newest
        if tag is not None:
            self.tags[name, tag] = sha
        return sha

    def files(self, name: str) -> Files:
        """The newest files."""
        return list(self.repositories[name].values())[-1]


class Handler(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # as in http_server.py

    def log_message(self, *_: Any) -> None: ...

    def do_GET(self) -> None:
        self._answer()

    do_HEAD = do_POST = do_PUT = do_GET

    def _answer(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        path = unquote(urlsplit(self.path).path)
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        if self.server.is_down:
            return self._error(503, None, "under maintenance")
        if token not in ("", OWNER, READER) and not path.startswith("/lfs/"):
            return self._error(401, None, "Invalid credentials in Authorization header")
        writes = self.command in ("POST", "PUT") and path != "/api/validate-yaml" and not path.startswith("/lfs/")
        if writes and token != OWNER:
            return self._error(403, None, "You don't have the rights to create a model under this namespace")
        for pattern, method in ROUTES.items():
            if found := re.fullmatch(pattern, path):
                return method(self, body, token, *found.groups())
        return self._error(404, None, f"the hub of the test has no {path}")

    def _send(self, content: bytes, kind: str = "application/json", status: int = 200, **headers: str) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(content)))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def _json(self, value: Any, status: int = 200) -> None:
        self._send(json.dumps(value).encode(), status=status)

    def _error(self, status: int, code: str | None, message: str) -> None:
        headers = {"X_Error_Message": message, **({"X_Error_Code": code} if code else {})}
        self._send(json.dumps({"error": message}).encode(), status=status, **headers)

    def _find(self, name: str, revision: str, token: str) -> tuple[str, Files] | None:
        """A commit and its files; None, and the error is sent, if there is none."""
        commits = self.server.repositories.get(name)
        if commits is None or (name in self.server.private and not token):
            self._error(404 if token else 401, "RepoNotFound", "Repository not found")
            return None
        sha = list(commits)[-1] if revision == "main" else self.server.tags.get((name, revision), revision)
        if sha not in commits:
            self._error(404, "RevisionNotFound", f"Invalid rev id: {revision}")
            return None
        return sha, commits[sha]

    def create(self, body: bytes, token: str) -> None:
        request = json.loads(body)
        name = f"{request['organization']}/{request['name']}"
        url = f"{self.server.url}/{name}"
        if name in self.server.repositories:
            return self._json({"error": "You already created this model repo", "url": url}, status=409)
        self.server.commit(name, {".gitattributes": b""})
        return self._json({"url": url, "name": name})

    def check_card(self, body: bytes, token: str) -> None:
        self._json({"errors": [], "warnings": []})

    def upload_modes(self, body: bytes, token: str, name: str, revision: str) -> None:
        files = json.loads(body)["files"]
        large = {True: "lfs", False: "regular"}
        self._json({
            "files": [
                {"path": f["path"], "uploadMode": large[f["path"].endswith(".safetensors")], "shouldIgnore": False}
                for f in files
            ]
        })  # fmt: skip

    def large_files(self, body: bytes, token: str, name: str) -> None:
        objects = [
            {**wanted, "actions": {"upload": {"href": f"{self.server.url}/lfs/{wanted['oid']}"}}}
            for wanted in json.loads(body)["objects"]
        ]
        self._json({"transfer": "basic", "objects": objects})

    def store(self, body: bytes, token: str, oid: str) -> None:
        assert hashlib.sha256(body).hexdigest() == oid
        self.server.stored[oid] = body
        self._send(b"")

    def take_commit(self, body: bytes, token: str, name: str, revision: str) -> None:
        files: Files = {}
        for line in body.splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif entry["key"] == "lfsFile":
                files[value["path"]] = self.server.stored[value["oid"]]
        sha = self.server.commit(name, files)
        self._json({"commitUrl": f"{self.server.url}/{name}/commit/{sha}", "commitOid": sha, "success": True})

    def info(self, body: bytes, token: str, name: str, revision: str | None = None) -> None:
        if found := self._find(name, revision or "main", token):
            self._json({"id": name, "sha": found[0], "siblings": [{"rfilename": path} for path in found[1]]})

    def tree(self, body: bytes, token: str, name: str, revision: str) -> None:
        if found := self._find(name, revision, token):
            self._json([{"type": "file", "path": p, "size": len(f), "oid": _oid(f)} for p, f in found[1].items()])

    def file(self, body: bytes, token: str, name: str, revision: str, path: str) -> None:
        found = self._find(name, revision, token)
        if found is None:
            return None
        sha, files = found
        if path not in files:
            return self._error(404, "EntryNotFound", "Entry not found")
        if self.command == "GET":
            self.server.downloads.append(f"{name}/{path}")
        headers = {"X_Repo_Commit": sha, "ETag": f'"{_oid(files[path])}"'}
        return self._send(files[path], "application/octet-stream", **headers)


def _oid(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


NAME = "([^/]+/[^/]+)"
ROUTES = {
    "/api/repos/create": Handler.create,
    "/api/validate-yaml": Handler.check_card,
    f"/api/models/{NAME}/preupload/([^/]+)": Handler.upload_modes,
    f"/api/models/{NAME}/commit/([^/]+)": Handler.take_commit,
    f"/api/models/{NAME}/tree/([^/]+)": Handler.tree,
    f"/api/models/{NAME}/revision/([^/]+)": Handler.info,
    f"/api/models/{NAME}": Handler.info,
    f"/{NAME}.git/info/lfs/objects/batch": Handler.large_files,
    "/lfs/([0-9a-f]+)": Handler.store,
    f"/{NAME}/resolve/([^/]+)/(.+)": Handler.file,
}
