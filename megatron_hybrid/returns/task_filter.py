"""On which tasks imitation pays: where the responses that the teacher prefers earn more.

    D_i = log q(y_i) - log pi(y_i)                                  of a whole response, nats; as the teacher reads it
    C_k = mean over responses of task k of (r_i - r)(D_i - D)       r, D: means of the group (the same prompt)

From the student towards the teacher, along pi^(1-e) q^e, the expected reward changes by Cov_pi(r, D) at e = 0. C_k has
its sign: on-policy E C_k = (1 - 1/n) Cov_pi(r, D) in groups of n, because the means contain i. Where it is negative,
being drawn to the teacher costs reward, and the imitation weight of that task is multiplied by a floor; elsewhere, and
where nothing is known (all responses earn the same, which is where the teacher is needed most), it stays.

The idea is the Q-filter's, which imitates a demonstrator only where it is the better one (Nair et al. 2018, arXiv
1709.10089), with a task in the place of a state, and log-probs that the loss has anyway in the place of a critic.

    rewards, D, groups, tasks [b] of a step ─► TaskFilter.updated ─► shares of the NEXT steps' weights, by task

A step's weights know earlier responses only: its gradient is, without bias, that of E[beta f_k KL - lambda r] with f_k
as they are. Not so in later epochs of a collection, whose weights know its first. Responses of another policy mu give
Cov_mu; nothing is reweighted.

Every rank of a model must come to the same side of 0: sums are made on the CPU, in one order, of numbers that are equal
on tensor-parallel ranks. Collectives: two all-gathers, [b] fp32 over context-parallel ranks and [tasks, 4] fp64 over
replicas.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Self

import torch
from torch import Tensor

from megatron_hybrid.collectives import sum_over_ranks
from megatron_hybrid.parallel import Group
from megatron_hybrid.returns.baselines import group_mean

_MOMENTS = ("covariance", "reward_variance", "preference_variance")
_UNSEEN = (0.0, 0.0, 0.0)


@dataclass(frozen=True)
class TaskFilter:
    """Running moments of each task; frozen, `updated` gives the next one."""

    tasks: tuple[str, ...]
    """Every task there can be, the same on every rank."""
    floor: float
    """Share of the imitation weight that is left where the teacher's preference costs reward, in [0, 1]."""
    decay: float
    """What a step keeps of the moments of those before it, in [0, 1)."""
    moments: dict[str, tuple[float, ...]] = field(default_factory=dict)
    """Of tasks that were seen: exponential means of Cov(r, D), Var(r), Var(D), within groups."""

    def share(self, task: str) -> float:
        """What the imitation weight of this task is multiplied by: 1 or the floor."""
        covariance, _, _ = self.moments.get(task, _UNSEEN)
        return self.floor if covariance < 0 else 1.0

    def shares(self, tasks: Sequence[str], device: torch.device | str = "cpu") -> Tensor:
        """[b] fp32: of responses to prompts of these tasks."""
        return torch.tensor([self.share(task) for task in tasks], dtype=torch.float32, device=device)

    def correlation(self, task: str) -> float | None:
        """Of reward and preference within groups, in [-1, 1]; None: one of them never differed, or nothing was seen."""
        covariance, of_reward, of_preference = self.moments.get(task, _UNSEEN)
        return covariance / (of_reward * of_preference) ** 0.5 if of_reward > 0 and of_preference > 0 else None

    def updated(
        self,
        rewards: Tensor,
        preference: Tensor,
        group_id: Tensor,
        tasks: Sequence[str],
        *,
        kept: Tensor | None = None,
        cp_group: Group = None,
        dp_group: Group = None,
    ) -> Self:
        """With one more step, of b responses on each replica; waits for the device.

        rewards     [b], where the groups communicate
        preference  [b] fp32, nats, on the CPU: D_i, or this context-parallel rank's part of it
        group_id    [b]; groups are whole, each of one task
        tasks       b names; those of a task that is none of `self.tasks` do not count
        kept        [b] bool: responses that count; None: all
        A group in which a response has no finite preference (the teacher forbids it) does not count. Ranks of cp_group
        and dp_group must all call.
        """
        device = rewards.device
        preference = sum_over_ranks(preference.detach().to(device), cp_group).cpu().double()
        rewards, group_id = rewards.detach().cpu().double(), group_id.cpu()
        place = {task: number for number, task in enumerate(self.tasks)}
        task_of = torch.tensor([place.get(task, -1) for task in tasks])
        known = rewards.isfinite() & preference.isfinite() & (task_of >= 0)
        if kept is not None:
            known &= kept.cpu()
        counts = ~torch.isin(group_id, group_id[~known])
        _, group, size = group_id[counts].unique(return_inverse=True, return_counts=True)
        r, d = (of - group_mean(of, group, size) for of in (rewards[counts], preference[counts]))
        products = torch.stack([r * d, r * r, d * d, torch.ones_like(r)], dim=1)
        sums = torch.zeros(len(self.tasks), 4, dtype=torch.float64).index_add_(0, task_of[counts], products)
        moments, decay = dict(self.moments), self.decay
        for task, (*of_task, count) in zip(self.tasks, sum_over_ranks(sums.to(device), dp_group).tolist(), strict=True):
            if count:
                pairs = zip(moments.get(task, _UNSEEN), of_task, strict=True)
                moments[task] = tuple(decay * before + (1 - decay) * total / count for before, total in pairs)
        return replace(self, moments=moments)

    def state(self) -> dict[str, float]:
        """What a checkpoint keeps, as plain numbers: the same names whatever was seen."""
        return {
            f"{task}/{name}": value
            for task in self.tasks
            for name, value in zip(_MOMENTS, self.moments.get(task, _UNSEEN), strict=True)
        }

    def loaded(self, state: Mapping[str, float]) -> Self:
        """Goes on exactly where `state` was taken; tasks that it does not have start anew."""
        known = [task for task in self.tasks if f"{task}/{_MOMENTS[0]}" in state]
        return replace(self, moments={task: tuple(state[f"{task}/{name}"] for name in _MOMENTS) for task in known})
