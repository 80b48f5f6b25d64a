"""Ragged samples become one padded batch, and nothing but sampled tokens is under the mask."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from megatron_hybrid.records import Prompt, RolloutBatch
from megatron_hybrid.rollouts.assemble import Sample, assemble

PROMPTS = [Prompt(0, (5, 6, 7), "a", "task"), Prompt(0, (5, 6, 7), "a", "task"), Prompt(1, (8,), "b", "task")]
SAMPLES = [
    Sample((1, 2), torch.tensor([-0.1, -0.2]), truncated=False),
    Sample((0,), torch.tensor([-0.3]), truncated=False),
    Sample((0, 3, 4), torch.tensor([-0.4, -0.5, -0.6]), truncated=True),
]


def batch(**changes) -> RolloutBatch:
    settings = {
        "group_id": [0, 0, 1],
        "decode": lambda ids: " ".join(map(str, ids)),
        "device": torch.device("cpu"),
        "temperature": 0.7,
        "policy_version": 3,
        "seed": 11,
    }
    return assemble(PROMPTS, SAMPLES, **(settings | changes))


def test_prompt_then_response_then_padding_by_hand():
    rollouts = batch()
    assert rollouts.tokens.tolist() == [[5, 6, 7, 1, 2], [5, 6, 7, 0, 0], [8, 0, 3, 4, 0]]
    assert rollouts.response_mask.int().tolist() == [[0, 0, 0, 1, 1], [0, 0, 0, 1, 0], [0, 1, 1, 1, 0]]
    expected = torch.tensor([[0, 0, 0, -0.1, -0.2], [0, 0, 0, -0.3, 0], [0, -0.4, -0.5, -0.6, 0]])
    assert torch.equal(rollouts.sampled_logprobs, expected)


def test_a_sampled_token_with_the_id_of_the_padding_is_under_the_mask():
    rollouts = batch()
    assert rollouts.tokens[1, 3] == rollouts.tokens[1, 4] == 0
    assert rollouts.response_mask[1].tolist() == [False, False, False, True, False]


def test_each_row_keeps_its_own_words_and_flags():
    rollouts = batch()
    assert rollouts.responses == ("1 2", "0", "0 3 4")
    assert rollouts.truncated == (False, False, True)
    assert rollouts.group_id.tolist() == [0, 0, 1]
    assert [prompt.text for prompt in rollouts.prompts] == ["a", "a", "b"]


def test_a_batch_knows_where_it_came_from():
    rollouts = batch()
    assert (rollouts.temperature, rollouts.policy_version, rollouts.seed) == (0.7, 3, 11)


def test_types_are_those_of_the_record():
    rollouts = batch()
    assert rollouts.tokens.dtype == rollouts.group_id.dtype == torch.int64
    assert rollouts.response_mask.dtype == torch.bool
    assert rollouts.sampled_logprobs.dtype == torch.float32


def test_every_tensor_goes_to_the_device_that_was_asked_for():
    rollouts = batch(device=torch.device("meta"))
    tensors = [value for value in dataclasses.asdict(rollouts).values() if isinstance(value, torch.Tensor)]
    assert len(tensors) == 4 and all(tensor.device.type == "meta" for tensor in tensors)


def test_a_prompt_without_a_sample_is_an_error_not_a_shorter_batch():
    with pytest.raises(ValueError):
        assemble(
            PROMPTS, SAMPLES[:2], group_id=[0, 0, 1], decode=str, device=torch.device("cpu"), temperature=1.0,
            policy_version=0, seed=0,
        )  # fmt: skip
