"""A teacher's answers to recorded rollouts, once for all runs on them: its k likeliest tokens at every response token.

    torchrun --nproc-per-node 8 tools/precompute_teacher.py --store teacher-store \\
        --hybrid --hybrid-rollouts old.jsonl --hybrid-teacher-load models/teacher \\
        --hybrid-teacher-payload topk --hybrid-teacher-topk 64 --tensor-model-parallel-size 4 ... (the run's own flags)

The run then takes --hybrid-teacher-store teacher-store in the place of --hybrid-teacher-load, and holds no teacher. Any
TP x PP x DP will do here and another one there; on a machine without a GPU add --distributed-backend gloo. A store has
8 k + 16 bytes or so per response token: 53 GB for 100 million tokens at k = 64. What is in the files:
megatron_hybrid/teachers/store.py.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))


def add_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Ours and those of a run."""
    from megatron_hybrid.cli.arguments import add_hybrid_args

    group = parser.add_argument_group("store")
    group.add_argument(
        "--store", metavar="FOLDER", required=True, help="where the answers go, on a disk all ranks share"
    )
    return add_hybrid_args(parser)


def main() -> None:
    """Checks, starts Megatron, asks the teacher; a mistake ends with one sentence and status 1."""
    if {"-h", "--help"} & set(sys.argv[1:]):
        parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
        add_arguments(parser).print_help()
        return
    from megatron_hybrid.cli import program

    program.run(work_out, add_arguments)


def work_out(args: argparse.Namespace) -> None:
    """The store that the arguments ask for."""
    import torch.distributed as dist

    from megatron_hybrid.mcore.symbols import borrow
    from megatron_hybrid.train.precompute import precompute, prepare_store

    prepared = prepare_store(args, args.store)
    borrow("megatron.training.training", "initialize_megatron")()
    precompute(prepared, args, args.store, lambda line: print(line, flush=True))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
