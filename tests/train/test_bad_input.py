"""Each mistake in settings, prompts or teacher ends before a model is built: what was wrong, why, and what to do."""

from __future__ import annotations

import contextlib
import functools
import io
import os
import re
import shutil
from argparse import Namespace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from tests.full_disk import small_disk
from tests.online_jobs import WORDS, make_prompts, make_tokenizer, run
from tests.train.test_sentencepiece import make_model as make_sentencepiece


def attempt(folder: str, overrides: dict[str, Any], environment: dict[str, str], plain: bool) -> tuple[str, str, bool]:
    """An online run up to Megatron's `pretrain`: (type of the error, its text, whether pretrain was called)."""
    from megatron.training import training

    import megatron_hybrid as mh
    from megatron_hybrid.errors import HybridError
    from tests.pretrain_jobs import stock_forward_step

    reached = []

    @functools.wraps(training.pretrain)
    def pretrain(*args: Any, **kwargs: Any) -> None:
        reached.append(True)

    said = io.StringIO()
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(training, "pretrain", pretrain))
        stack.enter_context(mock.patch.dict(os.environ, environment))
        stack.enter_context(contextlib.redirect_stderr(said))
        if plain:
            stack.enter_context(mock.patch.object(mh, "HybridForwardStep", lambda **_: stock_forward_step))
        try:
            run(folder, overrides)
        except HybridError as error:
            return type(error).__name__, str(error), bool(reached)
        except SystemExit:
            return "SystemExit", said.getvalue(), bool(reached)
    return "nothing", "", bool(reached)


def save_arguments(folder: str, arguments: dict[str, Any]) -> None:
    """A torch_dist checkpoint with a teacher's arguments and no tensors: the refusals read nothing else."""
    from megatron.core import dist_checkpointing

    from megatron_hybrid.mcore.checkpoint_io import single_rank

    inner = Path(folder, "release")
    inner.mkdir(parents=True)
    with single_rank():
        dist_checkpointing.save({"args": Namespace(**arguments)}, str(inner))
    Path(folder, "latest_checkpointed_iteration.txt").write_text("release\n")


@pytest.fixture(scope="module")
def folder(tmp_path_factory, rank_pool):
    """A good tokenizer and good prompts, and one of each kind that is not."""
    from transformers import AutoTokenizer

    from megatron_hybrid.checkpoint.fingerprint import tokenizer_fingerprint

    path = tmp_path_factory.mktemp("bad")
    make_tokenizer(path / "tokenizer")
    make_prompts(path / "prompts.jsonl")
    good = '{"prompt": "w1", "answer": "w2"}\n'
    make_sentencepiece(path / "tokenizer.model", 21)
    (path / "empty.jsonl").write_text("\n")
    (path / "malformed.jsonl").write_text(good + good + '{"prompt": "w1", "answer": }\n')
    (path / "no_answer.jsonl").write_text(good + '{"prompt": "w1", "solution": "w2"}\n')
    (path / "long.jsonl").write_text(good + '{"prompt": "w1 w2 w3", "answer": "w2"}\n')
    (path / "shown.jsonl").write_text('{"prompt": "w1", "response": "w2 w3"}\n')
    reordered = make_tokenizer(path / "reordered", WORDS[::-1])
    same = tokenizer_fingerprint(AutoTokenizer.from_pretrained(path / "tokenizer"))
    other = tokenizer_fingerprint(AutoTokenizer.from_pretrained(reordered))
    size = len(WORDS) + 2
    pool = rank_pool(1, init=False)
    for name, arguments in {
        "fitting": {"vocab_size": size, "hybrid_tokenizer_fingerprint": same},
        "other_ids": {"vocab_size": size, "hybrid_tokenizer_fingerprint": other, "tokenizer_model": "their/tokenizer"},
        "other_ids_by_folder": {"tokenizer_type": "HuggingFaceTokenizer", "tokenizer_model": str(reordered)},
        "other_size": {"vocab_size": size - 4, "hybrid_tokenizer_fingerprint": same},
        "odd_depth": {"num_layers": 3, "vocab_size": size, "hybrid_tokenizer_fingerprint": same},
    }.items():
        pool.run(save_arguments, str(path / name), {"num_layers": 4, "position_embedding_type": "rope"} | arguments)
    (path / "no_checkpoint").mkdir()
    return path


