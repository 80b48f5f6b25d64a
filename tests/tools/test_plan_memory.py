"""The plan against what a real step of a tiny model holds and sends, and as a user starts it."""

from __future__ import annotations

import dataclasses
import re
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
TOOL = ROOT / "tools" / "plan_memory.py"
sys.path.append(str(TOOL.parent))

import plan_bytes  # noqa: E402
import plan_head  # noqa: E402
import plan_memory  # noqa: E402
import plan_traffic  # noqa: E402
from plan_model import Layout, Plan, Step  # noqa: E402
from plan_shapes import Shape  # noqa: E402

from megatron_hybrid.errors import ConfigError  # noqa: E402
from tests.teachers.real import save_teacher  # noqa: E402
from tests.tools import plan_jobs  # noqa: E402
from tests.tools.plan_jobs import DECODED, PROMPT, RESPONSE, RESPONSES, TOPK, VOCAB  # noqa: E402

BF16 = {"bf16": True, "use_distributed_optimizer": True}
TP, PP, CP = (f"{axis}_parallel_size" for axis in ("tensor_model", "pipeline_model", "context"))
UNTIED = {"untie_embeddings_and_output_weights": True}
ENDS = {"account_for_embedding_in_pipeline_split": True, "account_for_loss_in_pipeline_split": True}
INTERLEAVED = {PP: 2, "num_virtual_stages_per_pipeline_rank": 2}
CHUNKED = {"lm_head_chunk_size": 7}
CASES = {
    "TP 2, several chunks": (
        {TP: 2, "sequence_parallel": True} | BF16,
        {"gradient_norms": True, "method": CHUNKED},
    ),
    "TP 2, whole logits, not gated": (
        {TP: 2, "swiglu": None, "normalization": "LayerNorm"},
        {"gradient_norms": True, "method": {"lm_head": "logits"}},
    ),
    "TP 2, top k": ({TP: 2, "add_qkv_bias": True, "qk_layernorm": True}, {"payload": "topk", "gradient_norms": True}),
    "PP 2, tied, weights of prefixes": ({PP: 2} | BF16, {"method": CHUNKED | {"prefix_correction": True}}),
    "PP 2, interleaved, ends count as layers": (INTERLEAVED | ENDS | UNTIED | {"num_layers": 6}, {}),
    "CP 2": ({CP: 2} | BF16, {"method": CHUNKED | {"rollout_correction": "sequence_mask"}}),
    "DP 2": (BF16, {}),
    "1024 ranks": (
        {TP: 8, PP: 8, CP: 4, "sequence_parallel": True, "num_layers": 16} | BF16,
        {"world_size": 1024, "teacher_flags": {"num_layers": 14} | ENDS, "method": {"lm_head_chunk_size": 3}},
    ),
}
"""Flags of the job, and what the step does; with a world size one rank of each end is real, all others made up."""
MADE_UP = (8, 904)
"""Ranks of 1024 with tp 0, cp 1, dp 0: on the first and on the last stage, with as many response tokens as any."""


def plan_for(flags: dict[str, Any], options: dict[str, Any]) -> Plan:
    method = options.get("method", {})
    shared = {"groups": 2, "vocab": VOCAB, "tied": not flags.get("untie_embeddings_and_output_weights")}
    shared |= {"gated": flags.get("swiglu", True) is not None, "qkv_bias": flags.get("add_qkv_bias", False)}
    shared |= {"qk_norm": flags.get("qk_layernorm", False), "norm_size": 2 if "normalization" in flags else 1}
    names = {"num_layers": "layers", "hidden_size": "hidden", "ffn_hidden_size": "ffn", "num_attention_heads": "heads"}
    student, teacher = (
        Shape(name, **{names.get(key, "head_dim"): flags.get(key, value) for key, value in sizes.items()}, **shared)
        for name, sizes in (("student", plan_jobs.STUDENT), ("teacher", plan_jobs.TEACHER))
    )
    teacher = dataclasses.replace(teacher, layers=(plan_jobs.TEACHER | options.get("teacher_flags", {}))["num_layers"])
    return Plan(
        student,
        teacher,
        Layout(
            ranks=options.get("world_size", 2),
            tp=flags.get(TP, 1),
            pp=flags.get(PP, 1),
            vpp=flags.get("num_virtual_stages_per_pipeline_rank", 1),
            cp=flags.get(CP, 1),
            sequence_parallel=flags.get("sequence_parallel", False),
        ),
        Step(
            responses=RESPONSES,
            seq_length=PROMPT + RESPONSE,
            response_tokens=RESPONSE,
            micro_batch=2,
            rollout_batch=DECODED,
            payload=options.get("payload", "hidden"),
            topk=TOPK,
            dtype_bytes=2 if flags.get("bf16") else 4,
            distributed_optimizer=flags.get("use_distributed_optimizer", False),
            vocab_multiple=1,
            gradient_norms=options.get("gradient_norms", False),
            group_size=2,
            head=method.get("lm_head", "fused"),
            chunk=method.get("lm_head_chunk_size"),
            rollout_correction=method.get("rollout_correction", "token_truncate"),
            prefix_correction=method.get("prefix_correction", False),
        ),
    )


