"""The two passes of the top-k loss over one rank's shard, and the merge of the shards between them; plain torch.

With K the teacher's tokens, e = exp((z - m)/T) and d = (z - m)/T - log q, a rank's columns are six numbers per token:

    stats     m, R = sum_{not K} e, S = sum_K e, A = sum_K e d, B = sum e (z - m)/T, z_y
    merge     s = R + S,   g_rest = log R - log Q_rest,   k = (A + R g_rest)/s = D + log s
    gradient  e (a (g - k) + b) - c onehot(y),    g = d in K, g_rest elsewhere;  a, b, c as in `function.py`

R is a sum, not 1 minus one, so a rest of any size has all its digits. The vocabulary is read in fp32, block by block;
per-token numbers and the k columns are float64, because g - k is small by cancellation: at a KL of 1e-6 it is 1e-3, and
fp32's 1e-7 would be 1e-4 of the gradient. Memory: two fp32 buffers of one block and a quarter for the stats, one for
the gradient; where rows are skipped, copies of the counted ones in the logits' type. Collectives: the one of the merge.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from megatron_hybrid.collectives import gather_ranks
from megatron_hybrid.errors import ShapeError
from megatron_hybrid.ops.call import Call, Shard
from megatron_hybrid.ops.eager import FAR, LOWEST, block_buffers, clear_uncounted, row_blocks, write_block
from megatron_hybrid.ops.function import Measured
from megatron_hybrid.records import TokenStats

REST_FLOOR = -24 * math.log(2)
"""log of fp32's unit roundoff, 6e-8: log-softmax in fp32, which most teachers use, resolves no smaller rest."""
NUM_STATS = 6
"""m, R, S, A, B, z_y; maximum and target logit in raw units, before the temperature."""
_PIECES = 8
"""A sum in float64 of fp32 columns copies them: an eighth of a block at a time, a quarter of a buffer."""


@dataclass(frozen=True)
class Slots:
    """The teacher's k tokens in the n counted rows."""

    ids: Tensor
    """[n, k] int64, -1 where unused."""
    log_probs: Tensor
    """[n, k] float64, -inf where unused."""
    log_rest: Tensor
    """[n] float64: log Q_rest."""

    def columns(self, start: int, stop: int, shard: Shard) -> Tensor:
        """[r, k]: the column of each id in this rank's blocks; the spare one, `width`, where it is not here."""
        local = self.ids[start:stop] - shard.first
        return torch.where((local >= 0) & (local < shard.width), local, shard.width)


def read_slots(ids: Tensor, log_probs: Tensor, call: Call, *, v: int, rest_floor: float) -> Slots:
    """Checks the caller's [..., k] ids and log-probs (see `topk.py`) and takes the counted rows; v: true vocabulary."""
    k = ids.shape[-1] if ids.dim() else 0
    if (
        ids.shape != (*call.shape, k)
        or log_probs.shape != ids.shape
        or ids.is_floating_point()
        or ids.dtype == torch.bool
        or not log_probs.is_floating_point()
    ):
        raise ShapeError(
            f"the teacher's tokens must be integer ids and float log-probs, both {[*call.shape, 'k']}; got ids "
            f"{ids.dtype} {list(ids.shape)} and log-probs {log_probs.dtype} {list(log_probs.shape)}. Give every row k "
            "slots and mark unused ones with id -1."
        )
    if ids.device != call.target.device or log_probs.device != call.target.device:
        raise ShapeError(
            f"teacher ids are on {ids.device}, log-probs on {log_probs.device}, the logits on {call.target.device}: "
            "move them there, the op copies nothing between devices."
        )
    flat = (call.shape.numel(), k)
    ids, log_probs = ids.reshape(flat).long(), log_probs.detach().reshape(flat)
    if call.rows is not None:
        ids, log_probs = ids.index_select(0, call.rows), log_probs.index_select(0, call.rows)
    torch._assert_async(
        ((ids >= -1) & (ids < v)).all(),
        f"a teacher id lies outside the vocabulary [0, {v}) and is not -1, the mark of an unused slot: the student has "
        "no such token. Check that teacher and student share a tokenizer.",
    )
    log_probs = torch.where(ids < 0, -torch.inf, log_probs.double())
    rest = 1 - log_probs.exp().sum(-1)
    return Slots(ids, log_probs, rest.clamp(min=math.exp(rest_floor)).log())


