"""The runs of the study of training: which methods, with which flags, on the real trainer, one after another.

    world of a setting (study_settings.py) + flags of a method + seed ─► pretrain_hybrid on one rank ─► metrics.jsonl

Every run of a setting has the same student, teacher, questions, rollouts and evaluations; a seed draws questions and
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

from study_settings import Setting

GRPO, FULL = "GRPO, k3 in the loss", "full hybrid"
FIRST_BETA = 10
"""Where beta falls, it falls from this many times itself."""
UP, FAR_UP, FLOOR = 3, 5, 0.1
"""Where the filter lets it, beta goes up this many times. Elsewhere a tenth of beta is left beside the first, as by
default, and beta itself beside the second."""
EVALUATIONS, EVALUATED = 10, 128
"""Of a run; held-out responses of each."""


@dataclass(frozen=True)
class Method:
    """One line of the tables."""

    flags: str
    others: str = ""
    """A kind of `study_estimators.Others` in the place of the product's credit."""
    pure: bool = True
    """Reward and teacher are not mixed in closed form: reinforcement, a KL penalty with it, or imitation alone."""
    ours: bool = False
    """The closed-form future cost or the filter of imitation, which are this product's."""


def methods(setting: Setting) -> dict[str, Method]:
    """By name; lambda is 1, and schedules turn over half of the run."""
    both = f"--hybrid-reward-weight 1 --hybrid-imitation-weight {setting.beta}"
    half = setting.steps // 2
    by_task = "--hybrid-imitation-filter task"
    beta_falls = f"--hybrid-imitation-weight-schedule linear:{FIRST_BETA * setting.beta:g}:{half}"
    first_imitate = (
        f"--hybrid-reward-weight-schedule linear:0:{half} --hybrid-imitation-weight-schedule linear:1:{half}"
    )

    def one_step(times: float, floor: float) -> Method:
        more = f"--hybrid-reward-weight 1 --hybrid-imitation-weight {times * setting.beta:g} --hybrid-discount 0"
        return Method(f"{more} {by_task} --hybrid-imitation-filter-floor {floor:g}", pure=False, ours=True)

    return {
        "reward alone, RLOO": Method("--hybrid-reward-weight 1 --hybrid-imitation-weight 0 --hybrid-baseline rloo"),
        GRPO: Method(f"{both} --hybrid-baseline grpo", others="k3_loss"),
        "KL in the reward, RLOO": Method(f"{both} --hybrid-baseline rloo", others="kl_in_reward"),
        "distillation": Method("--hybrid-reward-weight 0 --hybrid-imitation-weight 1 --hybrid-discount 0"),
        "paper's hybrid": Method(f"{both} --hybrid-future-cost sampled --hybrid-cost-baseline none", pure=False),
        "one-step hybrid": Method(f"{both} --hybrid-discount 0", pure=False),
        FULL: Method(both, pure=False, ours=True),
        "one-step hybrid, filtered": one_step(1, FLOOR),
        "one-step hybrid, filtered, beta up": one_step(UP, FLOOR / UP),
        "one-step hybrid, beta up by filter": one_step(FAR_UP, 1 / FAR_UP),
        "full hybrid, filtered": Method(f"{both} {by_task}", pure=False, ours=True),
        "full hybrid, beta falls": Method(f"{both} {beta_falls}", pure=False, ours=True),
        "full hybrid, imitation first": Method(f"{both} {first_imitate}", pure=False, ours=True),
    }


def flags_of(world: Path, method: Method, folder: Path, *, seed: int, lr: float, setting: Setting) -> list[str]:
    """The whole command line of a run."""
    from megatron_hybrid.checkpoint.hf_config import megatron_flags
    from megatron_hybrid.mcore.checkpoint_io import load_megatron_args

    common = """
        --load {world}/student --finetune --tokenizer-type HuggingFaceTokenizer --tokenizer-model {world}/tokenizer
        --hybrid --hybrid-teacher-load {world}/teacher --hybrid-group-size 4 --hybrid-run-dir {folder}
        --hybrid-gradient-norms-interval 1000 --hybrid-samples-interval 1000
        --micro-batch-size {batch} --global-batch-size {batch} --train-iters {steps} --seed {seed}
        --lr {lr} --min-lr {lr} --weight-decay 0 --clip-grad 1 --log-interval 1000
        --eval-interval {interval} --eval-iters {evaluations}
        --ckpt-format torch_dist --distributed-backend gloo --transformer-impl local --num-workers 0
        --no-persist-layer-norm --no-gradient-accumulation-fusion --no-masked-softmax-fusion --no-bias-swiglu-fusion
        --no-rope-fusion
    """
    values = {
        "world": world,
        "folder": folder,
        "seed": seed,
        "lr": lr,
        "batch": setting.batch,
        "steps": setting.steps,
        "interval": max(1, setting.steps // EVALUATIONS),
        "evaluations": max(1, EVALUATED // setting.batch),
    }
    words = [word.format(**values) for word in common.split()]  # split first: a path may have spaces
    of_model = megatron_flags(load_megatron_args(world / "student"))
    return [*of_model, *words, *setting.module.flags(world, setting), *method.flags.split()]


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
