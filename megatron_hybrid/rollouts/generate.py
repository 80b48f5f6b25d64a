"""Responses from the live student: autoregressive decoding over Megatron's own KV cache, on any layout.

Prompts of a decoding batch differ in length. All rows advance together from the shortest prompt on; a row that is still
inside its prompt takes its next prompt token instead of a sampled one. Every position is thus decoded exactly once,
without padding in the cache, so no attention implementation needs a mask. Rows are sorted by length, and a batch ends
where the next prompt is longer by more steps than a batch of its own would take.

Sequence and context parallelism are off meanwhile (`mcore/unsliced.py`): each context-parallel rank decodes the same
responses by itself.

Collectives per token: two small all-gathers over tp (sampling), one broadcast of [b] over pp.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_hybrid.mcore.model import StaticInferenceContext, last_position_logits, pipeline_forward, unwrap_model
from megatron_hybrid.mcore.unsliced import unsliced
from megatron_hybrid.parallel import ParallelContext
from megatron_hybrid.records import Prompt, RolloutBatch
from megatron_hybrid.rollouts.assemble import Decode, Sample, assemble
from megatron_hybrid.rollouts.sampling import sample_tokens
from megatron_hybrid.runtime.seeds import uniforms


@dataclass(frozen=True)
class Sampler:
    """Samples groups of responses from the model that is being trained."""

    parallel: ParallelContext
    device: torch.device
    vocab_size: int
    """True vocabulary: padded columns are never drawn."""
    stop_ids: frozenset[int]
    """A response ends with the first of these, which belongs to it."""
    decode: Decode
    """Response token ids to words."""
    temperature: float = 1.0
    max_response_length: int = 64
    batch_size: int = 64
    """Sequences decoded together."""

    def sample(
        self, model: list[torch.nn.Module], prompts: list[Prompt], group_size: int, *, step: int, seed: int
    ) -> RolloutBatch:
        """`group_size` responses for each prompt, rows of a prompt next to each other.

        model    the chunks of this rank, as Megatron holds them; left in the mode (train or eval) they were in
        step     optimizer steps taken so far; together with `seed`, the prompt and the sample it fixes every draw
        """
        requests = [(prompt, k) for prompt in prompts for k in range(group_size)]
        samples: dict[int, Sample] = {}
        chunks = unwrap_model(list(model))
        training = [chunk.training for chunk in chunks]
        for chunk in chunks:
            chunk.eval()
        try:
            with torch.no_grad(), unsliced(chunks):
                for wave in self._waves([len(prompt.token_ids) for prompt, _ in requests]):
                    drawn = self._decode_wave(chunks, [requests[i] for i in wave], step=step, seed=seed)
                    samples.update(zip(wave, drawn, strict=True))
        finally:
            for chunk, mode in zip(chunks, training, strict=True):
                chunk.train(mode)
        return assemble(
            [prompt for prompt, _ in requests],
            [samples[i] for i in range(len(requests))],
            group_id=[g for g in range(len(prompts)) for _ in range(group_size)],
            decode=self.decode,
            device=self.device,
            temperature=self.temperature,
            policy_version=step,
            seed=seed,
        )

    def _waves(self, lengths: list[int]) -> list[list[int]]:
        """Indices of the requests that are decoded together, shortest prompts first."""
        order = sorted(range(len(lengths)), key=lengths.__getitem__)
        waves = [order[:1]]
        for previous, i in itertools.pairwise(order):
            if len(waves[-1]) == self.batch_size or lengths[i] - lengths[previous] > self.max_response_length:
                waves.append([])
            waves[-1].append(i)
        return waves

    def _decode_wave(
        self, chunks: list[torch.nn.Module], requests: list[tuple[Prompt, int]], *, step: int, seed: int
    ) -> list[Sample]:
        lengths = [len(prompt.token_ids) for prompt, _ in requests]
        shortest, end = min(lengths), max(lengths) + self.max_response_length
        tokens = torch.zeros(len(requests), end, dtype=torch.long)
        noise = torch.zeros(len(requests), end, dtype=torch.float64)
        for row, (prompt, k) in enumerate(requests):
            tokens[row, : lengths[row]] = torch.tensor(prompt.token_ids)
            draws = uniforms(seed, step, prompt.prompt_id, k, self.max_response_length)
            noise[row, lengths[row] : lengths[row] + self.max_response_length] = torch.from_numpy(draws)
        tokens, noise = tokens.to(self.device), noise.to(self.device)
        length = torch.tensor(lengths, device=self.device)
        stops = torch.tensor(sorted(self.stop_ids), device=self.device)
        log_probs = torch.zeros(len(requests), end, device=self.device)
        stop_at = length + self.max_response_length  # one past the last token of each row, once known
        finished = torch.zeros(len(requests), dtype=torch.bool, device=self.device)

        context = StaticInferenceContext(len(requests), end)
        start = 0
        for position in range(shortest, end):
            drawn, log_prob = self._next_token(chunks, tokens[:, start:position], start, context, noise[:, position])
            start = position
            sampled = (position >= length) & ~finished
            tokens[:, position] = torch.where(sampled, drawn, tokens[:, position])
            log_probs[:, position] = torch.where(sampled, log_prob, 0.0)
            ends = sampled & (torch.isin(drawn, stops) | (position + 1 >= length + self.max_response_length))
            stop_at = torch.where(ends, position + 1, stop_at)
            finished |= ends
            if bool(finished.all()):
                break
        ids, logs = tokens.cpu(), log_probs.cpu()
        return [
            Sample(
                token_ids=tuple(ids[row, lengths[row] : stop].tolist()),
                log_probs=logs[row, lengths[row] : stop],
                truncated=int(ids[row, stop - 1]) not in self.stop_ids,
            )
            for row, stop in enumerate(stop_at.tolist())
        ]

    def _next_token(
        self,
        chunks: list[torch.nn.Module],
        tokens: Tensor,
        start: int,
        context: StaticInferenceContext,
        uniform: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """One forward over `tokens` [b, new] and a draw from the last position; the same ids on every stage."""
        batch, new = tokens.shape
        position_ids = torch.arange(start, start + new, device=self.device).expand(batch, -1)
        logits = pipeline_forward(
            chunks,
            tokens,
            position_ids,
            parallel=self.parallel,
            output_processor=last_position_logits,
            inference_context=context,
        )
        context.sequence_len_offset += new
        if logits is not None:
            drawn, log_prob = sample_tokens(
                logits, uniform, temperature=self.temperature, vocab_size=self.vocab_size, tp=self.parallel.tp
            )
        else:
            drawn = torch.zeros(batch, dtype=torch.long, device=self.device)
            log_prob = torch.zeros(batch, device=self.device)
        if self.parallel.pp.size > 1:
            dist.broadcast(drawn, group=self.parallel.pp.group, group_src=self.parallel.pp.size - 1)
        return drawn, log_prob
