"""A teacher's answers on disk: its k likeliest tokens at every token of recorded responses, worked out once.

    tools/precompute_teacher.py -> StoreWriter -> FOLDER/*.safetensors -> StoredTeacher -> TopKPayload, as a live one's

Each file holds some whole responses, r of them with n tokens together:

    ids        [n, k] int32, likeliest first; -1 where the teacher forbids all others
    log_probs  [n, k] fp32, nats, at the temperature of the metadata
    offsets    [r + 1] int64: the tokens of response i are offsets[i] up to offsets[i + 1]
    keys       [r, 2] int64: which response it is, `response_key`
    sums       [r] int64: the beginning of the sha256 of each response's ids and log_probs
    metadata   k, temperature, tokenizer (its fingerprint), teacher (where it was loaded from), format; and the sha256
               of these, offsets, keys and sums

A response is known by what the teacher read: its prompt, with a hint where there is one, and the response itself. So
files may be in any order, made on any number of replicas, and serve a part of what they hold. Tensors are mapped, and
the rows of a micro-batch read when it is asked for; held are the keys, some 300 bytes a response on every rank. A file
that is cut off or whose index was altered is told when it is opened, an altered answer when it is read: a response of
500 tokens at k = 64 has 384 kB to be hashed, where hashing a whole store first would take as long as reading it. A disk
that all ranks share; no collective.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_hybrid.errors import ConfigError, DataError
from megatron_hybrid.records import HybridMicrobatch, Prompt, TopKPayload

FORMAT = "2"
TOKENS_PER_FILE = 1 << 18
"""At k = 64 a file has 134 MB, which is what a replica holds in memory while it writes."""

_AGAIN = "Copy the file again, or work the store out anew."

Key = tuple[int, int]


def response_key(prompt: Prompt) -> Key:
    """128 bits of what a teacher reads of a row: the prompt in front of its one recorded response."""
    (response,) = prompt.responses
    front = prompt.token_ids if prompt.teacher_token_ids is None else prompt.teacher_token_ids
    text = torch.tensor([len(front), *front, *response.token_ids], dtype=torch.int64).numpy().tobytes()
    digest = hashlib.sha256(text).digest()
    return int.from_bytes(digest[:8], "big", signed=True), int.from_bytes(digest[8:16], "big", signed=True)


def _answer_sum(ids: Tensor, log_probs: Tensor) -> int:
    """What stands in `sums` for one response: 64 bits, against accidents."""
    digest = hashlib.sha256(ids.numpy().tobytes())
    digest.update(log_probs.numpy().tobytes())
    return int.from_bytes(digest.digest()[:8], "big", signed=True)


def _index_sum(metadata: dict[str, str], *index: Tensor) -> str:
    digest = hashlib.sha256(json.dumps(metadata, sort_keys=True).encode())
    for tensor in index:
        digest.update(tensor.numpy().tobytes())
    return digest.hexdigest()


class StoreWriter:
    """Writes the part of a store that one replica has worked out.

    folder    made where it does not exist
    part      beginning of this writer's file names
    metadata  as the module says; what a reader is told about the teacher
    """

    def __init__(self, folder: str | Path, part: str, *, k: int, temperature: float, tokenizer: str, teacher: str):
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.part = part
        self.metadata = {
            "format": FORMAT,
            "k": str(k),
            "temperature": repr(temperature),
            "tokenizer": tokenizer,
            "teacher": teacher,
        }
        self._rows: list[tuple[Key, Tensor, Tensor]] = []
        self._files = 0

    def add(self, batch: HybridMicrobatch, payload: TopKPayload, *, count: int) -> None:
        """The answers for the first `count` sequences of a micro-batch."""
        sequences, ids, log_probs = batch.sequence_of_token.cpu(), payload.ids.int().cpu(), payload.log_probs.cpu()
        for number, prompt in enumerate(batch.prompts[:count]):
            tokens = sequences == number
            self._rows.append((response_key(prompt), ids[tokens], log_probs[tokens]))
        if sum(len(ids) for _, ids, _ in self._rows) >= TOKENS_PER_FILE:
            self.flush()

    def flush(self) -> None:
        """Writes what has been added; to be called once more at the end."""
        if not self._rows:
            return
        from safetensors.torch import save_file

        keys, ids, log_probs = zip(*self._rows, strict=True)
        lengths = torch.tensor([0, *map(len, ids)], dtype=torch.int64)
        tensors = {
            "ids": torch.cat(ids),
            "log_probs": torch.cat(log_probs),
            "offsets": lengths.cumsum(0),
            "keys": torch.tensor(keys, dtype=torch.int64),
            "sums": torch.tensor([_answer_sum(*answer) for answer in zip(ids, log_probs, strict=True)]),
        }
        index_sum = _index_sum(self.metadata, tensors["offsets"], tensors["keys"], tensors["sums"])
        path = self.folder / f"{self.part}_{self._files:05d}.safetensors"
        save_file(tensors, path.with_suffix(".part"), metadata=self.metadata | {"sha256": index_sum})
        path.with_suffix(".part").rename(path)  # a file that is there is whole
        self._rows, self._files = [], self._files + 1


def _check_format(path: Path, metadata: dict[str, str]) -> None:
    if metadata.get("format") != FORMAT:
        raise DataError(
            f"{path} is no part of a teacher's answers: expected safetensors of format {FORMAT}, written by "
            f"tools/precompute_teacher.py, got {metadata or 'no metadata'}. Older formats have no checksums: work the "
            "store out anew."
        )


class TeacherStore:
    """A folder of such files, opened and held against what a run wants of it.

    Raises:
        ConfigError, DataError: it was made with another k, temperature or tokenizer, or is no store.
    """

    def __init__(self, folder: str | Path, *, k: int, temperature: float, tokenizer: str) -> None:
        from safetensors import SafetensorError, safe_open

        self.folder, self.k = Path(folder), k
        self._files: list[tuple[Path, Any]] = []
        self._places: dict[Key, tuple[int, int, int, int]] = {}
        """Of each response: its file, its first and last-but-one row there, and their sum."""
        paths = sorted(self.folder.glob("*.safetensors"))
        if not paths:
            raise DataError(
                f"teacher_store {str(folder)!r} holds no .safetensors file: give the folder that "
                "tools/precompute_teacher.py has written."
            )
        for number, path in enumerate(paths):
            try:
                file = safe_open(path, "pt")
                metadata = dict(file.metadata() or {})
                _check_format(path, metadata)
                index = [file.get_tensor(name) for name in ("offsets", "keys", "sums")]
            except (OSError, SafetensorError) as error:
                raise DataError(
                    f"{path} cannot be read as a part of a teacher's answers: {error}. Work the store out anew."
                ) from error
            if metadata.pop("sha256", None) != _index_sum(metadata, *index):
                raise DataError(f"{path} is not what was written: the sha256 of its index differs. {_AGAIN}")
            self._check(path, metadata, temperature=temperature, tokenizer=tokenizer)
            self._files.append((path, file))
            offsets, keys, sums = (tensor.tolist() for tensor in index)
            for (a, b), start, stop, known in zip(keys, offsets[:-1], offsets[1:], sums, strict=True):
                self._places[a, b] = (number, start, stop, known)

    def _check(self, path: Path, metadata: dict[str, str], *, temperature: float, tokenizer: str) -> None:
        if metadata["tokenizer"] != tokenizer:
            raise DataError(
                f"{path} was made with another tokenizer ({metadata['tokenizer'][:12]}..., not {tokenizer[:12]}...): "
                "the same id means different tokens, so imitation would teach noise. Work the store out anew."
            )
        if float(metadata["temperature"]) != temperature:
            raise ConfigError(
                f"{path} holds a teacher at temperature {metadata['temperature']}, and teacher_temperature is "
                f"{temperature}: log-probs of a few tokens cannot be tempered again. Use the store's, or work it out "
                "anew."
            )
        if int(metadata["k"]) < self.k:
            raise ConfigError(
                f"{path} holds the {metadata['k']} likeliest tokens, and teacher_topk is {self.k}: there are no more. "
                "Lower --hybrid-teacher-topk, or work the store out anew. (Fewer than it holds is fine.)"
            )

    def require(self, prompts: Iterable[Prompt]) -> None:
        """Raises DataError unless it has an answer for every recorded response of these prompts' rows."""
        missing, count = [], 0
        for prompt in prompts:
            count += 1
            if response_key(prompt) not in self._places:
                missing.append(prompt)
        if missing:
            entry = missing[0].responses[0].entry
            place = " ".join(f"{name} {entry[name]}" for name in ("line", "row") if name in entry)
            raise DataError(
                f"teacher_store {str(self.folder)!r} has no answer for {len(missing)} of {count} responses, the first "
                f"is {place}: it was made for other rollouts, another chat template, system prompt or hint, or never "
                "finished. Work it out anew with tools/precompute_teacher.py and this run's flags."
            )

    def read(self, prompt: Prompt) -> tuple[Tensor, Tensor]:
        """Ids [m, k] int64 and log-probs [m, k] fp32 of the m tokens of a row's response, on the CPU.

        Raises:
            DataError: they are not what was written.
        """
        number, start, stop, known = self._places[response_key(prompt)]
        path, file = self._files[number]
        ids, log_probs = (file.get_slice(name)[start:stop] for name in ("ids", "log_probs"))
        if _answer_sum(ids, log_probs) != known:
            raise DataError(
                f"{path}: tokens {start} to {stop - 1} are not what was written, by their sha256: imitation would "
                f"learn noise. {_AGAIN}"
            )
        return ids[:, : self.k].long(), log_probs[:, : self.k]


