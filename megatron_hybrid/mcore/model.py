"""Megatron models as the other rooms use them: response rows of hidden states, head shards, a forward of all stages.

    model_forward(model, ...)  ->  hidden [s, b, h] on the last stage  ->  output_processor  ->  its result
                                   response_hidden: rows [n, h]  ->  head_logits: this rank's logits [n, v/tp]

Prompt and padding positions never meet the LM head. `pipeline_forward` is the plain forward of generation, across any
pipeline.

Collectives over tp: under sequence parallelism one all-gather of hidden states; in backward the head's own all-reduce
of [n, h], or a reduce-scatter of all positions (`whole_hidden`). Over pp: the sends of `pipeline_forward`.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator
from typing import Any, cast

import torch
import torch.distributed as dist
from megatron.core.inference.contexts import StaticInferenceContext
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from megatron.core.utils import unwrap_model
from torch import Tensor

from megatron_hybrid.errors import ConfigError
from megatron_hybrid.parallel import ParallelContext

__all__ = [
    "forward_replaced",
    "head_logits",
    "last_position_logits",
    "model_forward",
    "packed_sequences",
    "pipeline_forward",
    "response_hidden",
    "unwrap_model",
    "whole_hidden",
]

OutputProcessor = Callable[..., Tensor]
"""Called on the last stage with hidden_states [s, b, h], output_layer, output_weight (None: the layer's own),
scale_logits and context by name, and more that may be ignored; what it returns is the model's output."""


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


def model_forward(
    model: Any,
    tokens: Tensor,
    position_ids: Tensor,
    *,
    output_processor: OutputProcessor,
    context: Any = None,
    attention_mask: Tensor | None = None,
    packed_seq_params: PackedSeqParams | None = None,
    inference_context: StaticInferenceContext | None = None,
    schedule_plan: bool = False,
) -> Any:
    """One call of a model chunk, wrappers and all, that on the last stage ends in `output_processor`.

    GPTModel hands its hidden states over itself. A model whose `forward` has no such parameter (HybridModel, GPTModel
    before 0.18) is asked through its `output_layer`: for the length of the call the layer gives its input to the
    processor and a placeholder to the model. What the model makes of that (scaling, transposing, casting) is thrown
    away.

    tokens          [b, s/cp] int64
    position_ids    [b, s/cp] int64
    context         handed to the processor as `context`
    schedule_plan   Megatron's combined 1F1B: the plan of the call in place of its result; with `output_processor` only
    returns         on the last stage what the processor gives, elsewhere hidden states [s/cp/tp or s/cp, b, h]

    Raises:
        ConfigError: a model without `output_processor` was asked for a plan, or did not call its output layer once.
    """
    options: dict[str, Any] = {
        name: value
        for name, value in (("packed_seq_params", packed_seq_params), ("inference_context", inference_context))
        if value is not None
    }
    bare = unwrap_model([model])[0]
    if "output_processor" in inspect.signature(type(bare).forward).parameters:
        call = model.build_schedule_plan if schedule_plan else model
        options |= {"output_processor": output_processor, "output_processor_context": context}
        return call(tokens, position_ids, attention_mask, **options)
    name = type(bare).__name__
    if schedule_plan:
        raise ConfigError(
            f"the combined 1F1B schedule asked for a plan, but {name} hands its hidden states over only while it "
            "runs. Train without --overlap-moe-expert-parallel-comm, or with a GPTModel of Megatron 0.18 or later."
        )
    if inference_context is not None:
        options["runtime_gather_output"] = True  # 0.17 insists on it; logits are not made
    if not bare.post_process:
        return model(tokens, position_ids, attention_mask, **options)
    results: list[Tensor] = []
    with _processed(bare, output_processor, context, results):
        model(tokens, position_ids, attention_mask, **options)
    if len(results) != 1:
        raise ConfigError(
            f"{name} called its output layer {len(results)} times in one forward pass, expected once: which call has "
            "the hidden states of the next token cannot be told. Train without --mtp-num-layers."
        )
    return results[0]


@contextlib.contextmanager
def _processed(bare: Any, output_processor: OutputProcessor, context: Any, results: list[Tensor]) -> Iterator[None]:
    """While inside, the model's output layer appends to `results` what the processor makes of its input."""
    layer = bare.output_layer
    original = layer.forward

    def forward(hidden_states: Tensor, weight: Tensor | None = None, **_: Any) -> tuple[Tensor, None]:
        with forward_replaced(layer, original):  # the processor calls the layer itself
            result = output_processor(
                hidden_states=hidden_states,
                output_layer=layer,
                output_weight=weight,
                scale_logits=bare._scale_logits,
                context=context,
            )
        results.append(result)
        return hidden_states.new_zeros(1, 1, 1), None  # [s, b, v/tp] as far as the model can tell

    with forward_replaced(layer, forward):
        yield


@contextlib.contextmanager
def forward_replaced(module: Any, forward: Callable[..., Any]) -> Iterator[None]:
    """While inside, calls of the module run `forward`, between the hooks of the module; then it is as it was."""
    before = vars(module).get("forward")
    module.forward = forward
    try:
        yield
    finally:
        if before is not None:
            module.forward = before
        else:
            del module.forward


def response_hidden(hidden_states: Tensor, rows: Tensor, output_layer: Any) -> Tensor:
    """The positions whose logits predict a response token, [n, h]; the same on every tensor-parallel rank.

    hidden_states  [s, b, h]; under sequence parallelism this rank's [s/tp, b, h], gathered here
    rows           [n] int64, indices into the flattened [s, b]

    The head sums the gradient over tensor-parallel ranks on its [n, h] rows, so backward only takes this rank's part:
    one all-gather forward, nothing backward. Summing here would cost a reduce-scatter of all positions.
    """
    return whole_hidden(hidden_states, output_layer, sum_gradient=False).flatten(0, 1).index_select(0, rows)


def whole_hidden(hidden_states: Tensor, output_layer: Any, *, sum_gradient: bool) -> Tensor:
    """[s/tp, b, h] of sequence parallelism to [s, b, h]; without it the same tensor.

    sum_gradient  whether backward sums over tensor-parallel ranks, by a reduce-scatter; else the head has done so
    """
    if not output_layer.sequence_parallel:
        return hidden_states
    return cast(Tensor, gather_from_sequence_parallel_region(hidden_states, tensor_parallel_output_grad=sum_gradient))


def head_logits(
    hidden: Tensor, output_layer: Any, output_weight: Tensor | None, scale_logits: Callable[[Tensor], Tensor]
) -> Tensor:
    """[n, h] through Megatron's own LM head to this rank's shard [n, v/tp], in the model's dtype.

    hidden  the same on every tensor-parallel rank; its gradient is all-reduced over them by the head
    """
    sequence_parallel = output_layer.sequence_parallel
    output_layer.sequence_parallel = False  # the rows are whole already
    try:
        # Megatron's linear layers take [s, b, h].
        logits, _ = output_layer(hidden.unsqueeze(1), weight=output_weight, runtime_gather_output=False)
    finally:
        output_layer.sequence_parallel = sequence_parallel
    return scale_logits(logits).squeeze(1)


def last_position_logits(
    *, hidden_states: Tensor, output_layer: Any, output_weight: Any, scale_logits: Any, **_: Any
) -> Tensor:
    """An `output_processor`: logits of the last position only, [s, b, h] or [s/tp, b, h] to [b, v/tp]."""
    hidden = whole_hidden(hidden_states, output_layer, sum_gradient=False)
    return head_logits(hidden[-1], output_layer, output_weight, scale_logits)


def pipeline_forward(
    chunks: list[torch.nn.Module],
    tokens: Tensor,
    position_ids: Tensor,
    *,
    parallel: ParallelContext,
    output_processor: OutputProcessor,
    inference_context: StaticInferenceContext | None = None,
    attention_mask: Tensor | None = None,
) -> Tensor | None:
    """One forward of whole sequences through every stage and chunk of the pipeline, without Megatron's schedule.

    Where the job slices sequences (sequence or context parallelism), call it inside `unsliced`.

    chunks        the model as Megatron holds it on this rank, one entry per virtual stage, wrappers removed or not
    tokens        [b, s] int64, the same on every stage
    position_ids  [b, s] int64
    returns       what `output_processor` gives, on the last stage; None elsewhere

    Blocking sends and receives of [s, b, h] over the pipeline group; no gradient.
    """
    bare = unwrap_model(list(chunks))
    config = bare[0].config
    if config.sequence_parallel or config.context_parallel_size > 1:
        raise AssertionError("pipeline_forward sends whole sequences between stages: call it inside `unsliced`")
    stages = len(bare) * parallel.pp.size
    output: Tensor | None = None
    for chunk_id, chunk in enumerate(bare):
        stage = chunk_id * parallel.pp.size + parallel.pp.rank
        if stage > 0 and parallel.pp.size > 1:
            shape = (tokens.shape[1], tokens.shape[0], config.hidden_size)
            received = torch.empty(shape, dtype=config.pipeline_dtype or config.params_dtype, device=tokens.device)
            dist.recv(received, group=parallel.pp.group, group_src=(parallel.pp.rank - 1) % parallel.pp.size)
            chunk.set_input_tensor([received])
        result = model_forward(
            chunk,
            tokens,
            position_ids,
            output_processor=output_processor,
            attention_mask=attention_mask,
            inference_context=inference_context,
        )
        if stage < stages - 1:
            dist.send(result, group=parallel.pp.group, group_dst=(parallel.pp.rank + 1) % parallel.pp.size)
        else:
            output = result
    return output
