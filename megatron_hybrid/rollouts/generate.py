"""Responses from the live student: autoregressive decoding over Megatron's own KV cache, on any layout.

    distinct prompts ── one forward ──► a row of the cache each ──► one per response ── a forward per token ──► samples

A prompt is read once, whatever its group's size. Prompts of a batch differ in length, see `wave.py`. Finished rows
leave the batch: a step costs what its living rows cost. Requests are sorted by length, and a batch ends where filling
the shorter prompts up would cost more than a batch of its own. What is drawn depends on (seed, step, prompt, sample).

Sequence and context parallelism are off meanwhile (`mcore/unsliced.py`): each context-parallel rank decodes the same
responses by itself.

Collectives per token: two small all-gathers over tp (sampling), one broadcast of [b] over pp. Once per call: one
all-reduce of a number over pp (`honours_masks`).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.profiler import record_function

from megatron_hybrid.mcore.kv_cache import KVCache, honours_masks
from megatron_hybrid.mcore.model import last_position_logits, pipeline_forward, unwrap_model
from megatron_hybrid.mcore.unsliced import unsliced
from megatron_hybrid.parallel import ParallelContext
from megatron_hybrid.records import Prompt, RolloutBatch
from megatron_hybrid.rollouts.assemble import Decode, Sample, assemble
from megatron_hybrid.rollouts.sampling import sample_tokens
from megatron_hybrid.rollouts.wave import Request, Wave

LEAVE_AT = 0.25
"""Share of a batch that must have finished before its cache is copied without them: a copy costs about a step."""
STEPS_PER_LOOK = 8
"""Steps between looks at who has finished where a look waits for the device (a GPU); everywhere else 1."""
FIXED_TOKENS = 32
"""What a step costs besides its rows (reading the weights, starting its kernels), in tokens of a prompt's forward."""


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
                aligned = honours_masks(chunks, self.parallel)
                for indices in self._waves(requests, aligned=aligned):
                    wave = self._wave([requests[i] for i in indices], aligned=aligned, step=step, seed=seed)
                    self._decode(chunks, wave)
                    samples.update(zip(indices, wave.samples(), strict=True))
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

    def _waves(self, requests: list[Request], *, aligned: bool) -> list[list[int]]:
        """Indices of the requests that are decoded together, shortest prompts first."""
        order = sorted(range(len(requests)), key=lambda i: len(requests[i][0].token_ids))
        waves: list[list[int]] = []
        for i in order:
            prompt = requests[i][0]
            if waves:
                others = [requests[j][0] for j in waves[-1]]
                gap = len(prompt.token_ids) - len(others[-1].token_ids)
                # Aligned prompts are filled up in their one forward, the others wait for the longer one step by step.
                filling = gap * len({other.prompt_id for other in others}) / FIXED_TOKENS if aligned else gap
            if not waves or len(waves[-1]) == self.batch_size or filling > self.max_response_length:
                waves.append([])
            waves[-1].append(i)
        return waves

    def _wave(self, requests: list[Request], *, aligned: bool, step: int, seed: int) -> Wave:
        return Wave(
            requests,
            max_response_length=self.max_response_length,
            stop_ids=tuple(self.stop_ids),
            aligned=aligned,
            step=step,
            seed=seed,
            device=self.device,
        )

    def _decode(self, chunks: list[torch.nn.Module], wave: Wave) -> None:
        """Reads the prompts, then draws one column after the other until no row writes any more."""
        cache = KVCache(chunks, len(wave.first), wave.end)
        prompts = slice(0, wave.border)
        logits = self._forward(
            chunks,
            wave.tokens[wave.first, prompts],
            wave.position_ids(wave.first, prompts),
            cache,
            wave.prefill_mask(),
        )
        cache.select(wave.place)
        logits = logits if logits is None else logits.index_select(0, wave.place)
        look = 1 if self.device.type == "cpu" else STEPS_PER_LOOK
        for column in range(wave.border, wave.end):
            with record_function("hybrid/sampling"):
                wave.write(column, *self._draw(logits, wave.uniform(column)))
                stay = wave.leave(LEAVE_AT) if (column - wave.border) % look == 0 else None
                if stay is not None:
                    cache.select(stay)
            if len(wave.rows) == 0 or column + 1 == wave.end:
                break
            newest = slice(column, column + 1)
            tokens, positions = wave.tokens[wave.rows, newest], wave.position_ids(wave.rows, newest)
            logits = self._forward(chunks, tokens, positions, cache, wave.mask(column))

    def _forward(
        self, chunks: list[torch.nn.Module], tokens: Tensor, position_ids: Tensor, cache: KVCache, mask: Tensor | None
    ) -> Tensor | None:
        """Logits [b, v/tp] behind the last of `tokens` [b, new] on the last stage; the cache holds them afterwards."""
        logits = pipeline_forward(
            chunks,
            tokens,
            position_ids,
            parallel=self.parallel,
            output_processor=last_position_logits,
            inference_context=cache,
            attention_mask=mask,
        )
        cache.sequence_len_offset += tokens.shape[1]
        return logits

    def _draw(self, logits: Tensor | None, uniform: Tensor) -> tuple[Tensor, Tensor]:
        """A token for each row and its log-probability, [b] each; the same ids on every stage."""
        if logits is not None:
            drawn, log_prob = sample_tokens(
                logits, uniform, temperature=self.temperature, vocab_size=self.vocab_size, tp=self.parallel.tp
            )
        else:
            drawn = torch.zeros(len(uniform), dtype=torch.long, device=self.device)
            log_prob = torch.zeros(len(uniform), device=self.device)
        if self.parallel.pp.size > 1:
            dist.broadcast(drawn, group=self.parallel.pp.group, group_src=self.parallel.pp.size - 1)
        return drawn, log_prob
