"""The C++ of the compiled backend on a CPU: what the tests of `test_compiled.py`, which also run by it, do not ask."""

import logging
import re
import subprocess
import time
from dataclasses import replace
from pathlib import Path
from threading import get_native_id
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_hybrid.ops import eager, native
from megatron_hybrid.ops.api import vocab_parallel_hybrid_loss
from megatron_hybrid.ops.call import Call, read_call
from megatron_hybrid.ops.divergence import DIVERGENCES
from megatron_hybrid.ops.reference import reference_hybrid_loss
from tests.ops.test_memory import Allocations
from tests.ops.vectors import gradient, problem

CHUNK = 2048
INF, NAN = float("inf"), float("nan")


def call_of(student: Tensor, teacher: Tensor | None, target: Tensor, **options: Any) -> Call:
    call = read_call(student, teacher, target, **options)
    assert native.serves(student, teacher), "there is a C++ compiler wherever these tests run"
    return call


def passes(backend: Any, student: Tensor, teacher: Tensor | None, call: Call) -> tuple[Tensor, Tensor]:
    """Stats [n, 8] and a gradient [rows, v/tp] of drawn coefficients about the torch backend's maxima."""
    drawn = torch.randn(len(call.target), 4, generator=torch.Generator().manual_seed(1))
    coefficients = torch.cat((eager.shard_stats(student, teacher, call)[:, 0:3:2], drawn), dim=1)
    out = torch.full_like(student, 7.0)
    backend.shard_gradient(student, teacher, call, coefficients, out)
    return backend.shard_stats(student, teacher, call), out


