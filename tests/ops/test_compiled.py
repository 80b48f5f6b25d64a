"""The compiled backend against the torch backend and the judge: same results, few compilations, a way out without any.

Each test runs by `native.cpp` and by torch.compile, or says which. torch.compile takes seconds for each variant, so the
tests share theirs: the same types, and vocabularies below 4096. What only `native.cpp` has is in `test_native.py`.
"""

import logging
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters
from torch._inductor import config as inductor_config
from torch._inductor.utils import fresh_cache

from megatron_hybrid.ops import compiled, eager, native
from megatron_hybrid.ops.api import vocab_parallel_hybrid_loss
from megatron_hybrid.ops.reference import reference_hybrid_loss
from megatron_hybrid.runtime import cpu
from tests.ops.one_process import run_ranks
from tests.ops.test_memory import Allocations
from tests.ops.vectors import assert_close_to, load_cases, outputs_of, run_case
from tests.ranks import Ranks

CASES = load_cases()
INF, NAN = float("inf"), float("nan")


BY_TORCH_COMPILE = pytest.mark.parametrize("path", ["torch.compile"], indirect=True)


@pytest.fixture(autouse=True, params=["native.cpp", "torch.compile"])
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who computes; whoever else is asked fails the test."""

    def declined(*args: Any) -> None:
        raise AssertionError(f"asked in the place of {request.param}")

    if request.param == "native.cpp":
        monkeypatch.setattr(compiled, "_variant", declined)
    else:
        monkeypatch.setattr(native, "serves", lambda *logits: False)
    stand_in = type("Eager", (), {"shard_stats": declined, "shard_gradient": declined})
    for name in ("NUM_STATS", "clear_uncounted"):
        setattr(stand_in, name, staticmethod(value) if callable(value := getattr(eager, name)) else value)
    monkeypatch.setattr(compiled, "eager", stand_in)


@pytest.fixture
def no_compilation() -> Iterator[None]:
    """Inside, a new compilation is an error: whatever runs must be compiled already."""
    with torch.compiler.set_stance("fail_on_recompile"):
        yield


def solve(backend: str, student: Tensor, teacher: Tensor | None, target: Tensor, **options: Any) -> list[Tensor]:
    """Outputs and gradient of the summed loss."""
    logits = student.detach().clone().requires_grad_() * 1
    out = vocab_parallel_hybrid_loss(logits, teacher, target, backend=backend, **options)
    (grad,) = torch.autograd.grad(out.loss.sum(), logits)
    return [value.detach() for value in (*out, grad)]


def assert_as_torch(student: Tensor, teacher: Tensor | None, target: Tensor, **options: Any) -> list[Tensor]:
    """The compiled results, after checking that they are the torch backend's, NaN and infinities included."""
    got, expected = (solve(backend, student, teacher, target, **options) for backend in ("compile", "torch"))
    for value, reference in zip(got[:-1], expected[:-1], strict=True):
        # fp32 sums of a few dozen terms of size 1 to 10, in another order
        torch.testing.assert_close(value, reference, rtol=1e-5, atol=3e-6, equal_nan=True)
    # at most one step of the logits' type where the two fp32 values round apart
    rounding = {torch.float32: 1e-5, torch.bfloat16: 2**-7, torch.float16: 2**-10}[student.dtype]
    torch.testing.assert_close(got[-1], expected[-1], rtol=rounding, atol=4e-6, equal_nan=True)
    return got


