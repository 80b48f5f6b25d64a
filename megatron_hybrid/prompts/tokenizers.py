"""The tokenizer of an online run, of either kind that Megatron trains with, behind the few methods that a run asks for.

    HuggingFaceTokenizer      the folder's own, chat template and all
    SentencePieceTokenizer    a .model file of the sentencepiece library, with Megatron's ids; it has no chat template,
                              so prompts are plain text (`template.py`) and nothing is put before them

What a run asks for: len(), get_vocab(), eos_token_id, chat_template, tokenizer(text)["input_ids"] and
decode(ids, skip_special_tokens=True).
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_hybrid.errors import ConfigError, DataError

HUGGING_FACE = "HuggingFaceTokenizer"
SENTENCEPIECE = ("SentencePieceTokenizer", "GPTSentencePieceTokenizer", "Llama2Tokenizer")
"""Megatron's names, three for one thing since 0.19."""
READABLE = (HUGGING_FACE, *SENTENCEPIECE)


def read_tokenizer(kind: str, path: str) -> Any:
    """The tokenizer of `--tokenizer-type KIND --tokenizer-model PATH`, KIND one of READABLE.

    Raises:
        DataError: nothing can be read from there.
    """
    return SentencePieceTokenizer.read(path) if kind in SENTENCEPIECE else _read_hugging_face(path)


def _read_hugging_face(folder: str) -> Any:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise DataError(
            f"no tokenizer can be read from {folder!r}: {error}. Give the folder of a Hugging Face tokenizer."
        ) from error


class SentencePieceTokenizer:
    """A sentencepiece model with the methods of a transformers tokenizer that a run asks for.

    processor  a loaded sentencepiece.SentencePieceProcessor
    """

    chat_template = None

    def __init__(self, processor: Any) -> None:
        self._processor = processor
        self.bos_token, self.eos_token, self.unk_token = (
            None if token_id < 0 else processor.id_to_piece(token_id)
            for token_id in (processor.bos_id(), processor.eos_id(), processor.unk_id())
        )
        self.eos_token_id: int | None = None if processor.eos_id() < 0 else processor.eos_id()

    @classmethod
    def read(cls, path: str) -> "SentencePieceTokenizer":
        """The model in the file `path`."""
        try:
            from sentencepiece import SentencePieceProcessor
        except ImportError as error:
            raise ConfigError(
                f"{path} is to be read as a sentencepiece model, but the package is not installed: "
                "pip install 'megatron-hybrid[sentencepiece]'"
            ) from error
        if not Path(path).is_file():
            raise DataError(
                f"no sentencepiece model can be read from {path!r}: it is no file. Give the .model file that "
                "tools/train_tokenizer.py wrote."
            )
        try:
            return cls(SentencePieceProcessor(model_file=path))
        except RuntimeError as error:
            raise DataError(
                f"{path} is no sentencepiece model ({error}): give the .model file that tools/train_tokenizer.py wrote."
            ) from error

    def __len__(self) -> int:
        return int(self._processor.get_piece_size())

    def __call__(self, text: str) -> dict[str, list[int]]:
        return {"input_ids": list(self._processor.encode(text))}

    def get_vocab(self) -> dict[str, int]:
        return {self._processor.id_to_piece(token_id): token_id for token_id in range(len(self))}

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool) -> str:
        """The text of ids [length]; control tokens such as end of sequence have none."""
        assert skip_special_tokens, "sentencepiece gives control tokens no text"
        return str(self._processor.decode(list(ids)))
