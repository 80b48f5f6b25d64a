"""A server as reward: one POST for all responses of a replica, one number back for each.

    POST {"items": [{"prompt_id", "task", "prompt", "response", "answer", "record"}, ...]}  ->  {"rewards": [0.5, ...]}

`answer` may be null; `record` is the source's own (the line of a prompt file with all its fields), with what JSON does
not know written as text. The server is asked by one rank of each replica, beside the teacher's pass. A key in the
environment variable HYBRID_REWARD_API_KEY goes along as a bearer token.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any
from urllib.parse import urlsplit

from megatron_hybrid.online_config import REWARD_KEY_VARIABLE
from megatron_hybrid.records import Prompt
from megatron_hybrid.servers.json_server import JsonServer


class HttpReward:
    """One server.

    Args:
        url: where to POST.
        timeout_s, retries, pause_s: see `JsonServer`.
    """

    main_thread_only = False

    def __init__(self, url: str, *, timeout_s: float, retries: int, pause_s: float = 1.0) -> None:
        parts = urlsplit(url)
        self.name = (
            f"{parts.hostname}{f':{parts.port}' if parts.port else ''}{parts.path.rstrip('/').replace('/', '.')}"
        )
        """Host, port and path: what a metric can be called, without the query, which may hold a key."""
        self._server = JsonServer(
            url,
            "the reward server",
            timeout_s=timeout_s,
            retries=retries,
            pause_s=pause_s,
            key_variable=REWARD_KEY_VARIABLE,
        )

    def score_all(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> list[float]:
        """A score per response.

        Raises:
            ServerError: it stays down, refuses, or answers something else than a number for each response.
        """
        if not responses:
            return []
        items = [_item(prompt, response) for prompt, response in zip(prompts, responses, strict=True)]
        answer = self._server.post("", {"items": items})
        rewards = answer.get("rewards") if isinstance(answer, dict) else None
        if not isinstance(rewards, list) or len(rewards) != len(items):
            raise self._server.broken(
                "", f'should answer {{"rewards": [...]}} with {len(items)} numbers, one per response', answer
            )
        for reward, item in zip(rewards, items, strict=True):
            if not isinstance(reward, int | float):
                raise self._server.broken("", f"gave {reward!r} for prompt {item['prompt_id']}, not a number", answer)
        try:
            return [float(reward) for reward in rewards]
        except OverflowError as error:  # JSON has whole numbers of any length
            raise self._server.broken("", "gave a number that no reward is as large as", answer) from error


def _item(prompt: Prompt, response: str) -> dict[str, Any]:
    record = json.loads(json.dumps(prompt.entry.get("record", {}), default=str))
    item = {"prompt_id": prompt.prompt_id, "task": prompt.task, "prompt": prompt.text, "response": response}
    return item | {"answer": prompt.answer, "record": record}
