"""Where positions lie: every one exactly once over the ranks, in Megatron's own order."""

from __future__ import annotations

import itertools

import pytest
import torch

from megatron_hybrid.schedule.layout import SequenceLayout

SEQUENCES = [torch.tensor(ids) for ids in ([10, 11, 12, 13, 14], [20], [30, 31, 32, 33, 34, 35, 36], [40, 41])]


def asked() -> tuple[torch.Tensor, torch.Tensor]:
    """Every position of every sequence."""
    pairs = [(number, place) for number, ids in enumerate(SEQUENCES) for place in range(len(ids))]
    sequence, position = torch.tensor(pairs).T
    return sequence, position


@pytest.mark.parametrize(
    ("cp_size", "row_multiple", "packed"), list(itertools.product((1, 2, 3), (1, 2), (False, True)))
)
def test_every_position_lies_on_one_rank_at_the_row_that_is_said(cp_size, row_multiple, packed):
    sequence, position = asked()
    found = torch.zeros(len(sequence), dtype=torch.long)
    width = SequenceLayout(0, cp_size, row_multiple, packed).width([len(ids) for ids in SEQUENCES])
    for rank in range(cp_size):
        layout = SequenceLayout(rank, cp_size, row_multiple, packed)
        given, mine = layout.model_input(SEQUENCES, sequence, position, width=width)
        assert given.tokens.shape == ((1 if packed else len(SEQUENCES)), width // cp_size)
        assert given.tokens.shape[1] % row_multiple == 0, "sequence parallelism shares the rows out"
        flat_tokens, flat_positions = (x.T.flatten() for x in (given.tokens, given.position_ids))
        ids = torch.stack([SEQUENCES[s][p] for s, p in zip(sequence, position, strict=True)])[mine]
        assert torch.equal(flat_tokens[given.token_rows], ids)
        assert torch.equal(flat_positions[given.token_rows], position[mine])
        assert flat_positions.max() < max(len(ids) for ids in SEQUENCES), "also in padding: a model's positions end"
        assert torch.equal(
            flat_tokens.sort().values,
            torch.cat((flat_tokens.new_zeros(len(flat_tokens) - len(ids)), ids)).sort().values,
        )
        found += mine.long()
    assert torch.equal(found, torch.ones_like(found))


def test_ranks_hold_the_first_and_the_last_chunk_by_hand():
    ids = [torch.arange(8)]
    everything = (torch.zeros(8, dtype=torch.long), torch.arange(8))
    held = [
        SequenceLayout(rank, 2).model_input(ids, *everything, width=8)[0].tokens.flatten().tolist() for rank in (0, 1)
    ]
    assert held == [[0, 1, 6, 7], [2, 3, 4, 5]]


def test_packed_sequences_are_cut_each_on_its_own_by_hand():
    ids = [torch.arange(4), 10 + torch.arange(8)]
    nothing = torch.zeros(0, dtype=torch.long)
    inputs = [SequenceLayout(rank, 2, packed=True).model_input(ids, nothing, nothing, width=12)[0] for rank in (0, 1)]
    assert inputs[0].tokens.tolist() == [[0, 3, 10, 11, 16, 17]]
    assert inputs[1].tokens.tolist() == [[1, 2, 12, 13, 14, 15]]
    for given in inputs:
        assert given.packed_seq_params.cu_seqlens_q.tolist() == [0, 4, 12], "Megatron counts over all ranks"
        assert given.packed_seq_params.max_seqlen_q == 8


def test_megatron_cuts_padded_rows_as_we_do(rank_pool):
    for rank, (ours, theirs) in enumerate(rank_pool(2, init=False).run(slices_of_both)):
        assert ours == theirs, rank


def slices_of_both() -> tuple[list[list[int]], list[list[int]]]:
    from megatron_hybrid.mcore.groups import parallel_context
    from tests.tiny import megatron

    with megatron(context_parallel_size=2, seq_length=16):
        from megatron.core.utils import get_batch_on_this_cp_rank
        from megatron.training import training

        training.initialize_megatron()
        rows = torch.arange(32).view(2, 16)
        nothing = torch.zeros(0, dtype=torch.long)
        layout = SequenceLayout.of(parallel_context())
        ours, _ = layout.model_input(list(rows), nothing, nothing, width=16)
        theirs = get_batch_on_this_cp_rank({"tokens": rows}, is_hybrid_cp=False)["tokens"]
        return ours.tokens.tolist(), theirs.tolist()


def test_wider_than_needed_is_padding_behind_everything():
    sequence, position = asked()
    for packed in (False, True):
        layout = SequenceLayout(packed=packed)
        width = layout.width([len(ids) for ids in SEQUENCES])
        assert width == (sum if packed else max)(len(ids) for ids in SEQUENCES)
        tight, _ = layout.model_input(SEQUENCES, sequence, position, width=width)
        wide, _ = layout.model_input(SEQUENCES, sequence, position, width=width + 6)
        assert torch.equal(wide.tokens[:, :width], tight.tokens)
        assert wide.tokens[:, width:].abs().sum() == 0
        assert torch.equal(wide.token_rows, tight.token_rows)


@pytest.mark.parametrize(
    ("cp_size", "row_multiple", "width"), [(1, 1, 17), (1, 2, 18), (2, 1, 20), (2, 2, 20), (1, 4, 20)]
)
def test_a_row_is_no_wider_than_its_cuts_need(cp_size, row_multiple, width):
    assert SequenceLayout(0, cp_size, row_multiple).width([17, 3]) == width
