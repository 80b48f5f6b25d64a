"""The study of training: its flags, its counting, and on a world made for it the direction of its outcome."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[2]
sys.path.append(str(ROOT / "tools"))

from study_outcome import Outcome  # noqa: E402
from study_runs import Method, credit_of_others, methods  # noqa: E402
from study_world import TASKS, WRONG, all_right, questions, right, share_right  # noqa: E402


def test_flags_of_every_method_are_settings_that_go_together():
    import argparse

    from megatron_hybrid.cli.arguments import add_hybrid_args, hybrid_config_from_args

    found = methods(100, 0.1)
    for name, method in found.items():
        args = add_hybrid_args(argparse.ArgumentParser(allow_abbrev=False)).parse_args(
            ["--hybrid", *method.flags.split()]
        )
        config = hybrid_config_from_args(args)
        assert config is not None, name
        assert config.imitates == (name != "reward alone, RLOO")
    assert {method.others for method in found.values()} == {"", "k3_loss", "kl_in_reward"}


def test_the_trainers_credit_is_its_own_again_afterwards():
    from megatron_hybrid.train import loop
    from megatron_hybrid.train.credit import Credit

    with credit_of_others("kl_in_reward"):
        assert loop.Credit is not Credit
        assert issubclass(loop.Credit, Credit)
    assert loop.Credit is Credit


def test_rollouts_to_a_reward_are_counted_along_lines():
    curves = np.array([[0.0, 0.4, 0.8], [0.5, 0.6, 0.6], [0.0, 0.1, 0.2]])
    outcome = Outcome("", Method(""), np.array([0, 100, 200]), {"val/score": curves})
    assert outcome.reaches("val/score", 0.5) == [125.0, 0.0, float("inf")]


def test_the_world_asks_each_task_and_pays_for_places():
    asked = questions(3, 40, seed=0)
    assert [question["task"] for question in asked[:4]] == list(TASKS)
    assert len({question["prompt"] for question in asked}) == 40
    assert right("sort", ["3", "1", "2"]) == ["1", "2", "3"]
    assert right("next", ["5", "0"]) == ["0", "1"]
    assert share_right("", "1 2 0", "1 2 3", {}) == pytest.approx(2 / 3)
    assert share_right("", "1 2 3 4", "1 2 3", {}) == pytest.approx(3 / 4)
    assert share_right("", "", "1 2 3", {}) == 0
    assert [all_right("", said, "1 2 3", {}) for said in ("1 2 3", "1 2 0", "1 2 3 4")] == [1, 0, 0]


@pytest.mark.slow
@pytest.mark.procs
def test_the_hybrid_learns_what_the_teacher_does_not_know_and_stays_nearer_to_it_than_reward_alone(tmp_path: Path):
    command = [sys.executable, ROOT / "tools" / "study_training.py", "--quick", "--out", tmp_path]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1500)
    assert done.returncode == 0, done.stderr[-3000:]
    records = {record["method"]: record for record in json.loads((tmp_path / "results.json").read_text())}
    hybrid, distilled, rewarded = (records[n] for n in ("full hybrid", "distillation", "reward alone, RLOO"))
    of_wrong = [sum(r[f"val/score/{task}"][0] for task in WRONG) for r in (hybrid, distilled)]
    assert of_wrong[0] > of_wrong[1]
    assert hybrid["val/score"][0] > distilled["val/score"][0]
    assert hybrid["val/kl_per_response"][0] < rewarded["val/kl_per_response"][0]
    again = subprocess.run(command, capture_output=True, text=True, timeout=1500)
    assert "run 1/" not in again.stderr, "a finished run is not repeated"
