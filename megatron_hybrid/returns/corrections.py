"""Importance weights of rollouts that were drawn from mu: an engine with other numerics, or older weights.

    l_t = log pi(y_t|s_t) - log mu(y_t|s_t),     rho_t = exp(l_t),     rho_{<t} and rho_{1:T} its products

The objective averages over pi, the rollouts over mu. With the advantage A_t and the dense term of `weights.py`,

    dJ = E_mu sum_t [ rho_{<t} beta dKL_t  -  rho_{1:T} A_t dlog pi(y_t|s_t) ]                              exact

* Dense: KL_t sums over the whole vocabulary at s_t, so only the tokens that led there need weighing: the prefix.
* Sparse: A_t looks ahead. The prefix weight rho_{<=t} makes s_t and y_t as frequent as under pi, but what follows, the
  reward and every future cost, would still be mu's: biased. A cost c_t' by itself needs the tokens that lead to it
  (rho_{<t'} in closed form, rho_{<=t'} sampled), the reward all of them. rho_{1:T} is exact for both, because ratios of
  tokens after t' average to 1, and for every baseline, because E_mu[rho_{1:T} dlog pi] = 0. One weight for the whole of
  A_t keeps its sign and its baseline; the price is the noise of later ratios on earlier costs, which C bounds.

    kind               multiplies A_t
    none               1
    token_truncate     min(rho_t, C)         as if the tokens before and after were pi's: biased, with little noise
    token_mask         rho_t within [1/C, C], else 0
    sequence_truncate  min(rho_{1:T}, C)     exact for C = inf together with `prefix`; noise grows with the length
    sequence_mask      rho_{1:T} within [1/C, C], else 0: the whole response is rejected
    ppo_clip           rho_t; 0 where A_t > 0 and rho_t > 1 + clip_high, or A_t < 0 and rho_t < 1 - clip_low: the
                       gradient of PPO's clipped surrogate (arXiv 1707.06347)

`prefix` multiplies the dense term by rho_{<t}, truncated at C; under the masks 0 outside [1/C, C].

Numerics: products are sums of logs, and a log ratio above 40 nats, of a token or a product, counts as 40: no weight is
infinite or NaN. A token that pi forbids (l = -inf) has weight 0, but for kind `none`. A token whose sampler gave no
finite log-prob is taken as on-policy (l = 0) and counted. Equal log-probs give exactly 1.

Sources: truncation at C is Ionides 2008 (truncated importance sampling), for rollout engines verl's `rollout_corr`;
products per step and prefix are per-decision importance sampling, Precup et al. 2000; k3 = rho - 1 - log rho is
Schulman's estimator of KL(mu || pi) (joschu.net/blog/kl-approx.html); the effective sample size (mean w)^2 / mean w^2
is Kish's.
Collectives: none. Not here: tables of whole responses (`token_table.py`).
"""

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from megatron_hybrid.config import ROLLOUT_CORRECTIONS, HybridConfig
from megatron_hybrid.errors import ConfigError
from megatron_hybrid.metrics import Metrics
from megatron_hybrid.returns.returns_to_go import cost_to_go

_LARGEST_LOG_RATIO = 40.0
"""Nats: no step survives a weight of exp(40) = 2e17, and its square is still finite in fp32."""

_SQUARE = "rollout_corr/rollout_is_square_mean"
"""Collected in place of the effective sample size, which is no mean; `finish_metrics` makes the one of the other."""


@dataclass(frozen=True)
class Correction:
    """What to do about rollouts of another policy; fields as in `HybridConfig`."""

    kind: str = "none"
    """`rollout_correction`, one of config.ROLLOUT_CORRECTIONS."""
    threshold: float = 2.0
    """C, `rollout_is_threshold`, at least 1 (a weight of 1 is not cut); inf: exact weights."""
    prefix: bool = False
    """`prefix_correction`: whether the dense term is weighed too."""
    clip_low: float = 0.2
    """`clip_ratio_low`."""
    clip_high: float = 0.2
    """`clip_ratio_high`."""

    def __post_init__(self) -> None:
        if self.kind not in ROLLOUT_CORRECTIONS:
            raise ConfigError(f"rollout_correction must be one of {', '.join(ROLLOUT_CORRECTIONS)}; got {self.kind!r}.")

    @classmethod
    def from_config(cls, config: HybridConfig) -> Self:
        """The settings' part that is about other policies' rollouts."""
        return cls(
            kind=config.rollout_correction,
            threshold=config.rollout_is_threshold,
            prefix=config.prefix_correction,
            clip_low=config.clip_ratio_low,
            clip_high=config.clip_ratio_high,
        )

    @property
    def of_sequences(self) -> bool:
        """Whether A_t is weighed by the ratio of its whole response."""
        return self.kind.startswith("sequence")

    @property
    def spans_responses(self) -> bool:
        """Whether a token's weights need the ratios of other tokens."""
        return self.of_sequences or self.prefix

    @property
    def masks(self) -> bool:
        """Whether a ratio outside [1/C, C] drops its term, instead of being lowered to C."""
        return self.kind.endswith("mask")


