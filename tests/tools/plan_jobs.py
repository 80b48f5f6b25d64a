"""One whole optimizer step of a tiny real model on this rank, weighed and counted: what a plan has to predict."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import os
import re
import sys
from collections import Counter
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch

VOCAB = 61
STUDENT = {"num_layers": 4, "hidden_size": 32, "ffn_hidden_size": 88, "num_attention_heads": 8, "kv_channels": 4}
TEACHER = {"num_layers": 8, "hidden_size": 48, "ffn_hidden_size": 64, "num_attention_heads": 8, "kv_channels": 6}
GROUPED = {"group_query_attention": True, "num_query_groups": 2}
"""Heads of keys and values, of student and teacher."""
STAGES_EVEN = {"account_for_embedding_in_pipeline_split": False, "account_for_loss_in_pipeline_split": False}
"""The job's own stages are not the teacher's."""
RESPONSES, PROMPT, RESPONSE, DECODED, TOPK = 8, 4, 9, 3, 5
"""Responses of a step, tokens of each prompt and response, sequences decoded together, tokens of the
teacher kept."""
COLLECTIVES = ("all_gather", "all_gather_into_tensor", "all_reduce", "broadcast", "send")
OURS = re.compile(r"megatron_hybrid\.(?!runtime\.)")
"""Modules whose calls are ours; `runtime` stands in for what Megatron's layers do on a GPU."""
Calls = dict[tuple[str, str], tuple[int, int]]
"""(module that called, collective) to (calls, bytes handed in)."""


@contextlib.contextmanager
def counted() -> Iterator[Calls]:
    """Every call of torch.distributed inside the block, by the module that makes it."""
    count: Counter[tuple[str, str]] = Counter()
    size: Counter[tuple[str, str]] = Counter()
    calls: Calls = {}
    with contextlib.ExitStack() as patches:
        for name in COLLECTIVES:
            original = getattr(torch.distributed, name)

            def call(*args: Any, _name: str = name, _original: Any = original, **options: Any) -> Any:
                key = (sys._getframe(1).f_globals["__name__"], _name)
                given = args[1] if _name.startswith("all_gather") else args[0]
                count[key] += 1
                size[key] += given.numel() * given.element_size()
                return _original(*args, **options)

            patches.enter_context(mock.patch.object(torch.distributed, name, call))
        yield calls
    calls.update({key: (count[key], size[key]) for key in count})


def pretended_step(rank: int, world_size: int, overrides: dict[str, Any], **options: Any) -> dict[str, Any]:
    """`step` as one rank of a large job has it, the others made up: what they would send is whatever memory held."""
    fake = {"fake_process_group": True, "disable_gloo_process_groups": True}
    with mock.patch.dict(os.environ, RANK=str(rank), WORLD_SIZE=str(world_size)):
        return step(overrides | fake, **options)


