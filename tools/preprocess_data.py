"""Texts to Megatron's indexed dataset, which --data-path reads: PREFIX.bin and PREFIX.idx.

    python tools/preprocess_data.py --input corpus.jsonl --output-prefix data/corpus \
        --tokenizer-type SentencePieceTokenizer --tokenizer-model tokenizer.model

Texts are one a line, or the "text" of each line of a .jsonl file; each becomes a document that ends in the
tokenizer's end of sequence. Dataset and tokenizers are Megatron's own. One process.
"""

import argparse
import logging
import sys
import warnings
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parent)]


def parser() -> argparse.ArgumentParser:
    main = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    main.add_argument("--input", type=Path, nargs="+", required=True, help="files of text")
    main.add_argument("--output-prefix", type=Path, required=True, help="as --data-path takes it")
    main.add_argument("--tokenizer-type", default="HuggingFaceTokenizer", help="as Megatron takes it")
    main.add_argument("--tokenizer-model", required=True, help="folder or file of the tokenizer")
    return main


def main() -> int:
    args = parser().parse_args()
    warnings.filterwarnings("ignore", module=r"(megatron|torch)\.")  # each GPU library that Megatron misses
    logging.disable(logging.WARNING)
    from megatron_hybrid.errors import HybridError

    try:
        documents, tokens = write(args)
    except HybridError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"{args.output_prefix}: {documents:,} documents, {tokens:,} tokens")
    return 0


def write(args: argparse.Namespace) -> tuple[int, int]:
    """Writes both files; returns the numbers of documents and of tokens."""
    import numpy
    from corpus import texts
    from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder, get_bin_path, get_idx_path
    from megatron.core.tokenizers.utils.build_tokenizer import build_tokenizer
    from megatron.training.config import TokenizerConfig

    from megatron_hybrid.errors import DataError

    prefix = str(args.output_prefix)
    if Path(get_idx_path(prefix)).exists():
        raise DataError(f"{get_idx_path(prefix)} is there already: choose another --output-prefix or remove it.")
    settings = TokenizerConfig(
        tokenizer_type=args.tokenizer_type, tokenizer_model=args.tokenizer_model, pad_vocab_size=False
    )
    try:
        tokenizer = build_tokenizer(settings)
    except Exception as error:  # whatever the tokenizer's library raises
        raise DataError(
            f"Megatron cannot read {args.tokenizer_model} as {args.tokenizer_type}: {error}. Give --tokenizer-type and "
            "--tokenizer-model as the training will have them."
        ) from error
    args.output_prefix.parent.mkdir(parents=True, exist_ok=True)
    builder = IndexedDatasetBuilder(get_bin_path(prefix), dtype=DType.optimal_dtype(tokenizer.vocab_size))
    documents = tokens = 0
    for text in texts(args.input):
        ids = [*tokenizer.tokenize(text), tokenizer.eod]
        builder.add_document(numpy.array(ids), [len(ids)])
        documents, tokens = documents + 1, tokens + len(ids)
    if not documents:
        raise DataError(f"{', '.join(map(str, args.input))} holds no text: there is nothing to train on.")
    builder.finalize(get_idx_path(prefix))  # last: a prefix with an index is a finished dataset
    return documents, tokens


if __name__ == "__main__":
    sys.exit(main())
