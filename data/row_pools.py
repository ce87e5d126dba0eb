"""Row pools: rows of one length from some documents, in an order that any rank can ask for.

A pool numbers its rows through all epochs and gives any range of them, as a pure function: what
a step trains on is a range of each pool, and a run's state is how many rows it has taken. An
epoch takes every document once, in an order of its own.
`PiecePool`: equal pieces of the decomposition. `StreamPool`: all tokens end to end, cut into rows
(concat-and-chunk). Others: `packing.BestFitPool`, `mixing.MixedPool`.
Price: an order (4 bytes a piece, 12 in a stream) when an epoch is first asked for, kept for the
last two epochs; then well under a microsecond a row or segment.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from ringctx.data.decompose import Bucket
from ringctx.data.randomness import Unit, permutation

T = TypeVar("T", bound=np.generic)

__all__ = ["EpochOrder", "PiecePool", "RowPool", "Rows", "StreamPool", "whole_documents"]


@dataclass(frozen=True, eq=False)
class Rows:
    """Rows, each of one or more pieces of documents; what a row lacks at its end is padding."""

    pieces: NDArray[np.int64]
    """`[n, 3]`: document, start, length."""
    offsets: NDArray[np.int64]
    """`[rows + 1]`: row r is pieces[offsets[r] : offsets[r + 1]]."""

    def __len__(self) -> int:
        """Number of rows."""
        return len(self.offsets) - 1

    @classmethod
    def join(cls, parts: Sequence["Rows"]) -> "Rows":
        """All rows of the parts, one after another."""
        sizes = np.concatenate([np.diff(part.offsets) for part in parts])
        pieces = np.concatenate([part.pieces for part in parts])
        return cls(pieces, np.concatenate([[0], np.cumsum(sizes)]))

    def is_single(self, row_len: int) -> bool:
        """Whether every row is one piece of this length."""
        return len(self.pieces) == len(self) and bool((self.pieces[:, 2] == row_len).all())

    def cut(self, length: int, *, into: int) -> "Rows":
        """Rows of one piece of `length` each as shorter rows, in order; `into` divides it."""
        if length == into:
            return self
        assert self.is_single(length), (length, into)
        starts = np.arange(0, length, into)
        pieces = np.repeat(self.pieces, len(starts), axis=0)
        pieces[:, 1] += np.tile(starts, len(self))
        pieces[:, 2] = into
        return Rows(pieces, np.arange(len(pieces) + 1))

    def take(self, rows: NDArray[np.int64]) -> "Rows":
        """Some of the rows, in the order named; a row may be named more than once."""
        sizes = (self.offsets[1:] - self.offsets[:-1])[rows]
        offsets = np.concatenate([[0], np.cumsum(sizes)])
        shift = np.repeat(self.offsets[rows] - offsets[:-1], sizes)
        return Rows(self.pieces[np.arange(len(shift)) + shift], offsets)


class RowPool(Protocol):
    """Rows of one length in an order of their own, without end."""

    @property
    def row_len(self) -> int:
        """Tokens of a row, padding included."""

    def available(self, epochs: float) -> int:
        """How many rows come before any document is used more than `epochs` times."""

    def rows(self, first: int, count: int) -> Rows:
        """Rows first, first + 1, ..., counted through all epochs."""


def whole_documents(lengths: NDArray[np.int64]) -> NDArray[np.int64]:
    """Every document that has tokens as one piece, int64 `[n, 3]`: document, start 0, length."""
    documents = np.flatnonzero(lengths)
    return np.stack([documents, np.zeros_like(documents), lengths[documents]], axis=1)


class EpochOrder:
    """Numbers 0 to n - 1 again and again, in a new order every epoch."""

    def __init__(
        self, n: int, *, seed: int, bucket_len: int, source: int = 0, unit: Unit = "piece"
    ) -> None:
        """Arguments as of `permutation`."""
        self._n = n
        self._seed, self._bucket_len, self._source, self._unit = seed, bucket_len, source, unit
        self._orders: dict[int, NDArray[np.uint32]] = {}

    def epoch(self, epoch: int) -> NDArray[np.uint32]:
        """The order of one epoch, `[n]`."""

        def make() -> NDArray[np.uint32]:
            return permutation(
                self._n,
                seed=self._seed,
                bucket_len=self._bucket_len,
                epoch=epoch,
                source=self._source,
                unit=self._unit,
            )

        return _recent(self._orders, epoch, make)

    def take(self, first: int, count: int) -> NDArray[np.uint32]:
        """Entries first, first + 1, ... of all epochs' orders one after another."""
        assert self._n or not count, (first, count)
        chosen = [np.empty(0, np.uint32)]
        end = first + count
        while first < end:
            epoch, at = divmod(first, self._n)
            chosen.append(self.epoch(epoch)[at : at + end - first])
            first += len(chosen[-1])
        return np.concatenate(chosen)