REWARD_ONLY = {"hybrid_imitation_weight": 0}
SHOWN = REWARD_ONLY | {
    "hybrid_prompts": None,
    "hybrid_rollouts": "{folder}/shown.jsonl",
    "hybrid_rollout_correction": "none",
    "hybrid_baseline": "none",
    "hybrid_group_size": 1,
}
"""Demonstrations, learnt by cross-entropy."""
CASES = [
    # The method.
    (
        "group of one",
        {"hybrid_group_size": 1},
        "ConfigError",
        "'rloo' .*group_size is 1: .*Use group_size >= 2, or base",
    ),
    ("discount above 1", {"hybrid_discount": 1.5}, "ConfigError", r"must lie in \[0, 1\], got 1.5: .*Use 1 for"),
    (
        "negative weight",
        {"hybrid_reward_weight": -2},
        "ConfigError",
        "must be a finite number >= 0, got -2.0: .*Change",
    ),
    ("aggregation", {"hybrid_aggregation": "token_mean"}, "SystemExit", "invalid choice: 'token_mean'.*token-mean"),
    # Sizes.
    (
        "batch that cuts groups",
        {"global_batch_size": 6, "micro_batch_size": 6},
        "ConfigError",
        "--global-batch-size 6 over 1 .* is 6 responses each, .*no multiple of group_size 4: .*Change",
    ),
    (
        "micro-batch that cuts groups",
        {"micro_batch_size": 2, "hybrid_imitation_weight": 1},
        "ConfigError",
        "--micro-batch-size is 2, group_size 4. Use a multiple of group_size, or --hybrid-cost-baseline none",
    ),
    (
        "no room to answer",
        {"hybrid_max_response_length": 16},
        "ConfigError",
        "--seq-length 16 leaves no room to answer: .* 16 tokens .*leaves 0 for the prompt. Raise one or lower",
    ),
    # Prompts.
    (
        "long prompt",
        {"seq_length": 5, "hybrid_prompts": "{folder}/long.jsonl"},
        "DataError",
        "1 of 2 prompts are longer than 2 tokens; the longest has 3 .*raise the sequence length",
    ),
    (
        "prompts longer than the room",
        {"hybrid_max_prompt_length": 15},
        "ConfigError",
        "max_prompt_length is 15, but --seq-length leaves 13 tokens .*Raise --seq-length",
    ),
    (
        "reward function that is not there",
        {"hybrid_reward": "0.5*exact_match,1*tests.rewards.user_rewards:missing"},
        "ConfigError",
        "'tests.rewards.user_rewards' has no function 'missing'",
    ),
    ("empty file", {"hybrid_prompts": "{folder}/empty.jsonl"}, "DataError", "empty.jsonl holds no questions: expected"),
    (
        "malformed line",
        {"hybrid_prompts": "{folder}/malformed.jsonl"},
        "DataError",
        "1 of 3 lines cannot be used. Expected .*line 3: not JSON .*at column 28",
    ),
    (
        "line without an answer",
        {"hybrid_prompts": "{folder}/no_answer.jsonl"},
        "DataError",
        "line 2: no 'answer' field .it has 'prompt', 'solution'",
    ),
    (
        "missing file",
        {"hybrid_prompts": "{folder}/none.jsonl"},
        "DataError",
        "none.jsonl: No such file.* Give a readable",
    ),
    (
        "not a form we know",
        {"hybrid_prompts": "questions.txt"},
        "ConfigError",
        "ends in .jsonl or .parquet, got 'questions.txt'",
    ),
    (
        "unknown task",
        {"hybrid_prompts": "reasoning_gym:chain_sums"},
        "ConfigError",
        "has no task 'chain_sums'. Did you mean 'chain_sum'",
    ),
    (
        "nothing held out",
        {"eval_iters": 1},
        "ConfigError",
        "--eval-iters is 1, but nothing is held out of .*--hybrid-eval-prompts another file, or set --eval-iters 0",
    ),
    (
        "everything held out",
        {"eval_iters": 1, "hybrid_eval_prompts": "{folder}/prompts.jsonl"},
        "DataError",
        "every question of .* is also held out, .*use different files",
    ),
    # The teacher.
    (
        "no teacher",
        {"hybrid_imitation_weight": 0.5},
        "ConfigError",
        "imitation_weight is 0.5, but there is no teacher .*-load, .*-server or .*-store, or set --hybrid-im",
    ),
    (
        "teacher with other ids",
        {"hybrid_teacher_load": "{folder}/other_ids"},
        "DataError",
        r"other_ids was made with another tokenizer \(their/tokenizer\): .*Use a teacher with the student's",
    ),
    (
        "teacher with other ids in its folder",
        {"hybrid_teacher_load": "{folder}/other_ids_by_folder"},
        "DataError",
        "was made with another tokenizer .*reordered",
    ),
    (
        "teacher of another size",
        {"hybrid_teacher_load": "{folder}/other_size"},
        "DataError",
        "has a vocabulary of 12 tokens, the student's tokenizer 16: .*Use a teacher with the student's",
    ),
    (
        "folder without a checkpoint",
        {"hybrid_teacher_load": "{folder}/no_checkpoint"},
        "DataError",
        "no_checkpoint is no torch_dist checkpoint: .* was expected. Save with --ckpt-format torch_dist, or convert",
    ),
    (
        "folder that is not there",
        {"hybrid_teacher_load": "{folder}/nowhere"},
        "DataError",
        "nowhere is no torch_dist checkpoint: .*was expected",
    ),
    (
        "teacher of a task that is not there",
        {"hybrid_teacher_load": "chess={folder}/fitting"},
        "ConfigError",
        "names a teacher for each of chess, but the prompts also have the task",
    ),
    (
        "server of whole distributions",
        {"hybrid_teacher_server": "http://localhost:9"},
        "ConfigError",
        "teacher_payload is 'hidden', but a server gives its likeliest tokens alone: set --hybrid-teacher-payload topk",
    ),
    (
        "server of a tempered teacher",
        {
            "hybrid_teacher_server": "http://localhost:9",
            "hybrid_teacher_payload": "topk",
            "hybrid_teacher_topk": 4,
            "hybrid_teacher_temperature": 2,
        },
        "ConfigError",
        "teacher_temperature is 2.0, but a server gives log-probs of temperature 1.*Use temperature 1",
    ),
    (
        "server of tempered rollouts",
        {"hybrid_rollout_server": "http://localhost:9", "hybrid_student_temperature": 0.5},
        "ConfigError",
        "student_temperature is 0.5, and http://localhost:9 samples: .*Use temperature 1, or",
    ),
    (
        "server that is to get weights of no Llama",
        {
            "hybrid_rollout_server": "http://localhost:9",
            "hybrid_rollout_sync_interval": 2,
            "normalization": "LayerNorm",
        },
        "ConfigError",
        "rollout_sync_interval is 2, but the student cannot .*normalization='RMSNorm', this one has 'LayerNorm'.*Leave",
    ),
    (
        "server that is to get a sentencepiece model",
        {
            "hybrid_rollout_server": "http://localhost:9",
            "hybrid_rollout_sync_interval": 2,
            "tokenizer_type": "SentencePieceTokenizer",
            "tokenizer_model": "{folder}/tokenizer.model",
        },
        "ConfigError",
        "rollout_sync_interval is 2 and --tokenizer-type SentencePieceTokenizer: .*Use --tokenizer-type HuggingFace",
    ),
    (
        "hint without a teacher",
        {"hybrid_teacher_hint": "The answer is {{answer}}."},
        "ConfigError",
        "teacher_hint is what a teacher reads .*, but there is no teacher: give --hybrid-teacher-load",
    ),
    (
        "more tokens than there are",
        {"hybrid_teacher_payload": "topk", "hybrid_teacher_topk": 17, "hybrid_teacher_load": "{folder}/fitting"},
        "ConfigError",
        "teacher_topk is 17, but the tokenizer has 16 tokens: .*Lower",
    ),
    (
        "floor beside a bucket",
        {"hybrid_teacher_payload": "topk", "hybrid_teacher_logit_floor": -50.0},
        "ConfigError",
        "teacher_logit_floor is -50.0, but teacher_payload is 'topk'",
    ),
    ("empty teacher", {"hybrid_teacher_load": ""}, "ConfigError", "teacher_load '' has an empty path"),
    (
        "teacher without prompts",
        {"hybrid_prompts": None, "hybrid_teacher_load": "self"},
        "ConfigError",
        "no --hybrid-prompts",
    ),
    # Rollouts from a file.
    (
        "rollouts beside prompts",
        {"hybrid_rollouts": "{folder}/shown.jsonl"},
        "ConfigError",
        "rollouts is .*shown.jsonl' and prompts .*one of the two would be silently ignored",
    ),
    (
        "log-probs that are not there",
        SHOWN | {"hybrid_rollout_correction": "token_truncate"},
        "ConfigError",
        "shown.jsonl holds no 'logprobs' .*rollout_correction must be 'none' .*got 'token_truncate'",
    ),
    (
        "prefix without log-probs",
        SHOWN | {"hybrid_prefix_correction": True},
        "ConfigError",
        "holds no 'logprobs' .*prefix_correction is on",
    ),
    (
        "demonstrations compared with one another",
        SHOWN | {"hybrid_baseline": "running_mean"},
        "ConfigError",
        "holds no 'reward': .*baseline 'running_mean' compares them .*Use baseline 'none'",
    ),
    (
        "groups of another size",
        SHOWN | {"hybrid_group_size": 2},
        "DataError",
        "1 of 1 groups do not have the 2 responses .*line 1 are 1",
    ),
    (
        "response without room",
        SHOWN | {"hybrid_max_response_length": 2},
        "DataError",
        "shown.jsonl: the group of line 1 is one with a response of more than 2 tokens.*--hybrid-long-prompts drop",
    ),
    (
        "every response without room",
        SHOWN | {"hybrid_max_response_length": 2, "hybrid_long_prompts": "drop"},
        "DataError",
        "no question of .*shown.jsonl can be used: 1 with a response of more than 2 tokens",
    ),
    # Collections and batches.
    (
        "batch of one",
        {
            "hybrid_baseline": "reinforce_plus_plus",
            "hybrid_group_size": 1,
            "global_batch_size": 1,
            "micro_batch_size": 1,
        },
        "ConfigError",
        "'reinforce_plus_plus' .*--global-batch-size 1 .*Raise it, or use",
    ),
    # The job.
    (
        "dropout",
        {"attention_dropout": 0.1, "hidden_dropout": None},
        "ConfigError",
        "--attention-dropout is 0.1 and --hidden-dropout 0.1: .*Set both to 0",
    ),
    ("no interval", {"eval_interval": None}, "ConfigError", "--eval-interval is not set"),
    (
        "no chat tokenizer",
        {"tokenizer_type": "NullTokenizer", "tokenizer_model": None, "vocab_size": 61},
        "ConfigError",
        "--tokenizer-type is NullTokenizer: .*--tokenizer-type HuggingFaceTokenizer --tokenizer-model FOLDER",
    ),
]


