"""Best fit, beside a packer that looks at every row for every document."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ringctx.data.packing import BestFitPool, best_fit
from ringctx.data.row_pools import whole_documents


def naive_spaces(lengths: list[int], row_len: int) -> list[int]:
    """Space left in every row by best fit, longest first, one document at a time."""
    spaces: list[int] = []
    for length in sorted(lengths, reverse=True):
        fits = [space for space in spaces if space >= length]
        if fits:
            spaces.remove(min(fits))
        spaces.append((min(fits) if fits else row_len) - length)
    return sorted(spaces)


def spaces_of(rows: list[int], lengths: list[int], row_len: int) -> list[int]:
    used: Counter[int] = Counter()
    for row, length in zip(rows, lengths, strict=True):
        used[row] += length
    assert set(used) == set(range(len(used)))
    return sorted(row_len - n for n in used.values())


@settings(max_examples=300, deadline=None)
@given(
    row_len=st.sampled_from([1, 2, 7, 16, 33, 100]),
    parts=st.lists(st.integers(0, 10**6), max_size=60),
)
def test_rows_are_as_full_as_if_packed_one_document_at_a_time(
    row_len: int, parts: list[int]
) -> None:
    lengths = [1 + part % row_len for part in parts]
    rows = best_fit(np.array(lengths, np.int64), row_len=row_len).tolist()
    assert spaces_of(rows, lengths, row_len) == naive_spaces(lengths, row_len)


@pytest.mark.parametrize("row_len", [300, 65536])
def test_thousands_of_documents_are_packed_as_one_at_a_time(row_len: int) -> None:
    draws = np.random.default_rng(0).lognormal(np.log(row_len / 8), 1.2, 3000)
    lengths = np.clip(draws.astype(np.int64), 1, row_len)
    rows = best_fit(lengths, row_len=row_len)
    assert spaces_of(rows.tolist(), lengths.tolist(), row_len) == naive_spaces(
        lengths.tolist(), row_len
    )


def test_a_document_goes_where_the_least_space_is_left() -> None:
    # 6 and 5 open rows of 10; 4 fills the first, 3 goes to the second, 3 opens a third.
    assert best_fit(np.array([3, 4, 5, 6, 3]), row_len=10).tolist() == [1, 0, 1, 0, 2]


def test_long_documents_give_whole_rows_and_are_cut_nowhere_else() -> None:
    pool = BestFitPool(whole_documents(np.array([25, 8, 3, 10])), row_len=10, seed=0)
    rows = pool.rows(0, pool.available(1))
    assert sorted(rows.pieces.tolist()) == [
        [0, 0, 10],
        [0, 10, 10],
        [0, 20, 5],
        [1, 0, 8],
        [2, 0, 3],
        [3, 0, 10],
    ]
    assert len(rows) == 5
    assert pool.padding_share == pytest.approx(4 / 50)


def test_no_documents_make_no_rows() -> None:
    pool = BestFitPool(np.empty((0, 3), np.int64), row_len=10, seed=0)
    assert (pool.available(3), pool.padding_share) == (0, 0.0)
