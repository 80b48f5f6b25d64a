"""Steps whose gradient is not finite: skipped, their batches kept to look at, and the run ended after some in a row.

    nonfinite/step_0000012/rank_3.safetensors   what this replica learnt from: tokens [b, s], masks, rewards [b],
                                                advantages, and what the loss said of each response token [n]
    nonfinite/step_0000012/rank_3.json          prompts and responses, extremes, which parameters

That nobody takes the step is the work of `mcore/finite_steps.py`. Written by the first tensor-parallel rank of each
replica's last pipeline stage, the newest steps only. What fp16's loss scaler skips, looking for its scale, is not
counted here. Those in a row go into Megatron's checkpoint: a run that is started again every few steps ends as well.
Collectives: one gathering of names and extremes over all ranks, in a step that was skipped; no other step has any.
"""

from __future__ import annotations

import logging
import math
import shutil
from collections import deque
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_hybrid.errors import DivergedError
from megatron_hybrid.mcore.finite_steps import finite_steps_only, nonfinite_parameters
from megatron_hybrid.parallel import ParallelContext
from megatron_hybrid.records import HybridMicrobatch, TokenNumbers
from megatron_hybrid.schedule.microbatch import rows_of_tokens
from megatron_hybrid.train import journal
from megatron_hybrid.train.credit import Scored
from megatron_hybrid.train.outlets import Outlet

logger = logging.getLogger(__name__)

KEPT_STEPS = 10
"""Newest steps whose batches stay; more where a run may have more in a row."""
NAMED_PARAMETERS = 8

Range = tuple[float, float]


@dataclass(frozen=True)
class Batch:
    """What this rank of the last stage learnt from in a step."""

    scored: Scored
    batches: Sequence[HybridMicrobatch]
    numbers: Sequence[TokenNumbers]

    def tensors(self) -> dict[str, Tensor]:
        """Rollouts and credit by sequence; numbers by token, `row_of_token` says whose, `position_of_token` where."""
        rollouts, scored = self.scored.rollouts, self.scored
        by_sequence = {
            "tokens": rollouts.tokens,
            "response_mask": rollouts.response_mask,
            "sampled_logprobs": rollouts.sampled_logprobs,
            "group_id": rollouts.group_id,
            "rewards": scored.rewards,
            "advantages": scored.advantages,
            **{f"rewards/{name}": scores for name, scores in scored.breakdown.items()},
        }
        by_token = {
            "row_of_token": rows_of_tokens(self.batches),
            "position_of_token": torch.cat([batch.position_of_token for batch in self.batches]),
            **{
                f"token/{name}": torch.cat([getattr(numbers, name) for numbers in self.numbers])
                for name in ("kl", "divergence", "log_prob", "teacher_log_prob", "imitation_weight", "advantage")
            },
        }
        present = {name: tensor for name, tensor in by_sequence.items() if tensor is not None}
        return {name: tensor.detach().contiguous().cpu() for name, tensor in (present | by_token).items()}

    def about(self) -> dict[str, Any]:
        """Prompts and responses in words, and where they come from."""
        rollouts = self.scored.rollouts
        rows = zip(rollouts.prompts, rollouts.responses, rollouts.truncated, strict=True)
        return {
            "policy_version": rollouts.policy_version,
            "temperature": rollouts.temperature,
            "seed": rollouts.seed,
            "sequences": [
                {
                    "prompt_id": prompt.prompt_id,
                    "task": prompt.task,
                    "prompt": prompt.text,
                    "answer": prompt.answer,
                    "response": response,
                    "truncated": truncated,
                }
                for prompt, response, truncated in rows
            ],
        }


@dataclass(frozen=True)
class Skipped:
    """One skipped step, the same on every rank."""

    step: int
    gradient_norm: float
    parameters: tuple[str, ...]
    """Those whose gradient is not finite; none where only the sum of squares is too large for fp32."""
    extremes: dict[str, Range]
    """Smallest and largest reward, KL, log-probability and advantage; NaN where there is one."""

    def __str__(self) -> str:
        named = ", ".join(self.parameters[:NAMED_PARAMETERS]) or "no single parameter (their squares overflow fp32)"
        more = f" and {rest} more" if (rest := len(self.parameters) - NAMED_PARAMETERS) > 0 else ""
        ranges = "; ".join(f"{name} {low:.4g} to {high:.4g}" for name, (low, high) in self.extremes.items())
        return f"step {self.step}, gradient norm {self.gradient_norm}, in {named}{more}; {ranges}"