Measured = tuple[Plan, list[dict[str, Any]]]


@pytest.fixture(scope="module", params=CASES)
def measured(request: pytest.FixtureRequest, rank_pool) -> Measured:
    flags, options = CASES[request.param]
    plan = plan_for(flags, options)
    if "world_size" not in options:
        return plan, rank_pool(2, init=False).run(plan_jobs.step, flags, **options)
    pool = rank_pool(1, init=False)
    return plan, [pool.run(plan_jobs.pretended_step, rank, overrides=flags, **options)[0] for rank in MADE_UP]


@pytest.mark.procs
def test_weights_gradients_and_optimizer_are_as_planned_on_both_ends_of_the_pipeline(measured: Measured):
    plan, ranks = measured
    sharing = plan.layout.dp * plan.layout.cp if plan.step.distributed_optimizer else 1
    for rank in ranks:
        parameters = plan_bytes.parameters(plan, plan.student, last=rank["is_last"])
        assert rank["columns"] == plan.columns and rank["width"] == plan.width
        assert rank["parameters"] == parameters and rank["weights"] == parameters * plan.step.dtype_bytes
        assert rank["teacher"] == plan_bytes.parameters(plan, plan.teacher, last=rank["is_last"])
        # The distributed optimizer pads: each tensor to 64 numbers, the buffer's end to as many as its ranks share.
        padding = 4 * 64 * 40 if plan.step.distributed_optimizer else 0
        assert 0 <= rank["gradients"] - plan_bytes.gradients(plan, last=rank["is_last"]) <= padding
        assert abs(rank["optimizer"] - plan_bytes.optimizer(plan, last=rank["is_last"])) <= 3 * padding
    if sharing == 2:  # each has a part of one size, padding included: together they have exactly the numbers there are
        assert sum(rank["optimizer"] for rank in ranks) == 12 * plan_bytes.parameters(plan, plan.student, last=True)


@pytest.mark.procs
def test_cache_and_payload_are_as_planned(measured: Measured):
    plan, ranks = measured
    for rank in ranks:
        assert rank["kv_cache"] == plan_bytes.kv_cache(plan, last=rank["is_last"])
    assert max(max(rank["tokens"]) for rank in ranks) == plan.tokens
    payloads = max((rank["payload"] for rank in ranks), key=sum)
    assert payloads == [plan_bytes.payload(plan, microbatches=1)] * plan.num_microbatches
    assert [rank["payload"] for rank in ranks if not rank["is_last"]] in ([], [[]])


@pytest.mark.procs
def test_every_message_of_ours_is_planned_call_by_call_and_byte_by_byte(measured: Measured):
    plan, ranks = measured
    last = max((rank for rank in ranks if rank["is_last"]), key=lambda rank: sum(rank["tokens"]))
    calls = dict(last["calls"])
    count, size = calls.pop(("megatron_hybrid.metrics", "all_reduce"), (0, 0))
    most = plan_traffic.metrics(plan)
    assert count == sum(message.count for message in most) and size <= sum(message.num_bytes for message in most)
    planned = [message for message in plan_traffic.ours(plan) if message not in most]
    assert totals((call.removesuffix("_into_tensor"), *value) for (_, call), value in calls.items()) == totals(
        (message.call, message.count, message.num_bytes) for message in planned
    )


