"""Slices of block pairs: exactly what the mask lets through, and equal work for every rank."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ringctx.errors import LayoutError
from ringctx.parallel import positions
from ringctx.parallel.layout import LAYOUTS
from ringctx.parallel.mask import PairSlice, visible_slices


def _painted(slices: tuple[PairSlice, ...], local_len: int) -> torch.Tensor:
    """How often each (query, key) pair is attended."""
    count = torch.zeros(local_len, local_len, dtype=torch.int64)
    for part in slices:
        block = torch.ones(part.q_stop - part.q_start, part.k_stop - part.k_start).long()
        count[part.q, part.k] += block.tril() if part.causal else block
    return count


def _visible_pairs(slices: tuple[PairSlice, ...]) -> int:
    total = 0
    for part in slices:
        rows, columns = part.q_stop - part.q_start, part.k_stop - part.k_start
        total += rows * (rows + 1) // 2 if part.causal else rows * columns
    return total


@given(
    world_size=st.integers(1, 8),
    layout=st.sampled_from(LAYOUTS),
    causal=st.booleans(),
    local_len=st.integers(1, 9),
)
def test_slices_paint_the_mask_of_the_positions_exactly_once(
    world_size: int, layout: str, causal: bool, local_len: int
) -> None:
    if layout == "zigzag" and world_size > 1:
        local_len *= 2
    held = [
        positions(world_size * local_len, rank=rank, world_size=world_size, layout=layout)
        for rank in range(world_size)
    ]
    for q_rank, kv_rank in itertools.product(range(world_size), repeat=2):
        slices = visible_slices(
            layout=layout,
            causal=causal,
            q_rank=q_rank,
            kv_rank=kv_rank,
            world_size=world_size,
            local_len=local_len,
        )
        visible = held[kv_rank][None, :] <= held[q_rank][:, None]
        expected = visible if causal else torch.ones_like(visible)
        assert torch.equal(_painted(slices, local_len), expected.long()), (q_rank, kv_rank)
        for part in slices:
            assert part.q_start < part.q_stop and part.k_start < part.k_stop, part
            assert not part.causal or part.q_stop - part.q_start == part.k_stop - part.k_start, part


def _work(layout: str, world_size: int, local_len: int) -> list[list[int]]:
    """Visible pairs of each rank in each ring step."""
    return [
        [
            _visible_pairs(
                visible_slices(
                    layout=layout,
                    causal=True,
                    q_rank=rank,
                    kv_rank=(rank - ring_step) % world_size,
                    world_size=world_size,
                    local_len=local_len,
                )
            )
            for ring_step in range(world_size)
        ]
        for rank in range(world_size)
    ]


@pytest.mark.parametrize("world_size", range(2, 9))
def test_zigzag_gives_every_rank_equal_causal_work_in_every_ring_step(world_size: int) -> None:
    work = _work("zigzag", world_size, local_len=10)
    assert all(rank == work[0] for rank in work)


@pytest.mark.parametrize("world_size", range(2, 9))
def test_striped_differs_by_one_diagonal_at_most_in_every_ring_step(world_size: int) -> None:
    for ring_step in zip(*_work("striped", world_size, local_len=10), strict=True):
        assert max(ring_step) - min(ring_step) <= 10


def test_contiguous_leaves_the_first_rank_idle_after_its_own_block() -> None:
    assert _work("contiguous", 4, local_len=10)[0] == [55, 0, 0, 0]


def test_rejects_an_unknown_layout() -> None:
    with pytest.raises(LayoutError, match="layout='spiral' is not known"):
        visible_slices(layout="spiral", causal=True, q_rank=0, kv_rank=0, world_size=1, local_len=1)
