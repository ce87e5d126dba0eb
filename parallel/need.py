"""Which ranks need which part of every shard: what a mask leaves of "everything everywhere".

One idea: the keys that a run of queries sees form one interval of positions (and one more for
sinks), and so do the queries that see a run of keys. Cutting all shards where such an interval
begins or ends gives the pieces; each is needed as a whole, or not at all, by every rank. Price: two
intervals per run of positions; no pair of ranks is ever looked at.

    causal, zigzag    front block of rank j: everybody; back block: ranks < j
    window w          the last w - 1 tokens before a border, by the ranks just after it
    documents         nothing leaves the ranks that share the document
    striped           every shard, by everybody: each window is spread over all ranks
"""

from bisect import bisect_right
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import numpy as np
import numpy.typing as npt

from ringctx.parallel.layout import Piece, Run, Sharding
from ringctx.parallel.mask import Mask

__all__ = ["Needed", "Travels", "needed_pieces"]

# What leaves its owner: keys and values, to where queries are, or the other way round.
Travels = Literal["kv", "q"]

Interval = tuple[int, int]


@dataclass(frozen=True, slots=True)
class Needed:
    """A piece, and the ranks besides its owner that need all of it."""

    piece: Piece
    users: tuple[int, ...]


@lru_cache(maxsize=256)
def needed_pieces(sharding: Sharding, mask: Mask, *, travels: Travels) -> tuple[Needed, ...]:
    """Cut every shard into pieces that each rank needs wholly or not at all.

    Args:
        sharding: the sequence and its layout.
        mask: who sees whom.
        travels: "kv": which keys do a rank's queries see; "q": which queries see a rank's keys.

    Returns:
        The pieces that some other rank needs, by owner and first row. Users are rising.
    """
    ranks = range(sharding.world_size)
    if sharding.layout == "striped" and sharding.world_size > 1:
        shards = (sharding.shard(rank) for rank in ranks)
        return tuple(Needed(shard, tuple(r for r in ranks if r != shard.owner)) for shard in shards)
    reach = _seen_keys if travels == "kv" else _seeing_queries
    wanted = [
        [interval for run in sharding.runs(rank) for interval in reach(mask, run, sharding.seq_len)]
        for rank in ranks
    ]
    runs = sorted((run, rank) for rank in ranks for run in _by_position(sharding.runs(rank)))
    edges = {first for (first, _, _), _ in runs} | {sharding.seq_len}
    edges |= {edge for intervals in wanted for interval in intervals for edge in interval}
    cuts = np.array(sorted(edges))
    # needs[i, rank]: whether positions [cuts[i], cuts[i + 1]) are needed there
    needs = np.zeros((len(cuts) - 1, len(ranks)), dtype=bool)
    for rank, intervals in enumerate(wanted):
        for start, stop in intervals:
            needs[np.searchsorted(cuts, start) : np.searchsorted(cuts, stop), rank] = True
    return _pieces(runs, cuts, needs)


def _by_position(runs: tuple[Run, ...]) -> list[tuple[int, int, int]]:
    return [(run.first, run.start, run.length) for run in runs]


def _pieces(
    runs: list[tuple[tuple[int, int, int], int]],
    cuts: npt.NDArray[np.int64],
    needs: npt.NDArray[np.bool_],
) -> tuple[Needed, ...]:
    """Join neighbours of one shard that the same ranks need; drop what only the owner needs."""
    needed: list[Needed] = []
    for (first, start, length), owner in sorted(runs, key=lambda item: (item[1], item[0][1])):
        low, high = np.searchsorted(cuts, [first, first + length])
        needs[low:high, owner] = False
        for i in range(low, high):
            users = tuple(np.flatnonzero(needs[i]).tolist())
            row = start + int(cuts[i]) - first
            stop = row + int(cuts[i + 1] - cuts[i])
            last = needed[-1] if needed else None
            if last and (last.piece.owner, last.piece.stop, last.users) == (owner, row, users):
                needed[-1] = Needed(Piece(owner, last.piece.start, stop), users)
            elif users:
                needed.append(Needed(Piece(owner, row, stop), users))
    return tuple(needed)


def _document(mask: Mask, position: int, seq_len: int) -> Interval:
    """First position of the document of `position`, and of the next."""
    if mask.cu_seqlens is None:
        return 0, seq_len
    index = bisect_right(mask.cu_seqlens, position)
    return mask.cu_seqlens[index - 1], mask.cu_seqlens[index]


def _seen_keys(mask: Mask, run: Run, seq_len: int) -> list[Interval]:
    """Positions of the keys that some query of the run sees."""
    first, last = run.first, run.first + run.length - 1
    start, _ = _document(mask, first, seq_len)
    if not mask.causal:
        return [(start, _document(mask, last, seq_len)[1])]
    if mask.window is None:
        return [(start, last + 1)]
    low = max(start, first - mask.window + 1)
    sinks = (start, min(start + mask.sinks, low))
    return [(low, last + 1), *([sinks] if sinks[0] < sinks[1] else [])]


def _seeing_queries(mask: Mask, run: Run, seq_len: int) -> list[Interval]:
    """Positions of the queries that see some key of the run."""
    first, last = run.first, run.first + run.length - 1
    start, stop = _document(mask, last, seq_len)
    if not mask.causal:
        return [(_document(mask, first, seq_len)[0], stop)]
    holds_sinks = mask.sinks > 0 and start + mask.sinks > first
    if mask.window is None or holds_sinks:
        return [(first, stop)]
    return [(first, min(stop, last + mask.window))]
