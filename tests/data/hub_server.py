"""A data set repository as the hub serves it, on this machine: what `datasets` and `huggingface_hub` ask for, and no more."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any
from urllib.parse import unquote, urlparse

REVISION = "0123456789abcdef0123456789abcdef01234567"


class HubServer(ThreadingHTTPServer):
    """Serves the files of a folder as the data set `name`; `asked` holds the files that were asked for, in order."""

    daemon_threads = True

    def __init__(self, folder: Path, name: str) -> None:
        super().__init__(("127.0.0.1", 0), _Answers)
        self.folder, self.name = folder, name
        self.asked: list[str] = []

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


@contextmanager
def serving(folder: Path, name: str) -> Iterator[HubServer]:
    """The server, running."""
    with HubServer(folder, name) as server:
        thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


class _Answers(BaseHTTPRequestHandler):
    server: HubServer
    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments: Any) -> None:
        """Nothing on the screen."""

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = unquote(urlparse(self.path).path)
        about, files = f"/api/datasets/{self.server.name}", f"/datasets/{self.server.name}/resolve/"
        if path.startswith(files):
            self._file(path.removeprefix(files).partition("/")[2])
        elif path == about or path.startswith(f"{about}/revision/"):
            self._json({"id": self.server.name, "sha": REVISION, "private": False, "siblings": []})
        elif path.startswith(f"{about}/tree/{REVISION}"):
            self._tree(path.removeprefix(f"{about}/tree/{REVISION}").strip("/"))
        else:
            self._json({"error": "not here"}, 404, {"x-error-code": "RepoNotFound"})

    def _tree(self, folder: str) -> None:
        found = self.server.folder / folder
        entries = [
            {
                "type": "directory" if entry.is_dir() else "file",
                "path": entry.relative_to(self.server.folder).as_posix(),
                "oid": "0" * 40,
                "size": entry.stat().st_size,
            }
            for entry in (sorted(found.iterdir()) if found.is_dir() else ())
        ]
        self._json(entries) if entries else self._json({"error": "not here"}, 404, {"x-error-code": "EntryNotFound"})

    def _file(self, name: str) -> None:
        self.server.asked.append(name)
        file = self.server.folder / name
        if not file.is_file():
            return self._json({"error": "not here"}, 404, {"x-error-code": "EntryNotFound"})
        content = whole = file.read_bytes()
        headers = {"etag": f'"{hashlib.sha1(whole).hexdigest()}"', "x-repo-commit": REVISION, "accept-ranges": "bytes"}
        if wanted := self.headers.get("range"):
            first, _, last = wanted.removeprefix("bytes=").partition("-")
            content = whole[int(first) : int(last) + 1 if last else None]
            headers["content-range"] = f"bytes {first}-{int(first) + len(content) - 1}/{len(whole)}"
        self._send(content, 206 if wanted else 200, headers)

    def _json(self, values: Any, status: int = 200, headers: dict[str, str] | None = None) -> None:
        self._send(json.dumps(values).encode(), status, {"content-type": "application/json", **(headers or {})})

    def _send(self, content: bytes, status: int, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {**headers, "content-length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)
