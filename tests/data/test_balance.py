"""Rows are dealt by what they cost: evenly, and the same way every time."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from ringctx.data.balance import deal_rows, visible_pairs
from ringctx.data.row_spans import row_costs
from ringctx.data.steps import Step
from tests.data.packed_steps import packed_step, packed_steps


@given(
    costs=st.lists(st.integers(0, 50), min_size=1, max_size=12),
    groups=st.integers(1, 5),
)
def test_every_row_goes_to_one_group_and_every_group_gets_as_many(
    costs: list[int], groups: int
) -> None:
    dealt = deal_rows(np.array(costs * groups), groups=groups)
    assert dealt.shape == (groups, len(costs))
    assert sorted(dealt.flatten().tolist()) == list(range(len(costs) * groups))
    for group in dealt:
        keys = [(-(costs * groups)[row], row) for row in group.tolist()]
        assert keys == sorted(keys), "costliest first, then by number"


def test_equal_rows_are_dealt_in_turn() -> None:
    assert deal_rows(np.full(6, 7), groups=3).tolist() == [[0, 3], [1, 4], [2, 5]]


def concatenated(rng: np.random.Generator, *, rows: int, row_len: int) -> NDArray[np.int64]:
    """Costs of rows cut from documents of log-normal lengths, laid end to end."""
    ends = np.cumsum(rng.lognormal(8, 1.6, size=rows * row_len // 500).astype(np.int64) + 1)
    assert ends[-1] > rows * row_len
    cuts = np.union1d(ends[ends < rows * row_len], np.arange(0, rows * row_len + 1, row_len))
    pairs = visible_pairs(np.diff(cuts))
    return np.add.reduceat(pairs, np.searchsorted(cuts, np.arange(0, rows * row_len, row_len)))


def evenness(costs: NDArray[np.int64]) -> float:
    """Mean over largest of the groups' costs; costs `[groups, rows]`."""
    loads = costs.sum(axis=1)
    return float(loads.mean() / loads.max())


@pytest.mark.parametrize("groups", [8, 32])
def test_groups_are_even_on_log_normal_documents_where_dealing_in_turn_is_not(groups: int) -> None:
    costs = concatenated(np.random.default_rng(0), rows=4 * groups, row_len=65_536)
    balanced = evenness(costs[deal_rows(costs, groups=groups)])
    in_turn = evenness(costs.reshape(-1, groups).T)
    assert balanced > 0.9
    assert in_turn < 0.8 * balanced


def test_rounds_are_even_too_since_each_group_goes_from_costly_to_cheap() -> None:
    costs = concatenated(np.random.default_rng(1), rows=64, row_len=16_384)
    dealt = costs[deal_rows(costs, groups=8)]
    shuffled = np.random.default_rng(2).permuted(dealt, axis=1)
    # A round takes as long as its costliest row.
    assert dealt.max(axis=0).sum() < 0.8 * shuffled.max(axis=0).sum()


@given(
    length=st.integers(0, 40),
    window=st.none() | st.integers(1, 45),
    sinks=st.integers(0, 45),
)
def test_visible_pairs_are_those_counted_one_by_one(
    length: int, window: int | None, sinks: int
) -> None:
    sinks = 0 if window is None else sinks
    counted = sum(
        window is None or query - key < window or key < sinks
        for query in range(length)
        for key in range(query + 1)
    )
    assert visible_pairs(np.array([length]), window=window, sinks=sinks).tolist() == [counted]


@given(drawn=packed_steps(), window=st.none() | st.integers(1, 60))
def test_a_row_costs_what_its_pieces_and_its_padding_see(
    drawn: tuple[list[int], Step], window: int | None
) -> None:
    _, step = drawn
    step = Step(0, step.bucket_len, step.pieces, 0, step.row_offsets, doc_mask=True, window=window)
    assert step.row_offsets is not None
    for row, cost in enumerate(row_costs(step).tolist()):
        own = step.pieces[step.row_offsets[row] : step.row_offsets[row + 1], 2]
        documents = np.append(own, step.bucket_len - own.sum())
        assert cost == visible_pairs(documents, window=window).sum()


def test_a_windowed_row_of_one_document_costs_little_more_than_one_of_many() -> None:
    many = [(i, 0, 32) for i in range(8)]
    step = packed_step(
        [[(8, 0, 256)], many], bucket_len=256, lengths=[32] * 8 + [300], doc_mask=True, window=8
    )
    one, several = row_costs(step).tolist()
    assert several < one < 1.15 * several