class NonFiniteSteps:
    """Of one run on one rank.

    limit   skipped steps in a row after which the run stops; 0: none is skipped, Megatron's own check is in force
    folder  the run folder
    fresh   the run begins: batches of an earlier one in this folder are moved aside, by one rank
    says    this is the rank that does so, and that tells what happens
    """

    def __init__(
        self, limit: int, folder: str | Path, parallel: ParallelContext, *, fresh: bool = False, says: bool = False
    ) -> None:
        self.limit = limit
        self.folder = Path(folder) / "nonfinite"
        self.parallel = parallel
        self._says = says
        self._norm: float | None = None
        self._parameters: list[str] = []
        self._in_a_row: deque[Skipped] = deque()
        self._files = Outlet(str(self.folder), "the batches of skipped steps may be missing there")
        if fresh and says and self.folder.exists():
            aside = self.folder.with_name("nonfinite.dropped")
            shutil.rmtree(aside, ignore_errors=True)
            self._files.write(self.folder.rename, aside)

    def stepping(self, model: list[torch.nn.Module], optimizer: Any) -> AbstractContextManager[None]:
        """What Megatron's step happens in."""
        self._norm, self._parameters = None, []
        return finite_steps_only(model, optimizer, partial(self._found, model)) if self.limit else nullcontext()

    def _found(self, model: list[torch.nn.Module], norm: float) -> None:
        self._norm, self._parameters = norm, nonfinite_parameters(model)

    def after_step(self, step: int, batch: Batch | None) -> None:
        """To be called on every rank after every step; collective where the step was skipped.

        batch  what this rank of the last stage learnt from

        Raises:
            DivergedError: on every rank, after `limit` such steps in a row.
        """
        if self._norm is None:
            self._in_a_row.clear()
            return
        skipped = self._gathered(step, self._norm, batch)
        self._in_a_row.append(skipped)
        if batch is not None and self.parallel.tp.rank == 0:
            self._files.write(self._save, skipped, batch)
        if self._says:
            logger.warning(
                "the gradient is not finite: %s. The step is skipped on every rank (%d of %d in a row); its batch is "
                "in %s",
                skipped,
                len(self._in_a_row),
                self.limit,
                self._folder_of(step),
            )
        if len(self._in_a_row) >= self.limit:
            self._stop()

    def state(self) -> list[dict[str, Any]]:
        """What a checkpoint keeps, equal on every rank: the skipped steps in a row that it is the end of."""
        return [asdict(skipped) for skipped in self._in_a_row]

    def load(self, state: Iterable[dict[str, Any]]) -> None:
        """Goes on from a checkpoint's state."""
        self._in_a_row = deque(Skipped(**skipped) for skipped in state)
        if self._in_a_row and self.limit and self._says:
            logger.warning(
                "the last %d steps before the checkpoint were skipped for a gradient that is not finite: they count "
                "among the %d in a row that end the run",
                len(self._in_a_row),
                self.limit,
            )

    def _gathered(self, step: int, norm: float, batch: Batch | None) -> Skipped:
        mine = (self._parameters, {} if batch is None else _extremes(batch))
        found: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(found, mine)
        extremes: dict[str, Range] = {}
        for _, of_rank in found:
            for name, (low, high) in of_rank.items():
                extremes[name] = _wider(extremes.get(name, (low, high)), (low, high))
        names = dict.fromkeys(name for names, _ in found for name in names)
        return Skipped(step, norm, tuple(names), extremes)

    def _save(self, skipped: Skipped, batch: Batch) -> None:
        from safetensors.torch import save_file

        folder = self._folder_of(skipped.step)
        folder.mkdir(parents=True, exist_ok=True)
        rank = dist.get_rank()
        save_file(batch.tensors(), folder / f"rank_{rank}.safetensors")
        journal.write_json(folder / f"rank_{rank}.json", {**asdict(skipped), "rank": rank, **batch.about()})
        for old in sorted(self.folder.glob("step_*"))[: -max(KEPT_STEPS, self.limit)]:
            shutil.rmtree(old, ignore_errors=True)  # another rank may be at it

    def _folder_of(self, step: int) -> Path:
        return self.folder / f"step_{step:07d}"

    def _stop(self) -> None:
        steps = [skipped.step for skipped in self._in_a_row]
        told = "\n".join(f"  {skipped}" for skipped in self._in_a_row)
        raise DivergedError(
            f"the gradient was not finite in {len(steps)} steps in a row, which were skipped: a gradient that is NaN "
            f"or infinite teaches nothing, and the weights are still those after step {steps[0] - 1}.\n{told}\n"
            f"The batches of these steps are in {self.folder}. Where they look as ever, the weights may have grown too "
            "large: go on from an earlier checkpoint with a lower --lr or --clip-grad. Where a KL or log-probability "
            "is not finite, look at its tokens. --hybrid-nonfinite-steps allows more in a row."
        )


def _extremes(batch: Batch) -> dict[str, Range]:
    tensors = batch.tensors()
    names = {"reward": "rewards", "KL": "token/kl", "log-probability": "token/log_prob", "advantage": "token/advantage"}
    chosen = {name: tensors[key] for name, key in names.items() if key in tensors}
    # min() and max() of a tensor that holds a NaN are NaN.
    return {name: (float(x.min()), float(x.max())) for name, x in chosen.items() if x.numel()}


def _wider(one: Range, other: Range) -> Range:
    numbers = (*one, *other)
    return (math.nan, math.nan) if any(map(math.isnan, numbers)) else (min(numbers), max(numbers))
