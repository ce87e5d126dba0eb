"""Rows by number: the same however they are asked for, and every token once an epoch."""

import itertools
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from ringctx.data.decompose import decompose
from ringctx.data.packing import BestFitPool
from ringctx.data.randomness import permutation
from ringctx.data.row_pools import PiecePool, RowPool, Rows, StreamPool, whole_documents

LENGTHS = st.lists(st.integers(1, 60), min_size=1, max_size=12).filter(lambda n: max(n) >= 8)


def piece_pool(lengths: list[int], *, pieces_per_row: int = 1, source: int = 0) -> PiecePool:
    """Pieces of 8 tokens."""
    lens = np.array(lengths)
    (bucket,) = decompose(lens, min_len=8, max_len=8).buckets
    return PiecePool(bucket, lens, seed=0, pieces_per_row=pieces_per_row, source=source)


def stream_pool(
    lengths: list[int], *, row_len: int = 8, start: int = 0, source: int = 0
) -> StreamPool:
    """All documents end to end."""
    documents = whole_documents(np.array(lengths))
    return StreamPool(documents, row_len=row_len, seed=0, start=start, source=source)


def best_fit_pool(lengths: list[int], *, source: int = 0) -> BestFitPool:
    """All documents packed."""
    return BestFitPool(whole_documents(np.array(lengths)), row_len=8, seed=0, source=source)


POOLS: dict[str, Callable[[list[int]], RowPool]] = {
    "piece": piece_pool,
    "pieces": lambda lengths: piece_pool(lengths, pieces_per_row=3),
    "stream": stream_pool,
    "late_stream": lambda lengths: stream_pool(lengths, start=5),
    "best_fit": best_fit_pool,
}
every_pool = pytest.mark.parametrize("kind", POOLS)


def tokens_of(rows: Rows) -> list[tuple[int, int]]:
    """Document and place in it of every token, in order."""
    return [
        (document, place)
        for document, start, length in rows.pieces.tolist()
        for place in range(start, start + length)
    ]


def rows_as_lists(rows: Rows) -> list[list[list[int]]]:
    pieces = rows.pieces.tolist()
    return [pieces[a:b] for a, b in zip(rows.offsets[:-1], rows.offsets[1:], strict=True)]


def all_tokens(lengths: list[int]) -> list[tuple[int, int]]:
    return [(document, place) for document, n in enumerate(lengths) for place in range(n)]


@every_pool
@settings(max_examples=50, deadline=None)
@given(data=st.data(), lengths=LENGTHS)
def test_rows_are_the_same_however_they_are_asked_for(
    kind: str, data: st.DataObject, lengths: list[int]
) -> None:
    first = data.draw(st.integers(0, 40))
    counts = data.draw(st.lists(st.integers(0, 15), min_size=1, max_size=6))
    whole = POOLS[kind](lengths).rows(first, sum(counts))
    pool = POOLS[kind](lengths)
    borders = (first + np.cumsum([0, *counts])).tolist()
    # Latest first, so that no answer can hang on an earlier one.
    parts = [pool.rows(at, count) for at, count in zip(borders, counts, strict=False)][::-1]
    assert rows_as_lists(whole) == [row for part in parts[::-1] for row in rows_as_lists(part)]
    assert len(whole) == sum(counts)


@every_pool
@given(lengths=LENGTHS, first=st.integers(0, 30))
@settings(max_examples=50, deadline=None)
def test_a_row_never_holds_more_than_its_length(kind: str, lengths: list[int], first: int) -> None:
    pool = POOLS[kind](lengths)
    sizes = [sum(piece[2] for piece in row) for row in rows_as_lists(pool.rows(first, 9))]
    padded = kind == "best_fit"
    assert all(0 < size <= pool.row_len if padded else size == pool.row_len for size in sizes)


