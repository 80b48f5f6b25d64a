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

from collections.abc import Sequence
from functools import partial
from typing import Any

from megatron_hybrid.errors import ServerError
from megatron_hybrid.servers.engine import Completion, Sampling, TopTokens, likeliest
from megatron_hybrid.servers.http_engine import WHOLE_DISTRIBUTION, HttpEngine, all_of

_WHOLE_DISTRIBUTION = WHOLE_DISTRIBUTION | {"top_k": 0}


class VllmEngine(HttpEngine):
    """See `HttpEngine`; its address with or without the /v1."""

    PATH = "/v1/completions"
    SUFFIX = "/v1"

    def complete(
        self, prompts: Sequence[tuple[Sequence[int], int]], n: int, sampling: Sampling
    ) -> list[list[Completion] | ServerError]:
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
        return self._ask(bodies, [partial(self._completions, n=n, room=sampling.max_tokens)] * len(bodies))

    def top_tokens(self, texts: Sequence[tuple[Sequence[int], int]], k: int) -> list[list[TopTokens]]:
        """See `Engine`."""
        common = {**_WHOLE_DISTRIBUTION, "max_tokens": 1, "prompt_logprobs": k}
        bodies = [{**common, "prompt": list(ids)} for ids, _ in texts]
        reads = [partial(self._positions, first=first, length=len(ids), k=k) for ids, first in texts]
        return all_of(self._ask(bodies, reads))

    def load_weights(self, folder: str) -> None:
        """See `Engine`."""
        self._server.tell("/collective_rpc", {"method": "reload_weights", "kwargs": {"weights_path": folder}})
        self._server.tell("/reset_prefix_cache")

    def _completions(self, answer: Any, n: int, room: int) -> list[Completion]:
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
            reasons = {choice["finish_reason"] for choice in choices}
        except (KeyError, TypeError) as error:
            raise self._server.broken(
                self.PATH,
                f"gives no {error}, which a rollout is made of: it takes a vLLM that knows return_token_ids",
                answer,
            ) from error
        return self._whole_completions(found, reasons, n, room, answer)

    def _positions(self, answer: Any, first: int, length: int, k: int) -> list[TopTokens]:
        try:
            tables = answer["choices"][0]["prompt_logprobs"]
            found = [
                likeliest([(int(token), entry["logprob"]) for token, entry in table.items()], k)
                for table in tables[first:]
            ]
            num_positions = len(tables)
        except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
            raise self._server.broken(
                self.PATH,
                f"gives no prompt_logprobs that can be read ({error!r}), which a teacher is asked for",
                answer,
            ) from error
        return self._whole_positions(found, num_positions, length, k, answer)
