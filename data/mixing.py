"""Rows of several sources, interleaved by weight: any number of first rows keeps the proportion.

The first n rows hold n times the share of each source, to within one row. Row i of a source with
share w may come no earlier than row i / w of the mixture and no later than (i + 1) / w; the row
due first, of those that may come, comes next. On one machine this keeps every date whenever the
shares add up to 1, as is known from fair scheduling. Shares are fractions of one period of at most
2^20 rows, after which the order repeats, so that one period is all that is ever computed:
thousands of stretches of it at once, each from a guess of how its start looks, until every
stretch ends as the next one starts.
Price: 0.2 s once for the longest period (seconds for dozens of sources of very uneven weights);
then about 0.1 us a row beside the pools' own.
Source: Baruah et al. 1996, "Proportionate progress: a notion of fairness in resource allocation".
"""

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ringctx.data.row_pools import RowPool, Rows

__all__ = ["Limit", "MixedPool", "interleave", "share_period"]

_LONGEST_PERIOD = 2**20


@dataclass(frozen=True)
class Limit:
    """How far a mixture goes."""

    rows: int
    source: int
    """The one that has no more rows then."""


class MixedPool:
    """Rows of several pools in proportion to weights; each source's in its own pool's order."""

    def __init__(self, pools: Sequence[RowPool], weights: Sequence[float]) -> None:
        """Mix pools.

        Args:
            pools: one for each source, all with rows of one length.
            weights: of the sources' rows, above 0; only their proportion counts.
        """
        lengths = {pool.row_len for pool in pools}
        assert len(lengths) == 1 and len(pools) == len(weights), (lengths, len(weights))
        self.pools = tuple(pools)
        self.row_len = lengths.pop()
        self.shares = share_period(tuple(weights))
        """Rows of each source in one period."""
        self._period = sum(self.shares)
        self._order = interleave(self.shares)
        # Where in a period each source has its rows.
        by_source = np.argsort(self._order, kind="stable")
        self._ordinals = np.split(by_source, np.cumsum(self.shares)[:-1])

    def counts(self, n: int) -> tuple[int, ...]:
        """Rows of each source among the first n."""
        periods, rest = divmod(n, self._period)
        return tuple(
            periods * share + int(np.searchsorted(ordinals, rest))
            for share, ordinals in zip(self.shares, self._ordinals, strict=True)
        )

    def available(self, epochs: Sequence[float]) -> Limit:
        """How many rows come before any source is used more often than allowed.

        Args:
            epochs: of each source.

        Returns:
            That number, and the source that stops it; of several the first.
        """
        ends = []
        for pool, share, ordinals, limit in zip(
            self.pools, self.shares, self._ordinals, epochs, strict=True
        ):
            periods, rest = divmod(pool.available(limit), share)
            ends.append(periods * self._period + int(ordinals[rest]))
        return Limit(min(ends), ends.index(min(ends)))

    def rows(self, first: int, count: int) -> Rows:
        """Rows first, first + 1, ..., of the mixture."""
        before, after = self.counts(first), self.counts(first + count)
        parts = [
            pool.rows(start, stop - start)
            for pool, start, stop in zip(self.pools, before, after, strict=True)
        ]
        order = self._order[np.arange(first, first + count) % self._period]
        # Entry i of the argsort is where row i of the parts, source by source, belongs.
        place = np.empty(count, np.int64)
        place[np.argsort(order, kind="stable")] = np.arange(count)
        return Rows.join(parts).take(place)


@functools.lru_cache(maxsize=16)
def share_period(weights: tuple[float, ...]) -> tuple[int, ...]:
    """Weights as whole numbers of rows.

    Args:
        weights: above 0.

    Returns:
        Rows of each source in the shortest period that holds the weights exactly (up to
        rounding of floats), or else in 2^20 rows, rounded, at least one each.
    """
    assert all(weight > 0 for weight in weights), weights
    shares = np.array(weights, np.float64) / math.fsum(weights)
    periods = np.arange(1, _LONGEST_PERIOD + 1)
    worst = np.zeros(len(periods))
    for share in shares:
        exact = share * periods
        np.maximum(worst, np.abs(exact - np.rint(exact)), out=worst)
    # A share so small that it rounds to nothing is not exact.
    worst[shares.min() * periods < 0.5] = 1
    fits = np.flatnonzero(worst < 1e-6 / len(shares))
    period = int(periods[fits[0]]) if len(fits) else _LONGEST_PERIOD
    rows = np.maximum(np.rint(shares * period), 1).astype(np.int64)
    rows[np.argmax(rows)] += period - rows.sum()
    return tuple(rows.tolist())


@functools.lru_cache(maxsize=16)
def interleave(shares: tuple[int, ...]) -> NDArray[np.uint16]:
    """The source of every row of a period in which each has so many rows.

    Args:
        shares: rows of each source, at least 1.

    Returns:
        `[sum(shares)]`; among the first n, for every n, each source has n * share / sum(shares)
        rows to within one.
    """
    share = np.array(shares, np.int64)
    period = int(share.sum())
    width = math.isqrt(period)
    starts = np.arange(0, period, width)
    counts = _guess(starts, share)
    sources = np.empty((width, len(starts)), np.uint16)
    wrong = np.arange(len(starts))
    while len(wrong):
        ends, sources[:, wrong] = _walk(starts[wrong], counts[wrong], share, width)
        # What follows a stretch that now ends elsewhere than the next began is walked again.
        follow = wrong[:-1] + 1 if wrong[-1] == len(starts) - 1 else wrong + 1
        ends = ends[: len(follow)]
        moved = (counts[follow] != ends).any(axis=1)
        wrong = follow[moved]
        counts[wrong] = ends[moved]
    order = sources.T.reshape(-1)[:period]
    # One array serves all callers.
    order.flags.writeable = False
    return order


def _guess(starts: NDArray[np.int64], share: NDArray[np.int64]) -> NDArray[np.int64]:
    """Probably how many rows of each source come before each start, `[starts, sources]`."""
    period = share.sum()
    counts = starts[:, None] * share // period
    missing = starts - counts.sum(axis=1)
    due = np.where(starts[:, None] * share % period, (counts + 1) / share, np.inf)
    rank = np.argsort(np.argsort(due, axis=1, kind="stable"), axis=1, kind="stable")
    return np.asarray(counts + (rank < missing[:, None]), np.int64)


def _walk(
    starts: NDArray[np.int64], counts: NDArray[np.int64], share: NDArray[np.int64], width: int
) -> tuple[NDArray[np.int64], NDArray[np.uint16]]:
    """From each start `width` rows on, all at once.

    Returns:
        The counts after them, `[starts, sources]`, and the rows' sources, `[width, starts]`.
    """
    period, pace = share.sum(), 1 / share
    counts = counts.copy()
    sources = np.empty((width, len(starts)), np.uint16)
    stretch = np.arange(len(starts))
    for row in range(width):
        may_come = counts * period < (starts[:, None] + row + 1) * share
        due = np.where(may_come, (counts + 1) * pace, np.inf)
        chosen = np.argmin(due, axis=1)
        counts[stretch, chosen] += 1
        sources[row] = chosen
    return counts, sources
