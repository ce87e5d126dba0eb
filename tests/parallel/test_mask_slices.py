"""Rectangles with edges: cut into slices that paint every visible pair once, and few of them."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from ringctx.ops.pair_attention import PairSlice
from ringctx.parallel.mask_slices import Rectangle, cut, joined
from tests.parallel.painted import painted

SIZE = 14
BORDERS = st.lists(st.integers(0, SIZE), min_size=2, max_size=2).map(sorted)
EDGES = st.none() | st.integers(-SIZE - 2, SIZE + 2)


@given(rows=BORDERS, columns=BORDERS, lower=EDGES, upper=EDGES)
def test_a_cut_rectangle_is_painted_once_between_its_edges(
    rows: list[int], columns: list[int], lower: int | None, upper: int | None
) -> None:
    (r0, r1), (c0, c1) = rows, columns
    area = Rectangle(r0, r1, c0, c1, lower=lower, upper=upper)
    i, j = torch.arange(SIZE)[:, None], torch.arange(SIZE)[None, :]
    expected = (i >= r0) & (i < r1) & (j >= c0) & (j < c1)
    if lower is not None:
        expected &= j >= i + lower
    if upper is not None:
        expected &= j <= i + upper
    slices = list(cut(area))
    assert torch.equal(painted(slices, SIZE, SIZE), expected.long()), slices
    assert torch.equal(painted(joined(slices), SIZE, SIZE), expected.long()), joined(slices)
    assert len(slices) <= 9


def test_squares_that_follow_each_other_become_tiles_of_one_slice() -> None:
    squares = [PairSlice(i, 3, i + 4, 3, "causal") for i in (0, 3, 6, 9)]
    assert joined(squares) == [PairSlice(0, 3, 4, 3, "causal", count=4)]
    assert joined([squares[0], squares[2]]) == [PairSlice(0, 3, 4, 3, "causal", 2, gap=3)]
    spaced = [PairSlice(0, 2, 0, 2, "anticausal", 2, gap=1), PairSlice(6, 2, 6, 2, "anticausal")]
    assert joined(spaced) == [PairSlice(0, 2, 0, 2, "anticausal", 3, gap=1)]


def test_squares_off_the_diagonal_of_another_kind_or_spacing_stay_apart() -> None:
    first = PairSlice(0, 3, 0, 3, "causal", 2)
    for other in (
        PairSlice(6, 3, 7, 3, "causal"),
        PairSlice(6, 3, 6, 3, "anticausal"),
        PairSlice(6, 2, 6, 2, "causal"),
        PairSlice(7, 3, 7, 3, "causal"),
        PairSlice(6, 3, 6, 3, "causal", 2, gap=1),
    ):
        assert joined([first, other]) == [first, other]


def test_four_rectangles_around_a_point_become_one() -> None:
    parts = [
        PairSlice(i, 2 + i, j, 3 - (j > 0), "full") for i, j in ((0, 0), (0, 3), (2, 0), (2, 3))
    ]
    assert joined(parts) == [PairSlice(0, 6, 0, 5, "full")]


def test_a_band_is_tiles_of_as_many_rows_as_columns_and_a_rest() -> None:
    # Width 3, 8 rows: two tiles, and two rows over.
    assert list(cut(Rectangle(0, 8, -3, 10, lower=-2, upper=0))) == [
        PairSlice(0, 3, 0, 3, "causal", 2),
        PairSlice(0, 2, -2, 2, "anticausal", 2, gap=1),
        PairSlice(6, 2, 6, 2, "causal"),
        PairSlice(6, 2, 4, 2, "anticausal"),
    ]


def test_edges_that_hide_nothing_leave_one_slice() -> None:
    assert list(cut(Rectangle(0, 4, 0, 4, lower=-3, upper=3))) == [PairSlice(0, 4, 0, 4, "full")]
    assert list(cut(Rectangle(0, 4, 0, 4, lower=-3, upper=0))) == [PairSlice(0, 4, 0, 4, "causal")]
    assert list(cut(Rectangle(0, 4, 0, 4, lower=0, upper=3))) == [
        PairSlice(0, 4, 0, 4, "anticausal")
    ]
