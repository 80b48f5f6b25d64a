"""A server is believed no further than it must be: its certificate, length and time of its answers, its redirects."""

from __future__ import annotations

import gzip
import re
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from megatron_hybrid.errors import ConfigError, ServerError
from megatron_hybrid.servers import bounded
from megatron_hybrid.servers.json_server import JsonServer

PEM = Path(__file__).parent / "self_signed.pem"
KEY = "sk-verysecret"
Speak = Callable[[socket.socket], None]


@contextmanager
def raw_server(speak: Speak, *, tls: bool = False, host: str = "127.0.0.1") -> Iterator[tuple[str, list[bytes]]]:
    """Address of a server that reads a request and speaks as told, byte by byte; and the requests that it got."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(PEM)
    asked: list[bytes] = []

    def answer(connection: socket.socket) -> None:
        with suppress(OSError), context.wrap_socket(connection, server_side=True) if tls else connection as stream:
            # Whole: what is unread when a connection closes makes the other end lose its answer.
            request = b""
            while not (end := re.search(rb"(?is)content-length: (\d+).*?\r\n\r\n", request)) or len(request) < (
                end.end() + int(end[1])
            ):
                if not (part := stream.recv(1 << 16)):
                    break
                request += part
            asked.append(request)
            speak(stream)

    def accept() -> None:
        with suppress(OSError):
            while True:
                threading.Thread(target=answer, args=(listener.accept()[0],), daemon=True).start()

    with socket.create_server((host, 0)) as listener:
        threading.Thread(target=accept, daemon=True).start()
        yield f"http{'s' if tls else ''}://{host}:{listener.getsockname()[1]}", asked
        listener.shutdown(socket.SHUT_RDWR)


def as_it_is(answer: Any) -> Any:
    return answer


def said(body: bytes, *headers: str, status: str = "200 OK") -> Speak:
    head = "\r\n".join([f"HTTP/1.1 {status}", f"Content-Length: {len(body)}", "Connection: close", *headers, "", ""])
    return lambda stream: stream.sendall(head.encode() + body)


def server(url: str, *, retries: int = 2, timeout_s: float = 10.0, key: str | None = None) -> JsonServer:
    return JsonServer(url, "the server", timeout_s=timeout_s, retries=retries, pause_s=0.001, key_variable=key)


@pytest.fixture
def with_key(monkeypatch) -> str:
    monkeypatch.setenv("HYBRID_TEST_KEY", f" {KEY}\n")
    return "HYBRID_TEST_KEY"


def test_a_certificate_that_nobody_vouches_for_is_refused_at_once_and_gets_nothing():
    with raw_server(said(b"{}"), tls=True) as (url, asked):
        with pytest.raises(ServerError, match="certificate that is not trusted .*nothing was sent.*SSL_CERT_FILE"):
            server(url).post("", {"prompt": "secret"}, as_it_is)
        assert not any(b"secret" in request for request in asked)
        assert len(asked) <= 1, "it stays refused however often it is asked"


def test_an_authority_of_ones_own_is_named_in_the_environment(monkeypatch):
    monkeypatch.setenv("SSL_CERT_FILE", str(PEM))
    with raw_server(said(b"[1]"), tls=True) as (url, _):
        assert server(url).post("", {}, as_it_is) == [1]
        assert server(url.replace("127.0.0.1", "localhost")).post("", {}, as_it_is) == [1]


def test_a_certificate_of_another_name_is_refused(monkeypatch):
    monkeypatch.setenv("SSL_CERT_FILE", str(PEM))
    expected = pytest.raises(ServerError, match="not trusted .*IP address mismatch")
    with raw_server(said(b"{}"), tls=True, host="127.0.0.2") as (url, _), expected:
        server(url).post("", {}, as_it_is)


@pytest.mark.parametrize("chunked", [False, True])
def test_an_answer_without_end_is_cut_off_at_the_bound(monkeypatch, chunked):
    monkeypatch.setattr(bounded, "LARGEST_ANSWER_BYTES", 1 << 20)
    sent = [0]

    def speak(stream: socket.socket) -> None:
        stream.sendall(b"HTTP/1.1 200 OK\r\n" + (b"Transfer-Encoding: chunked\r\n\r\n" if chunked else b"\r\n"))
        while True:
            stream.sendall((b"10000\r\n" if chunked else b"") + b" " * 65536 + (b"\r\n" if chunked else b""))
            sent[0] += 65536

    with raw_server(speak) as (url, asked), pytest.raises(ServerError, match="gives an answer of more than 1 MB"):
        server(url).post("", {}, as_it_is)
    assert len(asked) == 1
    assert sent[0] < 20 << 20, "what kernels buffer, not what the server has"


def test_the_largest_answer_that_is_allowed_is_read(monkeypatch):
    monkeypatch.setattr(bounded, "LARGEST_ANSWER_BYTES", 1 << 20)
    with raw_server(said(b"[1]".ljust(1 << 20))) as (url, _):
        assert server(url).post("", {}, as_it_is) == [1]


def test_an_answer_that_trickles_takes_no_longer_than_a_request_may():
    def speak(stream: socket.socket) -> None:
        stream.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n\r\n")
        for _ in range(400):
            stream.sendall(b" ")
            time.sleep(0.05)

    with raw_server(speak) as (url, asked), pytest.raises(ServerError, match="does not answer, after 1 more attempts"):
        server(url, retries=1, timeout_s=0.3).post("", {}, as_it_is)
    assert len(asked) == 2


def test_half_an_answer_is_asked_for_again_and_never_taken_for_a_whole_one():
    times = []

    def speak(stream: socket.socket) -> None:
        times.append(1)
        stream.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\nConnection: close\r\n\r\n" + b"[12]"[: 2 * len(times)])

    with raw_server(speak) as (url, _):
        assert server(url).post("", {}, as_it_is) == [12]
    assert len(times) == 2


def test_a_compressed_answer_is_not_unpacked():
    bomb = gzip.compress(b" " * (64 << 20))
    expected = pytest.raises(ServerError, match="answers something that is no JSON")
    with raw_server(said(bomb, "Content-Encoding: gzip")) as (url, asked), expected:
        server(url).post("", {}, as_it_is)
    assert b"Accept-Encoding: identity" in asked[0], "it was not asked for"


@pytest.mark.parametrize("status", ["301 Moved", "302 Found", "307 Temporary Redirect", "308 Permanent Redirect"])
def test_a_redirect_is_not_followed(with_key, status):
    expected = pytest.raises(ServerError, match="redirects to 'http.*/x', which is not followed")
    with raw_server(said(b"[1]")) as (elsewhere, asked):
        to = said(b"", f"Location: {elsewhere}/x", status=status)
        with raw_server(to) as (url, _), expected:
            server(url, key=with_key).post("", {}, as_it_is)
        assert not asked


def test_a_busy_server_does_not_decide_how_long_the_run_waits():
    began = time.monotonic()
    expected = pytest.raises(ServerError, match="refuses with status 503 after 2 more attempts")
    with raw_server(said(b"", "Retry-After: 100000", status="503 Busy")) as (url, asked), expected:
        server(url).post("", {}, as_it_is)
    assert len(asked) == 3 and time.monotonic() - began < 60


def test_the_key_is_sent_and_never_shown(with_key):
    """Some servers show the request in their errors."""

    def speak(stream: socket.socket) -> None:
        said(f"you came with Bearer {KEY}, which I do not know".encode(), status="401 Unauthorized")(stream)

    with raw_server(speak) as (url, asked), pytest.raises(ServerError) as refused:
        server(url, key=with_key).post("", {}, as_it_is)
    assert f"Authorization: Bearer {KEY}\r\n".encode() in asked[0], "without the line break that a file would end in"
    assert KEY not in str(refused.value) and "Bearer (the key)" in str(refused.value)


@pytest.mark.parametrize("key", [f"{KEY}\nmore", f"{KEY} more", f"{KEY}é", f"{KEY}\x00"])
def test_a_key_that_no_header_can_have_is_refused_without_being_shown(monkeypatch, key):
    import os

    monkeypatch.setattr(os, "environ", {"HYBRID_TEST_KEY": key})  # the real one takes no NUL
    with pytest.raises(ConfigError, match="HYBRID_TEST_KEY holds characters that no key") as refused:
        server("http://localhost:9", key="HYBRID_TEST_KEY")
    assert KEY not in str(refused.value)
    assert refused.value.__cause__ is None and refused.value.__context__ is None
