"""The parameter gradient of each estimator on one batch of rollouts, kept as a sketch of a few thousand numbers.

    rollouts ─► student's logits of the response tokens, once ─► the op with each credit: dz [n, v] ─► one backward each
                                                                                    gradient ─► sketch [layers, width]

All estimators share rollouts, both forward passes and the student's graph. A sketch is linear and keeps inner products:
every entry of a gradient gets a random sign and is added to one of `width` cells (a count sketch, Charikar et al.
2002), so E <Sg, Sh> = <g, h> over the signs, with a deviation of about sqrt(2 / width) |g| |h| in each layer. Layers
are sketched apart; side by side they are a sketch of the whole. Signs depend on a seed alone, so batches of different
runs compare. The exact squared norms are kept beside it, which says how good the sketch is.

One process, Megatron's GPTModel, no schedule: what is differentiated is the op with the product's credit.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from study_estimators import Source, credit_of
from torch import Tensor

from megatron_hybrid.mcore.model import head_logits, model_forward, response_hidden
from megatron_hybrid.ops.api import vocab_parallel_hybrid_loss
from megatron_hybrid.records import ModelInput
from megatron_hybrid.schedule.microbatch import microbatches
from megatron_hybrid.train.credit import Scored

BLOCK = 2**17
"""Entries that are sketched at a time."""


@dataclass(frozen=True)
class Sketched:
    """Gradients by name, of the mean over responses."""

    sketch: np.ndarray
    """[names, layers, width] fp32."""
    squared_norm: np.ndarray
    """[names, layers] fp64, exact."""


def layer_of(parameter: str) -> str:
    """The layer of a parameter by its name in GPTModel."""
    found = re.match(r"decoder\.layers\.(\d+)\.", parameter)
    if found:
        return f"layer {found[1]}"
    return next((layer for layer in ("embedding", "output_layer") if parameter.startswith(layer)), "final norm")


class Sketch:
    """Random signs for the parameters of a model.

    width  cells of a layer; a prime, so that a column of a matrix does not meet itself in every row
    """

    def __init__(self, model: torch.nn.Module, width: int, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.width = width
        self._block = max(1, BLOCK // width) * width
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        of_parameter = [layer_of(name) for name, p in model.named_parameters() if p.requires_grad]
        self.layers = list(dict.fromkeys(of_parameter))
        self._layer = [self.layers.index(layer) for layer in of_parameter]
        self._signs = [
            torch.randint(0, 2, (p.numel(),), generator=generator, dtype=torch.int8).mul_(2).sub_(1)
            for p in self.parameters
        ]

    def of(self, gradient: Sequence[Tensor]) -> tuple[np.ndarray, np.ndarray]:
        """(sketch [layers, width], exact squared norm [layers]) of one gradient, a tensor for each parameter."""
        cells = torch.zeros(len(self.layers), self.width)
        squared = np.zeros(len(self.layers))
        for tensor, signs, layer in zip(gradient, self._signs, self._layer, strict=True):
            # Blocks of whole rows of cells that stay in a cache: a gradient is read once and nothing of its size made.
            for part, sign in zip(tensor.detach().flatten().split(self._block), signs.split(self._block), strict=True):
                signed = part.float() * sign
                squared[layer] += float(signed.dot(signed))
                whole = signed.numel() // self.width * self.width
                cells[layer] += signed[:whole].view(-1, self.width).sum(dim=0)
                cells[layer, : signed.numel() - whole] += signed[whole:]
        return cells.numpy(), squared


def response_logits(model: Any, reads: ModelInput) -> Tensor:
    """[n, v]: logits that predict the response tokens, differentiable."""

    def keep(*, hidden_states: Tensor, output_layer: Any, output_weight: Any, scale_logits: Any, **_: Any) -> Tensor:
        hidden = response_hidden(hidden_states, reads.token_rows, output_layer)
        return head_logits(hidden, output_layer, output_weight, scale_logits)

    return model_forward(model, reads.tokens, reads.position_ids, output_processor=keep)


def batch_gradients(
    student: Any,
    teacher: Any,
    scored: Scored,
    sources: Mapping[str, Source],
    sketch: Sketch,
    *,
    vocab_size: int,
    backend: str = "torch",
) -> Sketched:
    """The gradient of each source's loss on one batch of scored rollouts, all of it in one micro-batch."""
    num_rows = len(scored.rollouts.prompts)
    (batch,) = microbatches(scored.rollouts, micro_batch_size=num_rows, aggregation="seq-mean-token-sum")
    with torch.no_grad():
        wanted = response_logits(teacher, batch.teacher_input)
    logits = response_logits(student, batch.student)
    leaf = logits.detach().requires_grad_()
    results = []
    for source in sources.values():
        weigh = credit_of(source, scored)(slice(0, num_rows), batch)
        out = vocab_parallel_hybrid_loss(
            leaf, wanted, batch.targets, weigh=weigh, vocab_size=vocab_size, ignore_index=None, backend=backend
        )
        (of_logits,) = torch.autograd.grad(out.loss.sum() / num_rows, leaf)
        results.append(sketch.of(torch.autograd.grad(logits, sketch.parameters, of_logits, retain_graph=True)))
    return Sketched(np.stack([cells for cells, _ in results]), np.stack([norm for _, norm in results]))
