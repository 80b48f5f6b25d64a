"""The divergences of the dense part: weighted sums of the KLs from teacher q and student p to one mixture of the two.

    D = t KL(q || m) + s KL(p || m),      m = o q + (1-o) p

    divergence         o      t     s          c = divergence_mix
    reverse_kl         1      0     1          KL(p || q); has passes of its own, `eager.py`
    forward_kl         0      1     0          KL(q || p)
    jsd                c      c     1-c        generalised Jensen-Shannon of GKD, arXiv 2306.13649 (its beta)
    skewed_kl          c      1     0          KL(q || c q + (1-c) p), DistiLLM, arXiv 2402.03898 (its alpha)
    skewed_reverse_kl  1-c    0     1          KL(p || c p + (1-c) q), the same

Sources: the reverse KL is the objective of arXiv 2512.23097, the forward KL that of distillation, Hinton et al. 2015,
arXiv 1503.02531. That all five are one form with three weights is ours.

Data in: a name and a number.  Data out: the three weights.  No tensors, no collective.
"""

from typing import NamedTuple

from megatron_hybrid.errors import ConfigError

DIVERGENCES = ("reverse_kl", "forward_kl", "jsd", "skewed_kl", "skewed_reverse_kl")


class Mixture(NamedTuple):
    """One divergence other than the reverse KL, in the letters of the module."""

    teacher_share: float
    """o: what the teacher has in m."""
    student_share: float
    """1 - o, with the digits that the subtraction would lose."""
    teacher_term: float
    """t: weight of KL(q || m)."""
    student_term: float
    """s: weight of KL(p || m)."""

    @property
    def slope(self) -> float:
        """t (1-o) - s o: what makes every column's term of D non-negative (times p - q, whose sum is 0)."""
        return self.teacher_term * self.student_share - self.student_term * self.teacher_share


def mixture_of(divergence: str, divergence_mix: float) -> Mixture | None:
    """The mixture behind a name; None for the reverse KL.

    divergence_mix  c, in (0, 1); checked whatever the divergence is, read by those that mix

    Raises:
        ConfigError: another name, or another number.
    """
    if divergence not in DIVERGENCES:
        raise ConfigError(f"divergence must be one of {', '.join(DIVERGENCES)}; got {divergence!r}.")
    if not 0 < divergence_mix < 1:
        raise ConfigError(
            f"divergence_mix must lie strictly between 0 and 1, got {divergence_mix}: at either end the mixture is one "
            "of the two distributions. Use divergence 'forward_kl' or 'reverse_kl' for these."
        )
    mix, rest = divergence_mix, 1 - divergence_mix
    return {
        "reverse_kl": None,
        "forward_kl": Mixture(0.0, 1.0, 1.0, 0.0),
        "jsd": Mixture(mix, rest, mix, rest),
        "skewed_kl": Mixture(mix, rest, 1.0, 0.0),
        "skewed_reverse_kl": Mixture(rest, mix, 0.0, 1.0),
    }[divergence]
