"""The same curve from one process and from two: tensor parallelism, no GPU.

    python examples/3_tensor_parallel.py        three quarters of a minute on two cores, 2 GB

With --tensor-model-parallel-size 2 each process holds half of the vocabulary, of the student's logits and of the
teacher's. The op gathers 32 bytes per token between them and merges them in rank order; the gradient and the sampled
responses are those of one process. What differs is the rounding of sums that are now taken in two parts.

The student starts as the teacher of tiny_world.py: it knows how answers look, and the reward teaches it which is right.
What the runs leave is in runs/3_tensor_parallel. Further flags go to Megatron, of both runs.
"""

import tiny_world

import megatron_hybrid as mh

FLAGS = """
    --hybrid --hybrid-reward-weight 1 --hybrid-imitation-weight 0.1
    --hybrid-group-size 8 --hybrid-max-response-length 4 --train-iters 20 --eval-iters 0
"""


def main() -> None:
    mh.cpu.enable()
    layouts = {"one process": (1, ""), "two processes": (2, "--tensor-model-parallel-size 2")}
    tiny_world.compare("3_tensor_parallel", FLAGS, layouts)


if __name__ == "__main__":
    main()
