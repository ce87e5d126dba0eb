"""What decay makes of a group of chunks: the factors of its products, all at most 1 (and `scale`).

With b_i the log decay from the chunk's first token to token i, and b_end over the chunk:

    pairs    scale exp(b_i - b_j) for i >= j, else 0      of query i and key j
    reads    scale exp(b_i)                               of query i and the entering state
    writes   exp(b_end - b_j)                             of key j in the leaving state

Differences are taken in float64 before the exponential: where decay is strong, those of fp32 sums
would be off by more than the result's rounding.
Shapes: n chunks of L rows, B batch, H heads; a leading 1 stands for what chunks or rows share.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from ringctx.ops.lightning.chunks import Chunks
from ringctx.ops.lightning.groups import Group, groups_of
from ringctx.ops.lightning.stages import Decay, Problem, wide_dtype

__all__ = ["WeightSource", "Weights", "chunk_decay"]

# exp of it is 0 in float64. What is below forgets no more, but sums of it would swallow the others.
_FORGETS_ALL = -750.0


@dataclass(frozen=True, eq=False)
class Weights:
    """Factors of one group; they broadcast over `[n, B, H, L, L]` and `[n, B, H, L, D]`."""

    pairs: Tensor
    reads: Tensor
    writes: Tensor


def chunk_decay(log_decay: Tensor, chunks: Chunks, *, like: Tensor) -> Decay:
    """What the stages are told of the decay.

    Args:
        log_decay: `[H]` or `[B, T, H]`, float64.
        chunks: of the call.
        like: an input, for dtype.
    """
    wide = wide_dtype(like)
    log_decay = log_decay.clamp(min=_FORGETS_ALL)
    if log_decay.ndim == 1:
        lengths = torch.tensor([n for _, n in chunks.bounds], device=log_decay.device)
        of_chunk = lengths[:, None, None] * log_decay
        return Decay(per_head=log_decay.to(wide), running=None, of_chunk=of_chunk)
    running = torch.empty_like(log_decay)
    for group in groups_of(chunks, most_rows=1 << 16, device=log_decay.device):
        # [n, B, H, L, 1]
        taken = group.take(log_decay.unsqueeze(-1))
        group.put_(running.unsqueeze(-1), taken.cumsum_(3))
    ends = torch.tensor([start + n - 1 for start, n in chunks.bounds], device=log_decay.device)
    of_chunk = running.index_select(1, ends).transpose(0, 1)
    return Decay(per_head=None, running=running, of_chunk=of_chunk)


class WeightSource:
    """The factors of every group of one call; of a decay per head, equal groups share them."""

    def __init__(self, problem: Problem, *, dtype: torch.dtype) -> None:
        self._decay, self._scale, self._dtype = problem.decay, problem.scale, dtype
        self._of_length: dict[int, Weights] = {}

    def of(self, group: Group) -> Weights:
        """The factors of a group."""
        if self._decay.per_head is None:
            return self._per_token(group)
        if group.length not in self._of_length:
            self._of_length[group.length] = self._per_head(group.length)
        weights = self._of_length[group.length]
        if group.gathered is None:
            return weights
        # Chunks that end before L decay less from a token to their end.
        place = torch.arange(group.length, device=group.gathered.lengths.device)
        left = (group.gathered.lengths[:, None] - 1 - place).clamp_(min=0)
        # [n, 1, H, L, 1]
        exponents = left[:, None, None, :, None] * self._log_decay[:, None, None]
        return Weights(weights.pairs, weights.reads, self._exp(exponents))

    @property
    def _log_decay(self) -> Tensor:
        assert self._decay.per_head is not None
        return self._decay.per_head.double()

    def _per_head(self, length: int) -> Weights:
        place = torch.arange(length, device=self._log_decay.device)
        distance = place[:, None] - place
        # [H, L, L] and [H, L, 1]
        pairs = self._exp(distance.clamp(min=0) * self._log_decay[:, None, None])
        pairs = pairs.mul_(self._scale).tril_()
        reads = self._exp((place[:, None] + 1) * self._log_decay[:, None, None]).mul_(self._scale)
        writes = self._exp((length - 1 - place[:, None]) * self._log_decay[:, None, None])
        return Weights(pairs, reads, writes)

    def _per_token(self, group: Group) -> Weights:
        assert self._decay.running is not None
        running = _unpadded(self._decay.running, group)
        end = running[..., -1:]
        # [n, B, H, L, L]; above the diagonal the difference is positive and may overflow.
        later = torch.ones(2 * (group.length,), dtype=torch.bool, device=running.device).triu_(1)
        differences = running[..., :, None] - running[..., None, :]
        pairs = self._exp(differences.masked_fill_(later, -torch.inf)).mul_(self._scale)
        reads = self._exp(running).mul_(self._scale).unsqueeze(-1)
        return Weights(pairs, reads, self._exp(end - running).unsqueeze(-1))

    def _exp(self, exponents: Tensor) -> Tensor:
        return exponents.to(self._dtype).exp()


def _unpadded(running: Tensor, group: Group) -> Tensor:
    """`[n, B, H, L]`, float64; pads hold what the chunk's last token holds: they decay no more."""
    if group.gathered is None:
        return group.take(running.unsqueeze(-1)).squeeze(-1)
    places = running.index_select(1, group.gathered.index)
    chosen: Tensor = places.unflatten(1, (-1, group.length))
    return chosen.permute(1, 0, 3, 2)
