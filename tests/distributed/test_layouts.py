"""The gradient of one batch of rollouts is the same number on every layout: Megatron's own schedule and finalize."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from megatron_hybrid.records import Prompt, RolloutBatch

VOCAB = 61
SEQUENCES = 8
GROUP = 4
TIED: dict[str, Any] = {}
UNTIED = {"untie_embeddings_and_output_weights": True}
INTERLEAVED = {"pipeline_model_parallel_size": 2, "num_virtual_stages_per_pipeline_rank": 2}
LAYOUTS = [
    pytest.param(1, {"micro_batch_size": 4}, id="micro-batches of 4"),
    pytest.param(1, {"micro_batch_size": 8}, id="one micro-batch"),
    pytest.param(2, {"tensor_model_parallel_size": 2}, id="TP 2, padded vocabulary"),
    pytest.param(2, {"pipeline_model_parallel_size": 2}, id="PP 2"),
    pytest.param(2, INTERLEAVED, id="PP 2 interleaved"),
    pytest.param(2, {}, id="DP 2"),
    pytest.param(2, {"use_distributed_optimizer": True}, id="DP 2, distributed optimizer"),
    pytest.param(4, INTERLEAVED | {"tensor_model_parallel_size": 2}, id="TP 2 x PP 2 interleaved"),
]


def rollouts() -> RolloutBatch:
    """Prompts of 3 or 5 tokens, responses of 1 to 9: every micro-batch has another number of tokens."""
    generator = torch.Generator().manual_seed(3)
    width = 14
    tokens = torch.randint(1, VOCAB, (SEQUENCES, width), generator=generator)
    mask = torch.zeros(SEQUENCES, width, dtype=torch.bool)
    for row, length in enumerate((1, 9, 4, 2, 7, 9, 1, 5)):
        border = 3 if row < GROUP else 5
        mask[row, border : border + length] = True
    return RolloutBatch(
        prompts=tuple(Prompt(row // GROUP, (1,), "", "task") for row in range(SEQUENCES)),
        tokens=tokens,
        response_mask=mask,
        sampled_logprobs=torch.zeros(SEQUENCES, width),
        group_id=torch.arange(SEQUENCES) // GROUP,
        truncated=(False,) * SEQUENCES,
        responses=("",) * SEQUENCES,
        temperature=1.0,
        policy_version=0,
        seed=0,
    )


def part(batch: RolloutBatch, rank: int, replicas: int) -> RolloutBatch:
    """The rows of one data-parallel replica."""
    size = SEQUENCES // replicas
    rows = slice(rank * size, (rank + 1) * size)
    tensors = {
        name: getattr(batch, name)[rows]
        for name in ("tokens", "response_mask", "sampled_logprobs", "group_id", "prompts")
    }
    return dataclasses.replace(batch, truncated=batch.truncated[rows], responses=batch.responses[rows], **tensors)


def gradient(overrides: dict[str, Any], aggregation: str = "seq-mean-token-sum") -> dict[str, Any]:
    """This rank's shards of the finalized gradient: (global name, global shape, offset, tensor) of each."""
    from megatron.core.distributed import finalize_model_grads
    from megatron.core.utils import get_model_config

    from megatron_hybrid.config import HybridConfig
    from megatron_hybrid.mcore.groups import parallel_context
    from megatron_hybrid.mcore.training import get_forward_backward_func
    from megatron_hybrid.returns.baselines import reward_advantages
    from megatron_hybrid.returns.weights import make_weigh
    from megatron_hybrid.schedule.forward_step import HybridForwardStep
    from megatron_hybrid.schedule.layout import SequenceLayout, schedule_shape
    from megatron_hybrid.schedule.microbatch import microbatches
    from megatron_hybrid.teachers.frozen import FrozenTeacher
    from tests.tiny import build, megatron, set_weights, start

    # The check needs Megatron's own step around the schedule.
    with megatron(**overrides, no_check_for_nan_in_loss_and_grad=True) as args:
        model = start(args, ddp=True)
        set_weights(model, "student")
        teacher_model = build(args)
        set_weights(teacher_model, "teacher")
        parallel = parallel_context()
        batch = part(rollouts(), parallel.dp.rank, parallel.dp.size)
        rewards = torch.tensor([0.0, 1.0, 0.5, 0.0, 2.0, 0.0, 0.0, 1.0])
        rewards = rewards[parallel.dp.rank * len(batch.tokens) :][: len(batch.tokens)]
        advantages = reward_advantages(rewards, batch.group_id, "rloo")

        def credit_for(rows: slice, sequence: torch.Tensor, column: torch.Tensor) -> Any:
            return make_weigh(
                reward_advantage=advantages[rows],
                row_of_token=sequence,
                position_of_token=column,
                num_positions=batch.tokens.shape[1],
                discount=0.9,
                future_cost="closed_form",
                reward_weight=1.5,
                imitation_weight=0.5,
            )

        batches = microbatches(
            batch,
            micro_batch_size=args.micro_batch_size,
            aggregation=aggregation,
            credit_for=credit_for,
            layout=SequenceLayout.of(parallel),
        )
        payloads = FrozenTeacher(teacher_model, parallel).annotate(batches)
        batches = [dataclasses.replace(b, teacher=p) for b, p in zip(batches, payloads, strict=True)]

        config = get_model_config(model[0])
        config.finalize_model_grads_func = finalize_model_grads
        for chunk in model:
            chunk.zero_grad_buffer()
            # With the distributed optimizer each replica keeps a part of the gradient; here all of it is compared.
            chunk.force_all_reduce = True
        micro_batch_size, seq_length = schedule_shape([b.student for b in batches], parallel.cp.size)
        iterators = [iter(batches) for _ in model]
        reports = get_forward_backward_func()(
            forward_step_func=HybridForwardStep(HybridConfig(aggregation=aggregation)),
            data_iterator=iterators if len(iterators) > 1 else iterators[0],
            model=model if len(model) > 1 else model[0],
            num_microbatches=len(batches),
            seq_length=seq_length,
            micro_batch_size=micro_batch_size,
            forward_only=False,
            force_all_reduce=True,
        )
        return {"shards": shards(model), "reports": reports}


