"""A teacher behind an inference engine's server: its k likeliest tokens at every response token.

    micro-batches ──► token ids of each sequence ──► the engine reads them ──► TopKPayload: ids, log-probs [n, k]

One request per sequence; it is read to the end of its response, and what the k tokens leave is one bucket to the op,
never renormalised. The response's own token is among the k only where it belongs there: a set that follows the sample
would bias the gradient. A teacher that reads a hint is asked with it.

Collectives: the payloads of a call, pickled, along tp on the last stage; one rank of each replica asks.
Not here: context parallelism (a rank does not hold whole sequences), temperatures other than 1.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from megatron_hybrid.collectives import from_first
from megatron_hybrid.errors import ServerError
from megatron_hybrid.parallel import ParallelContext
from megatron_hybrid.records import HybridMicrobatch, TopKPayload
from megatron_hybrid.servers.engine import Engine, TopTokens


class RemoteTeacher:
    """A teacher that is asked over HTTP.

    Args:
        engine: the server.
        k: tokens kept.
        vocab_size: true vocabulary: an id beyond it comes from another tokenizer.
        parallel: the axes of the job, without context parallelism.
    """

    def __init__(self, engine: Engine, k: int, vocab_size: int, parallel: ParallelContext) -> None:
        assert parallel.cp.size == 1, "prepare() refuses context parallelism"
        self.engine = engine
        self.k = k
        self.vocab_size = vocab_size
        self.parallel = parallel

    def annotate(self, batches: Sequence[HybridMicrobatch]) -> list[TopKPayload | None]:
        """See `Teacher`. Raises ServerError on every rank of the last stage."""
        if not self.parallel.is_last_stage:
            return [None] * len(batches)
        payloads = from_first(lambda: self._ask(batches), (self.parallel.tp,))
        return [
            TopKPayload(ids.to(batch.targets.device), log_probs.to(batch.targets.device))
            for batch, (ids, log_probs) in zip(batches, payloads, strict=True)
        ]

    def _ask(self, batches: Sequence[HybridMicrobatch]) -> list[tuple[Tensor, Tensor]]:
        """Ids [n, k] int64 and log-probs [n, k] fp32 of each micro-batch, on the CPU."""
        texts = [text for batch in batches for text in _texts(batch)]
        found = self.engine.top_tokens([(ids, int(positions[0])) for ids, positions, _ in texts], self.k)
        answers = iter(found)
        return [self._payload(batch, answers) for batch in batches]

    def _payload(self, batch: HybridMicrobatch, answers: Iterator[list[TopTokens]]) -> tuple[Tensor, Tensor]:
        n = len(batch.targets)
        ids, log_probs = torch.empty(n, self.k, dtype=torch.int64), torch.empty(n, self.k)
        for _, positions, tokens in _texts(batch):
            top = torch.tensor(next(answers), dtype=torch.float64)[positions - positions[0]]  # [m, k, 2]
            ids[tokens], log_probs[tokens] = top[..., 0].long(), top[..., 1].float()
        if n and not 0 <= int(ids.min()) <= int(ids.max()) < self.vocab_size:
            raise ServerError(
                f"the teacher server named tokens {int(ids.min())} to {int(ids.max())}, and the tokenizer has "
                f"{self.vocab_size}: its ids mean other tokens. Serve a model with the student's own tokenizer."
            )
        return ids, log_probs


def _texts(batch: HybridMicrobatch) -> list[tuple[list[int], Tensor, Tensor]]:
    """For each sequence with response tokens: all of its token ids; their positions in it [m] ascending; and which of
    the micro-batch's response tokens they are [m]; on the CPU."""
    reads = batch.teacher_input
    rows, sequences, targets = reads.token_rows.cpu(), batch.sequence_of_token.cpu(), batch.targets.cpu()
    table = reads.tokens.cpu()
    packing = reads.packed_seq_params
    starts = None if packing is None else packing.cu_seqlens_q.cpu()
    texts = []
    for number in range(len(batch.prompts)):
        tokens = (sequences == number).nonzero().squeeze(1)
        if not len(tokens):
            continue
        # The last token of a sequence is fed to no model: it is a target alone.
        if starts is None:
            row, before = table[number], rows[tokens] // len(table)
        else:
            row, before = table[0, starts[number] :], rows[tokens] - starts[number]
        last = int(before[-1])
        texts.append(([*row[: last + 1].tolist(), int(targets[tokens[-1]])], before + 1, tokens))
    return texts
