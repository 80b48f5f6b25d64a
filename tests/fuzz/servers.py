"""Any bytes as the answer of a server, over a real socket: what the clients make of them is whole, or a ServerError."""

from __future__ import annotations

import json
import math
import socket
import threading
from functools import cache
from typing import Any

from hypothesis import strategies as st

from megatron_hybrid.errors import HybridError, ServerError
from megatron_hybrid.records import Prompt
from megatron_hybrid.rewards.http import HttpReward
from megatron_hybrid.servers.engine import Completion, Sampling
from megatron_hybrid.servers.sglang import SglangEngine
from megatron_hybrid.servers.vllm import VllmEngine
from tests.fuzz.targets import Target

ROOM, K, TEXT, FIRST = 3, 2, (5, 6, 7), 1
IDS = st.sampled_from((3, 0, -1, True, 2**70, 1.0, "3", None))
LOGS = st.sampled_from((-0.5, 0, -1e308, 0.7, float("nan"), float("-inf"), 10**400, True, "x", None))
ODD = st.none() | IDS | LOGS | st.lists(LOGS, max_size=2) | st.just({}) | st.text(max_size=3)
GOOD_IDS, GOOD_LOGS = st.sampled_from((3, 4)), st.sampled_from((-0.5, -1.0))


def mostly(good: st.SearchStrategy[Any], other: st.SearchStrategy[Any] = ODD) -> st.SearchStrategy[Any]:
    return st.integers(0, 9).flatmap(lambda dice: other if dice == 0 else good)


def several(of: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return mostly(st.lists(of, min_size=2, max_size=2), st.lists(of, max_size=4))


TOKENS, PROBS = several(mostly(GOOD_IDS, IDS)), several(mostly(GOOD_LOGS, LOGS))
CHOICE = st.fixed_dictionaries(
    {
        "index": mostly(st.just(0)),
        "token_ids": mostly(TOKENS),
        "logprobs": mostly(st.fixed_dictionaries({"token_logprobs": mostly(PROBS)})),
        "finish_reason": mostly(st.sampled_from(("stop", "length"))),
        "prompt_logprobs": mostly(
            st.lists(
                mostly(
                    st.dictionaries(
                        mostly(st.sampled_from(("3", "4", "5")), st.sampled_from(("x", "-1", " 3", "3.0"))),
                        mostly(st.fixed_dictionaries({"logprob": mostly(GOOD_LOGS, LOGS)})),
                        min_size=2,
                        max_size=3,
                    )
                ),
                min_size=3,
                max_size=3,
            )
        ),
    }
)
TABLE = several(mostly(st.tuples(mostly(GOOD_LOGS, LOGS), mostly(GOOD_IDS, IDS), st.none()).map(list)))
INFO = st.fixed_dictionaries(
    {
        "output_token_logprobs": mostly(TABLE),
        "finish_reason": mostly(st.fixed_dictionaries({"type": mostly(st.sampled_from(("stop", "length")))})),
        "input_top_logprobs": mostly(st.lists(mostly(TABLE), min_size=3, max_size=3)),
    }
)
SGLANG = st.fixed_dictionaries({"meta_info": mostly(INFO)})
ANSWERS = {
    "vllm": st.fixed_dictionaries({"choices": mostly(st.lists(CHOICE, min_size=1, max_size=2))}),
    "sglang": SGLANG | st.lists(SGLANG, max_size=2),
    "reward": st.fixed_dictionaries({"rewards": mostly(several(LOGS))}),
}
BODIES = st.binary(max_size=20) | st.sampled_from((b"[" * 3000, b"1" * 5000, b"\xff", b"", b'{"choices": NaN}'))
STATUSES = st.sampled_from((b"200 OK",) * 9 + (b"204 No", b"301 Moved", b"404 No", b"500 Oh", b"999 x", b"abc"))


@st.composite
def answers(draw: st.DrawFn) -> tuple[str, bytes]:
    """(which client asks, all that the server says)."""
    kind = draw(st.sampled_from(sorted(ANSWERS)))
    body = json.dumps(draw(ANSWERS[kind])).encode() if draw(st.integers(0, 5)) else draw(BODIES)
    if not draw(st.integers(0, 15)):
        return kind, draw(st.binary(max_size=40))
    length = draw(st.sampled_from((0,) * 20 + (-1, 1, 10**12))) + len(body)
    said = [b"HTTP/1.1 " + draw(STATUSES), b"Content-Length: %d" % length]
    said += draw(st.sampled_from(([],) * 9 + ([b"Content-Encoding: gzip"], [b"Transfer-Encoding: chunked"], [b"\xff"])))
    return kind, b"\r\n".join([*said, b"Connection: close", b"", body])


class Server:
    """Says to whoever asks what it was told to say."""

    def __init__(self) -> None:
        self.says = b""
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        while True:
            connection, _ = self._listener.accept()
            with connection:
                head = b""
                while b"\r\n\r\n" not in head:
                    head += connection.recv(1 << 16)
                wanted = int(head.lower().partition(b"content-length: ")[2].partition(b"\r\n")[0])
                while len(head.partition(b"\r\n\r\n")[2]) < wanted:
                    head += connection.recv(1 << 16)
                connection.sendall(self.says)


@cache
def clients() -> tuple[Server, dict[str, Any]]:
    server = Server()
    common: dict[str, Any] = {"timeout_s": 5.0, "retries": 0}
    engines = {
        "vllm": VllmEngine(server.url, "the server", at_once=1, **common),
        "sglang": SglangEngine(server.url, "the server", at_once=1, **common),
    }
    return server, engines | {"reward": HttpReward(server.url, **common)}


def check(case: tuple[str, bytes]) -> None:
    kind, said = case
    server, by_kind = clients()
    server.says = said
    client = by_kind[kind]
    if kind == "reward":
        prompts = [Prompt(i, (1,), "q", "sums", "4", {}) for i in range(2)]
        for score in asked(lambda: client.score_all(prompts, ["a", "b"])):
            assert isinstance(score, float | HybridError)
        return
    for found in asked(lambda: client.complete([(TEXT, 1)], 1, Sampling(ROOM, (0,)))):
        for completion in () if isinstance(found, ServerError) else found:
            check_completion(completion)
    for positions in asked(lambda: client.top_tokens([(TEXT, FIRST)], K)):
        assert len(positions) == len(TEXT) - FIRST
        for top in positions:
            assert len({token for token, _ in top}) == len(top) == K
            assert all(type(token) is int and 0 <= token < 2**63 for token, _ in top)
            assert all(log_prob == -math.inf or is_log(log_prob) for _, log_prob in top)


def check_completion(completion: Completion) -> None:
    assert 0 < len(completion.token_ids) == len(completion.log_probs)
    assert all(type(token) is int and 0 <= token < 2**63 for token in completion.token_ids)
    assert all(map(is_log, completion.log_probs))


def is_log(value: Any) -> bool:
    return type(value) in (int, float) and -1e38 < value < 1e-3


def asked(ask: Any) -> list[Any]:
    try:
        return list(ask())
    except ServerError as error:
        assert len(str(error)) < 2000, "an answer is shown in parts"
        return []


TARGETS = {"answers of servers": Target(answers(), check)}
