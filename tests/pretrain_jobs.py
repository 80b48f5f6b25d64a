"""Short `megatron.training.pretrain` runs on ranks of a pool, with a plain script's own data and loss."""

from __future__ import annotations

import contextlib
import io
import re
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch

from tests.tiny import megatron


class RandomTokens:
    """A stock batch iterator: the same tokens on every layout, sliced over data-parallel ranks."""

    def __init__(self, args: Any, first: int) -> None:
        self.args = args
        self.micro_batch = first

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        return self

    def __next__(self) -> dict[str, torch.Tensor]:
        from megatron.core import mpu

        args, rank, replicas = self.args, mpu.get_data_parallel_rank(), mpu.get_data_parallel_world_size()
        generator = torch.Generator().manual_seed(self.micro_batch * replicas + rank)
        self.micro_batch += 1
        shape = (args.micro_batch_size, args.seq_length + 1)
        tokens = torch.randint(0, args.vocab_size, shape, generator=generator)
        mask = (torch.rand(args.micro_batch_size, args.seq_length, generator=generator) > 0.2).float()
        return {"tokens": tokens, "loss_mask": mask}


def provide(args: Any) -> Any:
    def provider(num_samples: Any, vp_stage: int | None = None) -> tuple[Any, Any, Any]:
        return RandomTokens(args, 0), RandomTokens(args, 10_000), None

    provider.is_distributed = True  # type: ignore[attr-defined]
    return provider


def get_batch(data_iterator: Any) -> tuple[Any, ...]:
    """As in a plain pretrain script: tokens, labels, loss_mask, attention_mask, position_ids."""
    batch = next(data_iterator)
    tokens = batch["tokens"]
    positions = torch.arange(tokens.shape[1] - 1).expand(tokens.shape[0], -1).contiguous()
    whole = {
        "tokens": tokens[:, :-1].contiguous(),
        "labels": tokens[:, 1:].contiguous(),
        "loss_mask": batch["loss_mask"],
        "position_ids": positions,
    }
    from megatron.core import mpu
    from megatron.core.utils import get_batch_on_this_cp_rank

    own = whole
    if mpu.get_context_parallel_world_size() > 1:  # its signature differs by version
        own = get_batch_on_this_cp_rank(whole, is_hybrid_cp=False, cp_group=mpu.get_context_parallel_group())
    return own["tokens"], own["labels"], own["loss_mask"], None, own["position_ids"]


def loss_func(loss_mask: torch.Tensor, output_tensor: torch.Tensor) -> tuple[Any, Any, dict[str, Any]]:
    losses = output_tensor.view(-1).float()
    mask = loss_mask.view(-1).float()
    loss = torch.sum(losses * mask)
    num_tokens = mask.sum().clone().detach().to(torch.int)
    return loss, num_tokens, {"lm loss": torch.cat([loss.clone().detach().view(1), num_tokens.view(1)])}


def stock_forward_step(data_iterator: Any, model: Any) -> tuple[Any, Any]:
    tokens, labels, loss_mask, attention_mask, position_ids = get_batch(data_iterator)
    output = model(tokens, position_ids, attention_mask, labels=labels, loss_mask=loss_mask)
    return output, partial(loss_func, loss_mask)


def run(kind: str, overrides: dict[str, Any]) -> list[str]:
    """What Megatron logs of each step: loss and gradient norm, as printed.

    kind  stock: Megatron alone; off: our names without --hybrid; demonstrations: the stock data through the hybrid op
    """
    out = io.StringIO()
    # Megatron's own cross-entropy gives probability to padded columns, ours does not: a vocabulary without padding.
    flags = {"dataloader_type": "external", "vocab_size": 64} | overrides
    if kind == "demonstrations":
        flags |= {"hybrid": True, "hybrid_lm_head_chunk_size": 20}  # several chunks in a micro-batch of 64 tokens
    with contextlib.redirect_stdout(out), megatron(quiet=False, **flags) as args:
        from megatron.core.enums import ModelType
        from megatron.training import pretrain
        from megatron.training.argument_utils import gpt_config_from_args, pretrain_cfg_container_from_args

        import megatron_hybrid as mh

        container = pretrain_cfg_container_from_args(args, gpt_config_from_args(args))
        job = (container, provide(args), ModelType.encoder_or_decoder)
        if kind == "stock":
            pretrain(*job, stock_forward_step)
        elif kind == "off":
            mh.pretrain_hybrid(*job, mh.HybridForwardStep(get_batch=get_batch, base_loss_func=loss_func))
        else:
            mh.pretrain_hybrid(*job, mh.HybridForwardStep(get_batch=get_batch))
    return re.findall(r"lm loss: (\S+) .*?grad norm: (\S+) ", out.getvalue())
