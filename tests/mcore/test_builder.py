"""A GPT by a `model_provider`, for versions without a builder, is the model that the builder makes."""

from __future__ import annotations

from argparse import Namespace
from typing import Any
from unittest import mock

import pytest
import torch

from megatron_hybrid.errors import ConfigError
from megatron_hybrid.mcore import builder
from megatron_hybrid.mcore.symbols import TAKES_CONFIG, TAKES_PROVIDER
from tests.tiny import megatron, start

EXPERTS = {"num_experts": 4, "moe_router_load_balancing_type": "none", "moe_layer_freq": "[0,1,0,1]"}
LEARNED = {"position_embedding_type": "learned_absolute", "untie_embeddings_and_output_weights": True}


def logits_of_both(overrides: dict[str, Any]) -> list[torch.Tensor]:
    """Of the builder's model, and of the provider's with its weights, by name."""
    with megatron(**overrides) as args, torch.no_grad():
        start(args)
        models = []
        for generation in (TAKES_CONFIG, TAKES_PROVIDER):
            with mock.patch.object(builder, "generation", lambda generation=generation: generation):
                models.append(builder.build_chunks(args))
        theirs, ours = models
        for chunk, other in zip(ours, theirs, strict=True):
            chunk.load_state_dict(other.state_dict(), strict=True)
        tokens = torch.arange(12).view(2, 6)
        mask = torch.ones(1, 1, 6, 6).triu(1) > 0
        return [chunk(tokens, torch.arange(6).expand(2, -1), mask) for chunk in (*theirs, *ours)]


@pytest.mark.parametrize("overrides", [{}, LEARNED, EXPERTS], ids=["rope", "learned positions", "experts"])
def test_the_provider_builds_what_the_builder_builds(rank_pool, overrides):
    theirs, ours = rank_pool(1, init=False).run(logits_of_both, overrides)[0]
    assert torch.equal(ours, theirs)
    assert theirs.std() > 0.01


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("hybrid_layer_pattern", "*-"),
        ("spec", ["module", "spec"]),
        ("position_embedding_type", "yarn"),
        ("moe_shared_expert_glu_interleave_size", 32),
    ],
)
def test_what_the_provider_would_build_wrongly_is_refused(name, value):
    asked = Namespace(position_embedding_type="rope")
    setattr(asked, name, value)
    with pytest.raises(
        ConfigError, match=rf"--{name.replace('_', '-')} is .*: with megatron-core .* nothing but a plain"
    ):
        builder.gpt_provider(asked)
