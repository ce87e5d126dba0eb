"""Mixtures: in proportion at every row, and each source in its own order."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ringctx.data.mixing import MixedPool, interleave, share_period
from ringctx.data.row_pools import StreamPool, whole_documents

SHARES = st.lists(st.integers(1, 60), min_size=1, max_size=12)
# Few large and many small ones: where taking turns by time alone fails.
UNEVEN = st.tuples(st.integers(1, 5000), st.lists(st.integers(1, 3), max_size=40)).map(
    lambda parts: [parts[0], *parts[1]]
)


def pools_of(lengths: list[list[int]]) -> list[StreamPool]:
    return [
        StreamPool(whole_documents(np.array(docs)), row_len=4, seed=source)
        for source, docs in enumerate(lengths)
    ]


def largest_deviation(shares: list[int]) -> float:
    """Between rows and due rows of any source after any number of rows of one period."""
    order = interleave(tuple(shares))
    rows = np.arange(1, len(order) + 1)
    return max(
        float(np.abs(np.cumsum(order == source) - rows * (share / len(order))).max())
        for source, share in enumerate(shares)
    )


@settings(max_examples=200, deadline=None)
@given(shares=st.one_of(SHARES, UNEVEN))
def test_every_prefix_holds_each_source_to_within_one_row(shares: list[int]) -> None:
    assert largest_deviation(shares) < 1


@pytest.mark.parametrize("sources", [2, 8, 30])
def test_the_longest_period_holds_each_source_to_within_one_row(sources: int) -> None:
    weights = np.random.default_rng(sources).dirichlet(np.ones(sources))
    shares = share_period(tuple(weights.tolist()))
    assert sum(shares) > 10**5
    assert largest_deviation(list(shares)) < 1


def naive_interleave(shares: list[int]) -> list[int]:
    """The rule, one row at a time: of the rows that may come, the one due first."""
    period, counts, order = sum(shares), [0] * len(shares), []
    for row in range(period):
        may_come = [s for s, share in enumerate(shares) if counts[s] * period < (row + 1) * share]
        chosen = min(may_come, key=lambda s: ((counts[s] + 1) * (1 / shares[s]), s))
        counts[chosen] += 1
        order.append(chosen)
    return order


@settings(max_examples=200, deadline=None)
@given(shares=st.one_of(SHARES, UNEVEN))
def test_stretches_walked_at_once_give_what_one_walk_gives(shares: list[int]) -> None:
    assert interleave(tuple(shares)).tolist() == naive_interleave(shares)


@pytest.mark.parametrize(
    ("weights", "rows"),
    [
        ((0.3, 0.3, 0.1, 0.3), (3, 3, 1, 3)),
        ((2.0, 1.0), (2, 1)),
        ((1 / 3, 1 / 7, 11 / 21), (7, 3, 11)),
        ((5.0,), (1,)),
        ((0.15, 0.15, 0.05, 0.25, 0.4), (3, 3, 1, 5, 8)),
    ],
)
def test_plain_weights_have_a_short_period(
    weights: tuple[float, ...], rows: tuple[int, ...]
) -> None:
    assert share_period(weights) == rows


@settings(max_examples=20, deadline=None)
@given(weights=st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=8))
def test_shares_are_the_weights_to_a_hundred_thousandth(weights: list[float]) -> None:
    rows = share_period(tuple(weights))
    for share, weight in zip(rows, weights, strict=True):
        # A weight below the resolution still comes once a period; another one gives way.
        assert abs(share / sum(rows) - weight / sum(weights)) < 1e-5
        assert share >= 1


def test_a_tiny_weight_still_comes_once_a_period() -> None:
    assert share_period((1.0, 1e-12)) == (2**20 - 1, 1)


@settings(max_examples=50, deadline=None)
@given(data=st.data(), weights=st.lists(st.integers(1, 9), min_size=1, max_size=4))
def test_sources_come_in_their_own_order_whatever_is_asked_for(
    data: st.DataObject, weights: list[int]
) -> None:
    lengths = [data.draw(st.lists(st.integers(1, 30), min_size=1)) for _ in weights]
    pools = pools_of(lengths)
    mixed = MixedPool(pools, weights)
    first, count = data.draw(st.integers(0, 60)), data.draw(st.integers(0, 30))
    rows = mixed.rows(first, count)
    order = [int(s) for s in np.tile(interleave(mixed.shares), 100)[: first + count]]
    for at in range(count):
        source = order[first + at]
        row = pools[source].rows(order[: first + at].count(source), 1)
        assert rows.take(np.array([at])).pieces.tolist() == row.pieces.tolist()
    assert mixed.counts(first) == tuple(order[:first].count(s) for s in range(len(weights)))


@settings(max_examples=50, deadline=None)
@given(data=st.data(), weights=st.lists(st.integers(1, 9), min_size=1, max_size=4))
def test_a_mixture_ends_before_the_first_source_that_would_repeat_too_often(
    data: st.DataObject, weights: list[int]
) -> None:
    lengths = [data.draw(st.lists(st.integers(1, 30), min_size=1)) for _ in weights]
    epochs = [data.draw(st.floats(0, 5)) for _ in weights]
    mixed = MixedPool(pools_of(lengths), weights)
    limits = [pool.available(n) for pool, n in zip(mixed.pools, epochs, strict=True)]
    end = mixed.available(epochs)
    assert all(n <= limit for n, limit in zip(mixed.counts(end.rows), limits, strict=True))
    assert mixed.counts(end.rows + 1)[end.source] == limits[end.source] + 1
