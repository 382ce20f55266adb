"""A server on this machine that speaks as much of the hub's protocol as reading takes, and fails by script."""

from __future__ import annotations

import json
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit


@dataclass
class Trouble:
    """What happens to the next `times` requests whose path holds `where`, after `skip` of them."""

    where: str
    kind: str
    """`status` · `reset` (after `after` bytes of the body) · `truncate` (likewise, closed politely) · `stall`."""
    status: int = 503
    after: int = 0
    times: int = 1
    skip: int = 0
    headers: dict[str, str] = field(default_factory=dict)


@dataclass
class Dataset:
    files: dict[str, bytes]
    sha: str
    token: str = ""
    gated: bool = False
    elsewhere: str = ""
    """Address of another server that files are redirected to, as the hub does with large ones."""


@dataclass
class FakeHub:
    datasets: dict[str, Dataset] = field(default_factory=dict)
    troubles: list[Trouble] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)
    """`METHOD path range`, in the order of arrival."""
    credentials: set[str] = field(default_factory=set)
    """What requests have sent as their authorization."""
    port: int = 0
    _server: ThreadingHTTPServer | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def up(self) -> None:
        hub = self

        class Handler(_Handler):
            pass

        Handler.hub = hub
        self._server = ThreadingHTTPServer(("127.0.0.1", self.port), Handler)
        self._server.daemon_threads = True
        self.port = self._server.server_address[1]
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()

    def down(self) -> None:
        """From now on connections are refused; those that are open break."""
        assert self._server
        self._server.shutdown()
        self._server.server_close()
        for connection in list(_connections):
            _reset(connection)
        self._server = None


_connections: set[socket.socket] = set()


def _reset(connection: socket.socket) -> None:
    try:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        connection.shutdown(socket.SHUT_RD)
        connection.close()
    except OSError:
        pass


@contextmanager
def running() -> Iterator[FakeHub]:
    hub = FakeHub()
    hub.up()
    try:
        yield hub
    finally:
        if hub._server:
            hub.down()


