"""A server with a real model (transformers, fp32, CPU) that speaks as vLLM's or SGLang's does: the paths, fields and
shapes of their protocol sources that the clients use, and no others. Neither engine runs on the machines of the tests.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from tests.http_server import serve

FOREIGN = {"temperature": 1.0, "top_p": 1.0, "min_p": 0.0, "repetition_penalty": 1.0}
"""What a request has to say, for a server whose own defaults are others."""


class EngineServer:
    """One model behind both dialects; `asked` keeps (path, body), `loaded` the folders of weights."""

    def __init__(self, folder: str | Path) -> None:
        self.asked: list[tuple[str, Any]] = []
        self.loaded: list[str] = []
        self._lock = threading.Lock()
        self._load(folder)

    def answer(self, path: str, body: Any) -> tuple[int, Any]:
        with self._lock:
            self.asked.append((path, body))
            known = {
                "/v1/completions": self._completions,
                "/collective_rpc": self._collective_rpc,
                "/reset_prefix_cache": lambda body: "",
                "/generate": self._generate,
                "/update_weights_from_disk": self._update_weights,
            }
            return (200, known[path](body)) if path in known else (404, "not found")

    def log_probs(self, ids: list[int]) -> torch.Tensor:
        """[s, v] fp32 of the token after each of `ids`."""
        with torch.no_grad():
            return self.model(torch.tensor([ids])).logits[0].float().log_softmax(-1)

    def _load(self, folder: str | Path) -> None:
        from transformers import AutoModelForCausalLM

        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()

    def _sample(self, ids: list[int], room: int, stops: list[int], seed: int | None) -> tuple[list[int], list[float]]:
        generator = torch.Generator()
        generator.manual_seed(seed) if seed is not None else generator.seed()
        drawn: list[int] = []
        chosen: list[float] = []
        while len(drawn) < room and not (drawn and drawn[-1] in stops):
            log_probs = self.log_probs([*ids, *drawn])[-1]
            token = int(torch.multinomial(log_probs.exp(), 1, generator=generator))
            drawn.append(token)
            chosen.append(float(log_probs[token]))
        return drawn, chosen

    # vLLM

    def _completions(self, body: dict[str, Any]) -> dict[str, Any]:
        assert {name: body[name] for name in FOREIGN} == FOREIGN and body["top_k"] == 0, body
        ids, choices = body["prompt"], []
        for index in range(body.get("n", 1)):
            seed = None if body.get("seed") is None else body["seed"] + index
            drawn, chosen = self._sample(ids, body["max_tokens"], body.get("stop_token_ids", []), seed)
            finished = bool(drawn) and drawn[-1] in body.get("stop_token_ids", [])
            choice: dict[str, Any] = {"index": index, "text": "", "finish_reason": "stop" if finished else "length"}
            if body.get("return_token_ids"):
                choice |= {"token_ids": drawn, "prompt_token_ids": ids}
            if body.get("logprobs") is not None:
                choice["logprobs"] = {"token_logprobs": chosen, "tokens": [f"token_id:{token}" for token in drawn]}
            if body.get("prompt_logprobs") is not None:
                choice["prompt_logprobs"] = self._prompt_log_probs(ids, body["prompt_logprobs"])
            choices.append(choice)
        return {"object": "text_completion", "choices": choices}

    def _prompt_log_probs(self, ids: list[int], k: int) -> list[dict[str, Any] | None]:
        tables: list[dict[str, Any] | None] = [None]
        for token, row in zip(ids[1:], self.log_probs(ids), strict=False):
            rank = {int(i): place for place, i in enumerate(row.argsort(descending=True), start=1)}
            kept = [token, *(i for i in rank if rank[i] <= k and i != token)]  # the text's own token comes first
            tables.append({str(i): {"logprob": float(row[i]), "rank": rank[i], "decoded_token": ""} for i in kept})
        return tables

    def _collective_rpc(self, body: dict[str, Any]) -> dict[str, Any]:
        assert body["method"] == "reload_weights", body
        self.loaded.append(body["kwargs"]["weights_path"])
        self._load(self.loaded[-1])
        return {"results": [None]}

    # SGLang

    def _generate(self, body: dict[str, Any]) -> Any:
        how = body["sampling_params"]
        assert {name: how[name] for name in FOREIGN} == FOREIGN and how["top_k"] == -1, body
        ids, answers = body["input_ids"], []
        for _ in range(how.get("n", 1)):
            drawn, chosen = self._sample(ids, how["max_new_tokens"], how.get("stop_token_ids", []), None)
            finished = bool(drawn) and drawn[-1] in how.get("stop_token_ids", [])
            reason = {"type": "stop", "matched": drawn[-1]} if finished else {"type": "length", "length": len(drawn)}
            pairs = [[log_prob, token, None] for log_prob, token in zip(chosen, drawn, strict=True)]
            info: dict[str, Any] = {"finish_reason": reason, "output_token_logprobs": pairs, "prompt_tokens": len(ids)}
            if body.get("logprob_start_len", -1) >= 0:
                tops = [row.topk(body["top_logprobs_num"]) for row in self.log_probs(ids)[:-1]]
                tables = [[[float(v), int(i), None] for v, i in zip(*top, strict=True)] for top in tops]
                info["input_top_logprobs"] = [None, *tables][body["logprob_start_len"] :]
            answers.append({"text": "", "output_ids": drawn, "meta_info": info})
        return answers if how.get("n", 1) > 1 else answers[0]

    def _update_weights(self, body: dict[str, Any]) -> dict[str, Any]:
        if not Path(body["model_path"]).exists():
            return {"success": False, "message": f"no such folder: {body['model_path']}"}
        self.loaded.append(body["model_path"])
        self._load(self.loaded[-1])
        return {"success": True, "message": "Succeeded to update model weights."}


@contextmanager
def serve_model(folder: str | Path) -> Iterator[tuple[EngineServer, str]]:
    """The server and its address, while the block runs."""
    server = EngineServer(folder)
    with serve(server.answer) as url:
        yield server, url