def totals(calls: Iterable[tuple[str, int, int]]) -> dict[str, tuple[int, int]]:
    """Calls and bytes of each collective."""
    found: dict[str, tuple[int, int]] = {}
    for name, count, size in calls:
        before = found.get(name, (0, 0))
        found[name] = before[0] + count, before[1] + size
    return found


HIDDEN, DRAWN = ("megatron_hybrid.mcore.model", "send"), ("megatron_hybrid.rollouts.generate", "broadcast")
AGREED = ("megatron_hybrid.mcore.kv_cache", "all_reduce")


@pytest.mark.procs
def test_other_stages_send_hidden_states_and_pass_drawn_ids_on(measured: Measured):
    plan, ranks = measured
    (drawn,) = [message for message in plan_traffic.sampling(plan) if message.call == "broadcast"] or [None]
    for rank in (rank for rank in ranks if not rank["is_last"]):
        assert rank["calls"].keys() == {HIDDEN, DRAWN, AGREED} and drawn is not None
        assert rank["calls"][DRAWN] == (drawn.count, drawn.num_bytes)


@pytest.mark.procs
def test_the_head_is_taken_as_planned(measured: Measured):
    plan, ranks = measured
    (taken,) = {tuple(rank["heads"]) for rank in ranks if rank["is_last"]}
    limit = plan.step.chunk or 512  # the trainer's own, on a CPU
    assert taken == (() if plan.step.head == "logits" else ((plan_head.one_pass(plan), limit),))


def test_a_large_job_is_planned_in_tables(monkeypatch, capsys):
    options = "--student llama-70b --teacher llama-405b --ranks 1024 --tp 8 --pp 8 --cp 4"
    monkeypatch.setattr(sys, "argv", ["plan_memory.py", *options.split()])
    assert plan_memory.main() == 0
    shown = capsys.readouterr().out
    for words in ("teacher: payload, hidden", "mini-batches", "two passes", "op: statistics", "Megatron's", "32 B"):
        assert words in shown


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ("--student llama-70b --ranks 100 --tp 8", "--ranks is 100.*TP 8 x PP 1 x CP 1 = 8.*Choose a multiple of 8"),
        ("--student llama-70b --ranks 7 --pp 7", "llama-70b has 80 layers, which 7 stages.*divide 80 or 82"),
        ("--student llama-8b --ranks 24 --tp 24", "llama-8b has 32 heads.*TP 24 cannot cut"),
        ("--student llama-8b --teacher qwen3-8b", "one tokenizer"),
        ("--student llama-8b --vpp 2", "--vpp is 2 at --pp 1"),
        ("--student llama-8b --response-tokens 4096", "a response needs a prompt"),
        ("--student llama-8b --ranks 3 --tp 1", "--responses is 1024.*multiple of 3"),
        ("--student llama-8b --ranks 4 --pp 4 --vpp 2 --responses 6", "groups of PP 4"),
        ("--layers 4 --hidden 32", "--ffn, --heads, --vocab missing"),
        ("--student llama-8b --tp 0", "--tp must be at least 1"),
        ("--student llama-8b --student-load x", "two models"),
    ],
)
def test_what_does_not_fit_is_one_sentence(monkeypatch, capsys, options: str, words: str):
    monkeypatch.setattr(sys, "argv", ["plan_memory.py", *options.split()])
    assert plan_memory.main() == 1
    assert re.search(words, capsys.readouterr().err)


@pytest.mark.parametrize(("key", "value"), [("num_experts", 8), ("multi_latent_attention", True)])
def test_a_model_that_a_plan_does_not_know_is_refused(key: str, value: Any):
    with pytest.raises(ConfigError, match=f"{key}={value}.*dense"):
        Shape.of_args("checkpoint", {key: value})


@pytest.mark.procs
def test_a_checkpoint_is_planned_with_the_shape_it_was_saved_with(rank_pool, tmp_path: Path):
    saved = tmp_path / "saved"
    flags = plan_jobs.TEACHER | plan_jobs.GROUPED | UNTIED
    rank_pool(1, init=False).run(save_teacher, str(saved), flags, "teacher")
    args = plan_memory.parser().parse_args(["--student-load", str(saved), "--teacher", "llama-8b", "--vocab", "128256"])
    plan = plan_memory.plan_of(args)
    expected = plan_for(UNTIED, {}).teacher
    assert expected is not None and plan.student == dataclasses.replace(expected, name="saved", vocab=128256)
