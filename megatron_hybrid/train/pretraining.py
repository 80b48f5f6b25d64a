"""Batches of the script's own data beside rollouts: drawn before the schedule call, fed behind the rollouts in it.

    dataset provider -> iterator -> get_batch, N times on every stage -> PretrainingMicrobatch -> the same schedule call

Their term is W times the mean cross-entropy per token over all batches of the step, on all replicas, whatever the
rollouts hold. Megatron divides the summed gradient by what the rollouts count (`schedule/normalise.py`), so a batch
counts nothing, and its loss carries W * (count of the rollouts) / (its step's tokens).

Drawing is outside the schedule because a script's `get_batch` may hold collectives over tensor-parallel ranks, and the
stages of a schedule come to it at different times. Where the data goes on follows from the number of steps.
Collectives: those of `get_batch`, and one all-reduce of two numbers over replicas and context-parallel ranks.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from megatron_hybrid.config import HybridConfig
from megatron_hybrid.errors import ConfigError, ShapeError
from megatron_hybrid.mcore.symbols import borrow
from megatron_hybrid.parallel import ParallelContext
from megatron_hybrid.records import HybridMicrobatch, PretrainingMicrobatch


@dataclass(frozen=True)
class PretrainingData:
    """The script's own batches on one rank, open."""

    batches: Iterator[Any] | None
    """None on ranks that get theirs from another one inside `get_batch`."""
    get_batch: Callable[[Any], Any]
    config: HybridConfig
    parallel: ParallelContext
    width: int | None = None
    """Positions of a batch on this rank, where pipeline stages rely on it."""

    def draw(self, rollouts: Sequence[HybridMicrobatch]) -> list[PretrainingMicrobatch]:
        """The step's batches, weighed against its rollouts; collective over the job.

        Raises:
            ShapeError: a batch that the next stage would wait for in vain.
        """
        drawn = [tuple(self.get_batch(self.batches)) for _ in range(self.config.pretraining_microbatches)]
        for tensor in (x for batch in drawn for x in batch[:3] if x is not None):
            if self.width is not None and tensor.shape[1] != self.width:
                raise ShapeError(
                    f"get_batch returned {list(tensor.shape)}, but pipeline stages hand over micro-batches of "
                    f"{self.width} positions (--seq-length over --context-parallel-size). Fill its rows up to that."
                )
        if not self.parallel.is_last_stage:
            return [PretrainingMicrobatch(batch, None) for batch in drawn]
        tokens = torch.stack([batch[2].double().sum() for batch in drawn]).sum()
        count = torch.stack([batch.count for batch in rollouts]).sum()
        totals = torch.stack([tokens, count.to(tokens)])
        if self.parallel.dp_cp.size > 1:
            dist.all_reduce(totals, group=self.parallel.dp_cp.group)
        scale = (self.config.pretraining_weight * totals[1] / totals[0].clamp(min=1)).float()
        return [PretrainingMicrobatch(batch, scale) for batch in drawn]


@dataclass(frozen=True)
class ScriptData:
    """Where a script's own batches come from; nothing is asked before `open`."""

    provider: Any
    """As Megatron takes it: asked for datasets, or for iterators under --dataloader-type external. None: no data."""
    get_batch: Callable[[Any], Any]
    dataloader_type: str
    """The job's own; while rollouts are fed another one stands in its arguments."""

    def check(self, args: Namespace, config: HybridConfig, *, packed: bool) -> None:
        """Raises ConfigError where these batches are asked for and cannot go beside rollouts."""
        count, stages = config.pretraining_microbatches, args.pipeline_model_parallel_size
        if count and self.provider is None:
            raise ConfigError(
                f"pretraining_microbatches is {count}, but the script has no data: its dataset provider is None. Use a "
                "script with data of its own (README, In a pretrain script), or leave pretraining_microbatches at 0."
            )
        if count and packed and stages > 1:
            raise ConfigError(
                f"pretraining_microbatches is {count} and pack_sequences is on, under --pipeline-model-parallel-size "
                f"{stages}: stages hand over micro-batches of one shape, and packed rollouts have one row where the "
                "script's batches have --micro-batch-size. Leave one out."
            )
        if args.virtual_pipeline_model_parallel_size and count % stages:
            raise ConfigError(
                f"pretraining_microbatches is {count}, but an interleaved schedule takes multiples of its {stages} "
                "stages: use one."
            )

    def open(
        self, num_samples: Sequence[int], args: Namespace, config: HybridConfig, parallel: ParallelContext
    ) -> PretrainingData | None:
        """The batches, where the steps so far have left them; None: none are asked for.

        num_samples  what Megatron asks a provider for; the first is replaced by what the steps of the run draw
        """
        if not config.pretraining_microbatches:
            return None
        per_step = config.pretraining_microbatches * int(args.micro_batch_size) * parallel.dp.size
        batches = None
        if getattr(self.provider, "is_distributed", False) or parallel.tp.rank == 0:
            training = self.provider([int(args.train_iters) * per_step, *num_samples[1:]])[0]
            if training is None:
                raise ConfigError(
                    f"pretraining_microbatches is {config.pretraining_microbatches}, but the script's dataset provider "
                    "gives no training data. Give it some (--data-path), or leave pretraining_microbatches at 0."
                )
            batches = iter(self._loader(training, args, int(args.iteration) * per_step))
        width = args.seq_length // parallel.cp.size if parallel.pp.size > 1 else None
        return PretrainingData(batches, self.get_batch, config, parallel, width)

    def _loader(self, training: Any, args: Namespace, consumed: int) -> Iterable[Any]:
        """Megatron's own loader of a dataset, `consumed` samples on; an external one is passed through."""
        build = borrow("megatron.training.datasets.data_samplers", "build_pretraining_data_loader")
        given, args.dataloader_type = args.dataloader_type, self.dataloader_type
        try:
            loader: Iterable[Any] = build(training, consumed)
        finally:
            args.dataloader_type = given
        return (
            borrow("megatron.training.training", "cyclic_iter")(loader) if self.dataloader_type == "cyclic" else loader
        )