def shards(model: list[Any]) -> list[tuple[str, tuple[int, ...], tuple[slice, ...], torch.Tensor]]:
    """Megatron describes its own shards: the gradient is put where the weights were and described as they are."""
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories
    from megatron.core.utils import unwrap_model

    found = []
    for chunk in unwrap_model(list(model)):
        with torch.no_grad():
            for parameter in chunk.parameters():
                parameter.copy_(parameter.main_grad)
        state = chunk.sharded_state_dict()
        apply_factories(state)
        for tensor in nested_values(state):
            if isinstance(tensor, ShardedTensor) and tensor.data is not None:
                sizes = (*[1] * tensor.prepend_axis_num, *tensor.local_shape)
                index = tuple(slice(o, o + n) for o, n in zip(tensor.global_offset, sizes, strict=True))
                found.append((tensor.key, tuple(tensor.global_shape), index, tensor.data.reshape(sizes).clone()))
    return found


def whole(ranks: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """Shards of all ranks put together; rows of the vocabulary's padding cut off."""
    tensors: dict[str, torch.Tensor] = {}
    for rank in ranks:
        for key, shape, index, data in rank["shards"]:
            tensor = tensors.setdefault(key, torch.full(shape, torch.nan))
            tensor[index] = data
    for key, tensor in tensors.items():
        if "word_embeddings" in key or "output_layer" in key:
            assert tensor[VOCAB:].abs().sum() == 0, "padding must have no gradient"
            tensors[key] = tensor[:VOCAB]
    return tensors


def assert_same(ours: dict[str, torch.Tensor], reference: dict[str, torch.Tensor]) -> None:
    assert ours.keys() == reference.keys()
    for key, expected in reference.items():
        # fp32 sums in another order; 1e-5 of each parameter's largest gradient is about 80 roundings.
        error = (ours[key] - expected).abs().max() / expected.abs().max()
        assert error < 1e-5, (key, float(error))
        assert expected.abs().max() > 0, key


@pytest.fixture(scope="module", params=[TIED, UNTIED], ids=["tied", "untied"])
def reference(request, rank_pool):
    return request.param, whole(rank_pool(1, init=False).run(gradient, request.param | {"micro_batch_size": 2}))


@pytest.mark.parametrize(("size", "layout"), LAYOUTS)
def test_every_layout_gives_the_gradient_of_one_rank(rank_pool, reference, size, layout):
    head, expected = reference
    assert_same(whole(rank_pool(size, init=False).run(gradient, head | layout)), expected)


@pytest.mark.parametrize("aggregation", ["token-mean", "seq-mean-token-mean"])
def test_the_normaliser_of_every_aggregation_is_global(rank_pool, aggregation):
    expected = whole(rank_pool(1, init=False).run(gradient, {}, aggregation))
    for size, layout in ((1, {"micro_batch_size": 8}), (2, {}), (2, {"pipeline_model_parallel_size": 2})):
        assert_same(whole(rank_pool(size, init=False).run(gradient, layout, aggregation)), expected)
