"""JSON over HTTP to a server that a run depends on: a body in, the answer's JSON out, or one clear error.

Connections are kept and shared by threads; a failed connection, a timeout, the statuses that a busy or restarting
server gives (429, 500, 502, 503, 504), and an answer that cannot be used are tried again with growing pauses (urllib3).
A server that was down at every attempt is from then on tried once a request, until it answers again: a run that goes on
without its answers waits for it once, not at every step.
Every request is one that may be answered twice without harm. A key is taken from an environment variable, so that no
address, error or configuration holds one. Not here: what bodies and answers mean.
"""

from __future__ import annotations

import json
import logging
import os
import re
import reprlib
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from queue import Empty, SimpleQueue
from typing import Any

import urllib3

from megatron_hybrid.errors import ConfigError, ServerDown, ServerError
from megatron_hybrid.servers.bounded import ASK, AnswerTooLarge, Patience, bounded_pool

logger = logging.getLogger(__name__)

Answer = urllib3.BaseHTTPResponse

_BUSY = frozenset({429, 500, 502, 503, 504})
_BUSY_WITH_ORDERS = _BUSY - {500}
"""Without the status of an order that failed, which would fail again."""
_SHOWN = 300
"""Characters of a bad answer that an error shows."""
_PARTS = reprlib.Repr(maxdict=8, maxstring=200, maxother=80)  # some are as long as memory allows, or as deep


class JsonServer:
    """One server.

    Args:
        url: its address, without a slash at the end; paths are put behind it.
        what: what it is to the run, for errors ("the reward server").
        timeout_s: seconds that one request may take.
        retries: times a failed request is tried again.
        pause_s: before the second of those; doubles from one to the next.
        key_variable: of the environment; what it holds is sent with every request as a bearer token.
        connections: kept open at once.
    """

    def __init__(
        self,
        url: str,
        what: str,
        *,
        timeout_s: float,
        retries: int,
        pause_s: float = 1.0,
        key_variable: str | None = None,
        connections: int = 1,
    ) -> None:
        self.url = url.rstrip("/")
        self.what = what
        self._timeout_s = timeout_s
        self._key = _key(key_variable) if key_variable else ""
        self._retry = Patience(
            retries,
            backoff_factor=pause_s / 2,
            status_forcelist=_BUSY,
            allowed_methods=None,  # POST too
            raise_on_status=False,
            respect_retry_after_header=False,
        )
        headers = {"Accept": "application/json", "Content-Type": "application/json"}
        if self._key:
            headers["Authorization"] = f"Bearer {self._key}"
        self._pool = bounded_pool(headers, timeout_s=timeout_s, connections=connections)
        self._is_down = False
        self._lock = threading.Lock()

    def post[T](self, path: str, body: Mapping[str, Any], read: Callable[[Any], T]) -> T:
        """What `read` makes of the answer's JSON.

        read  raises ServerError (`broken`) of an answer that it cannot use. It is then asked for again, as one that is
              no JSON: half an answer passes as a busy status does

        Raises:
            ServerError: nobody answers, the answer has another status than 2xx, or no attempt gives one to be used.
        """
        was_down = self._is_down
        try:
            found = self._answered(path, body, read, self._retry.new(total=0) if was_down else self._retry)
        except ServerDown:
            if not was_down:
                self._note(down=True)
            raise
        if was_down:  # when it was asked: the answer to an earlier request says nothing of now
            self._note(down=False)
        return found

    def _answered[T](self, path: str, body: Mapping[str, Any], read: Callable[[Any], T], retries: urllib3.Retry) -> T:
        while True:
            answer = self._exchange(path, body, retries)
            self._require_done(path, answer)
            try:
                return read(self._json(path, answer))
            except ServerError as unusable:
                retries = self._once_more(answer, unusable)

    def _note(self, *, down: bool) -> None:
        with self._lock:  # of several threads one says it
            changed, self._is_down = self._is_down != down, down
        if changed:
            now = "is down: until it answers again, a request is tried once" if down else "answers again"
            logger.warning("%s at %s %s", self.what, self.url, now)

    def tell(self, path: str, body: Mapping[str, Any] | None = None) -> None:
        """As `post`, for an order: the answer says nothing but that it was done. Status 500 says that it was not."""
        answer = self._exchange(path, body, self._retry.new(status_forcelist=_BUSY_WITH_ORDERS))
        self._require_done(path, answer, _BUSY_WITH_ORDERS)

    def broken(self, path: str, why: str, answer: Any) -> ServerError:
        """The error of an answer that came and cannot be used."""
        return ServerError(f"{self.what} at {self.url}{path} {why}. It answered: {_excerpt(answer)}")

    def _exchange(self, path: str, body: Mapping[str, Any] | None, retries: urllib3.Retry) -> Answer:
        try:
            # json's own escapes: a text may hold half a surrogate pair, which is no UTF-8.
            data = None if body is None else json.dumps(body)
            answer = self._pool.request("POST", self.url + path, body=data, retries=retries, **ASK)
        except AnswerTooLarge as error:
            raise ServerError(
                f"{self.what} at {self.url}{path} gives {error}, where a whole one is smaller: it would fill the "
                "memory of this machine. Ask for less at once (--hybrid-teacher-topk), or look at what answers there."
            ) from error
        except urllib3.exceptions.SSLError as error:
            raise ServerError(
                f"{self.what} at {self.url}{path} shows a certificate that is not trusted ({error}): nothing was sent. "
                "Where an authority of your own has signed it, name that one's certificate in the environment "
                "variable SSL_CERT_FILE; else it may be another server than you think."
            ) from error
        except urllib3.exceptions.HTTPError as error:
            cause = getattr(error, "reason", None) or error
            raise ServerDown(
                f"{self.what} at {self.url}{path} does not answer, after {_allowed(retries)} more attempts of at most "
                f"{self._timeout_s:g} s: {cause}. The run cannot go on without it: start it, correct the address, or "
                "allow more (--hybrid-server-timeout, --hybrid-server-retries)."
            ) from error
        if 300 <= answer.status < 400:
            raise ServerError(
                f"{self.what} at {self.url}{path} redirects to {answer.headers.get('Location', 'nowhere')[:_SHOWN]!r}, "
                "which is not followed: prompts and key would go to whom nobody has named. Give the final address."
            )
        return answer

    def _once_more(self, answer: Answer, unusable: ServerError) -> urllib3.Retry:
        """The attempts left behind an answer that cannot be used, after a pause; raises `unusable` where none is."""
        assert answer.retries is not None
        try:
            left = answer.retries.increment("POST", response=answer)
        except urllib3.exceptions.MaxRetryError:
            raise unusable from unusable.__cause__
        left.sleep()
        return left

    def _require_done(self, path: str, answer: Answer, busy: frozenset[int] = _BUSY) -> None:
        if not 200 <= answer.status < 300:
            tried = f" after {_allowed(answer.retries)} more attempts" if answer.status in busy else ""
            error = self.broken(path, f"refuses with status {answer.status}{tried}", self._text(answer))
            raise ServerDown(str(error)) if answer.status in busy else error

    def _json(self, path: str, answer: Answer) -> Any:
        text = self._text(answer)
        try:
            return json.loads(text)
        except (ValueError, RecursionError) as error:
            raise self.broken(path, f"answers something that is no JSON ({error})", text) from error

    def _text(self, answer: Answer) -> str:
        text = answer.data.decode("utf-8", errors="replace")
        return text.replace(self._key, "(the key)") if self._key else text  # some show what they got


