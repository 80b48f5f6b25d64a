"""The plan against what a real step of a tiny model holds and sends, and as a user starts it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parents[2]
TOOL = ROOT / "tools" / "plan_memory.py"
sys.path.append(str(TOOL.parent))

import plan_bytes  # noqa: E402
import plan_traffic  # noqa: E402
from plan_model import Layout, Plan, Shape, Step  # noqa: E402

from tests.tools import plan_jobs  # noqa: E402
from tests.tools.plan_jobs import PROMPT, RESPONSE, RESPONSES, VOCAB  # noqa: E402

BF16 = {"bf16": True, "use_distributed_optimizer": True}
TP, PP, CP = (f"{axis}_parallel_size" for axis in ("tensor_model", "pipeline_model", "context"))
UNTIED = {"untie_embeddings_and_output_weights": True}
ENDS = {"account_for_embedding_in_pipeline_split": True, "account_for_loss_in_pipeline_split": True}
INTERLEAVED = {PP: 2, "num_virtual_stages_per_pipeline_rank": 2}
CASES = {
    "TP 2": ({TP: 2, "sequence_parallel": True} | BF16, {"gradient_norms": True}),
    "TP 2, top k, not gated": ({TP: 2, "swiglu": None, "normalization": "LayerNorm"}, {"payload": "topk"}),
    "PP 2": ({PP: 2, "add_qkv_bias": True, "qk_layernorm": True} | UNTIED, {}),
    "PP 2, tied": ({PP: 2} | BF16, {}),
    "PP 2, interleaved, ends count as layers": (INTERLEAVED | ENDS | UNTIED | {"num_layers": 6}, {}),
    "CP 2": ({CP: 2} | BF16, {}),
    "DP 2": (BF16, {}),
}
"""Flags of the job, and what the step does."""


def plan_for(flags: dict[str, Any], options: dict[str, Any]) -> Plan:
    shared = {"groups": 2, "vocab": VOCAB, "tied": not flags.get("untie_embeddings_and_output_weights")}
    shared |= {"gated": flags.get("swiglu", True) is not None, "qkv_bias": flags.get("add_qkv_bias", False)}
    shared |= {"qk_norm": flags.get("qk_layernorm", False), "norm_size": 2 if "normalization" in flags else 1}
    names = {"num_layers": "layers", "hidden_size": "hidden", "ffn_hidden_size": "ffn", "num_attention_heads": "heads"}
    student, teacher = (
        Shape(name, **{names.get(key, "head_dim"): flags.get(key, value) for key, value in sizes.items()}, **shared)
        for name, sizes in (("student", plan_jobs.STUDENT), ("teacher", plan_jobs.TEACHER))
    )
    if "num_layers" in flags:
        teacher = Shape(**vars(teacher) | {"layers": plan_jobs.TEACHER["num_layers"]})
    return Plan(
        student,
        teacher,
        Layout(
            ranks=2,
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
            rollout_batch=3,
            payload=options.get("payload", "hidden"),
            topk=5,
            dtype_bytes=2 if flags.get("bf16") else 4,
            distributed_optimizer=flags.get("use_distributed_optimizer", False),
            vocab_multiple=1,
            gradient_norms=options.get("gradient_norms", False),
        ),
    )


Measured = tuple[Plan, list[dict[str, Any]]]


@pytest.fixture(scope="module", params=CASES)
def measured(request: pytest.FixtureRequest, rank_pool) -> Measured:
    flags, options = CASES[request.param]
    return plan_for(flags, options), rank_pool(2, init=False).run(plan_jobs.step, flags, **options)


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
    (last, *_) = sorted((rank for rank in ranks if rank["is_last"]), key=lambda rank: -sum(rank["tokens"]))
    got = {key: value for key, value in last["calls"].items() if ".runtime." not in key[0]}  # stand-ins of the CPU
    planned: dict[str, list[int]] = {}
    for message in plan_traffic.ours(plan):
        if not message.what.startswith("metrics"):
            count = planned.setdefault(message.call, [0, 0])
            count[0], count[1] = count[0] + message.count, count[1] + message.num_bytes
    found: dict[str, list[int]] = {}
    for (module, call), (count, size) in got.items():
        if module == "megatron_hybrid.metrics":
            (most,) = plan_traffic.metrics(plan)
            assert count == most.count and size <= most.num_bytes
            continue
        total = found.setdefault(call.removesuffix("_into_tensor"), [0, 0])
        total[0], total[1] = total[0] + count, total[1] + size
    assert found == planned


@pytest.mark.procs
def test_no_rank_outside_the_last_stage_sends_more_than_its_hidden_states_and_drawn_ids(measured: Measured):
    _, ranks = measured
    for rank in (rank for rank in ranks if not rank["is_last"]):
        assert {call for _, call in rank["calls"]} <= {"send", "broadcast"}