def problem(n: int = 6, v: int = 40, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Student, teacher, target, advantage."""
    student, teacher = torch.randn(n, v).to(dtype), torch.randn(n, v).to(dtype)
    return student, teacher, torch.randint(0, v, (n,)), torch.randn(n)


@pytest.mark.parametrize("name", CASES)
def test_every_case_of_the_ground_truth_in_fp32(name: str):
    out, grad = run_case(CASES[name], backend="compile")
    assert_close_to(CASES[name], out._asdict() | {"grad": grad})


@pytest.mark.parametrize(
    ("path", "dtype", "name"),
    [
        pytest.param(path, dtype, name, marks=pytest.mark.slow if dtype == torch.float16 and name != "plain" else ())
        for path, dtype in (
            ("native.cpp", torch.bfloat16),
            ("torch.compile", torch.bfloat16),
            ("torch.compile", torch.float16),
        )
        for name in ("plain", "padded_vocab", "both_minus_inf")
    ],
    indirect=["path"],
)
def test_half_precision_is_the_torch_backends(name: str, dtype: torch.dtype):
    got, expected = (outputs_of(CASES[name], dtype=dtype, backend=backend) for backend in ("compile", "torch"))
    assert got["grad"].dtype == dtype
    for field, value in got.items():
        # one step of the logits' type where the two fp32 values round apart; fp32 sums elsewhere
        rounding = {torch.bfloat16: 2**-7, torch.float16: 2**-10}[dtype] if field == "grad" else 1e-5
        torch.testing.assert_close(value, expected[field], rtol=rounding, atol=6e-6)


@pytest.mark.parametrize("offset", [-300.0, 0.0, 60.0])
@pytest.mark.parametrize("spread", [1e-3, 1.0, 14.0])
def test_gradient_keeps_its_digits_from_tiny_to_huge_kl_at_any_offset(spread: float, offset: float):
    student = torch.randn(32, 500) + offset
    teacher = student - 2 * offset + spread * torch.randn(32, 500)
    target = torch.randint(0, 500, (32,))
    expected = reference_hybrid_loss(student, teacher, target)
    *_, grad = solve("compile", student, teacher, target)
    error = (grad.double() - expected.gradient).norm(dim=-1) / expected.gradient.norm(dim=-1)
    assert error.max() < 1e-5  # the product's figure


def test_a_large_vocabulary_keeps_its_digits():
    student, teacher, target, advantage = problem(n=3, v=100_003)  # above 4096: summed in chunks
    expected = reference_hybrid_loss(student, teacher, target, advantage=advantage)
    *_, entropy, _, grad = solve("compile", student, teacher, target, advantage=advantage)
    torch.testing.assert_close(entropy.double(), expected.entropy, rtol=1e-6, atol=0)  # fp32 throughout
    error = (grad.double() - expected.gradient).norm(dim=-1) / expected.gradient.norm(dim=-1)
    assert error.max() < 1e-5  # the product's figure


@pytest.mark.parametrize("garbage", [NAN, INF, -INF, 1e30])
def test_ignored_rows_and_padded_columns_are_exactly_zero_whatever_they_hold(garbage: float):
    student, teacher, target, advantage = problem()
    clean = assert_as_torch(student, teacher, target, advantage=advantage)
    padded = [torch.cat((x, torch.full((6, 9), garbage)), dim=1) for x in (student, teacher)]
    *_, grad = assert_as_torch(*padded, target, advantage=advantage, vocab_size=40)
    assert grad[:, 40:].eq(0).all()
    target[[1, 4]] = -100
    for x in padded:
        x[[1, 4]] = garbage
    for inplace in (False, True):
        got = solve("compile", *padded, target, advantage=advantage, vocab_size=40, inplace=inplace)
        assert all(value[[1, 4]].eq(0).all() for value in got)
        torch.testing.assert_close(got[-1][[0, 2, 3, 5], :40], clean[-1][[0, 2, 3, 5]], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("who", [(0,), (1,), (0, 1)])
@pytest.mark.parametrize("floor", [None, -30.0])
def test_forbidden_tokens_are_the_torch_backends(who: tuple[int, ...], floor: float | None):
    tensors = problem()
    for side in who:
        tensors[side][1:4, 20:] = -INF
    student, teacher, target, advantage = tensors
    *_, grad = assert_as_torch(student, teacher, target % 20, advantage=advantage, teacher_logit_floor=floor)
    assert grad.isfinite().all()
    if 0 in who:
        assert grad[1:4, 20:].eq(0).all()


@pytest.mark.parametrize("who", [0, 1])
def test_a_nan_that_counts_is_never_silent(who: int):
    tensors = problem()
    tensors[who][3, 7] = NAN
    loss, *_, grad = solve("compile", *tensors[:3])
    assert loss[3].isnan() and grad[3].isnan().all()
    assert loss[[0, 1, 2, 4, 5]].isfinite().all()


def test_temperatures_and_a_missing_teacher_are_the_torch_backends():
    student, teacher, target, advantage = problem()
    assert_as_torch(student, teacher, target, advantage=advantage, student_temperature=0.7, teacher_temperature=1.3)
    assert_as_torch(student, teacher, target, advantage=advantage, student_temperature=0.7, teacher_temperature=0.7)
    assert_as_torch(student, None, target, advantage=advantage, student_temperature=0.7)


@BY_TORCH_COMPILE
@pytest.mark.parametrize("inplace", [False, True])
def test_blocks_of_rows_change_nothing(inplace: bool, monkeypatch: pytest.MonkeyPatch):
    student, teacher, target, advantage = problem(n=9)
    whole = solve("compile", student, teacher, target, advantage=advantage, inplace=inplace)
    monkeypatch.setattr(compiled, "_ELEMENTS_PER_THREAD", 80)  # two rows of 40 for each thread
    blocks = solve("compile", student, teacher, target, advantage=advantage, inplace=inplace)
    assert all(torch.equal(a, b) for a, b in zip(whole, blocks, strict=True))


@BY_TORCH_COMPILE
@pytest.mark.parametrize("n", [2, 3, 4, 5, 9])
def test_blocks_cover_every_row_once_and_none_has_a_single_one(n: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(compiled, "_ELEMENTS_PER_THREAD", 1)
    blocks = compiled._blocks(n, 40, torch.empty(0))
    assert [row for start, stop in blocks for row in range(start, stop)] == list(range(n))
    assert all(stop - start >= 2 for start, stop in blocks)


def test_two_vocabulary_shards_give_the_whole_vocabularys_result():
    case = CASES["plain"]
    results = run_ranks(2, lambda rank, group: outputs_of(case, rank=rank, ranks=2, group=group, backend="compile"))
    gathered = results[0] | {"grad": torch.cat([result["grad"] for result in results], dim=1)}
    assert_close_to(case, gathered)


def test_inputs_are_not_mutated_and_inplace_writes_the_same_gradient_over_the_student():
    student, teacher, target, advantage = problem()
    before = student.clone(), teacher.clone()
    *_, expected = solve("compile", student, teacher, target, advantage=advantage)
    assert torch.equal(student, before[0]) and torch.equal(teacher, before[1])
    logits = student.requires_grad_() * 1
    out = vocab_parallel_hybrid_loss(logits, teacher, target, advantage=advantage, inplace=True, backend="compile")
    (grad,) = torch.autograd.grad(out.loss.sum(), logits)
    assert grad.data_ptr() == logits.data_ptr() and torch.equal(grad, expected) and torch.equal(teacher, before[1])


@BY_TORCH_COMPILE
def test_nothing_is_compiled_again_for_other_rows_columns_temperatures_and_floors():
    def both(n: int, v: int, padding: int, **options: Any) -> None:
        student, teacher, target, _ = problem(n, v + padding)
        assert_as_torch(student, teacher, target % v, vocab_size=v, advantage=1.0, **options)

    for padding in (0, 9):
        both(5, 40, padding)
    with torch.compiler.set_stance("fail_on_recompile"):
        for n, v in ((2, 3), (40, 40), (3, 11), (7, 64), (1000, 4)):
            both(n, v, 0, student_temperature=n / 3, teacher_temperature=v / 9)
            both(n, v, 24, teacher_logit_floor=-n / 2)


@BY_TORCH_COMPILE
def test_another_type_of_logits_is_compiled_so_the_test_above_can_fail(no_compilation: None):
    student, teacher, target, _ = problem()
    with pytest.raises(RuntimeError, match="fail_on_recompile"):
        compiled._compiled(compiled._stats, ((torch.float64, True), None), False, "cpu", False)


@BY_TORCH_COMPILE
@pytest.mark.parametrize("inplace", [False, True])
def test_blocks_bound_what_is_held_even_where_nothing_is_fused(inplace: bool, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(compiled, "_ELEMENTS_PER_THREAD", 2 * 2048 // torch.get_num_threads())
    student, teacher, target, _ = problem(64, 2048)
    logits = student.requires_grad_() * 1
    with Allocations(logits, teacher) as seen:  # torch.compile steps aside for it: every intermediate is seen
        out = vocab_parallel_hybrid_loss(logits, teacher, target, inplace=inplace, backend="compile")
        torch.autograd.grad(out.loss.sum(), logits)
    block = 2 * 2048 * 4  # two rows in fp32
    assert [size for size in seen.sizes if size > block] == ([] if inplace else [64 * 2048 * 4])
    assert block in seen.sizes, "blocks must be seen, or this test sees nothing"


@BY_TORCH_COMPILE
def test_each_pass_is_one_graph_so_nothing_runs_uncompiled():
    torch._dynamo.reset()
    compiled._compiled.cache_clear()
    counters.clear()
    solve("compile", *problem()[:3])
    assert not counters["graph_break"] and counters["stats"]["unique_graphs"] == 2, dict(counters["stats"])


def _compiled_beside_the_cpu_stand_ins() -> tuple[bool, int, float]:
    """On a rank: (stand-ins are active, graphs compiled, largest difference from the torch backend's gradient)."""
    with cpu.enabled() as active, pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(native, "serves", lambda *logits: False)
        counters.clear()
        student, teacher, target, _ = problem()
        got, expected = (solve(backend, student, teacher, target)[-1] for backend in ("compile", "torch"))
        return active, counters["stats"]["unique_graphs"], (got - expected).abs().max().item()


@BY_TORCH_COMPILE
def test_it_compiles_on_a_rank_that_runs_megatron_without_a_gpu(rank_pool: Callable[..., Ranks]):
    ((active, graphs, difference),) = rank_pool(1).run(_compiled_beside_the_cpu_stand_ins)
    assert graphs == 2 and active is not torch.cuda.is_available()
    assert difference < 1e-6  # fp32 sums in another order, of entries below 1


@BY_TORCH_COMPILE
def test_without_a_compiler_the_torch_backend_runs_and_the_log_says_why_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    monkeypatch.setattr(compiled, "eager", eager)
    monkeypatch.setattr(inductor_config.cpp, "cxx", ("no-such-compiler",))
    student, teacher, target, advantage = problem()
    expected = solve("torch", student, teacher, target, advantage=advantage)
    compiled._compiled.cache_clear()
    torch._dynamo.reset()
    try:
        with fresh_cache(), caplog.at_level(logging.WARNING, logger=compiled.__name__):
            got = solve("compile", student, teacher, target, advantage=advantage)
    finally:
        compiled._compiled.cache_clear()
        compiled._say_why.cache_clear()
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
    messages = [record.message for record in caplog.records if record.name == compiled.__name__]
    assert len(messages) == 1, messages
    assert "runs as 'torch'" in messages[0] and "compiler" in messages[0].lower()
