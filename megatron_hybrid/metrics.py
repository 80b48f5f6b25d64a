"""Named scalars that carry their own reduction: collected on every rank, reduced once per step.

    mean  sum_i w_i x_i / sum_i w_i  over all values of all ranks (so uneven ranks are no mean of means);
    sum, max, min  over all values of all ranks.

`Metrics.reduce(group)` costs two collectives however many names there are: one MAX (minima travel negated), one SUM
(a mean travels as [sum, weight]). All ranks of the group must hold the same names: the MAX goes first, has the same
length whatever a rank holds, and carries a hash of the names, so a difference becomes an error on every rank instead
of a hang or a mix-up. Numbers stay fp64 tensors on their own device until then: collecting never synchronises.
Not here: where numbers go afterwards (`train/report.py`).
"""

import hashlib
import math
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_hybrid.errors import HybridError
from megatron_hybrid.parallel import Group

Kind = Literal["mean", "sum", "max", "min"]

MAX_SLOTS = 512
"""Length of the MAX vector (4 KiB): 2 slots of the hash, then 2 per maximum or minimum. A run has about 20 of those."""

MEANINGS = {
    "actor/loss": "surrogate loss, the number whose gradient is taken",
    "actor/pg_loss": "sparse part of the loss: -advantage * log pi",
    "actor/kl_loss": "reverse KL to the teacher, nats per response token; of a topk payload its lower bound",
    "actor/entropy": "entropy of the student, nats per response token",
    "actor/grad_norm": "norm of the whole gradient, before clipping",
    "actor/grad_norm_dense": "root mean square over response tokens of the imitation part's norm in logits",
    "actor/grad_norm_sparse": "root mean square over response tokens of the policy part's norm in logits",
    "actor/lr": "learning rate",
    "pretraining/loss": "cross-entropy of the script's own micro-batches, nats per token, before its weight",
    "pretraining/weight": "weight of that cross-entropy beside the rollouts' loss",
    "actor/distillation/loss": "the divergence that is minimised instead of the reverse KL, nats per response token",
    "actor/reward_weight": "lambda at this step",
    "actor/imitation_weight": "beta at this step",
    "actor/discount": "gamma at this step",
    "critic/score": "reward as the rubric gave it, per response (/mean, /max, /min, and /<task>)",
    "rewards": "of several rewards, the score of each before its weight, per response (/<reward>/mean and "
    "/<reward>/<task>)",
    "critic/rewards": "reward as the objective sees it, per response (/mean, /max, /min)",
    "critic/advantages": "advantage per response token, times its importance weight (/mean, /max, /min)",
    "response_length": "tokens of a response (/mean, /max, /min); /clip_ratio: share of responses cut off at the limit",
    "prompt_length/mean": "tokens of a prompt",
    "training/rollout_probs_diff_mean": "mean |p_sampler - p_trainer| of sampled tokens",
    "training/rollout_probs_diff_max": "largest |p_sampler - p_trainer| of sampled tokens",
    "rollout_corr/rollout_is": "importance weight pi / sampler as applied, per response token (_mean, _max, _min); the "
    "token's own ratio where nothing is corrected",
    "rollout_corr/rollout_is_eff_sample_size": "(mean weight)^2 / mean weight^2: share of the tokens that count",
    "rollout_corr/rollout_is_ratio_fraction_high": "share of response tokens whose ratio is above rollout_is_threshold",
    "rollout_corr/rollout_is_ratio_fraction_low": "share of response tokens whose ratio is below 1 / threshold",
    "rollout_corr/rollout_rs_masked_fraction": "share of response tokens that a masking correction drops",
    "rollout_corr/kl": "mean log p_sampler - log p_trainer of sampled tokens, nats: KL(sampler || trainer)",
    "rollout_corr/k3_kl": "the same KL from ratio - 1 - log ratio: never negative, less noise",
    "rollout_corr/unknown_fraction": "share of response tokens whose sampler gave no finite log-prob: not corrected",
    "actor/pg_clipfrac": "share of response tokens that ppo_clip stops",
    "timing_s": "seconds, slowest rank: /rollout, /teacher, /reward (what is still to wait for after the teacher), "
    "/credit, /update, and the whole /step",
    "perf/throughput": "tokens per second, prompts and responses, all ranks together",
    "perf/total_num_tokens": "tokens of the step, prompts and responses",
    "perf/max_memory_allocated_gb": "peak accelerator memory, largest rank",
    "training/policy_age": "optimizer steps since the responses were sampled",
    "training/imitation_share": "share of the imitation weight that imitation_filter leaves (/<task>)",
    "training/teacher_alignment": "correlation of reward and log q - log pi, among the responses to a prompt, in the "
    "steps before this one (/<task>): below 0, what the teacher prefers earns less",
    "training/failed_rewards": "responses of the step whose reward could not be made (on_failed_reward)",
    "training/failed_rollouts": "responses of the step that the rollout server did not give (on_failed_rollout)",
    "training/dropped_responses": "responses of the step that nothing is learnt from: all of a group where one failed",
    "training/skipped_steps": "steps whose update Megatron skipped",
    "training/infinite_kl_tokens": "response tokens of infinite divergence, which gives them no dense gradient: the "
    "teacher forbids what the student may say (see teacher_logit_floor), or under forward_kl the other way round",
    "val/score": "held-out reward per response (and /<task>)",
    "val/rewards": "held-out score of each of several rewards (/<reward>/mean and /<reward>/<task>)",
    "val/kl": "held-out reverse KL to the teacher, nats per response token; of a topk payload its lower bound",
    "val/kl_per_response": "held-out reverse KL of a whole response (trajectory), nats",
    "val/entropy": "held-out entropy, nats per response token",
    "val/response_length": "held-out response length, tokens",
}
"""Every name a run reports, or its stem, and what it means; users know most of them from other trainers."""


