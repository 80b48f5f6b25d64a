"""One token per sequence from logits that are split over tensor-parallel ranks, without gathering them.

Inverse transform: with one uniform number per sequence, the token is where the cumulative probability passes it. Ranks
exchange three numbers per sequence (maximum, mass; then the winner's id and logit), never the vocabulary, and the draw
is the same for every layout up to the rounding of the sums. The first exchange cannot wait for the second: where the
threshold lies is known only once every rank's mass is. One exchange would do if each rank drew a candidate of its own
and the masses chose among them, but then the draw would depend on how the vocabulary is cut.
"""

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_hybrid.parallel import GroupView


def sample_tokens(
    logits: Tensor, uniform: Tensor, *, temperature: float, vocab_size: int, tp: GroupView
) -> tuple[Tensor, Tensor]:
    """Draws from softmax(logits / temperature) over the true vocabulary.

    logits   [b, v/tp] of this rank, any float type; not written
    uniform  [b] fp32 or fp64 in [0, 1), the same on every rank
    returns  token ids [b] int64 and their log-probabilities [b] fp32 in nats, the same on every rank

    Two all-gathers of [2, b] over tp; none at tp = 1.
    """
    width = logits.shape[-1]
    start = tp.rank * width
    # Columns beyond the true vocabulary are phantoms of the padding: they get no probability.
    real = max(0, min(width, vocab_size - start))
    scaled = logits[:, :real].float() / temperature
    if real == 0:
        batch = logits.shape[0]
        maximum = torch.full((batch,), torch.finfo(torch.float32).min, device=logits.device)
        cumulative = torch.zeros(batch, 1, device=logits.device)
    else:
        # Finite even where a rank's columns are all forbidden (-inf): their difference would be NaN.
        maximum = scaled.amax(dim=-1).clamp(min=torch.finfo(torch.float32).min)
        cumulative = torch.exp(scaled - maximum.unsqueeze(-1)).cumsum(dim=-1)
    shards = _gather(torch.stack([maximum, cumulative[:, -1]]), tp)  # [tp, 2, b]
    top = shards[:, 0].amax(dim=0)
    masses = shards[:, 1].double() * torch.exp((shards[:, 0] - top).double())  # [tp, b]
    edges = masses.cumsum(dim=0)
    total = edges[-1]
    threshold = uniform.double() * total
    owner = (threshold >= edges).sum(dim=0).clamp(max=tp.size - 1)  # [b]

    below = edges[tp.rank] - masses[tp.rank]
    local = ((threshold - below) / torch.exp((maximum - top).double())).float()
    # A rounded threshold must not reach past the shard's mass, where columns without probability lie.
    mass = cumulative[:, -1]
    local = torch.minimum(local.clamp(min=0.0), torch.nextafter(mass, torch.zeros_like(mass)))
    if real == 0:
        chosen, logit = torch.zeros_like(owner), torch.zeros_like(top)
    else:
        chosen = torch.searchsorted(cumulative, local.unsqueeze(-1), right=True).squeeze(-1).clamp(max=real - 1)
        logit = scaled.gather(-1, chosen.unsqueeze(-1)).squeeze(-1)
    # Ids travel beside the logits as float64: exact up to 2**53.
    winners = _gather(torch.stack([(chosen + start).double(), logit.double()]), tp)
    pick = winners.gather(0, owner.view(1, 1, -1).expand(1, 2, -1)).squeeze(0)  # [2, b]
    log_prob = (pick[1] - top - torch.log(total)).float()
    return pick[0].long(), log_prob


def _gather(shard: Tensor, tp: GroupView) -> Tensor:
    if tp.size == 1:
        return shard.unsqueeze(0)
    parts = [torch.empty_like(shard) for _ in range(tp.size)]
    dist.all_gather(parts, shard, group=tp.group)
    return torch.stack(parts)
