"""Responses from a file, in place of the live student's own decoding.

    list[Prompt] with their recorded responses ──► RolloutBatch, log-probs as they were written down or none

No collective: every rank has read the file. Not here: held-out prompts, which the live student answers.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from megatron_hybrid.records import Prompt, RecordedResponse, RolloutBatch
from megatron_hybrid.rollouts.assemble import Decode, Sample, assemble


@dataclass(frozen=True)
class RecordedSampler:
    """Hands out groups of recorded responses; stands where `generate.Sampler` stands."""

    decode: Decode
    device: torch.device

    def sample(
        self, model: list[torch.nn.Module], prompts: list[Prompt], group_size: int, *, step: int, seed: int
    ) -> RolloutBatch:
        """The `group_size` responses of each prompt, rows of a prompt next to each other; arguments as `Sampler`'s."""
        assert all(len(prompt.responses) == group_size for prompt in prompts), "read_rollouts() refuses other groups"
        return recorded_rollouts(prompts, decode=self.decode, device=self.device, seed=seed)


def recorded_rollouts(prompts: list[Prompt], *, decode: Decode, device: torch.device, seed: int = 0) -> RolloutBatch:
    """The recorded responses of these prompts, groups of neighbours; each row's prompt holds its own response alone."""
    rows = [(group, prompt, response) for group, prompt in enumerate(prompts) for response in prompt.responses]
    return assemble(
        [replace(prompt, entry=response.entry, responses=(response,)) for _, prompt, response in rows],
        [_sample(response) for _, _, response in rows],
        group_id=[group for group, _, _ in rows],
        decode=decode,
        device=device,
        temperature=1.0,
        policy_version=None,
        seed=seed,
    )


def _sample(response: RecordedResponse) -> Sample:
    log_probs = None if response.log_probs is None else torch.tensor(response.log_probs, dtype=torch.float32)
    return Sample(response.token_ids, log_probs, response.truncated)
