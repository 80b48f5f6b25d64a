"""Responses from an inference engine's server, in place of the live student's own decoding.

    list[Prompt] ──► one rank of a replica asks the engine, a request per prompt ──► its ranks ──► RolloutBatch

The log-probs are the engine's: other kernels, other rounding, and weights of `version`, which every batch says. What
that changes is corrected and measured as for any sampler (`rollout_correction`, `rollout_corr/*`, `policy_age`).
Prompts are token ids, so the engine reads what the student reads; its tokenizer is never asked.

A prompt that the server gave up on ends the run, or has no responses: rows of an empty mask, which nothing is learnt
from (`on_failed`).

Collectives: the samples of a replica, pickled, along pp, cp and tp.
Not here: how the weights get there (`train/weight_sync.py`), temperatures other than 1.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from megatron_hybrid.collectives import from_first
from megatron_hybrid.errors import ServerError
from megatron_hybrid.parallel import ParallelContext
from megatron_hybrid.records import Prompt, RolloutBatch
from megatron_hybrid.rollouts.assemble import Decode, Sample, assemble
from megatron_hybrid.runtime.seeds import request_seed
from megatron_hybrid.servers.engine import Completion, Engine, Sampling

Failed = list[tuple[Prompt, ServerError]]
"""Prompts that a server gave up on, with the reason."""


def raise_first(failed: Failed) -> None:
    """What is done with them unless somebody knows better."""
    raise failed[0][1]


@dataclass
class RemoteSampler:
    """Samples groups of responses from a server; stands where `generate.Sampler` stands."""

    engine: Engine
    parallel: ParallelContext
    device: torch.device
    vocab_size: int
    """True vocabulary: an id beyond it comes from another tokenizer."""
    stop_ids: frozenset[int]
    """A response ends with the first of these, which belongs to it; or with one that the engine's own settings add."""
    decode: Decode
    max_response_length: int = 64
    version: int = 0
    """Optimizer steps that the engine's weights have seen."""
    on_failed: Callable[[Failed], None] = raise_first
    """Told, on every rank of the replica, of prompts without responses; raises, or lets the run go on without them."""

    def sample(
        self, model: list[torch.nn.Module], prompts: list[Prompt], group_size: int, *, step: int, seed: int
    ) -> RolloutBatch:
        """`group_size` responses for each prompt, rows of a prompt next to each other.

        model       not used
        step, seed  with the prompt they fix the seed of a request

        Raises:
            ServerError: on every rank of the replica.
        """
        p = self.parallel
        found = from_first(lambda: self._ask(prompts, group_size, step=step, seed=seed), (p.pp, p.cp, p.tp))
        failed = [
            (prompt, group) for prompt, group in zip(prompts, found, strict=True) if isinstance(group, ServerError)
        ]
        if failed:
            self.on_failed(failed)
        groups = [[_NOTHING] * group_size if isinstance(group, ServerError) else group for group in found]
        return assemble(
            [prompt for prompt in prompts for _ in range(group_size)],
            [_sample(completion) for group in groups for completion in group],
            group_id=[group for group in range(len(prompts)) for _ in range(group_size)],
            decode=self.decode,
            device=self.device,
            temperature=1.0,
            policy_version=self.version,
            seed=seed,
        )

    def _ask(
        self, prompts: list[Prompt], group_size: int, *, step: int, seed: int
    ) -> list[list[Completion] | ServerError]:
        asked = [(prompt.token_ids, request_seed(seed, step, prompt.prompt_id)) for prompt in prompts]
        sampling = Sampling(self.max_response_length, tuple(sorted(self.stop_ids)))
        found = self.engine.complete(asked, group_size, sampling)
        for prompt, group in zip(prompts, found, strict=True):
            for completion in [] if isinstance(group, ServerError) else group:
                self._check(prompt, completion)
        return found

    def _check(self, prompt: Prompt, completion: Completion) -> None:
        ids = completion.token_ids
        if len(ids) > self.max_response_length or not all(0 <= token < self.vocab_size for token in ids):
            raise ServerError(
                f"the rollout server answered prompt {prompt.prompt_id} with {len(ids)} tokens, ids {min(ids)} to "
                f"{max(ids)}: expected at most {self.max_response_length}, with ids below {self.vocab_size}, the "
                "tokenizer's size. Serve a model with the student's own tokenizer."
            )


_NOTHING = Completion((), (), False)


def _sample(completion: Completion) -> Sample:
    log_probs = torch.tensor(completion.log_probs, dtype=torch.float32)
    return Sample(completion.token_ids, log_probs, completion.truncated)
