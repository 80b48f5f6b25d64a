"""Teacher and reward together: each teaches what the other does not know. One process, no GPU.

    python examples/2_hybrid_on_cpu.py        half a minute, 1.1 GB

The teacher knows how an answer looks and nothing of the calendar; the reward is 1 for the right day alone and 0 for
anything else, which a student with random weights almost never says. Together: imitation leads to answers of one word
within a few steps, and among those the reward finds the right one.

At the end nearly every held-out answer is right, and the reverse KL of a response is log 7 = 1.95 nats: what it costs
to say one day with certainty where the teacher gives each of seven the same chance. The best policy is in proportion to
teacher * exp(reward / imitation weight): with --hybrid-imitation-weight 1 the right day would get 31 %, with 0.1 all.

Everything but FLAGS and the call is in tiny_world.py. Further flags go to Megatron. What the run leaves is in
runs/2_hybrid_on_cpu.
"""

import sys

import tiny_world
from megatron.core.enums import ModelType
from megatron.training.argument_utils import gpt_config_from_args, pretrain_cfg_container_from_args
from megatron.training.arguments import parse_and_validate_args

import megatron_hybrid as mh

FLAGS = """
    --hybrid --hybrid-reward-weight 1 --hybrid-imitation-weight 0.1
    --hybrid-group-size 8 --hybrid-max-response-length 4
    --train-iters 100 --eval-iters 1 --hybrid-run-dir runs/2_hybrid_on_cpu
"""


def main() -> None:
    mh.cpu.enable()
    with tiny_world.world() as flags:
        sys.argv[1:1] = [*flags.split(), *FLAGS.split()]  # what you type comes last and wins
        args = parse_and_validate_args(mh.add_hybrid_args)
        container = pretrain_cfg_container_from_args(args, gpt_config_from_args(args))
        mh.pretrain_hybrid(container, None, ModelType.encoder_or_decoder, mh.HybridForwardStep())


if __name__ == "__main__":
    main()
