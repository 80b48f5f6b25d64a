"""The benchmark of rollouts as a user starts it, with a model of a few thousand parameters."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TOOL = ROOT / "tools" / "bench_rollouts.py"


@pytest.mark.procs
def test_both_sides_answer_the_same_prompts_and_our_log_probs_are_theirs(tmp_path: Path):
    from tests.checkpoint.tiny_llama import make_folder

    make_folder(tmp_path / "model")
    questions = [{"prompt": " ".join(f"w{n}" for n in range(3, 4 + length)), "answer": "w3"} for length in (2, 7, 4)]
    (tmp_path / "questions.jsonl").write_text("".join(json.dumps(q) + "\n" for q in questions), encoding="utf-8")
    options = ["--model", tmp_path / "model", "--prompts", tmp_path / "questions.jsonl", "--num-prompts", "3"]
    options += ["--group-size", "2", "--max-response", "5", "--dtype", "fp32", "--repeats", "2", "--threads", "1"]
    done = subprocess.run(
        [sys.executable, TOOL, *options, "--never-stop", "--out", tmp_path / "out.json"],
        capture_output=True,
        text=True,
        timeout=280,
        env=os.environ | {"COLUMNS": "140"},
    )
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "out.json").read_text())
    assert [row["name"].partition(",")[0] for row in rows] == ["megatron_hybrid", "transformers", "transformers"]
    for row in rows:  # two rounds of three prompts; without a stop token every response has all its tokens
        assert (row["prompts"], row["responses"], row["tokens"]) == (6, 12, 60)
    # fp32, two implementations of one network, logits of order 10.
    assert rows[0]["error"] < 5e-5
    assert "log-prob error" in done.stdout