class PiecePool:
    """Equal pieces of documents, one or several a row."""

    def __init__(
        self,
        bucket: Bucket,
        lengths: NDArray[np.int64],
        *,
        seed: int,
        source: int = 0,
        pieces_per_row: int = 1,
        start: int = 0,
    ) -> None:
        """Pool the pieces of a bucket.

        Args:
            bucket: the pieces.
            lengths: int64 `[all documents]`, those that the bucket was cut from.
            seed: of the run.
            source: number of the source whose documents these are.
            pieces_per_row: how many pieces fill a row.
            start: pieces used before row 0, by a pool of the same bucket.
        """
        self._bucket, self._lengths = bucket, lengths
        self._per_row, self._start = pieces_per_row, start
        self._order = EpochOrder(len(bucket), seed=seed, bucket_len=bucket.length, source=source)

    @property
    def row_len(self) -> int:
        """Tokens of a row."""
        return self._bucket.length * self._per_row

    def available(self, epochs: float) -> int:
        """How many rows come before any piece is used more than `epochs` times."""
        pieces = math.floor(epochs * len(self._bucket)) - self._start
        return max(pieces, 0) // self._per_row

    def rows(self, first: int, count: int) -> Rows:
        """Rows first, first + 1, ..., counted through all epochs."""
        begin = self._start + first * self._per_row
        chosen = self._order.take(begin, count * self._per_row)
        pieces = np.empty((len(chosen), 3), np.int64)
        pieces[:, :2] = self._bucket.locate(chosen, self._lengths)
        pieces[:, 2] = self._bucket.length
        return Rows(pieces, np.arange(count + 1) * self._per_row)


class StreamPool:
    """All pieces end to end, epoch after epoch, cut into rows; a piece may go on in the next."""

    def __init__(
        self,
        pieces: NDArray[np.int64],
        *,
        row_len: int,
        seed: int,
        source: int = 0,
        start: int = 0,
    ) -> None:
        """Pool a stream of tokens.

        Args:
            pieces: int64 `[n, 3]`: document, start, length (at least 1).
            row_len: tokens of a row. The stream does not depend on it: a pool of other rows that
                starts where this one stopped repeats nothing.
            seed: of the run.
            source: number of the source whose documents these are.
            start: tokens of the stream before row 0.
        """
        assert len(pieces) == 0 or pieces[:, 2].min() > 0, "an empty piece"
        self.row_len = row_len
        self.epoch_tokens = int(pieces[:, 2].sum())
        self._pieces, self._start = pieces, start
        self._order = EpochOrder(len(pieces), seed=seed, bucket_len=0, source=source, unit="stream")
        self._ends_of: dict[int, NDArray[np.int64]] = {}

    def available(self, epochs: float) -> int:
        """How many rows come before any token is used more than `epochs` times."""
        tokens = math.floor(epochs * self.epoch_tokens) - self._start
        return max(tokens, 0) // self.row_len

    def rows(self, first: int, count: int) -> Rows:
        """Rows first, first + 1, ..., counted through all epochs."""
        assert self.epoch_tokens or not count, (first, count)
        begin = self._start + first * self.row_len
        end = begin + count * self.row_len
        segments = [np.empty((0, 3), np.int64)]
        while begin < end:
            epoch, at = divmod(begin, self.epoch_tokens)
            stop = min(at + end - begin, self.epoch_tokens)
            segments.append(self._segments(epoch, at, stop))
            begin += stop - at
        pieces = np.concatenate(segments)
        ends = np.cumsum(pieces[:, 2])
        borders = np.arange(1, count + 1) * self.row_len
        offsets = np.concatenate([[0], np.searchsorted(ends, borders) + 1])
        return Rows(pieces, offsets)

    def _segments(self, epoch: int, begin: int, stop: int) -> NDArray[np.int64]:
        """Tokens begin to stop of an epoch as parts of pieces that cross no row border."""
        order, ends = self._order.epoch(epoch), self._ends(epoch)
        row_phase = (self._start - epoch * self.epoch_tokens - begin) % self.row_len
        borders = np.arange(begin + row_phase, stop, self.row_len)
        first, last = np.searchsorted(ends, [begin, stop - 1], side="right")
        cuts = np.unique(np.concatenate([[begin], ends[first:last], borders]))
        at = np.searchsorted(ends[first : last + 1], cuts, side="right") + first
        segments: NDArray[np.int64] = self._pieces[order[at]]
        segments[:, 1] += cuts - (ends[at] - segments[:, 2])
        segments[:, 2] = np.diff(cuts, append=stop)
        return segments

    def _ends(self, epoch: int) -> NDArray[np.int64]:
        """Where each piece of an epoch's order ends in that epoch's tokens."""

        def make() -> NDArray[np.int64]:
            return np.cumsum(self._pieces[self._order.epoch(epoch), 2])

        return _recent(self._ends_of, epoch, make)


def _recent(kept: dict[int, NDArray[T]], epoch: int, make: Callable[[], NDArray[T]]) -> NDArray[T]:
    """What belongs to an epoch; kept for two, as rows may lie on both sides of a border."""
    if epoch not in kept:
        kept[epoch] = make()
        for older in list(kept)[:-2]:
            del kept[older]
    return kept[epoch]
