"""Rehearsal of a GPU without one: fake tensors on 'cuda:0' raise where a tensor is made on, or mixed with, the CPU.

Also what proves that no value is read back: a fake tensor has none, so `.item()`, `nonzero` and `if tensor` raise.
"""

from collections.abc import Iterator

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_hybrid.ops.api import vocab_parallel_hybrid_loss
from megatron_hybrid.ops.diagnostics import logit_gradient_norms
from megatron_hybrid.ops.function import HybridLossFunction
from megatron_hybrid.ops.lm_head_chunks import add_product
from megatron_hybrid.ops.topk import vocab_parallel_topk_hybrid_loss
from megatron_hybrid.returns.returns_to_go import cost_to_go
from megatron_hybrid.returns.weights import make_weigh

GPU = torch.device("cuda:0")


@pytest.fixture(autouse=True)
def _fake() -> Iterator[None]:
    with FakeTensorMode():
        yield


def credit(future_cost: str = "closed_form"):
    return make_weigh(
        reward_advantage=torch.randn(2, device=GPU),
        row_of_token=torch.zeros(6, dtype=torch.long, device=GPU),
        position_of_token=torch.zeros(6, dtype=torch.long, device=GPU),
        num_positions=9,
        discount=0.9,
        future_cost=future_cost,
        reward_weight=1.0,
        imitation_weight=1.0,
        group_id=torch.zeros(2, dtype=torch.long, device=GPU),
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("with_teacher", [True, False])
@pytest.mark.parametrize(
    ("future_cost", "divergence"),
    [("closed_form", "reverse_kl"), ("sampled", "reverse_kl"), ("closed_form", "forward_kl"), ("closed_form", "jsd")],
)
def test_forward_and_backward_stay_on_the_device(dtype, inplace, with_teacher, future_cost, divergence):
    student = torch.randn(6, 50, device=GPU, dtype=dtype).requires_grad_()
    teacher = torch.randn(6, 50, device=GPU, dtype=dtype) if with_teacher else None
    target = torch.zeros(6, dtype=torch.long, device=GPU)
    out = vocab_parallel_hybrid_loss(
        student,
        teacher,
        target,
        weigh=credit(future_cost),
        ignore_index=None,
        vocab_size=45,
        student_temperature=0.7,
        teacher_logit_floor=-50.0,
        inplace=inplace,
        divergence=divergence,
    )
    assert all(value.device == GPU and value.dtype == torch.float32 for value in out)
    # Called directly: autograd's engine wants a real device.
    grad, *_ = HybridLossFunction.backward(out.loss.grad_fn, torch.ones(6, device=GPU))
    assert grad.device == GPU and grad.dtype == dtype and grad.shape == student.shape


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("inplace", [False, True])
def test_a_teachers_top_k_stays_on_the_device(dtype, inplace):
    student = torch.randn(6, 50, device=GPU, dtype=dtype).requires_grad_()
    log_probs, ids = torch.randn(6, 45, device=GPU).log_softmax(-1).topk(4)
    target = torch.zeros(6, dtype=torch.long, device=GPU)
    out = vocab_parallel_topk_hybrid_loss(
        student,
        ids,
        log_probs,
        target,
        weigh=credit(),
        ignore_index=None,
        vocab_size=45,
        student_temperature=0.7,
        inplace=inplace,
    )
    assert all(value.device == GPU and value.dtype == torch.float32 for value in out)
    grad, *_ = HybridLossFunction.backward(out.loss.grad_fn, torch.ones(6, device=GPU))
    assert grad.device == GPU and grad.dtype == dtype and grad.shape == student.shape


@pytest.mark.parametrize("divergence", ["reverse_kl", "skewed_kl"])
def test_diagnostics_stay_on_the_device(divergence):
    logits, target = torch.randn(6, 50, device=GPU), torch.zeros(6, dtype=torch.long, device=GPU)
    norms = logit_gradient_norms(
        logits, logits, target, 1.0, torch.randn(6, device=GPU), ignore_index=None, divergence=divergence
    )
    assert all(norm.device == GPU for norm in norms)


def test_cost_to_go_stays_on_the_device():
    costs = torch.randn(3, 17, device=GPU)
    segments = torch.zeros(3, 17, dtype=torch.long, device=GPU)
    assert cost_to_go(costs, costs > 0, 0.9, segments).device == GPU


def test_the_rehearsal_notices_a_tensor_on_the_wrong_device():
    with pytest.raises(RuntimeError):
        torch.add(torch.zeros(2, device=GPU), torch.zeros(2))


@pytest.mark.parametrize("begin", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_fused_heads_weight_gradient_is_summed_in_fp32_on_the_device(dtype, begin):
    total = torch.zeros(32, 16, device=GPU)
    gradient, hidden = torch.randn(5, 32, device=GPU, dtype=dtype), torch.randn(5, 16, device=GPU, dtype=dtype)
    with Products() as seen:
        add_product(total, gradient, hidden, begin=begin)
    assert seen.dtypes == [torch.float32], "one product, and its sums are not rounded to the gradient's type"


class Products(TorchDispatchMode):
    """Output types of the matrix products inside the block."""

    def __init__(self) -> None:
        super().__init__()
        self.dtypes: list[torch.dtype] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if "mm" in func.__name__:
            self.dtypes.append(out.dtype)
        return out