class Metrics:
    """The scalars of one step on one rank. Adding to a name again accumulates (micro-batches)."""

    def __init__(self) -> None:
        self._kinds: dict[str, Kind] = {}
        self._sums: dict[str, Tensor] = {}  # mean: weighted sum; sum: sum
        self._weights: dict[str, Tensor] = {}  # mean only
        self._peaks: dict[str, Tensor] = {}  # max, and min negated

    def mean(self, name: str, values: Tensor | float, *, weights: Tensor | float = 1.0) -> None:
        """Adds to a weighted mean.

        values   any shape; a value of weight 0 is never looked at, NaN included
        weights  broadcasts to values: a mask, or the number of things a value already averages
        """
        self._claim(name, "mean")
        x = _fp64(values)
        w = _fp64(weights).to(x.device).expand_as(x)
        self._sums[name] = self._sums.get(name, 0.0) + torch.where(w != 0, x * w, 0.0).sum()
        self._weights[name] = self._weights.get(name, 0.0) + w.sum()

    def sum(self, name: str, values: Tensor | float) -> None:
        """Adds to a sum over everything."""
        self._claim(name, "sum")
        self._sums[name] = self._sums.get(name, 0.0) + _fp64(values).sum()

    def max(self, name: str, values: Tensor | float) -> None:
        """Raises a maximum; an empty tensor declares the name and changes nothing."""
        self._claim(name, "max")
        self._peak(name, _fp64(values))

    def min(self, name: str, values: Tensor | float) -> None:
        """Lowers a minimum; an empty tensor declares the name and changes nothing."""
        self._claim(name, "min")
        self._peak(name, -_fp64(values))

    def spread(self, name: str, values: Tensor, *, mask: Tensor | None = None) -> None:
        """`name/mean`, `name/max` and `name/min` of the values where mask (bool, same shape; None: all) is True."""
        x = _fp64(values)
        kept = torch.ones_like(x, dtype=torch.bool) if mask is None else mask
        # where, not x[mask]: the number of True is unknown on the host, indexing would wait for the device.
        self.mean(f"{name}/mean", x, weights=kept)
        self.max(f"{name}/max", torch.where(kept, x, -math.inf))
        self.min(f"{name}/min", torch.where(kept, x, math.inf))

    def reduce(self, group: Group = None, *, device: torch.device | str | None = None) -> dict[str, float]:
        """The scalars over all ranks of `group`, equal on each, in the order of this rank's first mention.

        group   None: this rank alone, no collective (not torch's default group)
        device  where the group communicates; None: the accelerator under NCCL, else the CPU
        A mean of no weight and a maximum of no value are NaN; a NaN anywhere makes its own name NaN, no other.
        Collectives: MAX [512] fp64, then SUM [sums + 2 * means] fp64.
        """
        if device is None:
            nccl = group is not None and "nccl" in dist.get_backend(group)
            device = torch.device("cuda", torch.cuda.current_device()) if nccl else "cpu"
        peaks = sorted(self._peaks)
        sums = sorted(self._sums)
        weights = sorted(self._weights)

        high = self._max_vector(peaks, device)
        if group is not None:
            dist.all_reduce(high, dist.ReduceOp.MAX, group=group)
        hashes, values, is_nan = high[:2], high[2 : 2 + len(peaks)], high[2 + len(peaks) : 2 + 2 * len(peaks)]
        if hashes[0] != -hashes[1]:
            self._raise_different_names(group)
        total = _packed([self._sums[n] for n in sums] + [self._weights[n] for n in weights], device)
        if group is not None:
            dist.all_reduce(total, dist.ReduceOp.SUM, group=group)

        values = torch.where((is_nan > 0) | values.isinf() & (values < 0), math.nan, values)
        reduced = dict(zip(peaks, values.tolist(), strict=True))
        numbers = total.tolist()
        reduced |= dict(zip(sums, numbers[: len(sums)], strict=True))
        for name, weight in zip(weights, numbers[len(sums) :], strict=True):
            reduced[name] = reduced[name] / weight if weight else math.nan
        return {n: -reduced[n] if kind == "min" else reduced[n] for n, kind in self._kinds.items()}

    def _claim(self, name: str, kind: Kind) -> None:
        known = self._kinds.setdefault(name, kind)
        if known != kind:
            raise HybridError(
                f"metric {name!r} was collected as a {known} and now as a {kind}: one name has one reduction. "
                "Give the second one a name of its own."
            )

    def _peak(self, name: str, values: Tensor) -> None:
        high = values.max() if values.numel() else values.new_tensor(-math.inf)
        known = self._peaks.get(name)
        self._peaks[name] = high if known is None else torch.maximum(known, high)

    def _max_vector(self, peaks: list[str], device: torch.device | str) -> Tensor:
        """[512] fp64: hash and negated hash of the names, the maxima, their NaN flags (MAX itself may swallow NaN)."""
        if 2 + 2 * len(peaks) > MAX_SLOTS:
            raise HybridError(
                f"{len(peaks)} maxima and minima were collected in one step, at most {(MAX_SLOTS - 2) // 2} fit into "
                "the one collective that reduces them. Collect fewer names, or raise metrics.MAX_SLOTS."
            )
        names = "\n".join(f"{kind} {name}" for name, kind in sorted(self._kinds.items()))
        # 48 bits: fp64 holds every integer below 2**53 exactly, also negated.
        code = float(int.from_bytes(hashlib.sha256(names.encode()).digest()[:6], "big"))
        vector = torch.full((MAX_SLOTS,), -math.inf, dtype=torch.float64, device=device)
        vector[:2] = torch.tensor([code, -code], dtype=torch.float64)
        values = _packed([self._peaks[n] for n in peaks], device)
        vector[2 : 2 + len(peaks)] = values.nan_to_num(nan=-math.inf, posinf=math.inf, neginf=-math.inf)
        vector[2 + len(peaks) : 2 + 2 * len(peaks)] = values.isnan().double()
        return vector

    def _raise_different_names(self, group: Group) -> None:
        """Every rank comes here together, so one more collective may find out who lacks what."""
        held: list[set[str]] = [set() for _ in range(dist.get_world_size(group))]
        dist.all_gather_object(held, {f"{name} ({kind})" for name, kind in self._kinds.items()}, group=group)
        everything = set.union(*held)
        lacking = [(i, sorted(everything - have)) for i, have in enumerate(held)]
        missing = "; ".join(f"rank {i} lacks {', '.join(names)}" for i, names in lacking if names)
        raise HybridError(
            f"the ranks of a group hold different metrics: {missing} (ranks counted within the group). Numbers of one "
            "name would be added to another's. Declare every name on every rank, with weight 0 or an empty tensor "
            "where there is nothing to say."
        )


def _fp64(values: Tensor | float) -> Tensor:
    # Not as_tensor alone: it would round a Python float to fp32 first.
    return values.detach().double() if isinstance(values, Tensor) else torch.tensor(values, dtype=torch.float64)


def _packed(scalars: list[Tensor], device: torch.device | str) -> Tensor:
    if not scalars:
        return torch.zeros(0, dtype=torch.float64, device=device)
    return torch.stack([scalar.to(device) for scalar in scalars])
