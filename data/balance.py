"""Rows of documents cost what their documents cost: deal them so that no group waits for another.

A row costs `6 P l + 12 L d pairs` FLOPs a step. The first term is the same for all rows of one
length, so only the pairs of a token and one that it sees decide; a row of one long document has
many times those of a row of short ones. LPT (longest processing time first): the costliest row
that is left goes to the group with the least so far that has room. A step is one accumulation
window and its rows are dealt among themselves, so the order of training is as deterministic as the
plan.
Price: about a microsecond a row. Source: Graham 1969 (SIAM J. Appl. Math. 17), section 3.
"""

import heapq

import numpy as np
from numpy.typing import NDArray

__all__ = ["deal_rows", "visible_pairs"]


def visible_pairs(
    lengths: NDArray[np.int64], *, window: int | None = None, sinks: int = 0
) -> NDArray[np.int64]:
    """Pairs of a token and one that it sees, itself included, within documents; causal.

    Args:
        lengths: tokens of each document.
        window: tokens that a token sees, itself included; None: all before it.
        sinks: first tokens of a document that stay visible beyond the window.

    Returns:
        int64, the shape of lengths.
    """
    near = lengths if window is None else np.minimum(window, lengths)
    behind = lengths - near
    return _capped_sum(lengths, near) + _capped_sum(behind, np.minimum(sinks, behind))


def deal_rows(costs: NDArray[np.int64], *, groups: int) -> NDArray[np.int64]:
    """Deal rows to groups, the same number to each, so that the costliest group costs little.

    Args:
        costs: of each row; their number is a multiple of groups.
        groups: that share the rows.

    Returns:
        `[groups, rows / groups]`: numbers of rows, in each group from the costliest to the
        cheapest, so that groups that go through theirs side by side keep step. Of equal rows the
        one with the lower number comes first, of equal groups too.
    """
    room, rest = divmod(len(costs), groups)
    assert rest == 0, (len(costs), groups)
    dealt: list[list[int]] = [[] for _ in range(groups)]
    loads = [(0, group) for group in range(groups)]
    by_cost = np.argsort(-costs, kind="stable")
    for row, cost in zip(by_cost.tolist(), costs[by_cost].tolist(), strict=True):
        load, group = heapq.heappop(loads)
        dealt[group].append(row)
        if len(dealt[group]) < room:
            heapq.heappush(loads, (load + cost, group))
    return np.array(dealt, dtype=np.int64).reshape(groups, room)


def _capped_sum(lengths: NDArray[np.int64], caps: NDArray[np.int64]) -> NDArray[np.int64]:
    """1 + 2 + ... + length, each term at most its cap <= length."""
    return caps * (caps + 1) // 2 + (lengths - caps) * caps
