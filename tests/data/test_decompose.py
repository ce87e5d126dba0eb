"""Every token in exactly one piece, or counted as dropped."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ringctx.data.decompose import Decomposition, LongDocs, decompose, remainders

LENGTHS = st.lists(st.integers(0, 5000), min_size=1, max_size=30)
BOTH: tuple[LongDocs, ...] = ("greedy", "spread")


def pieces_of(parts: Decomposition, lengths: list[int]) -> list[tuple[int, int, int]]:
    """Document, start and length of every piece."""
    found = []
    for bucket in parts.buckets:
        places = bucket.locate(np.arange(len(bucket)), np.array(lengths))
        found += [(document, start, bucket.length) for document, start in places.tolist()]
    return found


@pytest.mark.parametrize("long_docs", BOTH)
@settings(max_examples=50, deadline=None)
@given(lengths=LENGTHS, small=st.integers(0, 8), more=st.integers(0, 5), seed=st.integers(0, 9))
def test_every_token_is_in_one_piece_or_in_a_dropped_tail(
    long_docs: LongDocs, lengths: list[int], small: int, more: int, seed: int
) -> None:
    parts = decompose(
        np.array(lengths),
        min_len=2**small,
        max_len=2 ** (small + more),
        long_docs=long_docs,
        seed=seed,
    )
    uses = [np.zeros(length, dtype=int) for length in lengths]
    for document, start, length in pieces_of(parts, lengths):
        assert start + length <= lengths[document]
        uses[document][start : start + length] += 1
    for length, used in zip(lengths, uses, strict=True):
        kept = length - length % 2**small
        assert (used[:kept] == 1).all() and (used[kept:] == 0).all()
    assert parts.kept_tokens == sum(int(used.sum()) for used in uses)
    assert parts.dropped_tokens == sum(lengths) - parts.kept_tokens


@given(lengths=LENGTHS, small=st.integers(0, 8))
def test_remainders_are_the_dropped_tails(lengths: list[int], small: int) -> None:
    tails = remainders(np.array(lengths), min_len=2**small)
    expected = [
        (document, length - length % 2**small, length % 2**small)
        for document, length in enumerate(lengths)
        if length % 2**small
    ]
    assert [tuple(tail) for tail in tails.tolist()] == expected


@given(lengths=LENGTHS)
def test_pieces_of_a_document_never_grow_along_it(lengths: list[int]) -> None:
    by_document: dict[int, list[tuple[int, int]]] = {}
    for document, start, length in pieces_of(
        decompose(np.array(lengths), min_len=2, max_len=256), lengths
    ):
        by_document.setdefault(document, []).append((start, length))
    for pieces in by_document.values():
        in_order = [length for _, length in sorted(pieces)]
        assert in_order == sorted(in_order, reverse=True)


def test_a_document_is_cut_by_its_binary_digits_longest_first() -> None:
    lengths = [0b1101]
    pieces = pieces_of(decompose(np.array(lengths), min_len=1, max_len=8), lengths)
    assert sorted(pieces) == [(0, 0, 8), (0, 8, 4), (0, 12, 1)]


def test_a_document_longer_than_the_longest_piece_gives_several() -> None:
    lengths = [3, 27]
    pieces = pieces_of(decompose(np.array(lengths), min_len=2, max_len=8), lengths)
    assert sorted(pieces) == [(0, 0, 2), (1, 0, 8), (1, 8, 8), (1, 16, 8), (1, 24, 2)]


@given(lengths=st.lists(st.integers(0, 511), min_size=1, max_size=30))
def test_spread_leaves_documents_below_two_longest_pieces_as_they_are(lengths: list[int]) -> None:
    greedy, spread = (
        decompose(np.array(lengths), min_len=16, max_len=256, long_docs=long_docs)
        for long_docs in BOTH
    )
    assert pieces_of(spread, lengths) == pieces_of(greedy, lengths)


def test_spread_gives_every_bucket_equally_many_tokens() -> None:
    lengths = np.full(20, 10_000_000)
    parts = decompose(lengths, min_len=256, max_len=8192, long_docs="spread", seed=3)
    tokens = [bucket.length * len(bucket) for bucket in parts.buckets]
    assert len(tokens) == 6
    assert all(abs(n * 6 / sum(tokens) - 1) < 0.05 for n in tokens), tokens


def test_spread_lists_the_pieces_of_a_bucket_by_document_and_start() -> None:
    lengths = np.array([9000, 40_000, 300, 70_000])
    parts = decompose(lengths, min_len=64, max_len=1024, long_docs="spread")
    for bucket in parts.buckets:
        places = bucket.locate(np.arange(len(bucket)), lengths).tolist()
        assert places == sorted(places)


@pytest.mark.parametrize("longest", [2**16, 2**17])
def test_lengths_beyond_16_bits_are_buckets_like_any_other(longest: int) -> None:
    lengths = [longest, longest - 1, 2 * longest + 5]
    parts = decompose(np.array(lengths), min_len=longest // 2, max_len=longest)
    assert {bucket.length: len(bucket) for bucket in parts.buckets} == {longest // 2: 1, longest: 3}


def test_a_length_that_no_document_reaches_is_no_bucket() -> None:
    parts = decompose(np.array([300, 40]), min_len=16, max_len=2**30)
    assert [bucket.length for bucket in parts.buckets] == [32, 256]
