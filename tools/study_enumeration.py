"""The exact gradient of the objective where every response can be listed, through nothing of the product but the model.

    J = sum_y pi(y|x) [ beta sum_t (log pi(y_t) - log q(y_t)) - lambda r(x, y) ],  mean over the questions

Autograd through J itself, once for lambda and once for beta. For vocabularies of a dozen words and responses of three
tokens: some two thousand responses to a question.
"""

import itertools

import numpy as np
import torch
from study_gradients import Sketch, Sketched
from study_models import Setting
from torch import Tensor

from megatron_hybrid.records import Prompt
from megatron_hybrid.rollouts.assemble import Sample, assemble

MOST = 20_000
"""Responses to a question that are still listed."""
ROWS = 512
"""Responses in a forward pass."""


def num_responses(setting: Setting) -> int:
    """How many responses there are to one question."""
    words, length = setting.vocab_size - len(setting.sampler.stop_ids), setting.sampler.max_response_length
    ended = sum(words**k for k in range(length)) * len(setting.sampler.stop_ids)
    return ended + words**length


def responses(setting: Setting) -> list[list[int]]:
    """Every response: tokens that do not stop, then one that does, or no room for another."""
    stops, length = setting.sampler.stop_ids, setting.sampler.max_response_length
    words = [i for i in range(setting.vocab_size) if i not in stops]
    return [
        [*body, last]
        for size in range(1, length + 1)
        for body in itertools.product(words, repeat=size - 1)
        for last in range(setting.vocab_size)
        if last in stops or size == length
    ]


def exact_gradient(setting: Setting, sketch: Sketch) -> Sketched:
    """Of the mean over the questions: [2 parts, layers, width], in the order of `study_estimators.REFERENCE`."""
    every = responses(setting)
    totals: list[list[Tensor]] = [[torch.zeros_like(p) for p in sketch.parameters] for _ in range(2)]
    for prompt in setting.prompts:
        rewards = _rewards(setting, prompt, every)
        listed = 0.0
        for first in range(0, len(every), ROWS):
            some = every[first : first + ROWS]
            own, theirs = (_log_probs(model, prompt, some) for model in (setting.student, setting.teacher))
            chance = own.sum(dim=1).exp()
            listed += float(chance.detach().sum())
            losses = (-(chance * rewards[first : first + ROWS]).sum(), (chance * (own - theirs).sum(dim=1)).sum())
            for total, loss in zip(totals, losses, strict=True):
                gradient = torch.autograd.grad(loss / len(setting.prompts), sketch.parameters, retain_graph=True)
                torch._foreach_add_(total, list(gradient))
        assert abs(listed - 1) < 1e-4, f"every response once, but their probabilities add up to {listed}"
    results = [sketch.of(total) for total in totals]
    return Sketched(np.stack([cells for cells, _ in results]), np.stack([norm for _, norm in results]))


def _rewards(setting: Setting, prompt: Prompt, every: list[list[int]]) -> Tensor:
    """[responses] fp32."""
    samples = [Sample(token_ids=tuple(y), log_probs=None, truncated=False) for y in every]
    batch = assemble(
        [prompt] * len(every),
        samples,
        group_id=[0] * len(every),
        decode=setting.sampler.decode,
        device=torch.device("cpu"),
        temperature=1.0,
        policy_version=0,
        seed=0,
    )
    return setting.rubric.score(batch).rewards


def _log_probs(model: torch.nn.Module, prompt: Prompt, some: list[list[int]]) -> Tensor:
    """[responses, longest]: of each token, 0 behind the end."""
    longest, border = max(map(len, some)), len(prompt.token_ids)
    rows = torch.tensor([[*prompt.token_ids, *y, *[0] * (longest - len(y))] for y in some])
    mask = torch.tensor([[k < len(y) for k in range(longest)] for y in some])
    fed = rows[:, :-1]
    logits = model(fed, torch.arange(fed.shape[1]).expand_as(fed), None)
    chosen = logits[:, border - 1 :].log_softmax(-1).gather(2, rows[:, border:, None]).squeeze(2)
    return torch.where(mask, chosen, 0.0)
