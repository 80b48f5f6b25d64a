"""What the op allocates and keeps, seen from below: tensors that torch hands out or autograd saves, and peaks."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megatron_hybrid.ops import eager
from megatron_hybrid.ops.api import vocab_parallel_hybrid_loss
from megatron_hybrid.ops.topk import vocab_parallel_topk_hybrid_loss
from tests.memory import peak_bytes

ROWS, COLUMNS, BLOCK = 64, 2048, 4096


class Allocations(TorchDispatchMode):
    """Bytes of each new storage that an operation returns, inputs and views aside."""

    def __init__(self, *known: Tensor) -> None:
        super().__init__()
        self.storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage() for tensor in known}
        self.sizes: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor) and tensor.untyped_storage().data_ptr() not in self.storages:
                storage = tensor.untyped_storage()
                self.storages[storage.data_ptr()] = storage  # kept alive: an address stands for one storage
                self.sizes.append(storage.nbytes())
        return out


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(eager._BLOCK_ELEMENTS, "cpu", BLOCK)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"student_temperature": 0.7, "teacher_logit_floor": -9.0},
        {"skip": True},
        {"divergence": "forward_kl"},
        {"divergence": "jsd", "student_temperature": 0.7, "skip": True},
        {"divergence": "skewed_reverse_kl"},
    ],
)
def test_nothing_of_vocabulary_size_but_the_gradient_in_the_logits_dtype(dtype, inplace, options):
    options = dict(options)
    leaf = torch.randn(ROWS, COLUMNS).to(dtype).requires_grad_()
    student, teacher, target = leaf * 1, torch.randn(ROWS, COLUMNS).to(dtype), torch.randint(0, COLUMNS, (ROWS,))
    if options.pop("skip", False):
        target[::3] = -100
    with Allocations(student, teacher, target) as seen:
        out = vocab_parallel_hybrid_loss(student, teacher, target, advantage=1.0, inplace=inplace, **options)
        torch.autograd.grad(out.loss.sum(), student)
    large = [size for size in seen.sizes if size > BLOCK * 4]  # four bytes: one fp32 buffer of a block
    assert large == ([] if inplace else [ROWS * COLUMNS * dtype.itemsize])
    in_blocks = [size for size in seen.sizes if size > ROWS * 8 * 8]  # more than the [n, 8] statistics, even in float64
    assert len(in_blocks) > 0, "the blocks' buffers must be seen, or this test sees nothing"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("skip", [False, True])
def test_a_teachers_top_k_needs_nothing_of_vocabulary_size_but_the_gradient(dtype, inplace, skip):
    leaf = torch.randn(ROWS, COLUMNS).to(dtype).requires_grad_()
    student, target = leaf * 1, torch.randint(0, COLUMNS, (ROWS,))
    log_probs, ids = torch.randn(ROWS, COLUMNS).log_softmax(-1).topk(8)
    if skip:
        target[::3] = -100
    with Allocations(student, ids, log_probs, target) as seen:
        out = vocab_parallel_topk_hybrid_loss(student, ids, log_probs, target, advantage=1.0, inplace=inplace)
        torch.autograd.grad(out.loss.sum(), student)
    buffer = 4 * BLOCK // COLUMNS * (COLUMNS + 1)  # a block of fp32 with its spare column
    assert [size for size in seen.sizes if size > buffer] == ([] if inplace else [ROWS * COLUMNS * dtype.itemsize])
    assert buffer in seen.sizes, "the blocks' buffers must be seen, or this test sees nothing"


PEAKS = {
    "reverse_kl": (4, 3),
    "forward_kl": (5.8, 4),  # booleans besides
    "jsd": (7, 6),
    "skewed_kl": (7, 6),
    "skewed_reverse_kl": (7, 6),
    "top k": (2.3, 1),
}
"""fp32 buffers of one block held at once by each pass, as the modules say."""


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("what", PEAKS)
def test_the_passes_hold_the_buffers_of_one_block_that_they_say(monkeypatch, what, dtype):
    block = 1 << 15  # so large that numbers per token are nothing beside it
    monkeypatch.setitem(eager._BLOCK_ELEMENTS, "cpu", block)
    student = torch.randn(ROWS, COLUMNS).to(dtype).requires_grad_() * 1
    teacher, target = torch.randn(ROWS, COLUMNS).to(dtype), torch.randint(0, COLUMNS, (ROWS,))
    log_probs, ids = torch.randn(ROWS, COLUMNS).log_softmax(-1).topk(4)
    losses: list[Tensor] = []

    def forward() -> None:
        if what == "top k":
            out = vocab_parallel_topk_hybrid_loss(student, ids, log_probs, target, inplace=True, ignore_index=None)
        else:
            options = {"divergence": what, "inplace": True, "ignore_index": None}
            out = vocab_parallel_hybrid_loss(student, teacher, target, **options)
        losses.append(out.loss.sum())

    peaks = peak_bytes(forward), peak_bytes(lambda: torch.autograd.grad(losses[0], student))
    for peak, buffers in zip(peaks, PEAKS[what], strict=True):
        # 0.3 of a buffer: some thirty numbers of 8 bytes for each of the 64 tokens, and 4 slots of them
        assert buffers - 0.1 < peak / (4 * block) < buffers + 0.3


@pytest.mark.parametrize("divergence", ["reverse_kl", "jsd"])
def test_only_the_inputs_and_numbers_per_token_are_saved(divergence):
    student, teacher = torch.randn(ROWS, COLUMNS, requires_grad=True), torch.randn(ROWS, COLUMNS)
    saved: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        vocab_parallel_hybrid_loss(student, teacher, torch.zeros(ROWS, dtype=torch.long), divergence=divergence)
    large = [tensor.untyped_storage().data_ptr() for tensor in saved if tensor.numel() > ROWS]
    assert large == [student.untyped_storage().data_ptr(), teacher.untyped_storage().data_ptr()]
