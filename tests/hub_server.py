"""A Hugging Face hub in a thread: enough of its HTTP for the real client to make, fill and download a repository."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import threading
import urllib.parse
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import huggingface_hub.constants
import pytest

TOKEN, COMMIT = "hf_right", "1" * 40


class FakeHub(ThreadingHTTPServer):
    """Repositories by id, each a dictionary of files."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repositories: dict[str, dict[str, bytes]] = {}
        self.served: list[str] = []

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class _Handler(BaseHTTPRequestHandler):
    server: FakeHub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        """Quiet."""

    def _answer(self, status: int, body: bytes = b"{}", **headers: str) -> None:
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _json(self, value: object) -> None:
        self._answer(200, json.dumps(value).encode(), Content_Type="application/json")

    def do_GET(self) -> None:
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self._answer(401, X_Error_Code="RepoNotFound", X_Error_Message="Repository not found")
        parts = self.path.partition("?")[0].strip("/").removeprefix("datasets/").split("/")
        name = "/".join(parts[2:4] if parts[0] == "api" else parts[:2])
        files = self.server.repositories.get(name)
        if files is None:
            return self._answer(404, X_Error_Code="RepoNotFound")
        if "tree" in parts:
            oid = {f: hashlib.sha1(body).hexdigest() for f, body in files.items()}
            return self._json([{"type": "file", "path": f, "size": len(files[f]), "oid": oid[f]} for f in files])
        if parts[0] == "api":
            return self._json({"id": name, "sha": COMMIT, "siblings": [{"rfilename": f} for f in files]})
        body = files.get("/".join(parts[4:]))
        if body is None:
            return self._answer(404, X_Error_Code="EntryNotFound")
        self.server.served.append("/".join(parts[4:]))
        facts = {"ETag": f'"{hashlib.sha1(body).hexdigest()}"', "X_Repo_Commit": COMMIT}
        first, _, last = self.headers.get("Range", "").removeprefix("bytes=").partition("-")
        if not first:
            return self._answer(200, body, **facts)
        part = body[int(first) : int(last or len(body)) + 1]
        return self._answer(206, part, Content_Range=f"bytes {first}-{int(first) + len(part) - 1}/{len(body)}", **facts)

    do_HEAD = do_GET  # noqa: N815  (the base class dispatches on the name)

    def do_POST(self) -> None:
        text = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self._answer(401)
        parts = self.path.partition("?")[0].strip("/").split("/")
        if self.path == "/api/repos/create":
            made = json.loads(text)
            name = f"{made['organization']}/{made['name']}"
            self.server.repositories.setdefault(name, {})
            return self._json({"url": f"{self.server.address}/{name}"})
        if "paths-info" in parts:
            files = self.server.repositories["/".join(parts[2:4])]
            asked = [name for key, name in urllib.parse.parse_qsl(text.decode()) if key == "paths"]
            known = [name for name in asked or json.loads(text)["paths"] if name in files]
            oid = {name: hashlib.sha1(files[name]).hexdigest() for name in known}
            return self._json([{"type": "file", "path": n, "size": len(files[n]), "oid": oid[n]} for n in known])
        if "preupload" in parts:
            paths = [file["path"] for file in json.loads(text)["files"]]
            return self._json({"files": [{"path": p, "uploadMode": "regular", "shouldIgnore": False} for p in paths]})
        if "commit" in parts:
            name = "/".join(parts[2:4])
            files = self.server.repositories[name]
            for row in map(json.loads, text.splitlines()):
                if row["key"] == "file":
                    files[row["value"]["path"]] = base64.b64decode(row["value"]["content"])
            return self._json({"commitUrl": f"{self.server.address}/{name}/commit/{COMMIT}", "commitOid": COMMIT})
        return self._json({"errors": [], "warnings": []})


@contextlib.contextmanager
def running_hub(monkeypatch: pytest.MonkeyPatch, cache: Path) -> Iterator[FakeHub]:
    """The hub that this process's client talks to, with an empty cache."""
    hub = FakeHub()
    template = f"{hub.address}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    for name, value in (
        ("ENDPOINT", hub.address),
        ("HUGGINGFACE_CO_URL_TEMPLATE", template),
        ("HF_HUB_CACHE", str(cache)),
        ("HF_HUB_OFFLINE", False),
        ("HF_HUB_DISABLE_XET", True),
    ):
        monkeypatch.setattr(huggingface_hub.constants, name, value)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    thread = threading.Thread(target=hub.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.shutdown()
        hub.server_close()
        thread.join()
