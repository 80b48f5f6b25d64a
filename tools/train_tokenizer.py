"""A tokenizer of one's own: a sentencepiece model from files of text, as Megatron's --tokenizer-type
SentencePieceTokenizer reads it.

    python tools/train_tokenizer.py --input corpus.jsonl --save tokenizer.model --vocab-size 32000

Texts are one a line, or the "text" of each line of a .jsonl file. What every text gives back exactly: no
normalisation, spaces kept, digits one by one, unknown characters as bytes, a line break as one token. End of sequence
is </s>. Of a corpus with more lines than --max-sentences as many are drawn at random.
"""

import argparse
import os
import random
import sys
from collections.abc import Iterable
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parent)]


def parser() -> argparse.ArgumentParser:
    main = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    main.add_argument("--input", type=Path, nargs="+", required=True, help="files of text")
    main.add_argument("--save", type=Path, required=True, help="the .model file to write")
    main.add_argument("--vocab-size", type=int, required=True, help="tokens, 256 bytes and 4 special ones among them")
    main.add_argument("--model-type", choices=("bpe", "unigram"), default="bpe")
    main.add_argument("--symbols", nargs="*", default=[], help="strings that are always one token, such as <|user|>")
    main.add_argument("--max-sentences", type=int, default=1_000_000, help="lines that are learnt from")
    return main


def main() -> int:
    args = parser().parse_args()
    from megatron_hybrid.errors import HybridError

    try:
        train(args)
    except HybridError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def train(args: argparse.Namespace) -> None:
    from corpus import texts
    from rich.console import Console

    from megatron_hybrid.errors import DataError

    try:
        import sentencepiece
    except ImportError as error:
        raise DataError(
            "the package sentencepiece is not installed: pip install 'megatron-hybrid[sentencepiece]'"
        ) from error
    if args.save.suffix != ".model" or args.save.exists():
        raise DataError(f"--save {args.save} should be the name of a new file that ends in .model.")
    lines = drawn((line for text in texts(args.input) for line in text.split("\n") if line), args.max_sentences)
    if not lines:
        raise DataError(f"{', '.join(map(str, args.input))} holds no text: there is nothing to learn from.")
    args.save.parent.mkdir(parents=True, exist_ok=True)
    unfinished = args.save.with_suffix(f".{os.getpid()}")
    try:
        with unfinished.open("wb") as file, Console(stderr=True).status(f"learning from {len(lines):,} lines"):
            sentencepiece.SentencePieceTrainer.train(
                sentence_iterator=iter(lines),
                model_writer=file,
                vocab_size=args.vocab_size,
                model_type=args.model_type,
                user_defined_symbols=["\n", *args.symbols],
                normalization_rule_name="identity",
                remove_extra_whitespaces=False,
                split_digits=True,
                byte_fallback=True,
                character_coverage=1.0,
                minloglevel=2,
            )
        unfinished.rename(args.save)
    except (RuntimeError, OSError) as error:
        raise DataError(
            f"sentencepiece cannot train {args.vocab_size} tokens on these {len(lines):,} lines: {error}. Fewer tokens "
            "need less text; 256 bytes, the special tokens and every character of the text are always among them."
        ) from error
    finally:
        unfinished.unlink(missing_ok=True)
    report(args.save, lines[:: max(1, len(lines) // 1000)])


def drawn(lines: Iterable[str], count: int) -> list[str]:
    """`count` of the lines, each as likely as any other, the same in every run; all where there are no more."""
    draw, kept = random.Random(0), []
    for number, line in enumerate(lines):
        if number < count:
            kept.append(line)
        elif (place := draw.randrange(number + 1)) < count:
            kept[place] = line
    return kept


def report(model: Path, sample: list[str]) -> None:
    from megatron_hybrid.prompts.tokenizers import SentencePieceTokenizer

    tokenizer = SentencePieceTokenizer.read(str(model))
    characters, tokens = sum(map(len, sample)), sum(len(tokenizer(line)["input_ids"]) for line in sample)
    print(f"{model}: {len(tokenizer)} tokens, {characters / tokens:.2f} characters each on {len(sample)} of the lines")
    print("--tokenizer-type SentencePieceTokenizer --tokenizer-model", model)


if __name__ == "__main__":
    sys.exit(main())
