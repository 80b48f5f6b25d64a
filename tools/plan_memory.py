"""Memory of a rank and messages of a step, on paper, for any student, teacher and layout.

python tools/plan_memory.py --student llama-70b --teacher llama-405b --ranks 1024 --tp 8 --pp 8 --cp 4
python tools/plan_memory.py --student-load DIR --teacher-load DIR --ranks 8 --tp 4 --pp 2 --response-tokens 1024
python tools/plan_memory.py --layers 24 --hidden 2048 --ffn 5632 --heads 16 --vocab 32000 --ranks 8 --tp 2

For the first and the last rank of a pipeline: weights, gradients and optimizer, the teacher's weights and what it
leaves, KV cache, activations, the LM head with the op; then what a step sends, ours and Megatron's apart. Nothing is
built or measured here; tests hold every formula of ours against a small real run. Activations are Megatron's estimate.
A model is a preset, the arguments in a torch_dist checkpoint, or its numbers one by one, which also change a preset.
"""

import argparse
import dataclasses
import logging
import sys
import warnings
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))  # so that a checkout needs no installation
sys.path.insert(0, str(Path(__file__).parent))
from plan_model import Layout, Plan, Step
from plan_shapes import PRESETS, Shape

from megatron_hybrid.config import LM_HEADS, ROLLOUT_CORRECTIONS, TEACHER_PAYLOADS, HybridConfig
from megatron_hybrid.errors import ConfigError, HybridError  # no torch, the configuration neither
from megatron_hybrid.online_config import OnlineConfig

NUMBERS = ("layers", "hidden", "ffn", "heads", "groups", "head_dim", "vocab")


def parser() -> argparse.ArgumentParser:
    """Every flag; those of the teacher are the student's with `teacher-` in front."""
    main = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for who, front in (("student", ""), ("teacher", "teacher-")):
        group = main.add_argument_group(who)
        group.add_argument(f"--{who}", choices=sorted(PRESETS), help="a known model")
        group.add_argument(f"--{who}-load", type=Path, metavar="DIR", help="its arguments from a torch_dist checkpoint")
        for name in NUMBERS:
            group.add_argument(f"--{front}{name.replace('_', '-')}", type=int, metavar="N")
        group.add_argument(
            f"--{front}tied", action="store_true", default=None, help="embedding and head are one weight"
        )
    layout = main.add_argument_group("layout")
    layout.add_argument("--ranks", type=int, default=1, help="world size")
    for axis in ("tp", "pp", "vpp", "cp"):
        layout.add_argument(f"--{axis}", type=int, default=1)
    layout.add_argument("--no-sequence-parallel", action="store_true", help="without --sequence-parallel; off at TP 1")
    step = main.add_argument_group("step")
    step.add_argument("--seq-length", type=int, default=4096, help="tokens of prompt and response")
    step.add_argument("--response-tokens", type=int, default=3072, help="of them the response's")
    step.add_argument("--responses", type=int, default=1024, help="of one optimizer step, all replicas together")
    step.add_argument("--group-size", type=int, default=HybridConfig.group_size, help="responses to one prompt")
    step.add_argument("--micro-batch", type=int, default=1, help="responses read at a time")
    step.add_argument("--rollout-batch", type=int, default=64, help="sequences decoded together on a replica")
    step.add_argument("--payload", choices=TEACHER_PAYLOADS, default="hidden", help="what the teacher leaves")
    step.add_argument("--topk", type=int, default=64)
    step.add_argument("--head", choices=LM_HEADS, default="fused", help="--hybrid-lm-head of the run")
    step.add_argument(
        "--chunk", type=int, metavar="N", help="--hybrid-lm-head-chunk-size; unset: the most that the trainer takes"
    )
    step.add_argument("--rollout-correction", choices=ROLLOUT_CORRECTIONS, default=HybridConfig.rollout_correction)
    step.add_argument("--prefix-correction", action="store_true")
    step.add_argument("--fp32", action="store_true", help="weights and activations in fp32, not bf16")
    step.add_argument("--no-distributed-optimizer", action="store_true")
    step.add_argument(
        "--no-gradient-norms",
        action="store_true",
        help=f"a step that does not measure them: one in {OnlineConfig.gradient_norms_interval} does by default",
    )
    step.add_argument("--make-vocab-size-divisible-by", type=int, default=128)
    return main


def shape_of(args: argparse.Namespace, who: str) -> Shape | None:
    """The model that the flags describe; None: no teacher was asked for.

    Raises:
        ConfigError: a student was not described, or not wholly.
    """
    front = "" if who == "student" else "teacher_"
    given: dict[str, Any] = {name: getattr(args, front + name) for name in (*NUMBERS, "tied")}
    given = {name: value for name, value in given.items() if value is not None}
    preset, folder = getattr(args, who), getattr(args, f"{who}_load")
    if preset and folder:
        raise ConfigError(f"--{who} {preset} and --{who}-load {folder} are two models: give one of them.")
    if folder is not None:
        from megatron_hybrid.mcore.checkpoint_io import load_megatron_args

        return dataclasses.replace(Shape.of_args(folder.name, load_megatron_args(folder)), **given)
    if preset is not None:
        return dataclasses.replace(PRESETS[preset], **given)
    if who == "teacher" and not given:
        return None
    missing = [name for name in ("layers", "hidden", "ffn", "heads", "vocab") if name not in given]
    if missing:
        flags = ", ".join(f"--{(front + name).replace('_', '-')}" for name in missing)
        raise ConfigError(
            f"the {who} is not described: {flags} missing. Give them, or a known model with --{who}, or a checkpoint "
            f"with --{who}-load."
        )
    return Shape(who, **({"groups": given["heads"], "head_dim": given["hidden"] // given["heads"]} | given))


def plan_of(args: argparse.Namespace) -> Plan:
    """The plan that the flags describe, checked."""
    student, teacher = shape_of(args, "student"), shape_of(args, "teacher")
    assert student is not None
    sequence_parallel = args.tp > 1 and not args.no_sequence_parallel
    step = Step(
        responses=args.responses,
        seq_length=args.seq_length,
        response_tokens=args.response_tokens,
        micro_batch=args.micro_batch,
        rollout_batch=args.rollout_batch,
        payload=args.payload,
        topk=args.topk,
        group_size=args.group_size,
        head=args.head,
        chunk=args.chunk,
        dtype_bytes=4 if args.fp32 else 2,
        distributed_optimizer=not args.no_distributed_optimizer,
        vocab_multiple=args.make_vocab_size_divisible_by,
        gradient_norms=not args.no_gradient_norms,
        rollout_correction=args.rollout_correction,
        prefix_correction=args.prefix_correction,
    )
    return Plan(student, teacher, Layout(args.ranks, args.tp, args.pp, args.vpp, args.cp, sequence_parallel), step)


def main() -> int:
    """Prints the plan, or one sentence about what does not fit."""
    args = parser().parse_args()
    try:
        plan = plan_of(args)
        from plan_report import show
    except HybridError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    show(plan)
    return 0


if __name__ == "__main__":
    logging.disable(logging.WARNING)  # torch's and Megatron's, about GPU libraries that nobody needs here
    warnings.simplefilter("ignore")
    sys.exit(main())
