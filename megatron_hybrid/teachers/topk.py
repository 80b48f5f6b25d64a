"""A teacher's logits on shards of the vocabulary to its k most likely tokens, and a teacher that leaves nothing else.

    HiddenPayload [n, h_q] -> its own head, some tokens at a time: [r, v/tp] -> TopKPayload: ids, log-probs [n, k]

12 bytes per slot instead of 2 h_q per token: k = 64 against h_q = 4096 is ten times smaller, and the op runs without
the teacher's head. What the k tokens leave is one bucket to it.

Each logit and its id make one int64, ordered as the logits are and then by falling id. So integers are what is sorted:
equal logits have one order on every rank and device, and one all-gather of 8 (k + 2) bytes per token, the shards'
maxima and sums of exponentials among them, is merged by sorting once more.
Not here: the loss (`ops/topk.py`), renormalising the k, teachers that answer over a network (`remote.py`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from megatron_hybrid.collectives import gather_ranks
from megatron_hybrid.errors import ConfigError, ShapeError
from megatron_hybrid.parallel import GroupView
from megatron_hybrid.records import HybridMicrobatch, LogitsPayload, TopKPayload
from megatron_hybrid.teachers.base import Teacher
from megatron_hybrid.teachers.blocks import row_blocks

CHUNK_TOKENS = 256
"""Tokens whose logits exist at once: at v = 152k and tp = 1 78 MB in bf16. Each chunk reads the head's whole weight, so
fewer tokens cost time."""

_NO_TOKEN = torch.iinfo(torch.int64).min
_LOW_BITS = 0xFFFFFFFF
_MAGNITUDE_BITS = 0x7FFFFFFF


class TopKTeacher:
    """Another teacher's k most likely tokens; its hidden states are dropped.

    Args:
        inner: a teacher that leaves whole distributions (`LogitsPayload`), one model or several.
        k: tokens kept.
        vocab_size: true vocabulary of the teacher's head.
        temperature: divides its logits.
        tp: the ranks that share its vocabulary.
    """

    def __init__(self, inner: Teacher, k: int, vocab_size: int, temperature: float, tp: GroupView) -> None:
        self.inner = inner
        self.k = k
        self.vocab_size = vocab_size
        self.temperature = temperature
        self.tp = tp

    def annotate(self, batches: Sequence[HybridMicrobatch]) -> list[TopKPayload | None]:
        """See `Teacher`. On the last stage one all-gather per `CHUNK_TOKENS` tokens."""
        return [None if payload is None else self._keep(payload) for payload in self.inner.annotate(batches)]

    def _keep(self, payload: object) -> TopKPayload:
        if not isinstance(payload, LogitsPayload):
            raise ConfigError(
                f"TopKTeacher needs a teacher that leaves whole distributions, {type(self.inner).__name__} left a "
                f"{type(payload).__name__}: there are no logits to choose from. Use that teacher by itself."
            )
        parts = [
            topk_log_probs(
                payload.logits(slice(start, start + CHUNK_TOKENS)),
                self.k,
                vocab_size=self.vocab_size,
                temperature=self.temperature,
                tp=self.tp,
            )
            for start in range(0, max(payload.num_tokens, 1), CHUNK_TOKENS)  # no token: one empty part
        ]
        ids, log_probs = (torch.cat(part) for part in zip(*parts, strict=True))
        return TopKPayload(ids, log_probs)


@torch.no_grad()
def topk_log_probs(
    logits: Tensor, k: int, *, vocab_size: int, temperature: float, tp: GroupView
) -> tuple[Tensor, Tensor]:
    """The k likeliest tokens of softmax(logits / temperature) over the whole vocabulary, and their log-probabilities.

    logits      [n, v/tp] any float type; rank r holds columns r*v/tp ... of the padded vocabulary; read, never written
    vocab_size  true vocabulary: columns at or beyond it are ignored whatever they hold
    returns     ids [n, k] int64 and log-probs [n, k] fp32, nats, likeliest first, of equal ones the lower id first;
                equal on every rank. A token with the logit -inf takes no slot: its id is -1, its log-prob -inf

    Raises:
        ShapeError: logits that are no matrix of floats, or too few columns for the vocabulary.
        ConfigError: k or temperature out of range.
    """
    if logits.dim() != 2 or not logits.is_floating_point():
        raise ShapeError(f"teacher logits must be floating point [n, v/tp], got {logits.dtype} {list(logits.shape)}.")
    if not 0 < vocab_size <= logits.shape[1] * tp.size:
        raise ShapeError(
            f"vocab_size is {vocab_size}, but {tp.size} rank(s) with {logits.shape[1]} columns each hold "
            f"{logits.shape[1] * tp.size}: the true vocabulary must lie within the padded one."
        )
    if not 0 < k <= vocab_size:
        raise ConfigError(f"k must lie in [1, {vocab_size}], the true vocabulary, got {k}: choose fewer tokens.")
    if not (math.isfinite(temperature) and temperature > 0):
        raise ConfigError(f"temperature must be a finite number > 0, got {temperature}: logits are divided by it.")
    columns, first = logits.shape[1], tp.rank * logits.shape[1]
    own = logits[:, : min(max(vocab_size - first, 0), columns)]
    # 24 bytes of integers for each logit of a block.
    packed = torch.cat([_pack(own[block].float(), k, first, temperature) for block in row_blocks(logits)])
    gathered = gather_ranks(packed, tp.group) if len(packed) else packed.unsqueeze(0)
    keys = gathered[..., :k].transpose(0, 1).flatten(1).topk(k, dim=-1).values
    m_r, s_r = gathered[..., k:].contiguous().view(torch.float64).unbind(-1)
    m = m_r.amax(0)
    log_s = (((m_r - m) / temperature).exp() * s_r).sum(0).log()
    ids, values = _tokens(keys)
    log_probs = ((values.double() - m.unsqueeze(1)) / temperature - log_s.unsqueeze(1)).float()
    return torch.where(log_probs == -torch.inf, -1, ids), log_probs


def _pack(w: Tensor, k: int, first: int, temperature: float) -> Tensor:
    """What other ranks need of a block of fp32 logits [r, width], as int64 [r, k + 2].

    The keys of this rank's k largest, `_NO_TOKEN` where there are fewer; then the bits of two float64: the largest
    logit m and the sum of exp((w - m)/temperature). float64, because near 1 a probability is known by what the sum has
    beyond 1.
    """
    packed = torch.full((len(w), k + 2), _NO_TOKEN, dtype=torch.int64, device=w.device)
    here = min(k, w.shape[1])
    packed[:, :here] = _keys(w, first).topk(here, dim=-1).values
    parts = packed[:, k:].view(torch.float64)
    parts[:, 0], parts[:, 1] = torch.finfo(torch.float32).min, 0.0  # from -inf, a shard of -inf logits would make NaN
    if here:
        m = w.amax(-1, keepdim=True).clamp_(min=torch.finfo(torch.float32).min)
        parts[:, :1] = m
        parts[:, 1] = ((w - m) / temperature).exp_().sum(-1, dtype=torch.float64)
    return packed


def _keys(w: Tensor, first: int) -> Tensor:
    """fp32 logits [r, width] as int64 that sort as they do, equal ones by falling id: the logit's bits, then ~id."""
    keys = _ordered((w + 0.0).view(torch.int32)).long()  # + 0.0: -0.0 equals 0.0 but has other bits
    ids = torch.arange(first, first + w.shape[1], device=w.device)
    return keys.bitwise_left_shift_(32).bitwise_or_(_LOW_BITS - ids)


def _ordered(bits: Tensor) -> Tensor:
    """Bits of fp32 as int32 that sort as the numbers do, and back: below 0 a larger magnitude is a smaller number."""
    return (bits >> 31).bitwise_and_(_MAGNITUDE_BITS).bitwise_xor_(bits)


def _tokens(keys: Tensor) -> tuple[Tensor, Tensor]:
    """`_keys` undone: ids int64 and logits fp32 in the keys' shape."""
    return _LOW_BITS - (keys & _LOW_BITS), _ordered((keys >> 32).int()).view(torch.float32)
