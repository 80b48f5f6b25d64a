"""JSON over HTTP to a server that a run depends on: a body in, the answer's JSON out, or one clear error.

Connections are kept and shared by threads; a failed connection, a timeout, the statuses that a busy or restarting
server gives (429, 500, 502, 503, 504), and an answer that cannot be used are tried again with growing pauses (urllib3).
Every request is one that may be answered twice without harm. A key is taken from an environment variable, so that no
address, error or configuration holds one. Not here: what bodies and answers mean.
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from queue import Empty, SimpleQueue
from typing import Any

import urllib3

from megatron_hybrid.errors import ServerError

Answer = urllib3.BaseHTTPResponse

_BUSY = frozenset({429, 500, 502, 503, 504})
_BUSY_WITH_ORDERS = _BUSY - {500}
"""Without the status of an order that failed, which would fail again."""
_SHOWN = 300
"""Characters of a bad answer that an error shows."""


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
        self._retries = retries
        key = os.environ.get(key_variable) if key_variable else None
        self._retry = urllib3.Retry(
            retries,
            backoff_factor=pause_s / 2,
            status_forcelist=_BUSY,
            allowed_methods=None,  # POST too
            raise_on_status=False,
        )
        self._pool = urllib3.PoolManager(
            maxsize=connections,
            timeout=timeout_s,
            headers={
                "Accept": "application/json",
                "Content-Type": "application/json",
                **({"Authorization": f"Bearer {key}"} if key else {}),
            },
        )

    def post[T](self, path: str, body: Mapping[str, Any], read: Callable[[Any], T]) -> T:
        """What `read` makes of the answer's JSON.

        read  raises ServerError (`broken`) of an answer that it cannot use. It is then asked for again, as one that is
              no JSON: half an answer passes as a busy status does

        Raises:
            ServerError: nobody answers, the answer has another status than 2xx, or no attempt gives one to be used.
        """
        retries = self._retry
        while True:
            answer = self._exchange(path, body, retries)
            self._require_done(path, answer)
            try:
                return read(self._json(path, answer))
            except ServerError as unusable:
                retries = self._once_more(answer, unusable)

    def tell(self, path: str, body: Mapping[str, Any] | None = None) -> None:
        """As `post`, for an order: the answer says nothing but that it was done. Status 500 says that it was not."""
        answer = self._exchange(path, body, self._retry.new(status_forcelist=_BUSY_WITH_ORDERS))
        self._require_done(path, answer, _BUSY_WITH_ORDERS)

    def broken(self, path: str, why: str, answer: Any) -> ServerError:
        """The error of an answer that came and cannot be used."""
        return ServerError(f"{self.what} at {self.url}{path} {why}. It answered: {str(answer)[:_SHOWN]}")

    def _exchange(self, path: str, body: Mapping[str, Any] | None, retries: urllib3.Retry) -> Answer:
        try:
            # json's own escapes: a text may hold half a surrogate pair, which is no UTF-8.
            data = None if body is None else json.dumps(body)
            return self._pool.request("POST", self.url + path, body=data, retries=retries)
        except urllib3.exceptions.HTTPError as error:
            cause = getattr(error, "reason", None) or error
            raise ServerError(
                f"{self.what} at {self.url}{path} does not answer, after {self._retries} more attempts of at most "
                f"{self._timeout_s:g} s: {cause}. The run cannot go on without it: start it, correct the address, or "
                "allow more (--hybrid-server-timeout, --hybrid-server-retries)."
            ) from error

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
            tried = f" after {self._retries} more attempts" if answer.status in busy else ""
            raise self.broken(path, f"refuses with status {answer.status}{tried}", _text(answer))

    def _json(self, path: str, answer: Answer) -> Any:
        text = _text(answer)
        try:
            return json.loads(text)
        except ValueError as error:
            raise self.broken(path, f"answers something that is no JSON ({error})", text) from error


def _text(answer: Answer) -> str:
    return answer.data.decode("utf-8", errors="replace")


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
