"""On which tasks imitation pays: where the responses that the teacher prefers earn more.

    D_i = log q(y_i) - log pi(y_i)                                  of a whole response, nats; as the teacher reads it
    C_k = mean over responses of task k of (r_i - r)(D_i - D)       r, D: means of the group (the same prompt)

From the student towards the teacher, along pi^(1-e) q^e, the expected reward changes by Cov_pi(r, D), which C_k
estimates: exact at e = 0. Where it is negative, being drawn to the teacher costs reward, and the imitation weight of
that task is multiplied by a floor; elsewhere, and where nothing is known (all responses earn the same, which is where
the teacher is needed most), it stays.

The idea is the Q-filter's, which imitates a demonstrator only where it is the better one (Nair et al. 2018, arXiv
1709.10089), with a task in the place of a state, and log-probs that the loss has anyway in the place of a critic.

    rewards, D, groups, tasks [b] of a step ─► TaskFilter.updated ─► shares of the NEXT steps' weights, by task

A step's weights know earlier steps only: its gradient is, without bias, that of E[beta f_k KL - lambda r] with f_k as
they are. Collectives: two all-gathers, [b] fp32 over context-parallel ranks and [tasks, 4] fp64 over replicas.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Self

import torch
from torch import Tensor

from megatron_hybrid.collectives import sum_over_ranks
from megatron_hybrid.parallel import Group

_SUMS = ("covariance", "reward_variance", "preference_variance")


@dataclass(frozen=True)
class TaskFilter:
    """Running moments of each task; frozen, `updated` gives the next one."""

    tasks: tuple[str, ...]
    """Every task there can be, the same on every rank."""
    floor: float
    """Share of the imitation weight that is left where the teacher's preference costs reward, in [0, 1]."""
    decay: float
    """What a step keeps of the moments of those before it, in [0, 1)."""
    moments: dict[str, tuple[float, float, float]] = field(default_factory=dict)
    """Of tasks that were seen: exponential means of Cov(r, D), Var(r), Var(D), within groups."""

    def share(self, task: str) -> float:
        """What the imitation weight of this task is multiplied by: 1 or the floor."""
        return self.floor if self.moments.get(task, (0.0,))[0] < 0 else 1.0

    def shares(self, tasks: Sequence[str], device: torch.device | str = "cpu") -> Tensor:
        """[b] fp32: of responses to prompts of these tasks."""
        return torch.tensor([self.share(task) for task in tasks], dtype=torch.float32, device=device)

    def correlation(self, task: str) -> float | None:
        """Of reward and preference within groups, in [-1, 1]; None: one of them never differed, or nothing was seen."""
        covariance, rewards, preferences = self.moments.get(task, (0.0, 0.0, 0.0))
        return covariance / (rewards * preferences) ** 0.5 if rewards > 0 and preferences > 0 else None

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

        rewards     [b]
        preference  [b] nats: D_i, or this context-parallel rank's part of it
        group_id    [b]; groups are whole
        tasks       b names
        kept        [b] bool: responses that count; None: all
        A group in which a response has no finite preference (the teacher forbids it) does not count. Ranks of cp_group
        and dp_group must all call.
        """
        preference = sum_over_ranks(preference.detach().float(), cp_group)
        values = torch.stack([rewards.detach().to(preference).double(), preference.double()])
        known = values.isfinite().all(dim=0) if kept is None else values.isfinite().all(dim=0) & kept
        _, group = group_id.unique(return_inverse=True)
        lost = torch.zeros(int(group.max()) + 1, dtype=torch.bool, device=group.device)
        lost[group[~known]] = True
        values = torch.where(lost[group], 0.0, values)
        size = torch.zeros(len(lost), dtype=torch.float64, device=group.device)
        size.index_add_(0, group, torch.ones_like(values[0]))
        means = values.new_zeros(2, len(size)).index_add_(1, group, values) / size
        rest = torch.where(lost[group], 0.0, values - means[:, group])
        products = torch.stack([rest[0] * rest[1], rest[0] ** 2, rest[1] ** 2, (~lost[group]).double()], dim=1)
        number = torch.tensor([self.tasks.index(task) for task in tasks], device=products.device)
        sums = products.new_zeros(len(self.tasks), products.shape[1]).index_add_(0, number, products)
        moments, new = dict(self.moments), 1.0 - self.decay
        for task, (*of_task, count) in zip(self.tasks, sum_over_ranks(sums, dp_group).tolist(), strict=True):
            if count:
                before = moments.get(task, (0.0, 0.0, 0.0))
                covariance, reward, teacher = (
                    self.decay * old + new * total / count for old, total in zip(before, of_task, strict=True)
                )
                moments[task] = covariance, reward, teacher
        return replace(self, moments=moments)

    def state(self) -> dict[str, float]:
        """What a checkpoint keeps, as plain numbers: the same names whatever was seen."""
        return {
            f"{task}/{name}": value
            for task in self.tasks
            for name, value in zip(_SUMS, self.moments.get(task, (0.0, 0.0, 0.0)), strict=True)
        }

    def loaded(self, state: Mapping[str, float]) -> Self:
        """Goes on exactly where `state` was taken; tasks that it does not have start anew."""
        moments = {
            task: (state[f"{task}/covariance"], state[f"{task}/reward_variance"], state[f"{task}/preference_variance"])
            for task in self.tasks
            if f"{task}/covariance" in state
        }
        return replace(self, moments=moments)
