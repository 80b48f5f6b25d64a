"""A name for what token ids mean, so that a teacher with other ids is refused instead of imitated.

sha256 over the sorted (token, id) pairs and the special tokens that a run depends on. The padding token is left out:
users set it to whatever they like, and a padded position is never learnt from. Needs no torch.
"""

import hashlib
import json
from typing import Any

from megatron_hybrid.errors import DataError

_SPECIAL = ("bos_token", "eos_token", "unk_token")


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """64 hexadecimal digits, equal for tokenizers that give every token the same id.

    tokenizer  a Hugging Face tokenizer, or Megatron's wrapper, which keeps one in `tokenizer` or `_tokenizer`
    """
    inner = tokenizer
    while not hasattr(inner, "get_vocab"):
        inner = getattr(inner, "_tokenizer", None) or getattr(inner, "tokenizer", None)
        if inner is None:
            raise DataError(
                f"{type(tokenizer).__name__} has no get_vocab(), so what its ids mean cannot be read. "
                "Use a Hugging Face tokenizer (--tokenizer-type HuggingFaceTokenizer)."
            )
    special = {name: getattr(inner, name, None) for name in _SPECIAL}
    text = json.dumps(
        [
            sorted(inner.get_vocab().items()),
            {name: None if token is None else str(token) for name, token in special.items()},
        ]
    )
    return hashlib.sha256(text.encode("utf-8")).hexdigest()
