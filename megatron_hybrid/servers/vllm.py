"""vLLM's OpenAI-compatible server.

    complete      POST /v1/completions {prompt: [ids], n, seed, logprobs: 0, return_token_ids: true, ...}
                  -> choices[i]: token_ids, logprobs.token_logprobs, finish_reason
    top_tokens    POST /v1/completions {prompt: [ids], max_tokens: 1, prompt_logprobs: k}
                  -> choices[0].prompt_logprobs[position]: {"id": {"logprob": ...}}, null at position 0
    load_weights  POST /collective_rpc {method: reload_weights, kwargs: {weights_path}}, then /reset_prefix_cache;
                  both exist where the server was started with VLLM_SERVER_DEV_MODE=1 alone

Log-probs are those of the model before temperature (--logprobs-mode raw_logprobs, the default). A server gives at most
--max-logprobs of them (20 by default). A seed of a request seeds its n responses one after the other.
Written from vLLM's own protocol and router sources; tested against a server of tests/ that speaks as they do with a
real model behind it. vLLM itself was not run here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from megatron_hybrid.online_config import SERVER_KEY_VARIABLE
from megatron_hybrid.servers.engine import Completion, Sampling, TopTokens, is_log_prob, likeliest
from megatron_hybrid.servers.json_server import JsonServer

_COMPLETIONS = "/v1/completions"
_WHOLE_DISTRIBUTION = {
    "temperature": 1.0,
    "top_p": 1.0,
    "top_k": 0,
    "min_p": 0.0,
    "repetition_penalty": 1.0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
}
"""Said with every request: what is left out is taken from the model's generation_config.json."""


class VllmEngine:
    """One server, or a router before several.

    Args:
        url: without the /v1.
        what: what it is to the run, for errors.
        at_once: requests under way at a time.
        timeout_s, retries, pause_s: see `JsonServer`.
    """

    def __init__(
        self, url: str, what: str, *, at_once: int, timeout_s: float, retries: int, pause_s: float = 1.0
    ) -> None:
        self._server = JsonServer(
            url.rstrip("/").removesuffix("/v1"),
            what,
            timeout_s=timeout_s,
            retries=retries,
            pause_s=pause_s,
            key_variable=SERVER_KEY_VARIABLE,
            connections=at_once,
        )
        self._at_once = at_once

    def complete(
        self, prompts: Sequence[tuple[Sequence[int], int]], n: int, sampling: Sampling
    ) -> list[list[Completion]]:
        """See `Engine`."""
        common = {
            **_WHOLE_DISTRIBUTION,
            "n": n,
            "max_tokens": sampling.max_tokens,
            "stop_token_ids": list(sampling.stop_ids),
            "logprobs": 0,
            "return_token_ids": True,
        }
        bodies = [{**common, "prompt": list(ids), "seed": seed} for ids, seed in prompts]
        return [self._completions(answer, n) for answer in self._ask(bodies)]

    def top_tokens(self, texts: Sequence[tuple[Sequence[int], int]], k: int) -> list[list[TopTokens]]:
        """See `Engine`."""
        common = {**_WHOLE_DISTRIBUTION, "max_tokens": 1, "prompt_logprobs": k}
        answers = self._ask([{**common, "prompt": list(ids)} for ids, _ in texts])
        return [
            self._positions(answer, first, len(ids), k) for answer, (ids, first) in zip(answers, texts, strict=True)
        ]

    def load_weights(self, folder: str) -> None:
        """See `Engine`."""
        self._server.tell("/collective_rpc", {"method": "reload_weights", "kwargs": {"weights_path": folder}})
        self._server.tell("/reset_prefix_cache")

    def _ask(self, bodies: Sequence[Mapping[str, Any]]) -> list[Any]:
        return self._server.post_all(_COMPLETIONS, bodies, at_once=self._at_once)

    def _completions(self, answer: Any, n: int) -> list[Completion]:
        try:
            choices = sorted(answer["choices"], key=lambda choice: choice["index"])
            found = [
                Completion(
                    tuple(choice["token_ids"]),
                    tuple(choice["logprobs"]["token_logprobs"]),
                    choice["finish_reason"] == "length",
                )
                for choice in choices
            ]
            ended = {choice["finish_reason"] for choice in choices} <= {"length", "stop"}
        except (KeyError, TypeError) as error:
            raise self._server.broken(
                _COMPLETIONS,
                f"gives no {error}, which a rollout is made of: it takes a vLLM that knows return_token_ids",
                answer,
            ) from error
        whole = all(len(c.token_ids) == len(c.log_probs) > 0 and all(map(is_log_prob, c.log_probs)) for c in found)
        if len(found) != n or not whole or not ended:
            raise self._server.broken(
                _COMPLETIONS, f"should give {n} responses, each ended, with a log-prob for every token", answer
            )
        return found

    def _positions(self, answer: Any, first: int, length: int, k: int) -> list[TopTokens]:
        try:
            tables = answer["choices"][0]["prompt_logprobs"]
            found = [
                likeliest([(int(token), entry["logprob"]) for token, entry in table.items()], k)
                for table in tables[first:]
            ]
            whole = len(tables) == length
        except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
            raise self._server.broken(
                _COMPLETIONS,
                f"gives no prompt_logprobs that can be read ({error!r}), which a teacher is asked for",
                answer,
            ) from error
        if not whole or not all(len(top) == k and all(is_log_prob(value) for _, value in top) for top in found):
            raise self._server.broken(
                _COMPLETIONS, f"should give the {k} likeliest tokens at each of {length} positions", answer
            )
        return found
