"""What the fused LM head holds at its peak, from torch's own record of every allocation; and a rehearsal on a GPU."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from megatron_hybrid.ops import eager, lm_head_chunks
from megatron_hybrid.ops.lm_head import linear_hybrid_loss
from megatron_hybrid.ops.lm_head_function import LinearHybridLossFunction
from tests.memory import peak_bytes

CHUNK, HIDDEN, COLUMNS = 64, 8, 1024
GPU = torch.device("cuda:0")


def step(n: int, dtype: torch.dtype, **options: Any) -> Callable[[], None]:
    hidden, weight = (torch.randn(shape, dtype=dtype).requires_grad_() for shape in ((n, HIDDEN), (COLUMNS, HIDDEN)))
    teacher, target = (hidden.detach() + 1, weight.detach() + 1), torch.zeros(n, dtype=torch.long)

    def run() -> None:
        linear_hybrid_loss(
            hidden, weight, teacher, target, advantage=1.0, chunk_size=CHUNK, ignore_index=None, **options
        ).loss.sum().backward()

    return run


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", [{}, {"one_pass": True}, {"logit_softcap": 5.0}, {"divergence": "jsd"}])
def test_peak_memory_does_not_grow_with_the_tokens_but_by_numbers_per_token(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, options: dict[str, Any]
):
    monkeypatch.setitem(eager._BLOCK_ELEMENTS, "cpu", 4 * COLUMNS)
    few, many = (peak_bytes(step(n, dtype, **options)) for n in (4 * CHUNK, 16 * CHUNK))
    # per token: dh and two copies of it while it is scaled, some 30 numbers of 4 bytes; logits would be 1024 of them
    assert many - few <= 12 * CHUNK * (3 * HIDDEN * 4 + 40 * 4)
    logits = CHUNK * COLUMNS * dtype.itemsize
    weight_sum = COLUMNS * HIDDEN * (4 + dtype.itemsize + 4 * ("one_pass" in options))
    blocks = 5 * 4 * COLUMNS * 4 + COLUMNS * HIDDEN * dtype.itemsize
    tensors = 3 if "logit_softcap" in options else 2
    assert tensors * logits <= few <= tensors * logits + weight_sum + blocks + 4 * CHUNK * 400


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("one_pass", [False, True])
def test_forward_and_backward_stay_on_the_device_and_read_nothing_back(dtype: torch.dtype, one_pass: bool):
    with FakeTensorMode():

        def on_gpu(*shape: int) -> Tensor:
            return torch.randn(*shape, device=GPU, dtype=dtype)

        hidden, weight = on_gpu(6, HIDDEN).requires_grad_(), on_gpu(50, HIDDEN).requires_grad_()
        out = linear_hybrid_loss(
            hidden,
            weight,
            (on_gpu(6, 12), on_gpu(50, 12)),
            torch.zeros(6, dtype=torch.long, device=GPU),
            advantage=torch.ones(6, device=GPU),
            ignore_index=None,
            vocab_size=45,
            logit_softcap=20.0,
            chunk_size=4,
            one_pass=one_pass,
        )
        assert all(value.device == GPU and value.dtype == torch.float32 for value in out)
        # Called directly: autograd's engine wants a real device.
        grads = LinearHybridLossFunction.backward(out.loss.grad_fn, torch.ones(6, device=GPU))
        for grad, of in zip(grads[:2], (hidden, weight), strict=True):
            assert grad.device == GPU and grad.dtype == dtype and grad.shape == of.shape


@pytest.mark.parametrize(
    ("free", "expected"), [(80 << 30, 8192), (8 << 30, 4096), (4 << 30, 2048), (1 << 20, 256), (0, 256)]
)
def test_a_gpus_chunk_takes_an_eighth_of_the_free_memory(monkeypatch: pytest.MonkeyPatch, free: int, expected: int):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, 80 << 30))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 3 << 30)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 3 << 30)
    monkeypatch.setattr(lm_head_chunks.torch, "tensor", lambda values, device: Tensor(values).long())
    lm_head_chunks._fitting.cache_clear()
    with FakeTensorMode():
        head = torch.empty(64000, 8, device=GPU, dtype=torch.bfloat16)
    size = lm_head_chunks.default_chunk_size(head, has_teacher=True)
    lm_head_chunks._fitting.cache_clear()
    assert size == expected
