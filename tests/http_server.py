"""A store on this machine: the files of a folder over HTTP, with ranges, and with faults on demand."""

from __future__ import annotations

import html
import re
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

# What may happen to a request: a status, or one of these.
RESET, SHORT, SLOW, NO_RANGE = "reset", "short", "slow", "no range"
Fault = int | str | None


class Store(ThreadingHTTPServer):
    """fault: from the number of a request (from 1) and its path to what happens to it; None: it is answered.

    requests: (path, header Range) of all. faults: how often each fault happened. delay: seconds, of a slow answer. token:
    header Authorization that requests need.
    """

    daemon_threads = True

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.folder = folder.resolve()
        self.fault: Callable[[int, str], Fault] = lambda number, path: None
        self.requests: list[tuple[str, str | None]] = []
        self.faults: Counter[Fault] = Counter()
        self.delay = 0.2
        self.token: str | None = None
        self.lock = threading.Lock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def fail_every(self, count: int, *faults: Fault) -> None:
        """Every count-th request fails, with each of the faults in turn."""
        self.fault = lambda number, path: None if number % count else faults[number // count % len(faults)]

    def handle_error(self, *_: object) -> None:
        """Clients that go away are no errors."""


class Handler(BaseHTTPRequestHandler):
    server: Store
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # else a body waits 40 ms for the client to confirm the headers

    def log_message(self, *_: object) -> None: ...

    def do_GET(self) -> None:
        server, path = self.server, unquote(urlsplit(self.path).path)
        with server.lock:
            server.requests.append((path, self.headers.get("Range")))
            fault = server.fault(len(server.requests), path)
            if fault is not None:
                server.faults[fault] += 1
        if fault == RESET:
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.close()
            self.close_connection = True
            return
        if fault == SLOW:
            time.sleep(server.delay)
        if server.token not in (None, self.headers.get("Authorization")):
            fault = 401
        if isinstance(fault, int):
            self.answer(fault, b"fault")
            return
        file = (server.folder / path.lstrip("/")).resolve()
        if not file.is_relative_to(server.folder) or not file.exists():
            self.answer(404, b"no such file")
            return
        if file.is_dir():
            links = [f'<a href="{html.escape(each.name)}{"/" * each.is_dir()}">' for each in sorted(file.iterdir())]
            self.answer(200, "".join(links).encode(), {"Content-Type": "text/html"})
            return
        stat = file.stat()
        headers = {"ETag": f'"{stat.st_mtime_ns:x}-{stat.st_size:x}"'}
        found = re.fullmatch(r"bytes=([0-9]+)-([0-9]+)", self.headers.get("Range", ""))
        if found is None or fault == NO_RANGE:
            self.answer(200, file.read_bytes(), headers, cut=fault == SHORT)
            return
        first, last = int(found[1]), min(int(found[2]), stat.st_size - 1)
        if first >= stat.st_size:
            self.answer(416, b"", {**headers, "Content-Range": f"bytes */{stat.st_size}"})
            return
        with file.open("rb") as stream:
            stream.seek(first)
            content = stream.read(last - first + 1)
        headers["Content-Range"] = f"bytes {first}-{last}/{stat.st_size}"
        self.answer(206, content, headers, cut=fault == SHORT)

    do_HEAD = do_GET

    def answer(self, status: int, content: bytes, headers: dict[str, str] | None = None, cut: bool = False) -> None:
        """cut: send half of the content, and close the connection."""
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content[: len(content) // 2] if cut else content)
        self.close_connection |= cut


@contextmanager
def serve(folder: Path) -> Iterator[Store]:
    """A store of the files in a folder, in threads of this process."""
    store = Store(folder)
    thread = threading.Thread(target=store.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield store
    finally:
        store.shutdown()
        store.server_close()
        thread.join()
