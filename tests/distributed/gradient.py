"""The product's own gradient of a `Problem` on the layout of a job: Megatron's schedule and finalize_model_grads.

Every rank returns its shards of the finalized gradient, which Megatron's own description of its weights puts together.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from tests.distributed.problem import GROUP, REWARDS, SEQUENCES, VOCAB, Problem, rollouts

FP32 = 1e-5
"""Of a parameter's largest gradient: fp32 sums in another order, about 80 roundings."""
Shard = tuple[str, tuple[int, ...], tuple[slice, ...], torch.Tensor]
"""Global name, global shape, place, part of the gradient."""


def gradient(
    overrides: dict[str, Any],
    problem: Problem,
    packed: bool = False,
    *,
    drop_empty: bool = False,
    failed: tuple[int, ...] = (),
) -> dict[str, Any]:
    """This rank's shards, and what the schedule reported (last stage).

    drop_empty  leave out the micro-batches without a response token
    failed      rows whose reward could not be made: their groups are dropped
    """
    from megatron_hybrid.mcore.groups import parallel_context
    from megatron_hybrid.records import RewardBatch
    from megatron_hybrid.returns.baselines import reward_advantages
    from megatron_hybrid.schedule.forward_step import HybridForwardStep
    from megatron_hybrid.schedule.layout import SequenceLayout
    from megatron_hybrid.schedule.microbatch import credited, microbatches, without_rows
    from megatron_hybrid.teachers.frozen import FrozenTeacher
    from megatron_hybrid.train.credit import Credit, Scored
    from tests.tiny import build, megatron, set_weights, start

    # The check needs Megatron's own step around the schedule.
    with megatron(**overrides, no_check_for_nan_in_loss_and_grad=True) as args:
        model = start(args, ddp=True)
        set_weights(model, "student")
        teacher_model = build(args)
        set_weights(teacher_model, "teacher")
        parallel = parallel_context()
        size = SEQUENCES // parallel.dp.size
        rows = range(parallel.dp.rank * size, (parallel.dp.rank + 1) * size)
        batch = rollouts(problem)
        # Over the whole batch: with more than one replica a group may be cut, which the online loop never does.
        advantages = reward_advantages(torch.tensor(REWARDS), batch.group_id, "rloo")
        assert size % GROUP == 0 or problem.cost_baseline == "none"
        scored = Scored(batch, advantages=advantages).take(rows)
        flags = torch.tensor([row in failed for row in rows])
        scored = scored.rewarded(RewardBatch(torch.tensor(REWARDS)[list(rows)], failed=flags), drop_failed=True)
        step = HybridForwardStep(problem.config)
        batches = microbatches(
            scored.rollouts,
            micro_batch_size=args.micro_batch_size,
            aggregation=problem.aggregation,
            layout=SequenceLayout.of(parallel, sequence_parallel=args.sequence_parallel, packed=packed),
        )
        payloads = FrozenTeacher(teacher_model, parallel).annotate(batches)
        batches = [dataclasses.replace(b, teacher=p) for b, p in zip(batches, payloads, strict=True)]
        if scored.dropped is not None:
            batches = without_rows(batches, scored.rollouts.response_mask, scored.dropped, problem.aggregation)
        batches = credited(batches, Credit(problem.config, parallel).credit_for(scored, step=0, metrics=step.metrics))

        if drop_empty:
            batches = [b for b in batches if len(b.targets)]
        reports = run_schedule(model, step, batches, parallel)
        return {"shards": shards(model), "reports": reports}


def run_schedule(
    model: list[Any], step: Any, batches: list[Any], parallel: Any, shape: tuple[int, int] | None = None
) -> Any:
    """Megatron's own step around these micro-batches; leaves the finalized gradient in the model's buffers.

    shape  (micro_batch_size, seq_length) where not all of them are `HybridMicrobatch`es
    """
    from megatron.core.distributed import finalize_model_grads
    from megatron.core.utils import get_model_config

    from megatron_hybrid.mcore.training import get_forward_backward_func
    from megatron_hybrid.schedule.layout import schedule_shape

    get_model_config(model[0]).finalize_model_grads_func = finalize_model_grads
    for chunk in model:
        chunk.zero_grad_buffer()
        # With the distributed optimizer each replica keeps a part of the gradient; here all of it is compared.
        chunk.force_all_reduce = True
    iterators = [iter(batches) for _ in model]
    micro_batch_size, seq_length = shape or schedule_shape([b.student for b in batches], parallel.cp.size)
    return get_forward_backward_func()(
        forward_step_func=step,
        data_iterator=iterators if len(iterators) > 1 else iterators[0],
        model=model if len(model) > 1 else model[0],
        num_microbatches=len(batches),
        seq_length=seq_length,
        micro_batch_size=micro_batch_size,
        forward_only=False,
        force_all_reduce=True,
    )


def shards(model: list[Any]) -> list[Shard]:
    """Megatron describes its own shards: the gradient is put where the weights were and described as they are."""
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories
    from megatron.core.utils import unwrap_model

    found = []
    for chunk in unwrap_model(list(model)):
        for parameter in chunk.parameters():
            parameter.data = parameter.main_grad  # its own dtype: a bf16 weight has an fp32 gradient
        state = chunk.sharded_state_dict()
        apply_factories(state)
        for tensor in nested_values(state):
            if isinstance(tensor, ShardedTensor) and tensor.data is not None:
                sizes = (*[1] * tensor.prepend_axis_num, *tensor.local_shape)
                index = tuple(slice(o, o + n) for o, n in zip(tensor.global_offset, sizes, strict=True))
                found.append(
                    (tensor.key, tuple(tensor.global_shape), index, tensor.data.detach().reshape(sizes).clone())
                )
    return found


def whole(ranks: list[dict[str, Any]], vocab_size: int = VOCAB) -> dict[str, torch.Tensor]:
    """Shards of all ranks put together, float64; rows of the vocabulary's padding cut off."""
    tensors: dict[str, torch.Tensor] = {}
    for rank in ranks:
        for key, shape, index, data in rank["shards"]:
            tensor = tensors.setdefault(key, torch.full(shape, torch.nan, dtype=torch.float64))
            tensor[index] = data.double()
    for key, tensor in tensors.items():
        if "word_embeddings" in key or "output_layer" in key:
            assert tensor[vocab_size:].abs().sum() == 0, "padding must have no gradient"
            tensors[key] = tensor[:vocab_size]
    return tensors


def errors(ours: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> dict[str, float]:
    """Of each parameter: the largest difference, relative to its largest gradient."""
    assert ours.keys() == expected.keys(), ours.keys() ^ expected.keys()
    assert all(value.abs().max() > 0 for value in expected.values()), "a gradient of 0 proves nothing"
    return {key: float((ours[key] - value).abs().max() / value.abs().max()) for key, value in expected.items()}


def assert_same(ours: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], tolerance: float = FP32) -> None:
    """Raises AssertionError with the worst parameter and its error."""
    found = errors(ours, expected)
    worst = max(found, key=lambda key: found[key])
    assert found[worst] < tolerance, (worst, found[worst])
