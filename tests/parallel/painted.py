"""Slices as counts in a dense matrix, to compare with a mask."""

from collections.abc import Iterable

import torch

from ringctx.ops.pair_attention import PairSlice

__all__ = ["painted"]


def painted(slices: Iterable[PairSlice], rows: int, columns: int) -> torch.Tensor:
    """How often each (query, key) pair is attended. Checks that the slices are what they say."""
    times = torch.zeros(rows, columns, dtype=torch.int64)
    for part in slices:
        assert min(part.q_len, part.k_len, part.count) >= 1 and part.gap >= 0, part
        assert part.q_len == part.k_len or (part.kind == "full" and part.count == 1), part
        tile = torch.ones(part.q_len, part.k_len, dtype=torch.int64)
        tile = {"full": tile, "causal": tile.tril(), "anticausal": tile.triu()}[part.kind]
        assert part.pairs == part.count * int(tile.sum()), part
        for i in range(part.count):
            q_start = part.q_start + i * (part.q_len + part.gap)
            k_start = part.k_start + i * (part.k_len + part.gap)
            assert part.q.start <= q_start and q_start + part.q_len <= part.q.stop <= rows, part
            assert part.k.start <= k_start and k_start + part.k_len <= part.k.stop <= columns, part
            times[q_start : q_start + part.q_len, k_start : k_start + part.k_len] += tile
    return times
