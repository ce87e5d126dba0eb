"""Random cuts of long documents: each document on its own, whatever is drawn beside it."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ringctx.data import random_cut
from ringctx.data.random_cut import RandomCuts, cut_at_random

LENGTHS = st.lists(st.integers(0, 20_000), min_size=1, max_size=20)


def by_document(cuts: RandomCuts) -> dict[int, list[tuple[int, int]]]:
    """Start and length of every piece of each document."""
    found: dict[int, list[tuple[int, int]]] = {}
    for document, start, length in zip(
        cuts.documents.tolist(), cuts.starts.tolist(), cuts.lengths.tolist(), strict=True
    ):
        found.setdefault(document, []).append((start, length))
    return {document: sorted(pieces) for document, pieces in found.items()}


@given(lengths=LENGTHS, small=st.integers(2, 6), more=st.integers(0, 5))
def test_cutting_goes_on_while_two_longest_pieces_are_left(
    lengths: list[int], small: int, more: int
) -> None:
    longest = 2 ** (small + more)
    pieces = by_document(
        cut_at_random(np.array(lengths), min_len=2**small, max_len=longest, seed=1)
    )
    assert set(pieces) == {d for d, length in enumerate(lengths) if length >= 2 * longest}
    for document, cuts in pieces.items():
        at = 0
        for start, length in cuts:
            assert start == at and lengths[document] - at >= 2 * longest
            assert 2**small <= length <= longest and length & (length - 1) == 0
            at += length
        assert lengths[document] - at < 2 * longest


@given(lengths=LENGTHS, others=LENGTHS, block=st.integers(1, 500))
def test_a_document_is_cut_the_same_among_any_others_and_in_any_blocks(
    lengths: list[int], others: list[int], block: int
) -> None:
    alone = by_document(cut_at_random(np.array(lengths), min_len=16, max_len=256, seed=5))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(random_cut, "_BLOCK", block)
        among = by_document(
            cut_at_random(np.array(lengths + others), min_len=16, max_len=256, seed=5)
        )
    assert alone == {d: pieces for d, pieces in among.items() if d < len(lengths)}


def test_how_many_pieces_are_drawn_at_once_changes_no_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    lengths = np.array([3000, 700, 9000, 20_000])
    whole = by_document(cut_at_random(lengths, min_len=16, max_len=256, seed=5))
    monkeypatch.setattr(random_cut, "_expected_draws", lambda room, sizes: np.full(len(room), 3))
    assert by_document(cut_at_random(lengths, min_len=16, max_len=256, seed=5)) == whole


def test_seed_and_document_each_change_the_cut() -> None:
    lengths = np.array([50_000, 50_000])
    one, other = (
        by_document(cut_at_random(lengths, min_len=16, max_len=256, seed=seed)) for seed in (1, 2)
    )
    assert one[0] != one[1] and one[0] != other[0]


def test_each_length_is_drawn_twice_as_often_as_the_next_longer_one() -> None:
    cuts = cut_at_random(np.full(50, 500_000), min_len=64, max_len=1024, seed=0)
    _, counts = np.unique(cuts.lengths, return_counts=True)
    share = counts / counts.sum()
    assert np.abs(share - np.array([16, 8, 4, 2, 1]) / 31).max() < 0.005


def test_a_cut_is_what_it_was_when_this_test_was_written() -> None:
    cuts = cut_at_random(np.array([0, 1900]), min_len=64, max_len=512, seed=9)
    assert cuts.lengths.tolist() == [512, 64, 64, 64, 256]