@dataclass(frozen=True)
class TopKPasses:
    """Both passes against the teacher's tokens of the counted rows: what the autograd functions ask for."""

    teacher: Slots

    def of_rows(self, rows: slice) -> "TopKPasses":
        """Of some of the counted rows."""
        slots = self.teacher
        return TopKPasses(Slots(slots.ids[rows], slots.log_probs[rows], slots.log_rest[rows]))

    def measure(self, student: Tensor, teacher: Tensor | None, call: Call) -> Measured:
        """As `Passes.measure`; one all-gather of [n, 6] float64, none where no row counts."""
        stats = shard_stats(student, self.teacher, call)
        gathered = gather_ranks(stats, call.group) if len(stats) else stats.unsqueeze(0)
        m, s, g_rest, k, of_tokens = merge_shards(gathered, self.teacher, call)
        k = torch.where(of_tokens.kl == torch.inf, 0.0, k)  # finite also where D is not: a weight of 0 drops it
        return Measured(of_tokens, of_tokens.kl, (m, k, g_rest, s))

    def write_gradient(
        self,
        student: Tensor,
        teacher: Tensor | None,
        call: Call,
        numbers: Sequence[Tensor],
        dense: Tensor,
        sparse: Tensor,
        out: Tensor,
    ) -> None:
        """As `Passes.write_gradient`."""
        m, k, g_rest, s = numbers
        coefficients = torch.stack((m, k, g_rest, dense / s, sparse / s, sparse.double()), dim=-1)
        shard_gradient(student, self.teacher, call, coefficients, out)


class Merged(NamedTuple):
    """Per-token numbers of the whole vocabulary, [n] float64 each, equal on every rank."""

    m: Tensor
    """Largest student logit, raw."""
    s: Tensor
    """Sum of e."""
    g_rest: Tensor
    """The bucket's g; 0 where it is empty."""
    k: Tensor
    """E_p[g]; +inf where D is."""
    stats: TokenStats


def shard_stats(student: Tensor, teacher: Slots, call: Call) -> Tensor:
    """This rank's m, R, S, A, B, z_y of the counted rows, [n, 6] float64.

    student  [rows, v/tp], any float type; read, never written
    """
    shard, n = call.shard, len(call.target)
    stats = torch.zeros((n, NUM_STATS), dtype=torch.float64, device=student.device)
    stats[:, 0] = LOWEST
    blocks = row_blocks(n, shard.width, student)
    buffers = block_buffers(2, blocks, shard.width + 1, student)
    for start, stop in blocks:
        z, e = (buffer[: stop - start] for buffer in buffers)
        _read_block(z, student, call, start, stop)
        column, here = (index.unsqueeze(1) for index in call.owned(start, stop))
        m, z_y = z.amax(-1, keepdim=True).clamp_(min=LOWEST), torch.where(here, z.gather(1, column), 0.0)
        columns = teacher.columns(start, stop, shard)
        kept_z, kept_e = _kept(z, columns, m, shard)
        torch.exp(z.sub_(m).mul_(shard.student_scale), out=e).scatter_(1, columns, 0.0)
        # fp32 partial sums would cost the bucket two digits.
        rest = torch.stack([part.sum(-1, dtype=torch.float64) for part in e.chunk(_PIECES, dim=-1)], dim=-1)
        rest = rest.sum(-1, keepdim=True)
        difference = kept_z - teacher.log_probs[start:stop]
        a, kept_b = (torch.where(kept_e != 0, kept_e * x, 0.0).sum(-1, keepdim=True) for x in (difference, kept_z))
        b = z.mul_(e).nansum(-1, keepdim=True) + kept_b  # -inf * 0 is NaN and skipped; a true NaN is in m
        stats[start:stop] = torch.cat((m, rest, kept_e.sum(-1, keepdim=True), a, b, z_y), dim=-1)
    return stats


