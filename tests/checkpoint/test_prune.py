import pytest

from megatron_hybrid.checkpoint.prune import drop_layers, num_layers
from megatron_hybrid.errors import DataError

# Values stand for tensors: pruning moves names only.
STATE = {"embedding.word_embeddings.weight": "e"} | {
    f"decoder.layers.{layer}.{part}": f"{layer}.{part}"
    for layer in range(12)
    for part in ("mlp", "self_attention.linear_proj")
}


def test_the_layers_that_remain_are_renumbered_in_order():
    pruned = drop_layers(STATE, [1, 2, 10])
    kept = [0, 3, 4, 5, 6, 7, 8, 9, 11]
    assert num_layers(pruned) == 9
    assert [pruned[f"decoder.layers.{new}.mlp"] for new in range(9)] == [f"{old}.mlp" for old in kept]
    assert pruned["decoder.layers.8.self_attention.linear_proj"] == "11.self_attention.linear_proj"
    assert pruned["embedding.word_embeddings.weight"] == "e"
    assert len(pruned) == 1 + 2 * 9


def test_dropping_nothing_changes_nothing():
    assert drop_layers(STATE, []) == STATE


def test_unknown_layers_are_refused():
    with pytest.raises(DataError, match=r"\[12\].*0 to 11"):
        drop_layers(STATE, [3, 12])


def test_one_layer_must_remain():
    with pytest.raises(DataError, match="all 12 layers"):
        drop_layers(STATE, range(12))


def test_a_gap_in_the_numbers_is_refused():
    with pytest.raises(DataError, match="without gaps"):
        num_layers({"decoder.layers.0.mlp": 0, "decoder.layers.2.mlp": 0})
