"""Megatron models as the other rooms use them: response rows of hidden states, head shards, a forward of all stages.

`select_rows` and `head_logits` are what runs inside GPTModel's `output_processor`, on the last pipeline stage: prompt
and padding positions never meet the LM head. `pipeline_forward` is the plain forward of generation, across any
pipeline.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.inference.contexts import StaticInferenceContext
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.utils import unwrap_model
from torch import Tensor

from megatron_hybrid.parallel import ParallelContext

__all__ = [
    "StaticInferenceContext",
    "head_logits",
    "last_position_logits",
    "packed_sequences",
    "pipeline_forward",
    "select_rows",
    "unwrap_model",
]


def packed_sequences(starts: Tensor) -> PackedSeqParams:
    """Sequences behind one another in one row (THD), b of them.

    starts  [b + 1] integers: where each begins and the last ends, on all context-parallel ranks together
    """
    starts = starts.int()
    longest = int((starts[1:] - starts[:-1]).max())
    return PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=starts,
        cu_seqlens_kv=starts,
        max_seqlen_q=longest,
        max_seqlen_kv=longest,
    )


def select_rows(hidden_states: Tensor, rows: Tensor) -> Tensor:
    """[s, b, h] to [n, h]: the positions whose logits predict a response token.

    rows  [n] int64, indices into the flattened [s, b]
    """
    return hidden_states.flatten(0, 1).index_select(0, rows)


def head_logits(
    hidden: Tensor, output_layer: Any, output_weight: Tensor | None, scale_logits: Callable[[Tensor], Tensor]
) -> Tensor:
    """[n, h] through Megatron's own LM head to this rank's shard [n, v/tp], in the model's dtype."""
    # Megatron's linear layers take [s, b, h].
    logits, _ = output_layer(hidden.unsqueeze(1), weight=output_weight, runtime_gather_output=False)
    return scale_logits(logits).squeeze(1)


def last_position_logits(
    *, hidden_states: Tensor, output_layer: Any, output_weight: Any, scale_logits: Any, **_: Any
) -> Tensor:
    """An `output_processor`: logits of the last position only, [s, b, h] to [b, v/tp]."""
    return head_logits(hidden_states[-1], output_layer, output_weight, scale_logits)


def pipeline_forward(
    chunks: list[torch.nn.Module],
    tokens: Tensor,
    position_ids: Tensor,
    *,
    parallel: ParallelContext,
    output_processor: Callable[..., Tensor],
    inference_context: StaticInferenceContext | None = None,
    attention_mask: Tensor | None = None,
) -> Tensor | None:
    """One forward through every stage and chunk of the pipeline, without Megatron's schedule.

    chunks        the model as Megatron holds it on this rank, one entry per virtual stage, wrappers removed or not
    tokens        [b, s] int64, the same on every stage
    position_ids  [b, s] int64
    returns       what `output_processor` gives, on the last stage; None elsewhere

    Blocking sends and receives of [s, b, h] over the pipeline group; no gradient.
    """
    bare = unwrap_model(list(chunks))
    config = bare[0].config
    stages = len(bare) * parallel.pp.size
    output: Tensor | None = None
    for chunk_id, chunk in enumerate(bare):
        stage = chunk_id * parallel.pp.size + parallel.pp.rank
        if stage > 0 and parallel.pp.size > 1:
            shape = (tokens.shape[1], tokens.shape[0], config.hidden_size)
            received = torch.empty(shape, dtype=config.pipeline_dtype or config.params_dtype, device=tokens.device)
            dist.recv(received, group=parallel.pp.group, group_src=(parallel.pp.rank - 1) % parallel.pp.size)
            chunk.set_input_tensor([received])
        result = chunk(
            tokens,
            position_ids,
            attention_mask,
            inference_context=inference_context,
            output_processor=output_processor,
        )
        if stage < stages - 1:
            dist.send(result, group=parallel.pp.group, group_dst=(parallel.pp.rank + 1) % parallel.pp.size)
        else:
            output = result
    return output
