"""What a token sees, and which part of a pair of pieces that is, as slices that kernels run.

One idea: no mask is ever built. Positions are evenly spaced within a run of a shard, so in any
layout a mask is a few inequalities between a row i and a column j of two runs: a document is a
rectangle, causal is an upper edge j <= i + u, a window is a lower edge j >= i + l, and sinks are
the first columns of a document's rectangle, without the lower edge. `mask_slices` cuts those into
full rectangles and squares; every visible pair is in exactly one slice, and nothing else is.

    causal        j = i            j < i                    j > i
    contiguous    causal square    all q x all k            nothing
    zigzag        causal square    all q x front half k     back half q x all k
    striped       causal square    causal square            q[1:] x k[:-1], causal square

Their number grows with the documents that both pieces hold tokens of, not with lengths or windows.
Price: pure integers, some microseconds a document; cached.
"""

from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from itertools import pairwise

import numpy as np
from torch import Tensor

from ringctx.errors import LayoutError
from ringctx.ops.documents import check_cu_seqlens
from ringctx.ops.pair_attention import PairSlice
from ringctx.parallel.layout import Piece, Run, Sharding
from ringctx.parallel.mask_slices import Rectangle, cut, joined

__all__ = ["Mask", "MaskSettings", "pair_slices"]


@dataclass(frozen=True, slots=True)
class Mask:
    """What a token sees. Build it from what a user gave with `checked`."""

    # Only itself and earlier tokens.
    causal: bool = True
    # Only itself and the window - 1 tokens before it; only with causal.
    window: int | None = None
    # Also the first tokens, of each document where there are documents; only with a window.
    sinks: int = 0
    # Only its own document: where each begins, and the end of the last. None is one document.
    cu_seqlens: tuple[int, ...] | None = None
    _hash: int = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        """Hash the fields."""
        fields = (self.causal, self.window, self.sinks, self.cu_seqlens)
        object.__setattr__(self, "_hash", hash(fields))

    @classmethod
    def checked(
        cls,
        *,
        causal: bool,
        window: int | None,
        sinks: int,
        cu_seqlens: Tensor | None,
        seq_len: int,
    ) -> "Mask":
        """Check a user's settings; leave out those that hide nothing.

        Args:
            causal: whether a token sees only itself and earlier tokens.
            window: tokens that a query sees, itself included; None for all.
            sinks: tokens that stay visible beyond the window.
            cu_seqlens: int32 `[documents + 1]` on the CPU, over the whole sequence; None for one
                document.
            seq_len: tokens of the whole sequence.

        Raises:
            LayoutError: if a setting is out of range, or two do not fit together.
        """
        _check_window(causal, window, sinks)
        if window is None or window >= seq_len:
            window, sinks = None, 0
        if cu_seqlens is None:
            return cls(causal=causal, window=window, sinks=sinks)
        check_cu_seqlens(cu_seqlens)
        return _with_documents(causal, window, sinks, cu_seqlens.numpy().tobytes(), seq_len)

    def __hash__(self) -> int:
        """Worked out once: masks of thousands of documents are looked up for every piece."""
        return self._hash


@dataclass(frozen=True, kw_only=True)
class MaskSettings:
    """The arguments that make a mask, before the length of the sequence is known."""

    causal: bool
    window: int | None
    sinks: int
    cu_seqlens: Tensor | None

    def checked(self, seq_len: int) -> Mask:
        """The mask of a sequence of this length; LayoutError if they do not fit it."""
        return Mask.checked(**vars(self), seq_len=seq_len)


def pair_slices(mask: Mask, sharding: Sharding, *, q: Piece, k: Piece) -> tuple[PairSlice, ...]:
    """Cut a pair of pieces into the slices that some query in it can see.

    Args:
        mask: what a token sees.
        sharding: the sequence and how it is spread.
        q: rows of a shard whose queries look.
        k: rows of a shard whose keys are looked at.

    Returns:
        Disjoint slices, none of them empty, in rows of the two pieces. Together they are exactly
        the visible part.
    """
    # A typed front: the cache takes anything.
    return _pair_slices(mask, sharding, q, k)


def _check_window(causal: bool, window: int | None, sinks: int) -> None:
    if not isinstance(causal, bool):
        raise LayoutError(f"causal={causal!r} must be True or False")
    if window is None:
        if sinks != 0:
            raise LayoutError(
                f"sinks={sinks!r} needs a window: without one every earlier token is visible "
                "anyway; set window=..., or sinks=0"
            )
        return
    if not isinstance(window, int) or isinstance(window, bool) or window < 1:
        raise LayoutError(
            f"window={window!r} must be a whole number of at least 1, since a query sees itself; "
            "None for no window"
        )
    if not causal:
        raise LayoutError(
            f"window={window:,} needs causal=True: it counts backwards from the query; "
            "set causal=True, or window=None"
        )
    if not isinstance(sinks, int) or isinstance(sinks, bool) or sinks < 0:
        raise LayoutError(f"sinks={sinks!r} must be a whole number of at least 0; 0 for none")


