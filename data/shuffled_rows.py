"""A pool's rows in an order of their own: rows that were neighbours come far apart.

Rows cut from a stream of documents follow one another through each document, so without this a
long document would fill many steps by itself, and a short run little else.
Price: 4 bytes a row of a block, and a look-up a row, about 0.05 ms.
"""

import numpy as np
from numpy.typing import NDArray

from ringctx.data.randomness import permutation
from ringctx.data.row_pools import RowPool, Rows

__all__ = ["ShuffledPool"]


class ShuffledPool:
    """Blocks of a pool's rows one after another, each in random order."""

    def __init__(
        self,
        pool: RowPool,
        *,
        block: int,
        total: int | None = None,
        seed: int,
        source: int = 0,
    ) -> None:
        """Shuffle a pool.

        Args:
            pool: what to take rows from.
            block: rows that change places with one another, the first block from row 0 on.
            total: rows that may change places at all, so that the last block may be shorter; those
                beyond are another's. None: there is no end.
            seed: of the run.
            source: number of the source whose documents these are.
        """
        self._pool, self._block, self._total = pool, max(block, 1), total
        self._seed, self._source = seed, source
        self._last: tuple[int, NDArray[np.uint32]] | None = None

    @property
    def row_len(self) -> int:
        """Tokens of a row, padding included."""
        return self._pool.row_len

    def available(self, epochs: float) -> int:
        """How many rows come before any document is used more than `epochs` times."""
        return self._pool.available(epochs)

    def rows(self, first: int, count: int) -> Rows:
        """Rows first, first + 1, ..., counted through all blocks."""
        ordinals = range(first, first + count)
        parts = [self._pool.rows(self._place(ordinal), 1) for ordinal in ordinals]
        return Rows.join(parts) if parts else self._pool.rows(0, 0)

    def _place(self, ordinal: int) -> int:
        """The row of the pool that comes at this place."""
        block, at = divmod(ordinal, self._block)
        if self._last is None or self._last[0] != block:
            left = self._block if self._total is None else self._total - block * self._block
            order = permutation(
                min(self._block, left),
                seed=self._seed,
                bucket_len=self.row_len,
                epoch=block,
                source=self._source,
                unit="row",
            )
            self._last = (block, order)
        return block * self._block + int(self._last[1][at])