def step(
    overrides: dict[str, Any],
    payload: str = "hidden",
    gradient_norms: bool = False,
    method: dict[str, Any] | None = None,
    teacher_flags: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Bytes and calls of the online step's own parts, one after another as `train/loop.py` has them."""
    from megatron.core.optimizer import get_megatron_optimizer
    from megatron.training.training import get_megatron_optimizer_config

    from megatron_hybrid.mcore.groups import parallel_context
    from megatron_hybrid.teachers.frozen import FrozenTeacher
    from megatron_hybrid.teachers.topk import TopKTeacher
    from tests.tiny import build, megatron, start

    flags = STUDENT | GROUPED | {"global_batch_size": RESPONSES, "no_check_for_nan_in_loss_and_grad": True}
    with megatron(**flags | overrides) as args:
        model = start(args, ddp=True)
        config, _ = get_megatron_optimizer_config(args)
        optimizer = get_megatron_optimizer(config, model, use_gloo_process_groups=args.use_gloo_process_groups)
        asked = copy.copy(args)
        vars(asked).update(TEACHER | STAGES_EVEN | (teacher_flags or {}))
        teacher_model = build(asked)
        for chunk in teacher_model:
            chunk.to(args.params_dtype).eval().requires_grad_(False)
        parallel = parallel_context()
        teacher: Any = FrozenTeacher(teacher_model, parallel)
        if payload == "topk":
            teacher = TopKTeacher(teacher, TOPK, VOCAB, 1.0, parallel.tp)
        with counted() as calls:
            rollouts, cache = _sampled(model, args, parallel)
            batches, heads = _learnt_from(model, args, parallel, rollouts, teacher, gradient_norms, method or {})
        optimizer.step()
        return {
            "is_last": parallel.is_last_stage,
            "heads": heads,
            "columns": args.padded_vocab_size // parallel.tp.size,
            "width": batches[0].student.tokens.shape[1] * parallel.cp.size,
            "tokens": [len(batch.targets) for batch in batches],
            "parameters": _parameters(model),
            "teacher": _parameters(teacher_model),
            "weights": sum(_size(p) for chunk in model for p in chunk.parameters()),
            "gradients": sum(b.grad_data.nbytes for c in model for b in c.buffers + c.expert_parallel_buffers),
            "optimizer": _optimizer_bytes(optimizer, model),
            "kv_cache": cache,
            "payload": [_tensor_bytes(vars(batch.teacher)) for batch in batches if batch.teacher is not None],
            "calls": {key: value for key, value in calls.items() if OURS.match(key[0])},
        }


def _sampled(model: list[Any], args: Any, parallel: Any) -> tuple[Any, int]:
    """Responses that all run to the limit, and the bytes of the largest KV cache that they took."""
    from megatron_hybrid.mcore.kv_cache import KVCache
    from megatron_hybrid.records import Prompt
    from megatron_hybrid.rollouts import generate

    sizes: list[int] = []

    class Weighed(KVCache):
        def select(self, rows: torch.Tensor) -> None:
            super().select(rows)
            sizes.append(_tensor_bytes(self.key_value_memory_dict))

    prompts = [Prompt(i, tuple(range(1, PROMPT + 1)), "", "task") for i in range(RESPONSES // parallel.dp.size // 2)]
    device, never = torch.device("cpu"), frozenset({VOCAB + 1})
    lengths = {"max_response_length": RESPONSE, "batch_size": DECODED}
    with mock.patch.object(generate, "KVCache", Weighed):
        sampler = generate.Sampler(parallel, device, VOCAB, never, str, **lengths)
        rollouts = sampler.sample(model, prompts, 2, step=0, seed=1)
    if args.fake_process_group:  # tokens that somebody else has drawn are none
        tokens, unknown = rollouts.tokens.remainder(VOCAB), torch.zeros_like(rollouts.sampled_logprobs)
        rollouts = dataclasses.replace(rollouts, tokens=tokens, sampled_logprobs=unknown)
    return rollouts, max(sizes)


def _learnt_from(
    model: list[Any],
    args: Any,
    parallel: Any,
    rollouts: Any,
    teacher: Any,
    gradient_norms: bool,
    method: dict[str, Any],
) -> tuple[list[Any], set[tuple[bool, int]]]:
    """Rewards, teacher, credit, schedule and metrics of a step.

    Returns its micro-batches with what the teacher left, and how the fused head took them: (one pass, chunk).
    """
    from megatron_hybrid.config import HybridConfig
    from megatron_hybrid.ops import lm_head
    from megatron_hybrid.records import RewardBatch
    from megatron_hybrid.schedule.forward_step import HybridForwardStep
    from megatron_hybrid.schedule.layout import SequenceLayout
    from megatron_hybrid.schedule.microbatch import credited, microbatches
    from megatron_hybrid.train.credit import Credit, Scored
    from megatron_hybrid.train.scoring import start_scoring
    from tests.distributed.gradient import run_schedule

    settings = HybridConfig(group_size=2, **method)
    forward = HybridForwardStep(settings)
    forward.gradient_norms = gradient_norms
    zeros = torch.zeros(len(rollouts.prompts))
    rubric: Any = SimpleNamespace(score=lambda _: RewardBatch(zeros), main_thread_only=True, names=("zero",))
    wait = start_scoring(rollouts, rubric, parallel)
    batches = microbatches(
        rollouts,
        micro_batch_size=args.micro_batch_size,
        aggregation=settings.aggregation,
        layout=SequenceLayout.of(parallel, sequence_parallel=args.sequence_parallel),
    )
    payloads = teacher.annotate(batches)
    batches = [dataclasses.replace(b, teacher=p) for b, p in zip(batches, payloads, strict=True)]
    scores = wait()
    scored = Credit(settings, parallel).collected(Scored(rollouts, None if scores is None else scores.rewards))
    if scored.advantages is not None:
        credit_for = Credit(settings, parallel).credit_for(scored, step=0, metrics=forward.metrics)
        batches = credited(batches, credit_for)
    with mock.patch.object(lm_head, "HeadPlan", wraps=lm_head.HeadPlan) as plans:
        run_schedule(model, forward, batches, parallel)
    if parallel.is_last_stage:
        forward.metrics.reduce(parallel.dp_cp.group)
    return batches, {(call.kwargs["one_pass"], call.kwargs["chunk_size"]) for call in plans.call_args_list}


def _parameters(model: list[Any]) -> int:
    return sum(parameter.numel() for chunk in model for parameter in chunk.parameters())


def _size(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _tensor_bytes(values: dict[Any, Any]) -> int:
    tensors = [t for value in values.values() for t in (value if isinstance(value, tuple) else (value,))]
    return sum(_size(tensor) for tensor in tensors if isinstance(tensor, torch.Tensor))


def _optimizer_bytes(optimizer: Any, model: list[Any]) -> int:
    """Moments, and weights that are not the model's own memory; numbers of one element (steps) left out."""
    own = {p.untyped_storage().data_ptr() for chunk in model for p in chunk.parameters()}
    total = 0
    for part in getattr(optimizer, "chained_optimizers", [optimizer]):
        inner = part.optimizer
        tensors = [t for state in inner.state.values() for t in state.values() if isinstance(t, torch.Tensor)]
        tensors += [p for group in inner.param_groups for p in group["params"]]
        total += sum(_size(t) for t in tensors if t.numel() > 1 and t.untyped_storage().data_ptr() not in own)
    return total
