"""The runs of the study of training: which methods, with which flags, on the real trainer, one after another.

    small world (study_world.py) + flags of a method + seed ─► pretrain_hybrid on one rank ─► runs' own metrics.jsonl

Every run has the same student, teacher, questions, rollouts, learning rate and evaluations; a seed draws questions and
responses. Methods that are no setting of the product put others' credit (study_estimators.py) in the place of its own;
everything else of those runs is the product's. Collectives: those of a job of one rank.
"""

import contextlib
import logging
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

DIGITS = 3
REWARDS = {"share": "share_right", "exact": "all_right"}
"""Of places that are right; or of all of them at once."""
EVALUATED = 128
"""Held-out responses of an evaluation."""


@dataclass(frozen=True)
class Method:
    """One line of the tables."""

    flags: str
    others: str = ""
    """A kind of `study_estimators.Others` in the place of the product's credit."""
    baseline: bool = True
    """What ours is to beat, and not ours."""


def methods(steps: int, beta: float) -> dict[str, Method]:
    """By name; lambda is 1, and schedules turn over half of the run."""
    both = f"--hybrid-reward-weight 1 --hybrid-imitation-weight {beta}"
    half = steps // 2
    first_imitate = (
        f"--hybrid-reward-weight-schedule linear:0:{half} --hybrid-imitation-weight-schedule linear:1:{half}"
    )
    return {
        "reward alone, RLOO": Method("--hybrid-reward-weight 1 --hybrid-imitation-weight 0 --hybrid-baseline rloo"),
        "GRPO, k3 in the loss": Method(f"{both} --hybrid-baseline grpo", others="k3_loss"),
        "KL in the reward, RLOO": Method(f"{both} --hybrid-baseline rloo", others="kl_in_reward"),
        "distillation": Method("--hybrid-reward-weight 0 --hybrid-imitation-weight 1 --hybrid-discount 0"),
        "paper's hybrid": Method(f"{both} --hybrid-future-cost sampled --hybrid-cost-baseline none"),
        "one-step hybrid": Method(f"{both} --hybrid-discount 0", baseline=False),
        "full hybrid": Method(both, baseline=False),
        "full hybrid, imitation first": Method(f"{both} {first_imitate}", baseline=False),
    }


def flags_of(world: Path, method: Method, folder: Path, *, seed: int, about: dict[str, Any]) -> list[str]:
    """The whole command line of a run; `about` is the settings that all runs share."""
    from megatron_hybrid.checkpoint.hf_config import megatron_flags
    from megatron_hybrid.mcore.checkpoint_io import load_megatron_args

    common = """
        --load {world}/student --finetune --tokenizer-type HuggingFaceTokenizer --tokenizer-model {world}/tokenizer
        --hybrid --hybrid-teacher-load {world}/teacher --hybrid-reward study_world:{reward}
        --hybrid-prompts {world}/prompts-{digits}.jsonl --hybrid-eval-prompts {world}/held_out-{digits}.jsonl
        --hybrid-group-size 4 --hybrid-max-response-length {longest} --hybrid-run-dir {folder}
        --hybrid-gradient-norms-interval 1000 --hybrid-samples-interval 1000
        --seq-length 16 --micro-batch-size {batch} --global-batch-size {batch} --train-iters {steps} --seed {seed}
        --lr {lr} --min-lr {lr} --weight-decay 0 --clip-grad 1 --log-interval 1000
        --eval-interval {interval} --eval-iters {evaluations}
        --ckpt-format torch_dist --distributed-backend gloo --transformer-impl local --num-workers 0
        --no-persist-layer-norm --no-gradient-accumulation-fusion --no-masked-softmax-fusion --no-bias-swiglu-fusion
        --no-rope-fusion
    """
    values = about | {
        "world": world,
        "folder": folder,
        "seed": seed,
        "reward": REWARDS[about["reward"]],
        "digits": DIGITS,
        "longest": DIGITS + 1,
        "interval": max(1, about["steps"] // 10),
        "evaluations": max(1, EVALUATED // about["batch"]),
    }
    words = [word.format(**values) for word in common.split()]  # split first: a path may have spaces
    return [*megatron_flags(load_megatron_args(world / "student")), *words, *method.flags.split()]


def train(argv: list[str], others: str, log: str) -> None:
    """A job of a pool: one run, whose own words go to `log`."""
    from megatron.core.enums import ModelType
    from megatron.training.argument_utils import gpt_config_from_args, pretrain_cfg_container_from_args
    from megatron.training.arguments import parse_and_validate_args

    import megatron_hybrid as mh

    mh.cpu.enable()
    logging.disable(logging.WARNING)
    with (
        open(log, "w", encoding="utf-8") as out,
        contextlib.redirect_stdout(out),
        mock.patch.object(sys, "argv", ["study", *argv]),
        credit_of_others(others),
    ):
        args = parse_and_validate_args(mh.add_hybrid_args)
        container = pretrain_cfg_container_from_args(args, gpt_config_from_args(args))
        mh.pretrain_hybrid(container, None, ModelType.encoder_or_decoder, mh.HybridForwardStep())


@contextlib.contextmanager
def credit_of_others(kind: str) -> Iterator[None]:
    """While inside, the trainer's credit is that of another's formula; with no kind, its own."""
    if not kind:
        yield
        return
    from study_estimators import Others

    from megatron_hybrid.train import loop
    from megatron_hybrid.train.credit import Credit, Scored

    class OthersCredit(Credit):
        def credit_for(self, scored: Scored, *, step: int, metrics: Any) -> Any:
            now = self.config.at(step)
            return Others(kind, now.reward_weight, now.imitation_weight, now.baseline).credit_for(scored)

    with mock.patch.object(loop, "Credit", OthersCredit):
        yield