def log_ratios(log_prob: Tensor, sampled_logprobs: Tensor) -> tuple[Tensor, Tensor]:
    """(l_t, whether the sampler's log-prob is known), both [n]; l_t is 0 where it is not."""
    known = sampled_logprobs.isfinite()
    log_ratio = torch.where(known, log_prob.detach().float() - sampled_logprobs.float(), 0.0)
    return log_ratio.clamp(max=_LARGEST_LOG_RATIO), known  # a sum of finite ones can then not be infinite


def prefix_log_ratios(log_ratio: Tensor, mask: Tensor) -> Tensor:
    """log rho_{<t} [b, s] of l_t [b, s]: the strict past of a row is the strict future of the row reversed."""
    return cost_to_go(log_ratio.flip(1), mask.flip(1), 1.0).flip(1)


def importance(log_ratio: Tensor) -> Tensor:
    """exp of a log ratio, always finite."""
    return log_ratio.clamp(max=_LARGEST_LOG_RATIO).exp()


def sparse_weights(correction: Correction, log_ratio: Tensor, advantage: Tensor) -> Tensor:
    """W_t [n] fp32, the multiplier of advantage A_t [n]; log_ratio [n] of the token, or of its response."""
    ratio = importance(log_ratio)
    if correction.kind == "none":
        return torch.ones_like(ratio)
    if correction.kind == "ppo_clip":
        too_far = (advantage > 0) & (ratio > 1 + correction.clip_high)
        too_far |= (advantage < 0) & (ratio < 1 - correction.clip_low)
        return torch.where(too_far, 0.0, ratio)
    return _bounded(correction, ratio)


def dense_weights(correction: Correction, prefix_log_ratio: Tensor) -> Tensor:
    """Multiplier [n] fp32 of the dense term, from log rho_{<t} [n]."""
    return _bounded(correction, importance(prefix_log_ratio))


def _bounded(correction: Correction, ratio: Tensor) -> Tensor:
    if not correction.masks:
        return ratio.clamp(max=correction.threshold)
    kept = (ratio >= 1 / correction.threshold) & (ratio <= correction.threshold)
    return torch.where(kept, ratio, 0.0)


def measure(
    metrics: Metrics,
    correction: Correction,
    *,
    token_log_ratio: Tensor,
    known: Tensor,
    log_ratio: Tensor,
    weights: Tensor,
) -> None:
    """Adds the mismatch of n tokens and the weights they got; the names depend on the correction's kind alone.

    token_log_ratio  [n] l_t, and `known` [n] bool with it, from `log_ratios`
    log_ratio        [n] of the token, or of its response: what the weight was made from
    weights          [n] W_t; where nothing is corrected the ratios themselves are reported instead
    """
    ratio, applied = importance(log_ratio), weights
    if correction.kind == "none":
        applied = ratio
    for name, add in (("mean", metrics.mean), ("max", metrics.max), ("min", metrics.min)):
        add(f"rollout_corr/rollout_is_{name}", applied)
    metrics.mean(_SQUARE, applied.square())
    metrics.mean("rollout_corr/rollout_is_ratio_fraction_high", ratio > correction.threshold)
    metrics.mean("rollout_corr/rollout_is_ratio_fraction_low", ratio < 1 / correction.threshold)
    if correction.masks:
        metrics.mean("rollout_corr/rollout_rs_masked_fraction", weights == 0)
    if correction.kind == "ppo_clip":
        metrics.mean("actor/pg_clipfrac", (weights == 0) & (ratio > 0))
    metrics.mean("rollout_corr/kl", -token_log_ratio, weights=known)
    metrics.mean("rollout_corr/k3_kl", importance(token_log_ratio) - 1 - token_log_ratio, weights=known)
    metrics.mean("rollout_corr/unknown_fraction", ~known)


def finish_metrics(values: dict[str, float]) -> None:
    """Turns the reduced mean square of the weights into their effective sample size, (mean w)^2 / mean w^2.

    Changes `values`, the reduced metrics of a step; without a mismatch in them nothing happens.
    """
    if _SQUARE in values:
        square, mean = values.pop(_SQUARE), values["rollout_corr/rollout_is_mean"]
        values["rollout_corr/rollout_is_eff_sample_size"] = mean * mean / square if square else 0.0
