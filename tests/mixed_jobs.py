"""Rollouts and a script's own batches in one step: its gradient on a layout, and whole runs; jobs of a pool."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from tests.pretrain_jobs import RandomTokens, get_batch, stock_forward_step
from tests.recorded_jobs import rollout_batches


def mixed_gradient(folder: str, way: str, flags: dict[str, Any]) -> dict[str, Any]:
    """Shards of the gradient of one step, and the losses that it reports on this rank.

    way  rollouts: the file's responses alone; data: Megatron's own training on the script's batches alone; both: one
         schedule call
    """
    from megatron_hybrid.mcore.groups import parallel_context
    from megatron_hybrid.schedule.forward_step import HybridForwardStep
    from megatron_hybrid.schedule.layout import SequenceLayout
    from megatron_hybrid.train.pretraining import PretrainingData
    from tests.distributed.gradient import run_schedule, shards
    from tests.tiny import megatron, set_weights, start

    with megatron(vocab_size=64, no_check_for_nan_in_loss_and_grad=True, **flags) as args:
        model = start(args, ddp=True)
        set_weights(model, "student")
        parallel = parallel_context()
        shape = (args.micro_batch_size, args.seq_length)
        data = RandomTokens(args, 0)
        if way == "data":
            batches = [next(data) for _ in range(args.hybrid_pretraining_microbatches)]
            reports = run_schedule(model, stock_forward_step, batches, parallel, shape)
            return {"shards": shards(model), "reports": reports}
        layout = SequenceLayout.of(parallel)
        if layout.same_width:
            layout = replace(layout, least_width=args.seq_length)
        batches, config = rollout_batches(folder, args, parallel, layout=layout)
        step = HybridForwardStep(config)
        if way == "both":
            step.mixed = True
            batches = [*batches, *PretrainingData(iter(data), get_batch, config, parallel).draw(batches)]
        reports = run_schedule(model, step, batches, parallel, shape)
        return {"shards": shards(model), "reports": reports}


class Sentences(torch.utils.data.Dataset[dict[str, Tensor]]):
    """As many random sequences as a script is asked for."""

    def __init__(self, size: int, length: int, vocab_size: int) -> None:
        self.size, self.length, self.vocab_size = size, length, vocab_size

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(index)
        tokens = torch.randint(0, self.vocab_size, (self.length + 1,), generator=generator)
        return {"tokens": tokens, "loss_mask": (torch.rand(self.length, generator=generator) > 0.2).float()}


def sentences(args: Any) -> tuple[Callable[..., Any], Callable[[Any], Any]]:
    """A script's dataset provider and get_batch; only the first tensor-parallel rank is asked, as Megatron does."""

    def provide(num_samples: list[int]) -> tuple[Any, Any, Any]:
        return Sentences(num_samples[0], args.seq_length, args.padded_vocab_size), None, None

    return provide, broadcast_batch


def broadcast_batch(data_iterator: Any) -> Any:
    """As scripts do it: the first tensor-parallel rank reads, the others are sent what it has read."""
    from megatron.core import mpu

    found = [get_batch(data_iterator) if mpu.get_tensor_model_parallel_rank() == 0 else None]
    torch.distributed.broadcast_object_list(found, group=mpu.get_tensor_model_parallel_group(), group_src=0)
    return found[0]
