"""A server of files that behaves as the Hugging Face hub does, as a plain one, or badly."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path


@dataclass
class Server:
    url: str
    requests: list[tuple[str, str | None]] = field(default_factory=list[tuple[str, str | None]])
    """Path and `Range` header of each."""
    tokens: set[str] = field(default_factory=set[str])
    """`Authorization` headers that came."""
    states_hashes: bool = True
    """As the hub does: a redirect with size and hash, then the file."""
    ranges: bool = True
    """Whether it goes on in the middle of a file."""
    breaks_after: int = 0
    """Bytes after which it hangs up, once; 0 = never."""
    damages: bool = False
    """Whether one bit of each file arrives wrong."""


@contextmanager
def serve_files(folder: Path) -> Generator[Server]:
    """The files of `folder` on 127.0.0.1, until the block ends."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            name = self.path.removeprefix("/store").lstrip("/")
            server.requests.append((self.path, self.headers.get("Range")))
            if token := self.headers.get("Authorization"):
                server.tokens.add(token)
            path = folder / name
            if not path.is_file():
                self.send_error(404)
            elif server.states_hashes and not self.path.startswith("/store"):
                self._redirect(name, path.read_bytes())
            else:
                self._send(path.read_bytes())

        def _redirect(self, name: str, content: bytes) -> None:
            if name.endswith((".bin", ".json")):  # "large" files by SHA-256, "small" ones by git's hash
                etag = hashlib.sha256(content).hexdigest()
            else:
                etag = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
            self.send_response(302)
            self.send_header("Location", f"/store/{name}")
            self.send_header("X-Linked-Size", str(len(content)))
            self.send_header("X-Linked-ETag", f'"{etag}"')
            self.send_header("Content-Length", "0")
            self.end_headers()

        def _send(self, content: bytes) -> None:
            first = 0
            wanted = self.headers.get("Range")
            if wanted and server.ranges:
                first = int(wanted.removeprefix("bytes=").rstrip("-"))
                if first >= len(content):
                    self.send_error(416)
                    return
            self.send_response(206 if first else 200)
            if first:
                self.send_header("Content-Range", f"bytes {first}-{len(content) - 1}/{len(content)}")
            self.send_header("Content-Length", str(len(content) - first))
            self.end_headers()
            if server.damages:
                content = bytes([content[0] ^ 1]) + content[1:]
            if server.breaks_after:
                self.wfile.write(content[first : first + server.breaks_after])
                server.breaks_after = 0
                self.close_connection = True
                return
            self.wfile.write(content[first:])

        def log_message(self, format: str, *arguments: object) -> None:
            pass

    httpd = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server = Server(f"http://127.0.0.1:{httpd.server_address[1]}")
    thread = threading.Thread(target=httpd.serve_forever, args=(0.05,))
    thread.start()
    try:
        yield server
    finally:
        httpd.shutdown()
        httpd.server_close()
        thread.join()
