"""Ragged samples to one RolloutBatch: right-padded tokens, the mask of what was sampled, the sampler's log-probs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_hybrid.records import Prompt, RolloutBatch

Decode = Callable[[Sequence[int]], str]


@dataclass(frozen=True)
class Sample:
    """One response as it was drawn."""

    token_ids: tuple[int, ...]
    """The end-of-sequence token included, where there was one; none: there is no response."""
    log_probs: Tensor | None
    """[len(token_ids)] fp32, nats; zeros on pipeline stages that do not sample; None, in all samples: not known."""
    truncated: bool
    """It ran out of room before an end-of-sequence token."""


def assemble(
    prompts: Sequence[Prompt],
    samples: Sequence[Sample],
    *,
    group_id: Sequence[int],
    decode: Decode,
    device: torch.device,
    temperature: float,
    policy_version: int | None,
    seed: int,
) -> RolloutBatch:
    """One row per sample, [b, s] with s the longest prompt plus response of the batch."""
    rows = len(samples)
    width = max(len(p.token_ids) + len(s.token_ids) for p, s in zip(prompts, samples, strict=True))
    tokens = torch.zeros(rows, width, dtype=torch.long)
    mask = torch.zeros(rows, width, dtype=torch.bool)
    log_probs = torch.zeros(rows, width)
    known = all(sample.log_probs is not None for sample in samples)
    for row, (prompt, sample) in enumerate(zip(prompts, samples, strict=True)):
        border, end = len(prompt.token_ids), len(prompt.token_ids) + len(sample.token_ids)
        tokens[row, :end] = torch.tensor((*prompt.token_ids, *sample.token_ids))
        mask[row, border:end] = True
        if sample.log_probs is not None:
            log_probs[row, border:end] = sample.log_probs
    return RolloutBatch(
        prompts=tuple(prompts),
        tokens=tokens.to(device),
        response_mask=mask.to(device),
        sampled_logprobs=log_probs.to(device) if known else None,
        group_id=torch.tensor(group_id, dtype=torch.long, device=device),
        truncated=tuple(sample.truncated for sample in samples),
        responses=tuple(decode(sample.token_ids) for sample in samples),
        temperature=temperature,
        policy_version=policy_version,
        seed=seed,
        unanswered=tuple(not sample.token_ids for sample in samples),
    )
