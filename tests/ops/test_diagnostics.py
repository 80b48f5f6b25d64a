"""Norms of the two halves of the gradient, against the gradient itself."""

import pytest
import torch

from megatron_hybrid.ops.diagnostics import logit_gradient_norms
from megatron_hybrid.ops.divergence import DIVERGENCES
from megatron_hybrid.ops.reference import reference_hybrid_loss


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_norms_are_those_of_the_judges_gradient(divergence):
    student, teacher, target = torch.randn(5, 30), torch.randn(5, 30), torch.randint(0, 30, (5,))
    beta, advantage = torch.rand(5), torch.randn(5)
    options = {"student_temperature": 0.7, "teacher_temperature": 1.3, "divergence": divergence, "divergence_mix": 0.2}
    dense_sq, sparse_sq = logit_gradient_norms(student, teacher, target, beta, advantage, **options)
    expected = reference_hybrid_loss(student, teacher, target, imitation_weight=beta, advantage=advantage, **options)
    torch.testing.assert_close(dense_sq.double(), expected.dense.square().sum(-1), rtol=1e-5, atol=0)  # fp32 sums
    torch.testing.assert_close(sparse_sq.double(), expected.sparse.square().sum(-1), rtol=1e-5, atol=0)


def test_a_nearly_certain_token_keeps_the_digits_of_its_small_norm():
    student = torch.tensor([[0.0, -18.0, -19.0]])
    _, sparse_sq = logit_gradient_norms(student, None, torch.tensor([0]), 1.0, 1.0)
    expected = reference_hybrid_loss(student, student, torch.tensor([0]), advantage=1.0).sparse.square().sum(-1)
    torch.testing.assert_close(sparse_sq.double(), expected, rtol=1e-5, atol=0)  # 7e-16: 1 - p in fp32 is 0


def test_ignored_rows_and_infinite_kl_are_zero():
    student, teacher, target = torch.randn(3, 8), torch.randn(3, 8), torch.tensor([1, -100, 2])
    student[1], teacher[0, 5] = torch.nan, -torch.inf
    dense_sq, sparse_sq = logit_gradient_norms(student, teacher, target, 1.0, 1.0)
    assert dense_sq[:2].tolist() == [0, 0] and dense_sq[2] > 0
    assert sparse_sq[1] == 0 and sparse_sq[[0, 2]].gt(0).all()


def test_an_infinite_kl_is_no_matter_to_a_finite_divergence_nor_the_other_way_round():
    student, teacher, target = torch.randn(2, 8), torch.randn(2, 8), torch.tensor([1, 2])
    student[1, 5], teacher[0, 5] = -torch.inf, -torch.inf  # infinite: forward KL of row 1, reverse KL of row 0
    finite = {
        name: logit_gradient_norms(student, teacher, target, 1.0, 1.0, divergence=name)[0].gt(0).tolist()
        for name in ("reverse_kl", "forward_kl", "jsd")
    }
    assert finite == {"reverse_kl": [False, True], "forward_kl": [True, False], "jsd": [True, True]}