def assert_as_torch(student: Tensor, teacher: Tensor | None, target: Tensor, **options: Any) -> None:
    call = call_of(student, teacher, target, **options)
    got, expected = (passes(backend, student, teacher, call) for backend in (native, eager))
    # fp32 sums of a few thousand terms of size 1 to 10 in another order; at most one step of the logits' type
    torch.testing.assert_close(got[0], expected[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(got[1], expected[1], rtol=max(torch.finfo(student.dtype).eps, 1e-5), atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("v", [1, 7, 16, CHUNK, CHUNK + 1, 3 * CHUNK + 77])
def test_every_width_is_as_in_torch(v: int, dtype: torch.dtype):
    student, teacher = (3 * torch.randn(2, 5, v)).to(dtype)
    target = torch.randint(0, v, (5,))
    assert_as_torch(student, teacher, target, student_temperature=0.7)
    assert_as_torch(student, teacher, target, teacher_logit_floor=-1.0)
    assert_as_torch(student, None, target)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("v", [1, CHUNK, 2 * CHUNK + 77])
@pytest.mark.parametrize("divergence", DIVERGENCES[1:])
def test_every_divergence_is_as_in_torch_at_every_width(divergence: str, v: int, dtype: torch.dtype):
    student, teacher = (3 * torch.randn(2, 5, v)).to(dtype)
    target, call_options = torch.randint(0, v, (5,)), {"student_temperature": 0.7, "teacher_logit_floor": -4.0}
    target[1] = -100
    options = {"divergence": divergence, "divergence_mix": 0.3, "advantage": torch.randn(5), **call_options}
    got, expected = (gradient(student, teacher, target, backend=backend, **options) for backend in ("compile", "torch"))
    # fp32 sums of a few thousand terms of size 1 to 10 in another order; at most one step of the logits' type
    torch.testing.assert_close(got[0].divergence, expected[0].divergence, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(got[1], expected[1], rtol=max(torch.finfo(dtype).eps, 1e-5), atol=1e-5)


@pytest.mark.parametrize("offset", [-300.0, 0.0])
@pytest.mark.parametrize("spread", [1e-3, 1.0, 14.0])
def test_maxima_that_rise_from_chunk_to_chunk_cost_no_digits(spread: float, offset: float):
    v = 5 * CHUNK + 3
    student = torch.randn(6, v) + torch.linspace(0, 40, v) + offset  # each chunk outweighs those before it
    student[3:] = student[3:].flip(1)
    teacher = student - 2 * offset + spread * torch.randn(6, v)
    expected = reference_hybrid_loss(student, teacher, torch.zeros(6, dtype=torch.long))
    out, grad = gradient(student, teacher, torch.zeros(6, dtype=torch.long), backend="compile")
    error = (grad.double() - expected.gradient).norm(dim=-1) / expected.gradient.norm(dim=-1)
    assert error.max() < 1e-5  # the product's figure
    torch.testing.assert_close(out.kl.double(), expected.kl, rtol=1e-5, atol=2e-6)


def test_a_chunk_without_mass_leaves_no_trace_and_an_infinite_moment_goes_with_its_mass():
    student, teacher = torch.randn(2, 3, 3 * CHUNK)
    student[0, :CHUNK], student[1, 2 * CHUNK :] = -INF, torch.finfo(torch.float32).min
    teacher[2, 5] = -INF  # an infinite KL of what is no mass beside the last chunk's
    student[2, 2 * CHUNK :] += 200
    assert_as_torch(student, teacher, torch.tensor([CHUNK, 0, 3 * CHUNK - 1]))
    student[2, 2 * CHUNK :] -= 200
    stats = native.shard_stats(student, teacher, call_of(student, teacher, torch.zeros(3, dtype=torch.long)))
    assert stats[:, 4].eq(INF).tolist() == [False, False, True]


def test_exponentials_are_those_of_float64_and_exactly_zero_where_they_end():
    x = -torch.linspace(1e-3, 87.3, 20_000)
    student = torch.stack((torch.zeros_like(x), x), dim=1)
    call = call_of(student, None, torch.zeros(20_000, dtype=torch.long))
    powers = native.shard_stats(student, None, call)[:, 5].double() / x.double()  # B = e x
    expected = x.double().exp()
    # x/log(2) is rounded twice, to 2**-23 of it, as in the Triton kernels: least where the mass is; 2**-21 for the rest
    assert (((powers - expected) / expected).abs() < 2**-21 + 2**-23 * x.double().abs()).all()
    near = x > -1
    assert ((powers - expected) / expected)[near].abs().max() < 3e-7
    student[:, 1] = torch.where(x > -50, -88.0, -INF)
    stats = native.shard_stats(student, None, call)
    assert stats[:, 1].eq(1).all() and stats[:, 5].eq(0).all()


def test_bf16_gradients_are_the_fp32_ones_rounded_to_nearest():
    student, teacher = torch.randn(2, 64, 501).bfloat16()
    student[5, 7], teacher[6, 8], student[7, 9] = NAN, NAN, -INF
    call = call_of(student, teacher, torch.randint(0, 501, (64,)))
    coefficients, wide, narrow = torch.randn(64, 6), torch.empty(64, 501), torch.empty_like(student)
    coefficients[:, :2] += 5
    native.shard_gradient(student.float(), teacher.float(), call, coefficients, wide)
    native.shard_gradient(student, teacher, call, coefficients, narrow)
    assert torch.equal(wide.isnan(), narrow.isnan()) and wide[5, 7].isnan()
    assert torch.equal(wide.nan_to_num().bfloat16(), narrow.nan_to_num())


def test_bf16_ties_go_to_even_and_infinities_stay():
    bits = torch.arange(0, 1 << 16, 7, dtype=torch.int32) << 16
    slopes = torch.cat([bits + below for below in (0, 0x7FFF, 0x8000, 0x8001)]).view(torch.float32)
    coefficients = torch.zeros(len(slopes), 6)
    coefficients[:, 4] = slopes  # without a teacher and at the maximum, the gradient is b
    student = torch.zeros(len(slopes), 2).bfloat16()
    out, target = torch.empty_like(student), torch.zeros(len(slopes), dtype=torch.long)
    native.shard_gradient(student, None, call_of(student, None, target), coefficients, out)
    expected = slopes.bfloat16().unsqueeze(1).expand(-1, 2)
    torch.testing.assert_close(out, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("threads", [2, 3, 8])
def test_threads_change_no_bit(threads: int, inplace: bool, monkeypatch: pytest.MonkeyPatch):
    student, teacher, target, advantage = problem(n=7, v=500)
    target[[0, 3]] = -100
    options = {"advantage": advantage, "backend": "compile", "vocab_size": 490}
    target %= 490
    alone, expected = gradient(student, teacher, target, **options)
    monkeypatch.setattr(native, "_ELEMENTS_PER_THREAD", 1)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    logits = student * 1
    out = vocab_parallel_hybrid_loss(logits, teacher, target, inplace=inplace, **options)
    (grad,) = torch.autograd.grad(out.loss.sum(), logits)
    assert torch.equal(grad, expected) and all(torch.equal(a, b) for a, b in zip(out, alone, strict=True))


def test_the_threads_are_those_that_torch_has_already(monkeypatch: pytest.MonkeyPatch):
    def run_ns() -> dict[str, str]:
        """How long every other thread of this process has run."""
        others = {task.name: task for task in Path("/proc/self/task").iterdir() if task.name != str(get_native_id())}
        return {name: (task / "schedstat").read_text().split()[0] for name, task in others.items()}

    student, teacher, target, _ = problem(n=4, v=500)
    monkeypatch.setattr(native, "_ELEMENTS_PER_THREAD", 1)
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        torch.zeros(1 << 20).exp_()  # now torch has them
        before, now, tries = {}, run_ns(), 0
        while now != before and (tries := tries + 1) < 100:  # they wait for more awake, then they sleep
            time.sleep(0.1)
            before, now = now, run_ns()
        native.shard_stats(student, teacher, call_of(student, teacher, target))
        tries = 0
        while (now := run_ns()) == before and (tries := tries + 1) < 100:  # the kernel counts when a thread stops
            time.sleep(0.1)
        assert now.keys() == before.keys(), "no thread is new"
        assert now != before, "one of torch's has worked"
    finally:
        torch.set_num_threads(threads)


def test_few_numbers_take_one_thread_and_no_row_is_shared():
    assert [native.num_threads(n, v) for n, v in ((6, 40), (1, 1 << 20), (0, 40), (40, 0))] == [1, 1, 1, 1]


@pytest.mark.parametrize("gap", [3, 16])
def test_rows_that_lie_apart_are_read_where_they_are_and_nothing_between_is_written(gap: int):
    stored, target = torch.randn(2, 5, 48 + gap), torch.randint(0, 48, (5,))
    assert_as_torch(stored[0, :, :48], stored[1, :, :48], target)
    out, call = torch.full_like(stored[0], 7.0), call_of(stored[0, :, :48], stored[1, :, :48], target)
    native.shard_gradient(stored[0, :, :48], stored[1, :, :48], call, torch.zeros(5, 6), out[:, :48])
    assert out[:, :48].eq(0).all() and out[:, 48:].eq(7).all()


def test_a_shard_of_padding_alone_has_no_mass_and_no_gradient():
    student, teacher, target = torch.full((3, 16), NAN), torch.full((3, 16), NAN), torch.zeros(3, dtype=torch.long)
    call = call_of(torch.zeros(3, 16), None, target)
    call = replace(call, shard=replace(call.shard, first=16, width=0))
    assert torch.equal(native.shard_stats(student, teacher, call), eager.shard_stats(student, teacher, call))
    native.shard_gradient(student, teacher, call, torch.ones(3, 6), student)
    assert student.eq(0).all()


@pytest.mark.parametrize(
    ("student", "teacher"),
    [
        (torch.zeros(3, 4, dtype=torch.float16), None),
        (torch.zeros(3, 4, dtype=torch.float64), None),
        (torch.zeros(3, 4), torch.zeros(3, 4, dtype=torch.bfloat16)),
        (torch.zeros(4, 3).T, None),
        (torch.zeros(3, 4, device="meta"), None),
    ],
)
def test_what_it_cannot_read_is_left_to_torch_compile(student: Tensor, teacher: Tensor | None):
    assert not native.serves(student, teacher)


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nothing_of_vocabulary_size_but_the_gradient_in_the_logits_dtype(dtype: torch.dtype, inplace: bool):
    leaf, teacher, target, _ = problem(64, 2048, dtype)
    target[::3] = -100
    student = leaf * 1
    with Allocations(student, teacher, target) as seen:
        out = vocab_parallel_hybrid_loss(student, teacher, target, inplace=inplace, backend="compile")
        torch.autograd.grad(out.loss.sum(), student)
    # 64 rows of at most eight fp32 numbers are 2 KB
    assert [size for size in seen.sizes if size > 2048] == ([] if inplace else [64 * 2048 * dtype.itemsize])


def test_a_reader_of_overwritten_logits_is_told():
    student, teacher, target, _ = problem()
    logits = student * 1
    square = (logits * logits).sum()
    out = vocab_parallel_hybrid_loss(logits, teacher, target, inplace=True, backend="compile")
    torch.autograd.grad(out.loss.sum(), logits)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(square, student)


def test_every_loop_over_columns_is_made_of_vectors_for_both_types():
    version = subprocess.run(["c++", "--version"], capture_output=True, text=True).stdout
    if "Free Software Foundation" not in version:
        pytest.skip("reads what GCC reports")
    command = ["c++", *native.OPTIONS, "-fopt-info-vec-all", "-o", "/dev/null", *native.SOURCES]
    said = subprocess.run(command, check=True, capture_output=True, text=True).stderr
    # of two types: with and without a teacher, and of the four other divergences
    for source, loops, variants in zip(native.SOURCES, (3, 2), (4, 8), strict=True):
        lines = [i for i, line in enumerate(source.read_text().splitlines(), 1) if "int64_t j = 0" in line]
        assert len(lines) == loops, "maxima, sums, gradient; sums, gradient"
        for line in lines:  # or the line before, which has the pragma
            report = rf"{source.name}:(?:{line}|{line - 1}):\d+: (optimized: loop v|missed: couldn't v)ectorize"
            reports = re.findall(report, said)  # the rest of a row may have a smaller loop of its own
            assert len(reports) >= variants and set(reports) == {"optimized: loop v"}, (source.name, line, reports)


def test_without_a_compiler_it_declines_and_the_log_says_why_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    student, teacher, *_ = problem()
    native._build.cache_clear()
    try:
        for compiler in ("no-such-compiler", "false"):
            monkeypatch.setenv("CXX", compiler)
            with caplog.at_level(logging.WARNING, logger=native.__name__):
                assert [native.serves(student, teacher) for _ in range(2)] == [False, False]
            (record,) = caplog.records
            assert compiler in record.message and "without its C++" in record.message
            caplog.clear()
            native._build.cache_clear()
    finally:
        native._build.cache_clear()


def test_targets_with_gaps_in_memory_are_the_targets():
    generator = torch.Generator().manual_seed(0)
    student, teacher = torch.randn(2, 6, 50, generator=generator)
    ids = torch.randint(0, 50, (12,), generator=generator)
    got, want = (
        vocab_parallel_hybrid_loss(student, teacher, target, advantage=1.0, backend="compile")
        for target in (ids[::2], ids[::2].clone())
    )
    assert torch.equal(got.loss, want.loss) and torch.equal(got.log_prob, want.log_prob)
