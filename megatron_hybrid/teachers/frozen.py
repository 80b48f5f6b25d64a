"""A frozen Megatron model as teacher: one forward-only run of Megatron's schedule, hidden states kept, logits never.

    micro-batches -> schedule over the teacher's stages -> rows that predict a response token [n, h_q] -> payload

The payload is the teacher's last hidden states in its own dtype; its own LM head turns them into this rank's [n, v/tp]
when the op asks. At h_q = 8192 and v = 128k that is 16 times smaller than logits, and exact.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from megatron_hybrid.mcore.model import head_logits, model_forward, response_hidden, unwrap_model
from megatron_hybrid.mcore.second_model import build_frozen_model
from megatron_hybrid.mcore.training import get_forward_backward_func
from megatron_hybrid.parallel import ParallelContext
from megatron_hybrid.records import HiddenPayload, HybridMicrobatch


class FrozenTeacher:
    """A teacher whose model lies on the job's own process groups.

    Args:
        model: its chunks on this rank, in eval mode.
        parallel: the axes of the job.
    """

    def __init__(self, model: list[torch.nn.Module], parallel: ParallelContext) -> None:
        self.model = model
        self.parallel = parallel

    @classmethod
    def load(cls, checkpoint: str, checkpoint_args: Mapping[str, Any], parallel: ParallelContext) -> FrozenTeacher:
        """Builds and loads the model of a torch_dist checkpoint from the arguments stored in it.

        Raises:
            ConfigError: this job's layout cannot hold such a model.
            DataError: the folder is no torch_dist checkpoint.
        """
        return cls(build_frozen_model(checkpoint, checkpoint_args), parallel)

    def annotate(self, batches: Sequence[HybridMicrobatch]) -> list[HiddenPayload | None]:
        """See `Teacher`. Under a pipeline all micro-batches must have one shape [b, s]."""
        schedule = get_forward_backward_func()
        micro_batch_size, width = batches[0].teacher_input.tokens.shape
        asked = [*batches, *[batches[-1]] * self._filling(len(batches))]
        iterators = [iter(asked) for _ in self.model]
        with torch.no_grad():
            payloads = schedule(
                forward_step_func=_forward_step,
                data_iterator=iterators if len(iterators) > 1 else iterators[0],
                model=self.model if len(self.model) > 1 else self.model[0],
                num_microbatches=len(asked),
                seq_length=width * self.parallel.cp.size,  # Megatron divides by it
                micro_batch_size=micro_batch_size,
                forward_only=True,
                collect_non_loss_data=True,
            )
        return list(payloads[: len(batches)]) if self.parallel.is_last_stage else [None] * len(batches)

    def _filling(self, count: int) -> int:
        """Micro-batches that an interleaved schedule needs besides: it takes whole groups only, and a teacher of some
        tasks is asked for any number."""
        group = unwrap_model(self.model)[0].config.microbatch_group_size_per_vp_stage
        return -count % group if len(self.model) > 1 else 0


def _forward_step(data_iterator: Iterator[HybridMicrobatch], model: Any) -> tuple[Tensor, Callable[..., Any]]:
    reads = next(data_iterator).teacher_input
    head: list[Callable[[Tensor], Tensor]] = []

    def keep_rows(
        *, hidden_states: Tensor, output_layer: Any, output_weight: Any, scale_logits: Any, **_: Any
    ) -> Tensor:
        def logits_of(hidden: Tensor) -> Tensor:
            with torch.no_grad():
                return head_logits(hidden, output_layer, output_weight, scale_logits)

        head.append(logits_of)
        return response_hidden(hidden_states, reads.token_rows, output_layer)

    output = model_forward(
        unwrap_model([model])[0],
        reads.tokens,
        reads.position_ids,
        packed_seq_params=reads.packed_seq_params,
        output_processor=keep_rows,
    )

    def payload(rows: Tensor, non_loss_data: bool = True) -> HiddenPayload:
        return HiddenPayload(hidden=rows, logits_of=head[0])

    return output, payload
