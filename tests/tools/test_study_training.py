"""The study of training: its flags, its counting, and on a world made for it the direction of its outcome."""

import itertools
import json
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[2]
sys.path.append(str(ROOT / "tools"))

import study_gym  # noqa: E402
from study_goals import beside, level  # noqa: E402
from study_outcome import TUNING_SEED, Outcome, chosen_rate, run_folder  # noqa: E402
from study_runs import Method, credit_of_others, methods  # noqa: E402
from study_settings import SETTINGS, Setting  # noqa: E402
from study_training import parsed  # noqa: E402
from study_world import (  # noqa: E402
    DIGITS,
    TASKS,
    all_right,
    optimum,
    questions,
    right,
    share_right,
)


def test_flags_of_every_method_are_settings_that_go_together():
    import argparse

    from megatron_hybrid.cli.arguments import add_hybrid_args, hybrid_config_from_args

    found = methods(Setting(steps=100, beta=0.1))
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


def test_the_optimum_in_closed_form_is_that_of_every_response_listed():
    """Two digits: 36 responses, the teacher's chances tilted by the reward."""
    answer, believes = ("2", "1"), ("1", "2")
    for reward, paid in (("share", share_right), ("exact", all_right)):
        setting = Setting(reward=reward, beta=0.2, teacher=(0.7, 0.5), digits=2)
        for knows, said in ((True, answer), (False, believes)):
            sure = setting.teacher[not knows]
            q, r = [], []
            for response in itertools.product(DIGITS, repeat=2):
                q.append(math.prod(sure * (a == b) + (1 - sure) / 6 for a, b in zip(response, said, strict=True)))
                r.append(paid("", " ".join(response), " ".join(answer), {}))
            p = np.array(q) * np.exp(np.array(r) / setting.beta)
            p /= p.sum()
            expected = (float(p @ r), float(p @ np.log(p / np.array(q))))
            assert optimum(setting, knows=knows) == pytest.approx(expected, rel=1e-9)


def test_a_goal_is_met_where_every_seed_has_the_reward_with_half_of_the_rollouts_at_no_higher_kl():
    rollouts = np.array([0, 100, 200, 300, 400])
    climbs = np.array([[0.0, 0.25, 0.5, 0.75, 1.0], [0.0, 0.25, 0.5, 0.75, 1.0]])
    theirs = Outcome("theirs", Method(""), rollouts, {"val/score": climbs, "val/kl_per_response": 4 * climbs})
    assert level(theirs) == pytest.approx(0.9 * 0.75)  # the last three evaluations

    def said(of_second_seed: float, kl: float) -> list[str]:
        quick = np.array([[0.0, 1, 1, 1, 1], [0.0, of_second_seed, 1, 1, 1]])
        values = {"val/score": quick, "val/kl_per_response": kl * np.ones_like(quick)}
        return [cell.split(", ")[-1] for cell in beside(Outcome("ours", Method(""), rollouts, values), theirs)[1:]]

    assert said(1.0, kl=2.0) == ["met", "met"]
    assert said(0.1, kl=3.0) == ["open", "missed"]
    never = np.zeros_like(climbs)
    stuck = Outcome("stuck", Method(""), rollouts, {"val/score": never, "val/kl_per_response": never})
    assert beside(stuck, theirs)[1:] == ["0 of 2 seeds reach it, missed", "not there"]
    assert level(Outcome("flat", Method(""), rollouts, {"val/score": 0.01 * climbs})) is None


def test_each_method_is_reported_with_the_learning_rate_that_did_best_on_the_seed_that_is_not(tmp_path: Path):
    setting = Setting(lrs=(1e-3, 2e-3))
    for lr, seed, score in ((1e-3, TUNING_SEED, 0.4), (2e-3, TUNING_SEED, 0.6), (1e-3, 1, 0.9)):
        run = run_folder(tmp_path, "full hybrid", lr, seed)
        run.mkdir(parents=True)
        records = ({"step": k, "kind": "eval", "time": 0.0, "val/score": score * k} for k in (0, 1))
        (run / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
        (run / "summary.json").write_text("{}")
    assert chosen_rate(tmp_path, "full hybrid", setting) == 2e-3
    assert chosen_rate(tmp_path, "distillation", setting) == 1e-3  # nothing is known of it yet


def test_what_is_changed_is_changed_in_the_setting_that_is_named():
    options = parsed(["--setting", "exact", "--student", "0.1", "0.5", "--lrs", "1e-3"])
    assert options.setting == replace(SETTINGS["exact"], student=(0.1, 0.5), lrs=(1e-3,))
    with pytest.raises(SystemExit):
        parsed(["--setting", "share", "--reward", "nothing of this world"])


def test_the_teacher_of_the_gym_is_right_on_half_of_its_tasks_and_wrong_in_form_alike_on_the_others():
    asked = study_gym.questions()
    assert {task: len(of_task) for task, of_task in asked.items()}.items() >= {
        "products": 100,
        "chain_sum": 200,
    }.items()
    for task, of_task in asked.items():
        said = [study_gym.believed("teacher", question) == question.answer for question in of_task]
        assert all(said) if task not in study_gym.WRONG else np.mean(said) < 0.2
        assert all(study_gym.believed("student", question) == question.answer for question in of_task)
        assert max(len(str(question.answer)) for question in of_task) < study_gym.LONGEST_RESPONSE
    sums = {question.text: question for question in asked["chain_sum"]}
    text = next(text for text in sums if "4 + 6" in text)
    assert (sums[text].answer, study_gym.believed("teacher", sums[text])) == ("10", "-2")


def test_the_gyms_tokenizer_gives_back_what_it_reads_and_has_a_token_for_what_all_questions_share(tmp_path: Path):
    asked = study_gym.questions()
    tokenizer = study_gym._make_tokenizer(tmp_path, asked)
    for of_task in asked.values():
        for question in of_task[:3]:
            assert tokenizer.decode(tokenizer(question.text)["input_ids"]) == question.text
            assert len(tokenizer(question.text)["input_ids"]) < 10
            assert tokenizer.decode(tokenizer(question.answer)["input_ids"]) == question.answer


@pytest.mark.procs
@pytest.mark.parametrize("setting", ["share", pytest.param("gym", marks=pytest.mark.slow)])
def test_the_hybrid_learns_what_the_teacher_does_not_know_and_stays_nearer_to_it_than_reward_alone(
    setting: str, tmp_path: Path
):
    command = [sys.executable, ROOT / "tools" / "study_training.py", "--quick", "--setting", setting]
    command += ["--out", tmp_path / "runs", "--worlds", tmp_path]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1500)
    assert done.returncode == 0, done.stderr[-3000:]
    records = {record["method"]: record for record in json.loads((tmp_path / "runs" / "results.json").read_text())}
    hybrid, distilled, rewarded = (records[n] for n in ("full hybrid", "distillation", "reward alone, RLOO"))
    of_wrong = [sum(r[f"val/score/{task}"][0] for task in SETTINGS[setting].module.WRONG) for r in (hybrid, distilled)]
    assert of_wrong[0] > of_wrong[1]
    assert hybrid["val/score"][0] > distilled["val/score"][0]
    assert hybrid["val/kl_per_response"][0] < rewarded["val/kl_per_response"][0]
    again = subprocess.run(command, capture_output=True, text=True, timeout=1500)
    assert "run 1/" not in again.stderr, "a finished run is not repeated"
