"""One step of a tiny real model under Megatron's schedule: logits of some rows, and the gradient of a sum of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tests.distributed.gradient import shards

VOCAB = 61
B, S = 3, 8
UNTIED = {"untie_embeddings_and_output_weights": True}
HYBRID = {"hybrid_layer_pattern": "*-*-", "num_layers": None}
MUP = {"use_mup": True, "mup_base_hidden_size": 16}


def one_step(model: list[Any], forward: Callable[..., Any], *, seq_length: int, micro_batch_size: int) -> None:
    """One micro-batch forward and backward, gradients finalized as in training.

    forward     Megatron's forward_step_func; its loss function leaves what the test wants to see
    seq_length  on all context-parallel ranks together
    """
    from megatron.core.distributed import finalize_model_grads
    from megatron.core.utils import get_model_config

    from megatron_hybrid.mcore.training import get_forward_backward_func

    get_model_config(model[0]).finalize_model_grads_func = finalize_model_grads
    model[0].zero_grad_buffer()
    get_forward_backward_func()(
        forward_step_func=forward,
        data_iterator=iter([None]),
        model=model[0],
        num_microbatches=1,
        seq_length=seq_length,
        micro_batch_size=micro_batch_size,
        forward_only=False,
    )


def batch() -> tuple[Tensor, Tensor, Tensor]:
    """Tokens [b, s], rows of the flattened [s, b] that are read [n], and the loss's weight of each logit [n, v]."""
    generator = torch.Generator().manual_seed(8)
    tokens = torch.randint(1, VOCAB, (B, S), generator=generator)
    rows = torch.randperm(S * B, generator=generator)[:10]
    return tokens, rows, torch.randn(len(rows), VOCAB, generator=generator)


def step(overrides: dict[str, Any], through: str = "processor") -> dict[str, Any]:
    """Logits [n, v/tp] of the rows and shards of the finalized gradient of their weighted sum.

    through  "processor": the seam; "model": the model's own logits of all positions, and autograd
    """
    from megatron_hybrid.mcore.groups import parallel_context
    from megatron_hybrid.mcore.model import head_logits, model_forward, response_hidden
    from tests.tiny import megatron, set_weights, start

    tokens, rows, weights = batch()
    positions = torch.arange(S).expand(B, -1)
    seen: list[Tensor] = []
    with megatron(**UNTIED | overrides, no_check_for_nan_in_loss_and_grad=True) as args:
        model = start(args, ddp=True)
        set_weights(model)
        tp = parallel_context().tp

        def loss_of(logits: Tensor) -> Tensor:
            seen.append(logits.detach().float())
            padding = logits.shape[-1] * tp.size - VOCAB
            mine = torch.nn.functional.pad(weights, (0, padding)).chunk(tp.size, dim=-1)[tp.rank]
            return (logits.float() * mine).sum(dim=-1)

        def processor(
            *, hidden_states: Tensor, output_layer: Any, output_weight: Any, scale_logits: Any, context: Any, **_: Any
        ) -> Tensor:
            hidden = response_hidden(hidden_states, context, output_layer)
            return loss_of(head_logits(hidden, output_layer, output_weight, scale_logits))

        def forward(iterator: Any, chunk: Any) -> Any:
            if through == "processor":
                output = model_forward(chunk, tokens, positions, output_processor=processor, context=rows)
            else:
                output = chunk(tokens, positions, None)

            def loss(output: Tensor) -> Any:
                if through == "model":
                    output = loss_of(output.transpose(0, 1).flatten(0, 1)[rows])
                total = output.sum()
                return total, torch.tensor(len(rows), dtype=torch.int32), {"loss": total.detach()}

            return output, loss

        one_step(model, forward, seq_length=S, micro_batch_size=B)
        return {"shards": shards(model), "logits": torch.cat(seen) if seen else None}


def logits_of(ranks: list[dict[str, Any]]) -> Tensor:
    return torch.cat([rank["logits"] for rank in ranks if rank["logits"] is not None], dim=-1)[:, :VOCAB]
