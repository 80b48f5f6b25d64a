"""The same curve from a whole model and from a pipeline of two halves: Megatron's own 1F1B schedule, no GPU.

    python examples/4_pipeline_parallel.py        three quarters of a minute on two cores, 2 GB

With --pipeline-model-parallel-size 2 the first process holds the embedding and one layer, the second the other layer
and the LM head. The schedule is Megatron's; what is ours happens around its call (schedule/inject.py): rollouts pass
through the stages token by token, the teacher's pass is a forward-only run of the same schedule, and credit and loss
are on the last stage, where the logits are. Four micro-batches a step, so that both stages have work at once.

The student starts as the teacher of tiny_world.py: it knows how answers look, and the reward teaches it which is right.
What the runs leave is in runs/4_pipeline_parallel. Further flags go to Megatron, of both runs.
"""

import tiny_world

import megatron_hybrid as mh

FLAGS = """
    --hybrid --hybrid-reward-weight 1 --hybrid-imitation-weight 0.1 --micro-batch-size 32
    --hybrid-group-size 8 --hybrid-max-response-length 4 --train-iters 20 --eval-iters 0
"""


def main() -> None:
    mh.cpu.enable()
    layouts = {"one stage": (1, ""), "two stages": (2, "--pipeline-model-parallel-size 2")}
    tiny_world.compare("4_pipeline_parallel", FLAGS, layouts)


if __name__ == "__main__":
    main()