class _Handler(BaseHTTPRequestHandler):
    hub: FakeHub
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def setup(self) -> None:
        super().setup()
        _connections.add(self.connection)

    def finish(self) -> None:
        _connections.discard(self.connection)
        with suppress(OSError):
            super().finish()

    def log_message(self, format: str, *args: object) -> None:
        pass

    def handle(self) -> None:
        try:
            super().handle()
        except (OSError, ValueError):
            self.close_connection = True

    def do_GET(self) -> None:
        self._answer(b"")

    def do_HEAD(self) -> None:
        self._answer(b"")

    def do_POST(self) -> None:
        self._answer(self.rfile.read(int(self.headers.get("Content-Length", 0))))

    def _answer(self, body: bytes) -> None:
        path = unquote(urlsplit(self.path).path)
        self.hub.requests.append(f"{self.command} {path} {self.headers.get('Range', '')}".strip())
        self.hub.credentials.add(self.headers.get("Authorization", ""))
        trouble = self._trouble(path)
        if trouble and trouble.kind == "status":
            self._send(trouble.status, json.dumps({"error": "scripted"}).encode(), trouble.headers)
            return
        status, payload, headers = self._route(path, body)
        self._send(status, payload, headers, trouble)

    def _trouble(self, path: str) -> Trouble | None:
        for trouble in self.hub.troubles:
            if trouble.where in path and trouble.times:
                if trouble.skip:
                    trouble.skip -= 1
                    continue
                trouble.times -= 1
                return trouble
        return None

    def _route(self, path: str, body: bytes) -> tuple[int, bytes, dict[str, str]]:
        for name, dataset in self.hub.datasets.items():
            routes: list[tuple[str, Callable[[Dataset, str, bytes], tuple[int, bytes, dict[str, str]]]]] = [
                (f"/api/datasets/{name}", lambda d, rest, body, name=name: self._api(name, d, rest, body)),
                (f"/datasets/{name}/resolve/", self._file),
            ]
            for prefix, route in routes:
                if path == prefix or path.startswith(prefix.rstrip("/") + "/"):
                    if dataset.token and self.headers.get("Authorization") != f"Bearer {dataset.token}":
                        return 401, b'{"error": "no access"}', {"X-Error-Code": "RepoNotFound"}
                    if dataset.gated:
                        return 403, b'{"error": "gated"}', {"X-Error-Code": "GatedRepo"}
                    return route(dataset, path.removeprefix(prefix).strip("/"), body)
        return 404, b'{"error": "Repository not found"}', {"X-Error-Code": "RepoNotFound"}

    def _api(self, name: str, dataset: Dataset, rest: str, body: bytes) -> tuple[int, bytes, dict[str, str]]:
        parts = rest.split("/", 2)
        if parts[0] in ("revision", "tree", "paths-info") and parts[1] not in ("main", dataset.sha):
            return 404, b'{"error": "Revision not found"}', {"X-Error-Code": "RevisionNotFound"}
        if parts[0] in ("", "revision"):
            answer: object = {
                "id": name,
                "sha": dataset.sha,
                "private": bool(dataset.token),
                "tags": [],
                "siblings": [{"rfilename": file} for file in dataset.files],
            }
        elif parts[0] == "tree":
            folder = parts[2] if len(parts) > 2 else ""
            recursive = parse_qs(urlsplit(self.path).query).get("recursive", ["false"])[0].lower() in ("true", "1")
            answer = _tree(dataset, folder, recursive=recursive)
            if not answer and folder:
                return 404, b'{"error": "Entry not found"}', {"X-Error-Code": "EntryNotFound"}
        elif parts[0] == "paths-info":
            wanted = json.loads(body)["paths"] if body[:1] == b"{" else parse_qs(body.decode())["paths"]
            answer = [entry for entry in _tree(dataset, "", recursive=True) if entry["path"] in wanted]
        else:
            return 404, b'{"error": "unknown"}', {}
        return 200, json.dumps(answer).encode(), {"Content-Type": "application/json"}

    def _file(self, dataset: Dataset, rest: str, body: bytes) -> tuple[int, bytes, dict[str, str]]:
        revision, _, file = rest.partition("/")
        headers = {"X-Repo-Commit": dataset.sha, "ETag": f'"{hash((file, dataset.sha)):x}"', "Accept-Ranges": "bytes"}
        if revision not in ("main", dataset.sha):
            return 404, b"", {"X-Error-Code": "RevisionNotFound"}
        if file not in dataset.files:
            return 404, b"", {**headers, "X-Error-Code": "EntryNotFound"}
        if dataset.elsewhere:
            return 302, b"", {**headers, "Location": dataset.elsewhere + self.path + "?signature=1"}
        content = dataset.files[file]
        wanted = self.headers.get("Range")
        if not wanted:
            return 200, content, headers
        first, _, last = wanted.removeprefix("bytes=").partition("-")
        if int(first) >= len(content):
            return 416, b"", {**headers, "Content-Range": f"bytes */{len(content)}"}
        end = min(int(last or len(content)), len(content) - 1)
        part = content[int(first) : end + 1]
        return 206, part, {**headers, "Content-Range": f"bytes {first}-{end}/{len(content)}"}

    def _send(self, status: int, payload: bytes, headers: dict[str, str], trouble: Trouble | None = None) -> None:
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(payload)))
        self.end_headers()
        if self.command == "HEAD":
            return
        if not trouble:
            self.wfile.write(payload)
            return
        self.wfile.write(payload[: trouble.after])
        self.wfile.flush()
        self.close_connection = True
        if trouble.kind == "reset":
            _reset(self.connection)
        elif trouble.kind == "stall":
            self.connection.settimeout(30)
            self.connection.recv(1)  # until the client has enough of it


def _tree(dataset: Dataset, folder: str, *, recursive: bool) -> list[dict[str, object]]:
    entries: dict[str, dict[str, object]] = {}
    for file, content in dataset.files.items():
        if folder and not file.startswith(folder + "/"):
            continue
        below = file.removeprefix(folder + "/") if folder else file
        parts = below.split("/")
        prefix = folder + "/" if folder else ""
        for depth in range(1, len(parts) if recursive else min(len(parts), 2)):
            path = prefix + "/".join(parts[:depth])
            entries[path] = {"type": "directory", "path": path, "oid": "0" * 40, "size": 0}
        if recursive or len(parts) == 1:
            entries[file] = {
                "type": "file",
                "path": file,
                "oid": f"{abs(hash(content)):040x}"[:40],
                "size": len(content),
            }
    return list(entries.values())
