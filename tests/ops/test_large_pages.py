"""Memory in large pages, as Linux tells it of each stretch of memory."""

from pathlib import Path

import pytest
import torch

from megatron_hybrid.ops import large_pages
from megatron_hybrid.ops.api import vocab_parallel_hybrid_loss
from megatron_hybrid.ops.lm_head_chunks import WeightTotal, product, weight_gradient
from tests.ops.vectors import problem

PAGE = 2 << 20


def in_large_pages(tensor: torch.Tensor) -> bool:
    """Whether the first whole large page of its memory is asked for as one."""
    address, flags = -(-tensor.data_ptr() // PAGE) * PAGE, ""
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        first, *rest = line.split()
        if "-" in first and not first.endswith(":"):
            start, end = (int(number, 16) for number in first.split("-"))
            inside = start <= address < end
        elif inside and first == "VmFlags:":
            flags = rest
    assert flags, "no such memory"
    return "hg" in flags


@pytest.fixture(autouse=True)
def _has_large_pages() -> None:
    if not Path("/sys/kernel/mm/transparent_hugepage").exists():
        pytest.skip("this system has no large pages to ask for")


def test_what_a_fused_head_fills_and_the_gradient_of_logits_are_in_large_pages():
    hidden, weight = torch.ones(4096, 2), torch.ones(1024, 2)
    assert in_large_pages(product(hidden, weight))
    total = WeightTotal.new(torch.empty(1 << 21, 1)).sum
    assert in_large_pages(total) and in_large_pages(weight_gradient(torch.empty(1, dtype=torch.bfloat16), total))
    student, teacher, target, _ = problem(64, 1 << 15)
    out = vocab_parallel_hybrid_loss(student, teacher, target)
    assert in_large_pages(torch.autograd.grad(out.loss.sum(), student)[0])


@pytest.mark.parametrize("shape", [(), (0,), (3, 5), (PAGE - 1,), (PAGE,), (3, PAGE + 5)])
def test_any_shape_is_made_and_can_be_written(shape: tuple[int, ...]):
    made = large_pages.empty(shape, torch.uint8, torch.device("cpu"))
    assert made.shape == shape and made.dtype == torch.uint8 and made.fill_(7).eq(7).all()


def test_tensors_without_memory_are_made_as_torch_makes_them():
    assert large_pages.empty((PAGE,), torch.float32, torch.device("meta")).is_meta
