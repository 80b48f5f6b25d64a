"""The judge is judged: against numbers done by hand, against autograd and against the project's ground truth."""

import math

import pytest
import torch

from megatron_hybrid.ops.divergence import DIVERGENCES
from megatron_hybrid.ops.reference import autograd_hybrid_loss, reference_hybrid_loss
from tests.ops.vectors import load_cases

CASES = load_cases()


def test_two_words_by_hand():
    # p = (3/4, 1/4), q = (1/2, 1/2): log ratios log 3/2 and log 1/2
    student, teacher = torch.tensor([[math.log(3), 0.0]], dtype=torch.float64), torch.zeros(1, 2, dtype=torch.float64)
    out = reference_hybrid_loss(student, teacher, torch.tensor([1]), imitation_weight=2.0, advantage=0.5)
    kl = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
    assert out.kl.item() == pytest.approx(kl)
    assert out.loss.item() == pytest.approx(2 * kl - 0.5 * math.log(0.25))
    assert out.dense[0, 0].item() == pytest.approx(2 * 0.75 * (math.log(1.5) - kl))
    assert out.sparse.tolist() == [pytest.approx([0.5 * 0.75, 0.5 * (0.25 - 1)])]


@pytest.mark.parametrize(
    ("divergence", "value", "slopes"),
    [
        ("forward_kl", 0.5 * math.log(2 / 3) + 0.5 * math.log(2), (-2 / 3, -2)),
        # m = q/4 + 3p/4 = (11/16, 5/16)
        (
            "jsd",
            0.25 * (0.5 * math.log(8 / 11) + 0.5 * math.log(8 / 5))
            + 0.75 * (0.75 * math.log(12 / 11) + 0.25 * math.log(4 / 5)),
            (0.75 * math.log(12 / 11), 0.75 * math.log(4 / 5)),
        ),
        ("skewed_kl", 0.5 * math.log(8 / 11) + 0.5 * math.log(8 / 5), (-0.75 * 8 / 11, -0.75 * 8 / 5)),
        # m = p/4 + 3q/4 = (9/16, 7/16)
        (
            "skewed_reverse_kl",
            0.75 * math.log(4 / 3) + 0.25 * math.log(4 / 7),
            (math.log(4 / 3) - 0.25 * 4 / 3, math.log(4 / 7) - 0.25 * 4 / 7),
        ),
    ],
)
def test_other_divergences_of_the_two_words_by_hand(divergence, value, slopes):
    student, teacher = torch.tensor([[math.log(3), 0.0]], dtype=torch.float64), torch.zeros(1, 2, dtype=torch.float64)
    out = reference_hybrid_loss(
        student, teacher, torch.tensor([1]), imitation_weight=2.0, divergence=divergence, divergence_mix=0.25
    )
    assert out.divergence.item() == pytest.approx(value)
    assert out.loss.item() == pytest.approx(2 * value)
    assert out.kl.item() == pytest.approx(0.75 * math.log(1.5) + 0.25 * math.log(0.5))
    expected = 2 * 0.75 * 0.25 * (slopes[0] - slopes[1])  # p_0 (g_0 - p_0 g_0 - p_1 g_1)
    assert out.dense.tolist() == [pytest.approx([expected, -expected])]


@pytest.mark.parametrize("name", CASES)
def test_closed_form_equals_the_ground_truth(name):
    case = dict(CASES[name])
    expected = {key: case.pop(key) for key in ("kl", "log_prob", "teacher_log_prob", "entropy", "grad")}
    out = reference_hybrid_loss(**case)
    for key in ("kl", "log_prob", "teacher_log_prob", "entropy"):
        # both sides float64; the ground truth sums in another order
        torch.testing.assert_close(getattr(out, key), expected[key], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(out.gradient, expected["grad"], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("name", [name for name in CASES if "inf" not in name])
def test_closed_form_equals_autograd(name, divergence):
    case = {key: CASES[name][key] for key in CASES[name] if key not in ("kl", "log_prob", "teacher_log_prob")}
    del case["entropy"], case["grad"]
    case |= {"divergence": divergence, "divergence_mix": 0.3}
    student = case.pop("student_logits").clone().requires_grad_()
    loss = autograd_hybrid_loss(student, **case)
    loss.sum().backward()
    out = reference_hybrid_loss(student.detach(), **case)
    torch.testing.assert_close(loss.detach(), out.loss, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(student.grad, out.gradient, rtol=1e-9, atol=1e-12)  # autograd subtracts large numbers


def test_autograd_form_equals_finite_differences():
    torch.manual_seed(0)
    student, teacher = torch.randn(3, 5, dtype=torch.float64), torch.randn(3, 5, dtype=torch.float64)

    def loss(logits):
        return autograd_hybrid_loss(
            logits, teacher, torch.tensor([0, 3, 4]), advantage=torch.tensor([1.0, -2, 0]), student_temperature=0.7
        )

    assert torch.autograd.gradcheck(loss, student.requires_grad_())
