"""Who needs which piece: exactly those who see something in it."""

import numpy as np
import pytest
from hypothesis import given, settings

from ringctx.parallel.layout import Piece, Sharding
from ringctx.parallel.mask import Mask
from ringctx.parallel.need import Needed, Travels, needed_pieces
from tests.parallel.route_cases import seen, sharded_masks, sharding_of


def needs(sharding: Sharding, mask: Mask, travels: Travels) -> np.ndarray:
    """How often each rank is listed for each row of each shard, `[user, owner, row]`."""
    table = np.zeros((sharding.world_size, sharding.world_size, sharding.local_len), dtype=int)
    for item in needed_pieces(sharding, mask, travels=travels):
        for user in item.users:
            table[user, item.piece.owner, item.piece.rows] += 1
    return table


def needs_by_brute_force(sharding: Sharding, mask: Mask, travels: Travels) -> np.ndarray:
    visible = seen(sharding, mask)
    # [user, owner, row] of keys; [owner, row, user] of queries
    keys, queries = visible.any(axis=1), np.einsum("ork->kor", visible.any(axis=3))
    table = (keys if travels == "kv" else queries).astype(int)
    for rank in range(sharding.world_size):
        table[rank, rank] = 0
    return table


@settings(max_examples=300, deadline=None)
@given(case=sharded_masks())
def test_lists_exactly_the_rows_that_are_seen(case: tuple[Sharding, Mask]) -> None:
    sharding, mask = case
    sides: tuple[Travels, ...] = ("kv", "q")
    for travels in sides:
        listed = needs(sharding, mask, travels)
        truth = needs_by_brute_force(sharding, mask, travels)
        if sharding.layout == "striped":
            # All that is seen, and all else too: striping spreads every window over all ranks.
            assert (listed >= truth).all() and listed.max(initial=0) <= 1
        else:
            assert (listed == truth).all(), travels


@settings(max_examples=100, deadline=None)
@given(case=sharded_masks())
def test_pieces_are_in_order_and_users_rise(case: tuple[Sharding, Mask]) -> None:
    sharding, mask = case
    for travels in ("kv", "q"):
        items = needed_pieces(sharding, mask, travels=travels)
        keys = [(item.piece.owner, item.piece.start) for item in items]
        assert keys == sorted(set(keys))
        for item in items:
            assert list(item.users) == sorted(set(item.users) - {item.piece.owner})
            assert item.users and item.piece.length > 0


def test_causal_zigzag_sends_back_blocks_only_to_the_ranks_below() -> None:
    found = needed_pieces(sharding_of(3, 4, "zigzag"), Mask(), travels="kv")
    assert found == (
        Needed(Piece(0, 0, 2), (1, 2)),
        Needed(Piece(1, 0, 2), (0, 2)),
        Needed(Piece(1, 2, 4), (0,)),
        Needed(Piece(2, 0, 4), (0, 1)),
    )


def test_a_window_needs_the_last_tokens_before_a_border() -> None:
    found = needed_pieces(sharding_of(3, 10, "contiguous"), Mask(window=4), travels="kv")
    assert found == (Needed(Piece(0, 7, 10), (1,)), Needed(Piece(1, 7, 10), (2,)))


def test_documents_that_end_with_a_shard_leave_nothing_to_send() -> None:
    mask = Mask(cu_seqlens=(0, 10, 20, 30))
    assert needed_pieces(sharding_of(3, 10, "contiguous"), mask, travels="kv") == ()


@pytest.mark.parametrize("layout", ["contiguous", "zigzag"])
def test_full_attention_needs_whole_shards_everywhere(layout: str) -> None:
    found = needed_pieces(sharding_of(4, 2, layout), Mask(causal=False), travels="q")
    everyone = range(4)
    assert found == tuple(
        Needed(Piece(owner, 0, 2), tuple(r for r in everyone if r != owner)) for owner in everyone
    )
