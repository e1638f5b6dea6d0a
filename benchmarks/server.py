"""A static file server that is faster than its clients, and can be as slow as an object store.

    python benchmarks/server.py FOLDER [--port PORT] [--rate BYTES_PER_SECOND] [--delay SECONDS]

A rate is of each connection; `total`, which only a reset sets, is of all of them together.

Speaks plain HTTP (GET and HEAD, Range, If-Match) and as much S3 as reading by path wants: the path
of an object is `/bucket/key`, below FOLDER; signatures are not looked at. Prints its URL.
`GET /__stats__` gives the requests since the last `POST /__reset__?rate=…&delay=…&total=…` as JSON.
"""

import argparse
import contextlib
import email.utils
import http.server
import json
import os
import re
import threading
import time
import urllib.parse
from pathlib import Path

CHUNK_BYTES = 256 * 1024  # sent at once where a rate is kept


class Server(http.server.ThreadingHTTPServer):
    """A thread for each connection."""

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, folder: Path, port: int, rate: float, delay: float) -> None:
        """Listen on this machine, on a free port if it is 0."""
        super().__init__(("127.0.0.1", port), Handler)
        self.folder, self.rate, self.delay = folder, rate, delay
        self.log: list[dict[str, float | str]] = []
        self.total, self.free, self.lock = 0.0, 0.0, threading.Lock()

    def wait_for_turn(self, sent: int) -> None:
        """Keep to the rate that all connections have together."""
        with self.lock:
            self.free = max(self.free, time.monotonic()) + sent / self.total
            turn = self.free
        time.sleep(max(0, turn - time.monotonic()))


class Handler(http.server.BaseHTTPRequestHandler):
    """Answers one connection's requests."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: Server

    def do_GET(self) -> None:
        """Send a file, or a part of it."""
        url = urllib.parse.urlsplit(self.path)
        if url.path == "/__stats__":
            self._text(json.dumps(self.server.log))
        else:
            entry: dict[str, float | str] = {"method": self.command, "begin": time.monotonic()}
            self.server.log.append(entry)
            time.sleep(self.server.delay)
            with contextlib.suppress(ConnectionError):
                self._file(self.server.folder / urllib.parse.unquote(url.path[1:]), entry)

    do_HEAD = do_GET  # noqa: N815 - the name that http.server wants

    def do_POST(self) -> None:
        """Forget the log, and set the rate and the delay."""
        url = urllib.parse.urlsplit(self.path)
        if url.path != "/__reset__":
            self.send_error(404)
            return
        settings = dict(urllib.parse.parse_qsl(url.query))
        self.server.rate = float(settings.get("rate", 0))
        self.server.delay = float(settings.get("delay", 0))
        self.server.total = float(settings.get("total", 0))
        self.server.log.clear()
        self._text("")

    def _text(self, text: str) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text.encode())

    def _file(self, path: Path, entry: dict[str, float | str]) -> None:
        if not path.is_file():
            self.send_error(404)
            return
        with path.open("rb") as file:
            status = os.fstat(file.fileno())
            size = status.st_size
            tag = f'"{status.st_mtime_ns:x}-{size:x}"'
            first, last = _extent(self.headers["Range"], size)
            if self.headers.get("If-Match", tag) not in (tag, "*"):
                self.send_error(412)
                return
            if self.headers["Range"] and first > last:
                self.send_response(416)
                self.send_header("Content-Range", f"bytes */{size}")
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            self.send_response(206 if self.headers["Range"] else 200)
            if self.headers["Range"]:
                self.send_header("Content-Range", f"bytes {first}-{last}/{size}")
            self.send_header("Content-Length", str(last - first + 1))
            self.send_header("Accept-Ranges", "bytes")
            self.send_header("Content-Type", "application/octet-stream")
            self.send_header("ETag", tag)
            self.send_header("Last-Modified", email.utils.formatdate(status.st_mtime, usegmt=True))
            self.end_headers()
            self.wfile.flush()
            entry["first"], entry["bytes"] = first, 0
            if self.command == "GET":
                self._body(file.fileno(), first, last + 1, entry)

    def _body(self, file: int, start: int, end: int, entry: dict[str, float | str]) -> None:
        rate, began, begin = self.server.rate, time.monotonic(), start
        while start < end:
            slow = rate or self.server.total
            most = min(CHUNK_BYTES, end - start) if slow else end - start
            sent = os.sendfile(self.connection.fileno(), file, start, most)
            start += sent
            entry["bytes"] = start - begin
            if rate:
                time.sleep(max(0, began + (start - begin) / rate - time.monotonic()))
            if self.server.total:
                self.server.wait_for_turn(sent)

    def log_message(self, *_: object) -> None:
        """Stay quiet."""


def _extent(text: str | None, size: int) -> tuple[int, int]:
    """Give the first and the last byte of a range (RFC 9110, section 14.1.2)."""
    match = re.fullmatch(r"bytes=(\d*)-(\d*)", text or "")
    if not match or match[0] == "bytes=-":
        return 0, size - 1
    if not match[1]:
        return max(0, size - int(match[2])), size - 1
    return int(match[1]), min(size - 1, int(match[2] or size))


def main() -> None:
    """Serve until killed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--port", type=int, default=0, help="0 takes a free one")
    parser.add_argument("--rate", type=float, default=0, help="bytes per second a connection")
    parser.add_argument("--delay", type=float, default=0, help="seconds before each answer")
    options = parser.parse_args()
    server = Server(options.folder, options.port, options.rate, options.delay)
    print(f"http://127.0.0.1:{server.server_port}", flush=True)
    server.serve_forever()


if __name__ == "__main__":
    main()
