"""SGLang's native server; its OpenAI-compatible one gives no token ids.

    complete      POST /generate {input_ids, sampling_params: {n, ...}, return_logprob: true}
                  -> meta_info: output_token_logprobs [[log-prob, id, text], ...], finish_reason.type; of n > 1 a list
    top_tokens    POST /generate {input_ids, sampling_params: {max_new_tokens: 0}, logprob_start_len: 0,
                  top_logprobs_num: k} -> meta_info.input_top_logprobs[position]: [[log-prob, id, text], ...]
    load_weights  POST /update_weights_from_disk {model_path} -> {success, message}; the cache is flushed with it

Seeds are not passed on: SGLang takes one under its deterministic inference alone. Rollouts of a run that is repeated or
resumed differ.
Written from SGLang's documentation and tests; tested against a server of tests/ that speaks as they do with a real
model behind it. SGLang itself was not run here.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from megatron_hybrid.errors import ServerError
from megatron_hybrid.servers.engine import Completion, Sampling, TopTokens, likeliest
from megatron_hybrid.servers.http_engine import WHOLE_DISTRIBUTION, HttpEngine, all_of

_WHOLE_DISTRIBUTION = WHOLE_DISTRIBUTION | {"top_k": -1}


class SglangEngine(HttpEngine):
    """See `HttpEngine`."""

    PATH = "/generate"

    def complete(
        self, prompts: Sequence[tuple[Sequence[int], int]], n: int, sampling: Sampling
    ) -> list[list[Completion] | ServerError]:
        """See `Engine`; the seeds are not used."""
        how = {
            **_WHOLE_DISTRIBUTION,
            "n": n,
            "max_new_tokens": sampling.max_tokens,
            "stop_token_ids": list(sampling.stop_ids),
        }
        bodies = [{"input_ids": list(ids), "sampling_params": how, "return_logprob": True} for ids, _ in prompts]
        return self._ask(bodies, [partial(self._completions, n=n, room=sampling.max_tokens)] * len(bodies))

    def top_tokens(self, texts: Sequence[tuple[Sequence[int], int]], k: int) -> list[list[TopTokens]]:
        """See `Engine`."""
        common = {
            "sampling_params": {**_WHOLE_DISTRIBUTION, "max_new_tokens": 0},
            "return_logprob": True,
            "logprob_start_len": 0,
            "top_logprobs_num": k,
        }
        bodies = [{**common, "input_ids": list(ids)} for ids, _ in texts]
        reads = [partial(self._positions, first=first, length=len(ids), k=k) for ids, first in texts]
        return all_of(self._ask(bodies, reads))

    def load_weights(self, folder: str) -> None:
        """See `Engine`."""
        path = "/update_weights_from_disk"

        answer: Any = self._server.post(path, {"model_path": folder}, lambda answer: answer)
        if not (isinstance(answer, dict) and answer.get("success") is True):  # weights that do not fit will not later
            raise self._server.broken(path, f"did not take the weights in {folder}", answer)

    def _completions(self, answer: Any, n: int, room: int) -> list[Completion]:
        answers = answer if isinstance(answer, list) else [answer]
        try:
            infos = [one["meta_info"] for one in answers]
            found = [
                Completion(
                    tuple(token for _, token, *_ in info["output_token_logprobs"]),
                    tuple(log_prob for log_prob, *_ in info["output_token_logprobs"]),
                    info["finish_reason"]["type"] == "length",
                )
                for info in infos
            ]
            reasons = {info["finish_reason"]["type"] for info in infos}
        except (KeyError, TypeError, ValueError) as error:
            raise self._server.broken(
                self.PATH, f"gives nothing that a rollout can be made of ({error!r})", answer
            ) from error
        return self._whole_completions(found, reasons, n, room, answer)

    def _positions(self, answer: Any, first: int, length: int, k: int) -> list[TopTokens]:
        try:
            tables = answer["meta_info"]["input_top_logprobs"]
            found = [likeliest([(token, log_prob) for log_prob, token, *_ in table], k) for table in tables[first:]]
            num_positions = len(tables)
        except (KeyError, TypeError, ValueError) as error:
            raise self._server.broken(
                self.PATH, f"gives no input_top_logprobs that can be read ({error!r})", answer
            ) from error
        return self._whole_positions(found, num_positions, length, k, answer)
