"""A real HTTP server on a thread, whose answers a test decides: what it was asked is kept."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Answer = Callable[[str, Any], tuple[int, Any]]
"""(path, JSON body) to (status, JSON, or text as it is); or the status and what a handler does instead of answering."""


def closes(handler: BaseHTTPRequestHandler) -> None:
    """No answer: the connection ends."""
    handler.connection.shutdown(socket.SHUT_RDWR)


def half(text: str) -> Callable[[BaseHTTPRequestHandler], None]:
    """An answer that is announced whole, and of which half comes."""

    def write(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(200)
        handler.send_header("Content-Length", str(len(text.encode())))
        handler.end_headers()
        handler.wfile.write(text.encode()[: len(text) // 2])

    return write


def slow(seconds: float) -> Callable[[BaseHTTPRequestHandler], None]:
    """No answer for so long."""
    return lambda handler: time.sleep(seconds)


@contextmanager
def serve(answer: Answer, *, key: str | None = None) -> Iterator[str]:
    """The address of a server that answers so, while the block runs; where there is a key, to those who have it."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            self._answer(json.loads(body) if body else None)

        def do_GET(self) -> None:
            self._answer(None)

        def _answer(self, body: Any) -> None:
            known = key is None or self.headers.get("Authorization") == f"Bearer {key}"
            status, said = answer(self.path, body) if known else (401, "who are you?")
            if callable(said):
                self.close_connection = True
                return said(self)
            data = said.encode() if isinstance(said, str) else json.dumps(said).encode()
            with suppress(ConnectionError):  # who asked may have given up
                self.send_response(status)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

        def log_message(self, format: str, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