@every_pool
@settings(max_examples=50, deadline=None)
@given(lengths=LENGTHS, epochs=st.integers(1, 4))
def test_available_rows_use_no_token_more_often_than_the_epochs(
    kind: str, lengths: list[int], epochs: int
) -> None:
    pool = POOLS[kind](lengths)
    tokens = tokens_of(pool.rows(0, pool.available(epochs)))
    uses = [tokens.count(token) for token in set(tokens)]
    assert max(uses, default=0) <= epochs
    # One row more would not do.
    more = tokens_of(pool.rows(0, pool.available(epochs) + 1))
    fit = sum(length // 8 * 8 for length in lengths) if "piece" in kind else sum(lengths)
    assert len(more) + (5 if kind == "late_stream" else 0) > epochs * fit


@settings(max_examples=50, deadline=None)
@given(lengths=LENGTHS, epoch=st.integers(0, 3))
def test_an_epoch_of_pieces_has_every_piece_once(lengths: list[int], epoch: int) -> None:
    pool = piece_pool(lengths)
    n = pool.available(1)
    kept = [(d, i) for d, i in all_tokens(lengths) if i < lengths[d] // 8 * 8]
    assert sorted(tokens_of(pool.rows(epoch * n, n))) == kept


@settings(max_examples=50, deadline=None)
@given(lengths=LENGTHS, epoch=st.integers(0, 3))
def test_an_epoch_of_packed_rows_has_every_token_once(lengths: list[int], epoch: int) -> None:
    pool = best_fit_pool(lengths)
    n = pool.available(1)
    assert sorted(tokens_of(pool.rows(epoch * n, n))) == all_tokens(lengths)
    assert pool.padding_share == pytest.approx(1 - sum(lengths) / (8 * n))


@settings(max_examples=50, deadline=None)
@given(lengths=LENGTHS, row_len=st.integers(1, 100), start=st.integers(0, 300))
def test_a_stream_is_its_epochs_end_to_end(lengths: list[int], row_len: int, start: int) -> None:
    total = sum(lengths)
    count = -(-(start + 3 * total) // row_len)
    rows = stream_pool(lengths, row_len=row_len).rows(0, count)
    stream = tokens_of(rows)
    for epoch in range(3):
        part = stream[epoch * total : (epoch + 1) * total]
        assert sorted(part) == all_tokens(lengths)
        # Documents are whole: a part of one is followed by its next token.
        ends = [a for a, b in itertools.pairwise(part) if b != (a[0], a[1] + 1)]
        assert all(place == lengths[document] - 1 for document, place in ends)
    late = stream_pool(lengths, row_len=row_len, start=start)
    assert (
        tokens_of(late.rows(0, 3 * total // row_len))
        == stream[start:][: 3 * total // row_len * row_len]
    )


def test_another_row_length_goes_on_where_the_first_one_stopped() -> None:
    lengths = [13, 40, 7, 22, 9]
    short, long = stream_pool(lengths), stream_pool(lengths, row_len=16, start=3 * 8)
    seen = tokens_of(short.rows(0, 3)) + tokens_of(long.rows(0, long.available(1)))
    assert seen == tokens_of(short.rows(0, 11))
    assert len(set(seen)) == 3 * 8 + 4 * 16


@pytest.mark.parametrize("build", [piece_pool, stream_pool, best_fit_pool])
def test_epochs_and_sources_each_have_an_order_of_their_own(
    build: Callable[..., RowPool],
) -> None:
    lengths = [8] * 40
    pool, other = build(lengths), build(lengths, source=1)
    orders = [pool.rows(0, 40), pool.rows(40, 40), other.rows(0, 40), other.rows(40, 40)]
    assert len({tuple(tokens_of(rows)) for rows in orders}) == 4
    assert len({tuple(sorted(tokens_of(rows))) for rows in orders}) == 1


def test_pieces_come_in_the_order_of_the_plan() -> None:
    lengths = np.array([30, 9, 17, 64])
    (bucket,) = decompose(lengths, min_len=8, max_len=8).buckets
    n = len(bucket)
    order = np.concatenate([permutation(n, seed=7, bucket_len=8, epoch=e) for e in range(3)])
    rows = PiecePool(bucket, lengths, seed=7).rows(5, 2 * n)
    assert rows.pieces[:, :2].tolist() == bucket.locate(order[5:][: 2 * n], lengths).tolist()
    assert (rows.pieces[:, 2] == 8).all()


def test_several_pieces_fill_a_row_in_the_order_that_they_have_alone() -> None:
    lengths = [30, 9, 17, 64]
    one, three = piece_pool(lengths), piece_pool(lengths, pieces_per_row=3)
    assert three.row_len == 24
    assert three.rows(2, 5).pieces.tolist() == one.rows(6, 15).pieces.tolist()
    assert three.rows(2, 5).offsets.tolist() == [0, 3, 6, 9, 12, 15]


def test_a_part_of_an_epoch_is_available_in_whole_rows() -> None:
    lengths = [80, 23]
    assert piece_pool(lengths).available(0.5) == 6
    assert piece_pool(lengths, pieces_per_row=4).available(1.5) == 4
    assert stream_pool(lengths).available(1) == 12
    assert stream_pool(lengths, start=90).available(1) == 1
    assert stream_pool(lengths, start=200).available(1) == 0
    assert best_fit_pool(lengths).available(2.5) == 32


def test_pools_that_start_late_go_on_where_another_one_stopped() -> None:
    lens = np.array([30, 9, 17, 64, 12])
    (bucket,) = decompose(lens, min_len=8, max_len=8).buckets
    late = PiecePool(bucket, lens, seed=0, pieces_per_row=2, start=5)
    assert tokens_of(late.rows(1, 4)) == tokens_of(piece_pool(lens.tolist()).rows(7, 8))
    assert (late.available(1), late.available(0.1)) == ((len(bucket) - 5) // 2, 0)
    whole = best_fit_pool(lens.tolist())
    packed = BestFitPool(whole_documents(lens), row_len=8, seed=0, start=3)
    assert rows_as_lists(packed.rows(1, 20)) == rows_as_lists(whole.rows(4, 20))
    assert (packed.available(1), packed.available(0)) == (whole.available(1) - 3, 0)


def test_remainders_fill_rows_by_themselves() -> None:
    tails: NDArray[np.int64] = np.array([[0, 16, 5], [2, 8, 6], [3, 0, 7]])
    pool = StreamPool(tails, row_len=9, seed=0)
    expected = [(0, i) for i in range(16, 21)] + [(2, i) for i in range(8, 14)]
    expected += [(3, i) for i in range(7)]
    assert sorted(tokens_of(pool.rows(0, 2))) == expected


def test_an_empty_document_is_no_piece() -> None:
    assert whole_documents(np.array([3, 0, 5])).tolist() == [[0, 0, 3], [2, 0, 5]]


@every_pool
@settings(max_examples=30, deadline=None)
@given(lengths=LENGTHS, picks=st.lists(st.integers(0, 8), max_size=12))
def test_rows_can_be_picked_in_any_order(kind: str, lengths: list[int], picks: list[int]) -> None:
    rows = POOLS[kind](lengths).rows(3, 9)
    picked = rows_as_lists(rows.take(np.array(picks, np.int64)))
    assert picked == [rows_as_lists(rows)[pick] for pick in picks]
