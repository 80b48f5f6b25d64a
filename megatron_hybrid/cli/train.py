"""`python -m megatron_hybrid.cli.train`, or `megatron-hybrid-train`: a whole online run from Megatron's command line.

Under torchrun or Slurm this is every rank's program. Megatron's own flags describe model, layout, optimizer and
checkpoints; `--hybrid-*` flags the method, prompts and teacher. On a machine without a GPU add
`--distributed-backend gloo`.
"""

from __future__ import annotations

import argparse
import sys

from megatron_hybrid.cli import program
from megatron_hybrid.cli.arguments import add_hybrid_args


def main() -> None:
    """Parses, checks, trains; a mistake in settings or data ends with one sentence and status 1."""
    if {"-h", "--help"} & set(sys.argv[1:]):
        show_help()
    else:
        program.run(train, add_hybrid_args)


def train(args: argparse.Namespace) -> None:
    """An online run.

    Raises:
        ConfigError: nothing is said of rollouts.
    """
    import megatron_hybrid as mh
    from megatron_hybrid.mcore.builder import pretrain_arguments
    from megatron_hybrid.mcore.symbols import borrow

    if not args.hybrid or (args.hybrid_prompts is None and args.hybrid_rollouts is None):
        raise mh.errors.ConfigError(
            "this program trains on rollouts and has no data of its own: give --hybrid, and --hybrid-prompts or "
            "--hybrid-rollouts. For a script with data use Megatron's pretrain_gpt.py, or put the hybrid step into "
            "it as the README shows."
        )
    mh.pretrain_hybrid(
        train_valid_test_dataset_provider=None,
        model_type=borrow("megatron.core.enums", "ModelType").encoder_or_decoder,
        forward_step_func=mh.HybridForwardStep(),
        **pretrain_arguments(args),
    )


def show_help() -> None:
    """Our flags, at once: Megatron takes seconds to load, and the help of 0.19.2 ends in an error (a bare % in it)."""
    parser = argparse.ArgumentParser(
        prog="megatron-hybrid-train",
        usage="%(prog)s [--hybrid ...] [Megatron's flags ...]",
        description="Trains online with the hybrid objective (arXiv 2512.23097), in Megatron's own loop.",
        epilog="Every other flag is Megatron's own, as in its pretrain_gpt.py. examples/6_smollm2_recovery.sh is a "
        "whole command line.",
    )
    add_hybrid_args(parser).print_help()


if __name__ == "__main__":
    main()
