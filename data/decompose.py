"""Dataset Decomposition: cut every document into power-of-two pieces, longest first.

A document of l tokens gives one piece for every binary digit of l; what exceeds the longest bucket
gives several longest pieces. Nothing is stored: the piece of bucket 2^k in document d starts where
l has its digits up to k cleared, so a bucket is a list of documents. Long documents may instead be
cut at random (`spread`), as the paper's released code does; then every piece's start is stored.
Price: one pass over the lengths a bucket (10 M documents in about a second), 4 bytes a piece
(12 with `spread`).
Source: Pouransari et al. 2024 (arXiv 2405.13226), section 2.1.
"""

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from ringctx.data.random_cut import cut_at_random

__all__ = ["Bucket", "Decomposition", "LongDocs", "decompose", "remainders"]

LongDocs = Literal["greedy", "spread"]
"""What becomes of a document that holds several longest pieces."""


@dataclass(frozen=True, eq=False)
class Bucket:
    """All pieces of one length."""

    length: int
    documents: NDArray[Any]
    """Whole numbers `[documents]`: those with a piece of this length, ascending."""
    ends: NDArray[np.int64] | None = None
    """`[documents]`: cumulative number of pieces, where documents may have several in a row."""
    starts: NDArray[np.int64] | None = None
    """`[documents]`: where the pieces start, if not at a binary digit; a document stands here as
    often as it has pieces."""

    def __len__(self) -> int:
        """Number of pieces."""
        if self.ends is None:
            return len(self.documents)
        return int(self.ends[-1]) if len(self.ends) else 0

    def locate(self, pieces: NDArray[Any], lengths: NDArray[np.int64]) -> NDArray[np.int64]:
        """Where pieces lie.

        Args:
            pieces: `[n]`, numbers of pieces in this bucket.
            lengths: int64 `[all documents]`.

        Returns:
            int64 `[n, 2]`: document, and start inside it.
        """
        if self.ends is not None:
            at = np.searchsorted(self.ends, pieces, side="right")
            documents = self.documents[at].astype(np.int64)
            before = np.where(at > 0, self.ends[at - 1], 0)
            starts = (pieces - before) * self.length
        else:
            documents = self.documents[pieces].astype(np.int64)
            if self.starts is None:
                starts = lengths[documents] & -(2 * self.length)
            else:
                starts = self.starts[pieces]
        return np.stack([documents, starts], axis=1)


@dataclass(frozen=True, eq=False)
class Decomposition:
    """Every token in exactly one piece, or counted as dropped."""

    buckets: tuple[Bucket, ...]
    """Those that have pieces, by ascending length."""
    kept_tokens: int
    dropped_tokens: int
    """Tokens of remainders shorter than the shortest bucket."""


def decompose(
    lengths: NDArray[np.int64],
    *,
    min_len: int,
    max_len: int,
    long_docs: LongDocs = "greedy",
    seed: int = 0,
) -> Decomposition:
    """Cut documents into pieces of the lengths min_len, 2 min_len, ..., max_len.

    Args:
        lengths: int64 `[documents]`, tokens of each document; 0 leaves a document out.
        min_len: shortest piece, a power of two.
        max_len: longest piece, a power of two.
        long_docs: what becomes of a document that holds several longest pieces. greedy: just
            those. spread: while it has at least two, pieces of random lengths, such that every
            bucket gets equally many tokens.
        seed: names the random lengths, document by document.
    """
    cut = _greedy_buckets if long_docs == "greedy" else _spread_buckets
    buckets = cut(lengths, min_len, max_len, seed)
    dropped = int((lengths & (min_len - 1)).sum())
    return Decomposition(
        buckets=tuple(bucket for bucket in buckets if len(bucket)),
        kept_tokens=int(lengths.sum()) - dropped,
        dropped_tokens=dropped,
    )


def remainders(lengths: NDArray[np.int64], *, min_len: int) -> NDArray[np.int64]:
    """What is left of documents behind their last piece.

    Args:
        lengths: int64 `[documents]`.
        min_len: shortest piece of the decomposition, a power of two.

    Returns:
        int64 `[n, 3]`: document, start and length (1 to min_len - 1) of each remainder.
    """
    left = lengths & (min_len - 1)
    documents = np.flatnonzero(left)
    return np.stack([documents, (lengths - left)[documents], left[documents]], axis=1)


def _greedy_buckets(
    lengths: NDArray[np.int64], min_len: int, max_len: int, seed: int
) -> list[Bucket]:
    small = _small(lengths)
    buckets = []
    length = min_len
    while length < max_len:
        buckets.append(Bucket(length, np.flatnonzero(lengths & length).astype(small)))
        length *= 2
    longest = lengths // max_len
    documents = np.flatnonzero(longest)
    buckets.append(Bucket(max_len, documents.astype(small), np.cumsum(longest[documents])))
    return buckets


def _spread_buckets(
    lengths: NDArray[np.int64], min_len: int, max_len: int, seed: int
) -> list[Bucket]:
    small = _small(lengths)
    cuts = cut_at_random(lengths, min_len=min_len, max_len=max_len, seed=seed)
    # What the random pieces leave, less than two longest pieces, is cut by its binary digits.
    rest = lengths.copy()
    np.subtract.at(rest, cuts.documents, cuts.lengths)
    buckets = []
    length = min_len
    while length <= max_len:
        drawn = cuts.lengths == length
        whole = np.flatnonzero(rest & length)
        documents = np.concatenate([cuts.documents[drawn], whole])
        at_digits = (lengths - rest)[whole] + (rest[whole] & -(2 * length))
        starts = np.concatenate([cuts.starts[drawn], at_digits])
        order = np.lexsort([starts, documents])
        buckets.append(Bucket(length, documents[order].astype(small), starts=starts[order]))
        length *= 2
    return buckets


def _small(lengths: NDArray[np.int64]) -> type[np.unsignedinteger[Any] | np.signedinteger[Any]]:
    """The narrowest type that this library keeps document numbers in."""
    return np.uint32 if len(lengths) < 2**32 else np.int64
