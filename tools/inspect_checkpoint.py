"""What a model folder holds, without loading it: parameters, shapes, dtypes, vocabulary, layout, iteration.

    python tools/inspect_checkpoint.py runs/first/checkpoints
    python tools/inspect_checkpoint.py runs/first/checkpoints/iter_0000060 --all
    python tools/inspect_checkpoint.py models/smollm2-hf

For Megatron's torch_dist checkpoints and Hugging Face folders with safetensors. A folder of iterations is read at its
latest. Seconds, whatever the size: only metadata is read.
"""

import argparse
import sys
import warnings
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))


def parser() -> argparse.ArgumentParser:
    main = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    main.add_argument("folder", type=Path, help="checkpoint folder, one iteration inside it, or a Hugging Face folder")
    main.add_argument("--all", action="store_true", help="also tensors of the optimizer, one a line")
    return main


def main() -> int:
    args = parser().parse_args()
    warnings.filterwarnings("ignore", module=r"(megatron|torch)\.")  # each GPU library that Megatron misses
    from megatron_hybrid.checkpoint.inspect import inspect_folder
    from megatron_hybrid.errors import HybridError

    try:
        found = inspect_folder(args.folder)
    except HybridError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(found.kind)
    for name, value in found.facts:
        print(f"  {name:<16}  {value}")
    shown = [entry for entry in found.tensors if args.all or entry.trained]
    width = max((len(entry.name) for entry in shown), default=0)
    for entry in shown:
        print(f"{entry.name:<{width}}  {entry.dtype:<8}  [{', '.join(map(str, entry.shape))}]")
    return 0


if __name__ == "__main__":
    sys.exit(main())
