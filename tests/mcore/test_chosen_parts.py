"""Whose layers Megatron picked: of a real model built here, and of classes as Transformer Engine's are named."""

from types import SimpleNamespace

import torch

from megatron_hybrid.mcore.chosen_parts import chosen_parts


def parts_of_a_tiny_model() -> dict[str, str]:
    from tests.tiny import megatron, start

    with megatron() as args:
        return chosen_parts(start(args), args)


def test_a_model_built_here_is_megatrons_own_with_torchs_norms_and_adam(rank_pool):
    (parts,) = rank_pool(1, init=False).run(parts_of_a_tiny_model)
    why = "--transformer-impl local; transformer-engine is not installed, Apex is not installed"
    assert parts["attention"] == f"megatron DotProductAttention ({why})"
    assert parts["linear layers"] == f"megatron ColumnParallelLinear, megatron RowParallelLinear ({why})"
    assert parts["norms"].startswith("torch ") and parts["norms"].endswith(f"({why})")
    assert parts["optimizer"].startswith("torch AdamW (")


def test_another_librarys_layers_are_named_after_it():
    fused = type("TEDotProductAttention", (torch.nn.Module,), {"__module__": "transformer_engine.pytorch.attention"})
    layer, args = torch.nn.Module(), SimpleNamespace(transformer_impl="transformer_engine", optimizer="muon")
    layer.core_attention = fused()
    parts = chosen_parts([layer], args)
    assert parts["attention"].startswith("transformer_engine TEDotProductAttention (--transformer-impl transformer_en")
    assert parts["norms"].startswith("none on this rank") and parts["optimizer"].startswith("muon (")