def refused(folder: Path, pool: Any, overrides: dict[str, Any], *, plain: bool = False, **env: str) -> tuple[str, str]:
    """Type and text of the error, which must have come before `pretrain` and left no run folder."""
    filled = {k: v.format(folder=folder) if isinstance(v, str) else v for k, v in (REWARD_ONLY | overrides).items()}
    kind, text, reached = pool.run(attempt, str(folder), filled, env, plain)[0]
    assert not reached, "a model would have been built"
    assert not (folder / "run").exists()
    return kind, " ".join(text.split())


@pytest.mark.parametrize(("overrides", "kind", "message"), [c[1:] for c in CASES], ids=[c[0] for c in CASES])
def test_a_mistake_is_found_before_a_model_is_built(rank_pool, folder, overrides, kind, message):
    got, text = refused(folder, rank_pool(1, init=False), overrides)
    assert got == kind, text
    assert re.search(message, text), text


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"num_experts": 4, "expert_model_parallel_size": 2}, "--expert-model-parallel-size above 1 is not supported"),
        (
            {
                "context_parallel_size": 2,
                "hybrid_teacher_hint": "The answer is {{answer}}.",
                "hybrid_teacher_load": "{folder}/fitting",
            },
            "--context-parallel-size is 2: a response token would lie on one rank for the student",
        ),
        (
            {
                "context_parallel_size": 2,
                "hybrid_teacher_server": "http://localhost:9",
                "hybrid_teacher_payload": "topk",
                "hybrid_teacher_topk": 4,
            },
            "--context-parallel-size is 2, but a teacher on a server is asked for whole sequences",
        ),
        (
            {"hybrid_reward": "http://localhost:9/score"},
            "may take 3615 s .*--distributed-timeout-minutes 10 for it: .*Set it to 61 or more, or lower",
        ),
        (
            {"pipeline_model_parallel_size": 2, "hybrid_teacher_load": "{folder}/odd_depth"},
            "the teacher has 3 layers, which 2 pipeline stages .* cannot share evenly",
        ),
    ],
    ids=[
        "expert parallel",
        "hint under context parallel",
        "server under context parallel",
        "server that may take longer than a collective",
        "teacher that the stages cannot share",
    ],
)
def test_a_layout_the_hybrid_path_cannot_honour_is_refused(rank_pool, folder, overrides, message):
    # Megatron itself drops these flags in a job of one rank.
    got, text = refused(folder, rank_pool(1, init=False), overrides, WORLD_SIZE="2")
    assert got == "ConfigError", text
    assert re.search(message, text), text


