"""Reading tests/vectors, and running one case of it through the op on any number of vocabulary shards."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from megatron_hybrid.ops.api import HybridLoss, vocab_parallel_hybrid_loss
from megatron_hybrid.ops.reference import Reference, reference_hybrid_loss

VECTORS = Path(__file__).parents[1] / "vectors"


def load_cases() -> dict[str, dict[str, Any]]:
    """Case name to its fields: float64 and int64 tensors, temperatures as float, vocab_size as int."""
    cases: dict[str, dict[str, Any]] = {}
    with np.load(VECTORS / "op.npz") as arrays:
        for key in arrays.files:
            name, field = key.split("/")
            value = arrays[key]
            cases.setdefault(name, {})[field] = value.item() if value.ndim == 0 else torch.from_numpy(value)
    return cases


def run_case(
    case: dict[str, Any],
    *,
    dtype: torch.dtype = torch.float32,
    rank: int = 0,
    ranks: int = 1,
    group: Any = None,
    **options: Any,
) -> tuple[HybridLoss, Tensor]:
    """The op on this rank's columns: (outputs, gradient of the summed loss [n, v/tp])."""
    columns = slice(*(case["student_logits"].shape[1] * r // ranks for r in (rank, rank + 1)))
    student = case["student_logits"][:, columns].to(dtype).requires_grad_()
    out = vocab_parallel_hybrid_loss(
        student,
        case["teacher_logits"][:, columns].to(dtype),
        case["target"],
        imitation_weight=case["imitation_weight"].float(),
        advantage=case["advantage"].float(),
        student_temperature=case["student_temperature"],
        teacher_temperature=case["teacher_temperature"],
        vocab_size=case["vocab_size"],
        group=group,
        **options,
    )
    out.loss.sum().backward()
    assert student.grad is not None
    return out, student.grad


def outputs_of(case: dict[str, Any], **options: Any) -> dict[str, Tensor]:
    """`run_case` as plain detached tensors, to travel between processes."""
    out, gradient = run_case(case, **options)
    return {name: value.detach() for name, value in out._asdict().items()} | {"grad": gradient}


def judged(case: dict[str, Any], dtype: torch.dtype = torch.float32, **options: Any) -> Reference:
    """The judge's answer to a case as the op is given it, in `dtype`."""
    return reference_hybrid_loss(
        *(case[f"{who}_logits"].to(dtype) for who in ("student", "teacher")),
        case["target"],
        **{field: case[field] for field in ("imitation_weight", "advantage")},
        **{field: case[field] for field in ("student_temperature", "teacher_temperature", "vocab_size")},
        **options,
    )


def assert_close_to(case: dict[str, Any], got: dict[str, Tensor]) -> None:
    """fp32 results of a case against its ground truth: 1e-5 relative (the product's figure), for the gradient per row.

    2e-6 absolute beside it, for values that vanish: they are sums of fp32 terms of size 1 to 10.
    """
    for field in ("kl", "log_prob", "teacher_log_prob", "entropy"):
        torch.testing.assert_close(got[field].double(), case[field], rtol=1e-5, atol=2e-6)
    error = (got["grad"].double() - case["grad"]).norm(dim=-1)
    assert (error <= 1e-5 * case["grad"].norm(dim=-1) + 2e-6).all(), error
    assert got["grad"][:, case["vocab_size"] :].eq(0).all()


def problem(n=6, v=40, dtype=torch.float32):
    """Student (a leaf), teacher, target, advantage."""
    student, teacher = torch.randn(n, v).to(dtype), torch.randn(n, v).to(dtype)
    return student.requires_grad_(), teacher, torch.randint(0, v, (n,)), torch.randn(n)


def gradient(student, teacher, target, **options):
    """(outputs, d sum(loss) / d student)."""
    student = student.detach().clone().requires_grad_()
    out = vocab_parallel_hybrid_loss(student, teacher, target, **options)
    out.loss.sum().backward()
    return out, student.grad
