"""How many (query, key) pairs a mask leaves between runs of a sharded sequence, for many at once.

One idea: between rows i of one run and columns j of another, causal is j <= i + u, so the pairs
below an edge are a difference of triangles; a window takes the pairs below a second edge away, and
sinks give those of the first columns back. Documents clip both runs first. Price: some ten integer
operations per pair of runs and shared document; no slice or mask is ever made.

Exact: equal to the sum of `PairSlice.pairs` over `mask.pair_slices`.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ringctx.parallel.layout import Piece, Sharding
from ringctx.parallel.mask import Mask
from ringctx.parallel.topology import Ints

__all__ = ["visible_pairs"]

# Rows of the largest table: runs times shared documents.
_CHUNK = 1 << 21


def visible_pairs(
    mask: Mask,
    sharding: Sharding,
    *,
    pieces: Sequence[Piece],
    ranks: Ints,
    keys: bool,
    which: Ints | None = None,
) -> Ints:
    """Visible pairs between pieces and the whole shards of ranks.

    Args:
        mask: who sees whom.
        sharding: the sequence and its layout.
        pieces: pieces of shards.
        ranks: `[n]`, the rank at the other side.
        keys: whether the pieces hold keys and the ranks queries, or the other way round.
        which: `[n]`, an index into `pieces`; None takes each once.

    Returns:
        `[n]`.
    """
    which = np.arange(len(pieces)) if which is None else which
    assert len(which) == len(ranks), (len(which), len(ranks))
    counts = np.zeros(len(ranks), dtype=np.int64)
    runs = _Runs.of_all(sharding)
    edges = np.array([(p.owner, p.start, p.stop) for p in pieces], dtype=np.int64).reshape(-1, 3)
    for run in range(runs.first.shape[1]):
        part = runs.clipped(edges, run)
        some = np.flatnonzero(part.length[which])
        for other in range(runs.first.shape[1]):
            whole = _Spans(runs.first[ranks[some], other], runs.length[ranks[some], other])
            here = part.rows(which[some])
            q, k = (whole, here) if keys else (here, whole)
            counts[some] += _between(mask, q, k, stride=runs.stride, seq_len=sharding.seq_len)
    return counts


@dataclass(frozen=True, slots=True, eq=False)
class _Spans:
    """Runs of positions first, first + stride, ..., a row each."""

    first: Ints
    length: Ints

    def rows(self, index: Ints | slice) -> "_Spans":
        return _Spans(self.first[index], self.length[index])

    def end(self, stride: int) -> Ints:
        """One past the last position."""
        return self.first + (self.length - 1) * stride + 1

    def within(self, start: Ints, stop: Ints, stride: int) -> "_Spans":
        """What holds positions [start, stop)."""
        skip = np.clip(-((self.first - start) // stride), 0, self.length)
        end = np.clip(-((self.first - stop) // stride), 0, self.length)
        return _Spans(self.first + skip * stride, np.maximum(end - skip, 0))


@dataclass(frozen=True, slots=True, eq=False)
class _Runs:
    """All shards' runs: `[ranks, runs of a shard]`."""

    start: Ints
    first: Ints
    length: Ints
    stride: int

    @staticmethod
    def of_all(sharding: Sharding) -> "_Runs":
        shards = [sharding.runs(rank) for rank in range(sharding.world_size)]
        table = np.array([[(r.start, r.first, r.length) for r in runs] for runs in shards])
        return _Runs(table[..., 0], table[..., 1], table[..., 2], shards[0][0].stride)

    def clipped(self, pieces: Ints, run: int) -> _Spans:
        """What each piece (owner, start, stop) holds of that run of its shard."""
        owner, start, stop = pieces.T
        begin = self.start[owner, run]
        low = np.maximum(begin, start)
        high = np.minimum(begin + self.length[owner, run], stop)
        first = self.first[owner, run] + (low - begin) * self.stride
        return _Spans(first, np.maximum(high - low, 0))


def _between(mask: Mask, q: _Spans, k: _Spans, *, stride: int, seq_len: int) -> Ints:
    """Visible pairs of each row of `q` with the same row of `k`; no span is empty."""
    if mask.cu_seqlens is None:
        start = np.zeros(1, dtype=np.int64)
        return _within_document(mask, q, k, start, stride)
    bounds = np.array(mask.cu_seqlens)
    # The documents [low, high) that have positions in the reach of both.
    low = np.searchsorted(bounds, np.maximum(q.first, k.first), side="right") - 1
    high = np.searchsorted(bounds, np.minimum(q.end(stride), k.end(stride)))
    shared = np.maximum(high - low, 0)
    counts = np.zeros(len(q.first), dtype=np.int64)
    for rows in _chunks(shared):
        row = np.repeat(rows, shared[rows])
        before = np.cumsum(shared[rows]) - shared[rows]
        document = low[row] + np.arange(len(row)) - np.repeat(before, shared[rows])
        start, stop = bounds[document], bounds[document + 1]
        queries, keys = (span.rows(row).within(start, stop, stride) for span in (q, k))
        pairs = _within_document(mask, queries, keys, start, stride)
        counts += np.bincount(row, weights=pairs, minlength=len(counts)).astype(np.int64)
    return counts


def _chunks(shared: Ints) -> list[Ints]:
    """Rows that share anything, in groups whose documents fit in memory."""
    some = np.flatnonzero(shared)
    group = np.cumsum(shared[some]) // _CHUNK
    return np.split(some, np.flatnonzero(np.diff(group)) + 1)


def _within_document(mask: Mask, q: _Spans, k: _Spans, start: Ints, stride: int) -> Ints:
    if not mask.causal:
        return q.length * k.length
    pairs = _below(q.first - k.first, q.length, k.length, stride)
    if mask.window is None:
        return pairs
    behind = q.first - mask.window - k.first
    sinks = np.clip(-((k.first - start - mask.sinks) // stride), 0, k.length)
    hidden = _below(behind, q.length, k.length, stride)
    return pairs - hidden + _below(behind, q.length, sinks, stride)


def _below(ahead: Ints, rows: Ints, columns: Ints, stride: int) -> Ints:
    """Pairs (i, j), i < rows and j < columns, with stride * j <= stride * i + ahead."""
    u = ahead // stride
    total: Ints = _triangle(rows + u) - _triangle(u)
    total += _triangle(u - columns) - _triangle(rows + u - columns)
    return total


def _triangle(n: Ints) -> Ints:
    n = np.maximum(n, 0)
    return n * (n + 1) // 2
