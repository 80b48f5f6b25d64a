"""A student imitates its teacher on the student's own words: no reward, one process, no GPU.

    python examples/1_imitate_on_cpu.py        half a minute, 1.1 GB

The student starts from random weights and answers with noise. At every token it writes, the teacher's whole
distribution is there to be followed (reverse KL), and a later cost counts for the tokens that led to it. In the end it
answers as the teacher does: one day, then stop, and any day is as good as another. The reward is measured and not
trained (weight 0), so it ends where guessing among seven days ends.

Everything but FLAGS and the call is in tiny_world.py. Further flags go to Megatron. What the run leaves is in
runs/1_imitate_on_cpu.
"""

import sys

import tiny_world
from megatron.core.enums import ModelType
from megatron.training.argument_utils import gpt_config_from_args, pretrain_cfg_container_from_args
from megatron.training.arguments import parse_and_validate_args

import megatron_hybrid as mh

FLAGS = """
    --hybrid --hybrid-reward-weight 0 --hybrid-imitation-weight 1
    --hybrid-group-size 8 --hybrid-max-response-length 4
    --train-iters 60 --eval-iters 1 --hybrid-run-dir runs/1_imitate_on_cpu
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