def merge_shards(gathered: Tensor, teacher: Slots, call: Call) -> Merged:
    """The ranks' statistics [tp, n, 6] to those of the whole vocabulary."""
    m_r, rest_r, kept_r, a_r, b_r, z_y_r = gathered.unbind(-1)
    scale, m = call.shard.student_scale, m_r.amax(0)
    shift = (m_r - m) * scale
    factor = shift.exp()

    def total(moment: Tensor) -> Tensor:
        # A rank whose mass underflows adds nothing, even where its own moment is infinite.
        return torch.where(factor == 0, 0.0, factor * moment).sum(0)

    rest, kept = total(rest_r), total(kept_r)
    s, log_rest = rest + kept, rest.log()
    log_s = s.log()
    g_rest = torch.where(rest > 0, log_rest - teacher.log_rest, 0.0)
    k = (total(a_r + shift * kept_r) + rest * g_rest) / s
    z_y = (z_y_r.sum(0) - m) * scale
    at_target = teacher.ids == call.target.unsqueeze(1)
    # A target whose bucket underflows has all of it, as far as anybody can tell.
    outside = torch.where(rest > 0, z_y - g_rest, teacher.log_rest)
    inside = torch.where(at_target, teacher.log_probs, 0.0).sum(-1)
    teacher_log_prob = torch.where(at_target.any(-1), inside, outside)
    entropy = log_s - total(b_r + shift * (rest_r + kept_r)) / s
    stats = (k - log_s, z_y - log_s, teacher_log_prob, entropy)
    return Merged(m, s, g_rest, k, TokenStats(*(value.float() for value in stats)))


def shard_gradient(student: Tensor, teacher: Slots, call: Call, coefficients: Tensor, out: Tensor) -> None:
    """Writes e (a (g - k) + b) - c onehot(y) of every row and column of the shard into `out`.

    coefficients  [n, 6] float64: m, k, g_rest, a, b, c of each counted row
    out           [rows, v/tp] in the student's dtype; may be the student logits themselves. Rows that do not count and
                  columns beyond the vocabulary become exactly 0.
    """
    shard = call.shard
    blocks = row_blocks(len(call.target), shard.width, student)
    buffers = block_buffers(1, blocks, shard.width + 1, student)
    for start, stop in blocks:
        z = buffers[0][: stop - start]
        m, k, g_rest, a, b, c = coefficients[start:stop].split(1, dim=-1)
        _read_block(z, student, call, start, stop)
        columns = teacher.columns(start, stop, shard)
        kept_z, kept_e = _kept(z, columns, m, shard)
        difference = (kept_z - teacher.log_probs[start:stop]).clamp(min=-FAR, max=FAR) - k
        kept = torch.where(kept_e != 0, kept_e * (a * difference + b), 0.0)
        z.sub_(m.float()).mul_(shard.student_scale).exp_().mul_((a * (g_rest - k) + b).float())
        z.scatter_(1, columns, kept.float())
        write_block(z[:, : shard.width], c.float(), call, start, stop, out)
    clear_uncounted(call, out)


def _read_block(z: Tensor, student: Tensor, call: Call, start: int, stop: int) -> None:
    """Fills z [r, width + 1] with the counted rows [start:stop] of the shard's true columns, raw, and a spare column.

    The spare column is -inf, a token that the student forbids: slots whose id is not on this rank read from it and
    write to it, and it changes no maximum and no sum.
    """
    columns = student[:, : call.shard.width]
    z[:, :-1] = columns[start:stop] if call.rows is None else columns.index_select(0, call.rows[start:stop])
    z[:, -1] = -torch.inf


def _kept(z: Tensor, columns: Tensor, m: Tensor, shard: Shard) -> tuple[Tensor, Tensor]:
    """(z - m)/T and e of the teacher's tokens on this rank, [r, k] float64; -inf and 0 where they are elsewhere."""
    kept = (z.gather(1, columns).double() - m) * shard.student_scale
    return kept, kept.exp()
