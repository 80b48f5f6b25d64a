"""A whole run on a hostile file and with keys in its environment: it stays in its folder, counts what it leaves out,
and shows no key."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any
from unittest import mock

from tests.http_server import serve
from tests.online_jobs import make_tokenizer, run, steps

KEYS = {"HYBRID_REWARD_API_KEY": "sk-of-the-reward", "HYBRID_SERVER_API_KEY": "sk-of-the-engine"}
TASKS = ("../../escaped", "/tmp/hybrid_escaped_root", "..", "a/../../b", "-rf", "CON", "$(touch escaped)", "%s%n{0}")
"""What would be a place elsewhere, a flag, a device, a command or a format if a name of data became one."""


def train(folder: str, url: str, name: str) -> tuple[str, str]:
    """What a run said, or what it ended in."""
    from megatron_hybrid.errors import ServerError

    flags: dict[str, Any] = {
        "hybrid_run_dir": f"{folder}/{name}",
        "tensorboard_dir": f"{folder}/{name}/tensorboard",
        "hybrid_imitation_weight": 0,
        "hybrid_reward": f"{url}/{name}",
        "hybrid_on_bad_record": "skip",
        "hybrid_server_retries": 0,
        "hybrid_samples_interval": 1,
        "train_iters": 2,
        "eval_iters": 0,
        "distributed_timeout_minutes": 61,
    }
    with mock.patch.dict(os.environ, KEYS):
        try:
            return run(folder, flags), ""
        except ServerError as error:
            return "", str(error)


def test_a_hostile_file_and_keys_leave_nothing_where_they_should_not(rank_pool, tmp_path):
    folder = tmp_path / "deep" / "below"
    folder.mkdir(parents=True)
    make_tokenizer(folder / "tokenizer")
    lines = [json.dumps({"prompt": "w1", "answer": "w2", "task": task, "id": task}) for task in TASKS]
    lines += ["broken", json.dumps({"prompt": "w1", "answer": "w2", "task": "line\nbreak"}), lines[0]]
    (folder / "prompts.jsonl").write_text("\n".join(lines))
    asked: list[str | None] = []

    def answer(path: str, body: Any) -> tuple[int, Any]:
        if path == "/refused":
            return 403, f"{KEYS['HYBRID_REWARD_API_KEY']} may not come in"
        asked.extend(item["task"] for item in body["items"])
        return 200, {"rewards": [float(len(item["response"]) % 3) for item in body["items"]]}

    before = set(tmp_path.rglob("*"))
    with serve(answer, key=KEYS["HYBRID_REWARD_API_KEY"]) as url:
        ((said, _),) = rank_pool(1, init=False).run(train, str(folder), url, "run")
        ((_, error),) = rank_pool(1, init=False).run(train, str(folder), url, "refused")
    assert list((folder / "run" / "tensorboard").iterdir()), "its tags are names of data, too"
    assert len(steps(folder)) == 2 and set(asked) <= set(TASKS) and len(set(asked)) > 3

    made = set(tmp_path.rglob("*")) - before
    outside = [path for path in made if not path.is_relative_to(folder / "run") and path.is_file()]
    assert [path for path in outside if not path.is_relative_to(folder / "refused")] == []
    assert not Path("/tmp/hybrid_escaped_root").exists() and not list(tmp_path.rglob("*escaped*"))

    (left_out,) = json.loads((folder / "run" / "config.json").read_text())["config"]["left_out"]
    assert (left_out["unit"], left_out["count"], left_out["of"]) == ("lines", 3, 11)
    assert [reason.partition(":")[0] for reason in left_out["reasons"]] == ["line 9", "line 10", "line 11"]

    texts = [said, error, *(path.read_bytes().decode(errors="replace") for path in made if path.is_file())]
    for key in KEYS.values():
        assert not [text[:200] for text in texts if key in text], "a key is never written down"
    assert "refuses with status 403. It answered: (the key) may not come in" in error