# The same borders give the same object, which is equal to itself at a glance.
@lru_cache(maxsize=64)
def _with_documents(
    causal: bool, window: int | None, sinks: int, int32_bounds: bytes, seq_len: int
) -> Mask:
    bounds = tuple(np.frombuffer(int32_bounds, dtype=np.int32).tolist())
    if len(bounds) < 2 or bounds[0] != 0:
        found = f"begins with {bounds[0]:,}" if bounds else "is empty"
        if bounds[:1] == (0,):
            found = "is [0]"
        raise LayoutError(
            f"cu_seqlens {found}; it must begin with 0 and end with seq_len={seq_len:,}"
        )
    for i, (start, stop) in enumerate(pairwise(bounds)):
        if stop <= start:
            raise LayoutError(
                f"cu_seqlens[{i + 1}]={stop:,} does not rise above cu_seqlens[{i}]={start:,}; "
                "every document must hold a token: leave empty ones out"
            )
    if bounds[-1] != seq_len:
        raise LayoutError(
            f"cu_seqlens ends with {bounds[-1]:,} and the whole sequence with {seq_len:,}; they "
            "must agree: cu_seqlens covers all ranks' tokens, padding as a document of its own"
        )
    documents = None if len(bounds) == 2 else bounds
    return Mask(causal=causal, window=window, sinks=sinks, cu_seqlens=documents)


@lru_cache(maxsize=4096)
def _pair_slices(mask: Mask, sharding: Sharding, q: Piece, k: Piece) -> tuple[PairSlice, ...]:
    assert 0 <= q.owner < sharding.world_size and 0 <= k.owner < sharding.world_size, (q, k)
    assert 0 <= q.start <= q.stop <= sharding.local_len, (q, sharding)
    assert 0 <= k.start <= k.stop <= sharding.local_len, (k, sharding)
    areas = _rectangles(mask, sharding, q, k)
    return tuple(joined(part for area in areas for part in cut(area)))


def _rectangles(mask: Mask, sharding: Sharding, q: Piece, k: Piece) -> Iterator[Rectangle]:
    if q.owner == k.owner and mask == Mask():
        # Positions rise within a shard: causal is one staircase, across its runs too.
        yield Rectangle(0, q.length, 0, k.length, upper=q.start - k.start)
        return
    for queries in _clipped(sharding.runs(q.owner), q):
        for keys in _clipped(sharding.runs(k.owner), k):
            for start, stop in _shared_documents(mask, queries, keys):
                yield from _document(mask, queries, keys, start=start, stop=stop)


def _clipped(runs: Iterable[Run], piece: Piece) -> list[Run]:
    """What the piece holds of each run, in rows of the piece."""
    parts = []
    for run in runs:
        start, stop = max(run.start, piece.start), min(run.start + run.length, piece.stop)
        if start < stop:
            first = run.first + (start - run.start) * run.stride
            parts.append(Run(start - piece.start, stop - start, first, run.stride))
    return parts


def _shared_documents(mask: Mask, queries: Run, keys: Run) -> Iterable[tuple[int, int]]:
    """Where each document begins and ends that has a token in both runs."""
    (q_first, q_end), (k_first, k_end) = (
        (run.first, run.first + (run.length - 1) * run.stride + 1) for run in (queries, keys)
    )
    if mask.cu_seqlens is None:
        return ((0, max(q_end, k_end)),)
    q_documents = _overlapping(mask.cu_seqlens, q_first, q_end)
    k_documents = _overlapping(mask.cu_seqlens, k_first, k_end)
    first, end = max(q_documents[0], k_documents[0]), min(q_documents[1], k_documents[1])
    return pairwise(mask.cu_seqlens[first : end + 1])


def _overlapping(bounds: Sequence[int], start: int, stop: int) -> tuple[int, int]:
    """The documents [first, end) that have a token in [start, stop)."""
    return bisect_right(bounds, start) - 1, bisect_left(bounds, stop)


def _document(mask: Mask, queries: Run, keys: Run, *, start: int, stop: int) -> Iterator[Rectangle]:
    """One document's part of a pair of runs."""
    stride = queries.stride
    assert stride == keys.stride, (queries, keys)
    area = Rectangle(
        *_rows(queries, start, stop), *_rows(keys, start, stop), *_edges(mask, queries, keys)
    )
    if area.is_empty:
        return
    if mask.sinks and area.is_cut_below:
        _, border = _rows(keys, start, min(start + mask.sinks, stop))
        if area.c0 < border:
            yield replace(area, c1=border, lower=None)
            area = replace(area, c0=border)
    yield area


def _rows(run: Run, start: int, stop: int) -> tuple[int, int]:
    """The rows [first, end) of a run that hold positions [start, stop)."""
    first, end = (-((run.first - x) // run.stride) for x in (start, stop))
    return run.start + max(first, 0), run.start + min(end, run.length)


def _edges(mask: Mask, queries: Run, keys: Run) -> tuple[int | None, int | None]:
    """The edges j - i >= lower and j - i <= upper between a row i and a column j."""
    stride = queries.stride
    # position(j) - position(i) = stride * (j - i) - ahead
    ahead = queries.first - stride * queries.start - (keys.first - stride * keys.start)
    lower = None if mask.window is None else -((mask.window - 1 - ahead) // stride)
    upper = ahead // stride if mask.causal else None
    return lower, upper
