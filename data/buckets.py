"""Buckets: where a plan's rows come from, one for each length or stage, and what each may give.

A bucket is a pool of rows (`row_pools.py`) with a limit: every row once, or the share that
total_tokens, the weights of sources and max_epochs leave it. Which buckets a curriculum has, and
what is in them, say `supply_decomposed.py` and `supply_staged.py`.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from ringctx.data.mixing import MixedPool
from ringctx.data.row_pools import RowPool
from ringctx.data.source_shares import SourceShare

__all__ = ["Mixture", "RowBucket", "Supply", "mix_pools"]


@dataclass(frozen=True, eq=False, kw_only=True)
class RowBucket:
    """Rows of one length that a plan draws from."""

    row_len: int
    pool: RowPool | MixedPool
    rows: int
    """What the whole plan may take."""
    doc_mask: bool = False
    """Rows hold several pieces, and tokens see only their own."""
    tokens_per_step: int | None = None
    """Of this bucket's steps; None: the curriculum's."""

    def rows_per_step(self, tokens_per_step: int) -> int:
        """Rows of one step, where the curriculum's steps have `tokens_per_step`."""
        return (self.tokens_per_step or tokens_per_step) // self.row_len


@dataclass(frozen=True, eq=False, kw_only=True)
class Supply:
    """All buckets of a plan, and what of the dataset is in none."""

    buckets: tuple[RowBucket, ...]
    """By ascending length, or in the order of the stages."""
    source_tokens: int
    """Tokens of the documents that rows are made of: all, or those of the sources of a mix."""
    dropped_tokens: int
    """Tokens of these that no row can hold."""
    passed_over_tokens: int
    """Tokens of the dataset that the rows leave out: by total_tokens, stages, weights of sources,
    and at the end of a stream."""
    repeated_tokens: int
    """Tokens in the rows that had been in a row before."""
    padding_tokens: int = 0
    """Places without a token in the rows that the plan may take."""
    notes: tuple[str, ...] = ()
    """What a user would want to know about the rows, a sentence each."""

    @property
    def tokens(self) -> int:
        """Places for tokens in all rows that the plan may take."""
        return sum(bucket.rows * bucket.row_len for bucket in self.buckets)


@dataclass(frozen=True, eq=False, kw_only=True)
class Mixture:
    """The pool of one bucket, made of one pool a source."""

    pool: RowPool | MixedPool
    shares: tuple[SourceShare, ...]
    parts: tuple[RowPool, ...]
    """The pool of each share."""

    def available(self) -> int:
        """Rows until a source has been used max_epochs times; without a mix, one epoch."""
        if isinstance(self.pool, MixedPool):
            return self.pool.available([share.epochs for share in self.shares]).rows
        return self.pool.available(self.shares[0].epochs)

    def counts(self, rows: int) -> tuple[int, ...]:
        """How many of the first rows come from each share."""
        return self.pool.counts(rows) if isinstance(self.pool, MixedPool) else (rows,)

    @property
    def exhausted(self) -> str:
        """The source that runs out first."""
        if isinstance(self.pool, MixedPool):
            first = self.pool.available([share.epochs for share in self.shares]).source
            return self.shares[first].key
        return self.shares[0].key


def mix_pools(parts: Sequence[tuple[SourceShare, RowPool]]) -> Mixture:
    """One pool out of one a source; the weights are those of the sources that are there."""
    shares = tuple(share for share, _ in parts)
    pools = tuple(pool for _, pool in parts)
    if len(pools) == 1:
        return Mixture(pool=pools[0], shares=shares, parts=pools)
    mixed = MixedPool(pools, [share.weight for share in shares])
    return Mixture(pool=mixed, shares=shares, parts=pools)
