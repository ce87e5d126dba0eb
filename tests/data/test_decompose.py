"""Every token in exactly one piece, or counted as dropped."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ringctx.data.decompose import Decomposition, decompose

LENGTHS = st.lists(st.integers(1, 5000), min_size=1, max_size=30)


def pieces_of(parts: Decomposition, lengths: list[int]) -> list[tuple[int, int, int]]:
    """Document, start and length of every piece."""
    found = []
    for bucket in parts.buckets:
        places = bucket.locate(np.arange(len(bucket)), np.array(lengths))
        found += [(document, start, bucket.length) for document, start in places.tolist()]
    return found


@given(lengths=LENGTHS, small=st.integers(0, 8), more=st.integers(0, 5))
def test_every_token_is_in_one_piece_or_in_a_dropped_tail(
    lengths: list[int], small: int, more: int
) -> None:
    parts = decompose(np.array(lengths), min_len=2**small, max_len=2 ** (small + more))
    uses = [np.zeros(length, dtype=int) for length in lengths]
    for document, start, length in pieces_of(parts, lengths):
        assert start + length <= lengths[document]
        uses[document][start : start + length] += 1
    for length, used in zip(lengths, uses, strict=True):
        kept = length - length % 2**small
        assert (used[:kept] == 1).all() and (used[kept:] == 0).all()
    assert parts.kept_tokens == sum(int(used.sum()) for used in uses)
    assert parts.dropped_tokens == sum(lengths) - parts.kept_tokens


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


@pytest.mark.parametrize("longest", [2**16, 2**17])
def test_lengths_beyond_16_bits_are_buckets_like_any_other(longest: int) -> None:
    lengths = [longest, longest - 1, 2 * longest + 5]
    parts = decompose(np.array(lengths), min_len=longest // 2, max_len=longest)
    assert {bucket.length: len(bucket) for bucket in parts.buckets} == {longest // 2: 1, longest: 3}


def test_a_length_that_no_document_reaches_is_no_bucket() -> None:
    parts = decompose(np.array([300, 40]), min_len=16, max_len=2**30)
    assert [bucket.length for bucket in parts.buckets] == [32, 256]