class StoredTeacher:
    """A teacher that was asked before.

    Args:
        store: its answers; `require` has found all that will be asked.
        is_last_stage: whether payloads belong here.
    """

    def __init__(self, store: TeacherStore, *, is_last_stage: bool) -> None:
        self.store = store
        self.is_last_stage = is_last_stage

    def annotate(self, batches: Sequence[HybridMicrobatch]) -> list[TopKPayload | None]:
        """See `Teacher`. None for responses that were sampled now: nobody has asked the teacher about them."""
        return [self._payload(batch) if self.is_last_stage else None for batch in batches]

    def _payload(self, batch: HybridMicrobatch) -> TopKPayload | None:
        if not all(prompt.responses for prompt in batch.prompts):
            return None
        sequences, positions = batch.sequence_of_token.cpu(), batch.position_of_token.cpu()
        ids = torch.empty(len(positions), self.store.k, dtype=torch.int64)
        log_probs = torch.empty(len(positions), self.store.k)
        for number, prompt in enumerate(batch.prompts):
            tokens = sequences == number
            rows = positions[tokens] - len(prompt.token_ids)
            ids[tokens], log_probs[tokens] = (part[rows] for part in self.store.read(prompt))
        device = batch.targets.device
        return TopKPayload(ids.to(device), log_probs.to(device))