def _allowed(retries: urllib3.Retry | None) -> int:
    """Attempts behind the first that a request was allowed, wherever it stands."""
    return 0 if retries is None else int(retries.total or 0) + len(retries.history)


def _excerpt(answer: Any) -> str:
    return (answer if isinstance(answer, str) else _PARTS.repr(answer))[:_SHOWN]


def _key(variable: str) -> str:
    """What the environment variable holds; an error of Python's own would show it."""
    key = os.environ.get(variable, "").strip()
    if not re.fullmatch("[!-~]*", key):
        raise ConfigError(
            f"the environment variable {variable} holds characters that no key in an HTTP header can have (it is not "
            "shown here): spaces, line breaks or letters beyond ASCII. Set it to the key alone."
        )
    return key


def run_all[T](jobs: Sequence[Callable[[], T]], *, at_once: int) -> list[T]:
    """What each job returns, in order, `at_once` of them running; the first error in their order is raised.

    On daemon threads: who waits can be interrupted, and no unanswered request keeps a process alive.
    """
    results: list[Future[T]] = [Future() for _ in jobs]
    queue: SimpleQueue[int] = SimpleQueue()
    for number in range(len(jobs)):
        queue.put(number)

    def work() -> None:
        while True:
            try:
                number = queue.get_nowait()
            except Empty:
                return
            try:
                results[number].set_result(jobs[number]())
            except BaseException as error:  # it belongs to the thread that waits
                results[number].set_exception(error)

    for _ in range(min(at_once, len(jobs))):
        threading.Thread(target=work, name="requests", daemon=True).start()
    return [result.result() for result in results]