def test_a_plain_function_as_forward_step_is_refused(rank_pool, folder):
    got, text = refused(folder, rank_pool(1, init=False), {}, plain=True)
    assert got == "ConfigError"
    assert re.search("forward_step_func is function: .*Pass HybridForwardStep", text), text


@pytest.mark.parametrize(
    "overrides",
    [
        REWARD_ONLY,
        SHOWN,
        {"hybrid_teacher_load": "{folder}/fitting"},
        REWARD_ONLY | {"hybrid_rollout_server": "http://localhost:9", "hybrid_rollout_sync_interval": 1},
    ],
    ids=["alone", "demonstrations", "teacher", "weights to a server"],
)
def test_good_input_reaches_megatron(rank_pool, folder, overrides):
    """Otherwise everything above could be refused for a reason of the test's own."""
    filled = {k: v.format(folder=folder) if isinstance(v, str) else v for k, v in overrides.items()}
    kind, text, reached = rank_pool(1, init=False).run(attempt, str(folder), filled, {}, False)[0]
    assert (kind, reached) == ("nothing", True), text
    shutil.rmtree(folder / "run", ignore_errors=True)


@pytest.mark.parametrize("fault", ["read-only", "full", "journal is a folder", "a file is in its place"])
def test_a_run_folder_that_cannot_be_written_is_refused(rank_pool, folder, tmp_path, fault):
    with small_disk(tmp_path / "disk", "2m") as disk:
        run_dir, reason = disk.path, "No space left on device"
        if fault == "read-only":
            disk.read_only()
            reason = "Read-only file system"
        elif fault == "full":
            disk.fill()
        elif fault == "journal is a folder":
            (disk.path / "metrics.jsonl").mkdir()
            reason = "Is a directory"
        else:
            run_dir, reason = disk.path / "file", "File exists"
            run_dir.write_text("")
        overrides = REWARD_ONLY | {"hybrid_run_dir": str(run_dir)}
        kind, text, reached = rank_pool(1, init=False).run(attempt, str(folder), overrides, {}, False)[0]
    assert (kind, reached) == ("ConfigError", False)
    assert re.search(f"the run folder '.*' cannot be written: .*{reason}.*or give another --hybrid-run-dir", text), text
