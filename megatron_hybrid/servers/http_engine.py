"""What the clients of inference engines share: one server, many requests, and answers that are whole or an error."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from typing import Any, ClassVar

from megatron_hybrid.errors import ServerDown, ServerError
from megatron_hybrid.online_config import SERVER_KEY_VARIABLE
from megatron_hybrid.servers.engine import Completion, TopTokens, is_log_prob, is_token_id
from megatron_hybrid.servers.json_server import JsonServer, run_all

WHOLE_DISTRIBUTION = {
    "temperature": 1.0,
    "top_p": 1.0,
    "min_p": 0.0,
    "repetition_penalty": 1.0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
}
"""Said with every request: what is left out is taken from the model's generation_config.json."""


class HttpEngine:
    """One server, or a router before several.

    Args:
        url: the server's address.
        what: what it is to the run, for errors.
        at_once: requests under way at a time.
        timeout_s, retries, pause_s: see `JsonServer`.
    """

    PATH: ClassVar[str]
    """Where texts are asked about."""
    SUFFIX: ClassVar[str] = ""
    """Of an address, which some write and others do not."""

    def __init__(
        self, url: str, what: str, *, at_once: int, timeout_s: float, retries: int, pause_s: float = 1.0
    ) -> None:
        self._server = JsonServer(
            url.rstrip("/").removesuffix(self.SUFFIX),
            what,
            timeout_s=timeout_s,
            retries=retries,
            pause_s=pause_s,
            key_variable=SERVER_KEY_VARIABLE,
            connections=at_once,
        )
        self._at_once = at_once

    def _ask[T](
        self, bodies: Sequence[Mapping[str, Any]], reads: Sequence[Callable[[Any], T]]
    ) -> list[T | ServerError]:
        """What each `read` makes of the answer to its body, some asked at a time; or the error, of the last attempt.

        A server that is down for one is not asked for the next: all of them would be waited for, each at its length.
        """
        down: list[ServerDown] = []

        def ask(body: Mapping[str, Any], read: Callable[[Any], T]) -> T | ServerError:
            if down:
                return down[0]
            try:
                return self._server.post(self.PATH, body, read)
            except ServerDown as error:
                down.append(error)
                return error
            except ServerError as error:
                return error

        jobs = [partial(ask, body, read) for body, read in zip(bodies, reads, strict=True)]
        return run_all(jobs, at_once=self._at_once)

    def _whole_completions(
        self, found: list[Completion], reasons: Collection[str], n: int, room: int, answer: Any
    ) -> list[Completion]:
        """`found`, of an answer to one prompt; raises ServerError unless these are n responses that have ended, of at
        most `room` tokens."""
        whole = all(
            0 < len(c.token_ids) == len(c.log_probs) <= room
            and all(map(is_token_id, c.token_ids))
            and all(map(is_log_prob, c.log_probs))
            for c in found
        )
        if len(found) != n or not whole or not set(reasons) <= {"length", "stop"}:
            raise self._server.broken(
                self.PATH,
                f"should give {n} responses, each ended, of at most {room} tokens, with a log-prob for every token",
                answer,
            )
        return found

    def _whole_positions(
        self, found: list[TopTokens], num_positions: int, length: int, k: int, answer: Any
    ) -> list[TopTokens]:
        """`found`, of an answer about one text; raises ServerError unless it has k tokens at each position."""
        if num_positions != length or not all(
            len({token for token, _ in top}) == len(top) == k
            and all(is_token_id(token) and (is_log_prob(value) or value == -math.inf) for token, value in top)
            for top in found
        ):
            raise self._server.broken(
                self.PATH, f"should give the {k} likeliest tokens at each of {length} positions", answer
            )
        return found


def all_of[T](answers: Sequence[T | ServerError]) -> list[T]:
    """The answers; raises the first error among them."""
    found = []
    for answer in answers:
        if isinstance(answer, ServerError):
            raise answer
        found.append(answer)
    return found
