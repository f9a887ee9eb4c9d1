"""Local stub of the Hugging Face Hub: the HTTP endpoints that huggingface_hub uses, and a log of requests."""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote

REPOSITORY = "owner/tiny"
_TREE = re.compile(r"/api/models/(owner/tiny)(?:/(tree|revision)/([^/?]+))?")
_FILE = re.compile(r"/(owner/tiny)/resolve/([^/]+)/(.+)")


class HubStub:
    """Serves one directory as revision `main`, and others under names of their own."""

    def __init__(self, revisions: dict[str, Path]) -> None:
        self.revisions = revisions
        self.commits = {hashlib.sha1(name.encode()).hexdigest(): path for name, path in revisions.items()}
        self.fetched: list[str] = []
        self.requests = 0

    def commit(self, revision: str) -> str | None:
        """The commit that a branch or commit name stands for."""
        known = {**{name: hashlib.sha1(name.encode()).hexdigest() for name in self.revisions}}
        return known.get(revision) or (revision if revision in self.commits else None)


@contextmanager
def hub(revisions: dict[str, Path]) -> Iterator[tuple[str, HubStub]]:
    """Address and record of a running stub."""
    stub = HubStub(revisions)

    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.answer(body=False)

        def do_GET(self) -> None:
            self.answer(body=True)

        def answer(self, body: bool) -> None:
            stub.requests += 1
            path = unquote(self.path.split("?")[0])
            if match := _FILE.fullmatch(path):
                commit = stub.commit(match[2])
                file = stub.commits[commit] / match[3] if commit else None
                if file is None or not file.is_file():
                    return self.send(404, b"", {"X-Error-Code": "EntryNotFound" if commit else "RevisionNotFound"})
                if body:
                    stub.fetched.append(match[3])
                data = file.read_bytes()
                headers = {"X-Repo-Commit": commit, "ETag": f'"{hashlib.sha1(data).hexdigest()}"'}
                return self.send(200, data, headers, body)
            if match := _TREE.fullmatch(path):
                commit = stub.commit(match[3] or "main")
                if commit is None:
                    return self.send(404, b'{"error": "no such revision"}', {"X-Error-Code": "RevisionNotFound"})
                root = stub.commits[commit]
                files = sorted(p for p in root.rglob("*") if p.is_file())
                names = [p.relative_to(root).as_posix() for p in files]
                if match[2] == "tree":
                    rows = [
                        {"type": "file", "path": name, "size": path.stat().st_size, "oid": "0" * 40}
                        for name, path in zip(names, files, strict=True)
                    ]
                    return self.send(200, json.dumps(rows).encode())
                info = {"id": match[1], "sha": commit, "siblings": [{"rfilename": name} for name in names]}
                return self.send(200, json.dumps(info).encode())
            return self.send(404, b'{"error": "no such repository"}', {"X-Error-Code": "RepoNotFound"})

        def send(self, status: int, data: bytes, headers: dict[str, str] | None = None, body: bool = True) -> None:
            self.send_response(status)
            for name, value in (headers or {}).items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            if body:
                self.wfile.write(data)

        def log_message(self, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", stub
    finally:
        server.shutdown()
        server.server_close()
