"""Connections to servers that are trusted no further than they must be.

    TLS         a server shows a certificate of its name that an authority of the system's vouches for; one of your own
                is named in SSL_CERT_FILE, as OpenSSL has it. One that is refused is not tried again: it stays refused
    answers     are at most `LARGEST_ANSWER_BYTES` long and take no longer than a request may; compressed ones are not
                asked for and not unpacked
    redirects   are not followed: key and prompts would go to whom nobody has named
    Retry-After is not waited for: pauses are the run's own, and other ranks wait for them

Not here: what is asked and how often (`json_server.py`).
"""

from __future__ import annotations

import http.client
import ssl
import time
from collections.abc import Mapping
from typing import Any, Self

import urllib3
from urllib3.connection import HTTPConnection, HTTPSConnection

LARGEST_ANSWER_BYTES = 1 << 29
"""A teacher's 64 likeliest tokens at each of 64,000 positions are some 500 MB of JSON."""
_CHUNK_BYTES = 1 << 16


class AnswerTooLarge(urllib3.exceptions.HTTPError):
    """An answer went on beyond the bound."""


class Patience(urllib3.Retry):
    """urllib3's account of attempts, of which a certificate that is not trusted ends all."""

    def increment(
        self,
        method: str | None = None,
        url: str | None = None,
        response: urllib3.BaseHTTPResponse | None = None,
        error: Exception | None = None,
        _pool: Any = None,
        _stacktrace: Any = None,
    ) -> Self:
        refused = isinstance(error, urllib3.exceptions.SSLError) and error.args
        if error is not None and refused and isinstance(error.args[0], ssl.SSLCertVerificationError):
            raise error
        return super().increment(method, url, response, error, _pool, _stacktrace)


class _Answer(http.client.HTTPResponse):
    """An answer that ends at the bounds."""

    def begin(self) -> None:
        self._taken = 0
        self._last_moment = time.monotonic() + (self.fp.raw._sock.gettimeout() or float("inf"))  # type: ignore[attr-defined]
        super().begin()

    def read(self, amt: int | None = None) -> bytes:
        if amt is not None:
            return self._counted(super().read(amt))
        parts = []
        while part := self._counted(super().read1(_CHUNK_BYTES)):
            parts.append(part)
        if self.length:  # as the method does that this stands for
            raise http.client.IncompleteRead(b"", self.length)
        self.close()
        return b"".join(parts)

    def _counted(self, part: bytes) -> bytes:
        self._taken += len(part)
        if self._taken > LARGEST_ANSWER_BYTES:
            raise AnswerTooLarge(f"an answer of more than {LARGEST_ANSWER_BYTES >> 20} MB")
        if time.monotonic() > self._last_moment:
            raise TimeoutError("the answer takes longer than a request may")
        return part


class _HTTPConnection(HTTPConnection):
    response_class = _Answer


class _HTTPSConnection(HTTPSConnection):
    response_class = _Answer


class _HTTPPool(urllib3.HTTPConnectionPool):
    ConnectionCls = _HTTPConnection


class _HTTPSPool(urllib3.HTTPSConnectionPool):
    ConnectionCls = _HTTPSConnection


def bounded_pool(headers: Mapping[str, str], *, timeout_s: float, connections: int) -> urllib3.PoolManager:
    """Connections that keep all of the module's promises but those of `ASK`, which every request says."""
    pool = urllib3.PoolManager(
        maxsize=connections, timeout=timeout_s, headers=headers, ssl_context=ssl.create_default_context()
    )
    pool.pool_classes_by_scheme = {"http": _HTTPPool, "https": _HTTPSPool}
    return pool


ASK: dict[str, Any] = {"redirect": False, "decode_content": False}
"""With every request."""
