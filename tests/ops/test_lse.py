"""Joining softmax results: as all keys at once, in any order, also where nothing was seen."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from ringctx.errors import LayoutError
from ringctx.ops.lse import merge, merge_
from ringctx.ops.naive import naive_attention


def _parts(q: Tensor, k: Tensor, v: Tensor, cuts: list[int]) -> list[tuple[Tensor, Tensor]]:
    """Attention over each piece of the keys; a piece may be all in the future of some queries."""
    borders = [0, *sorted(cuts), k.shape[1]]
    return [
        naive_attention(
            q,
            k[:, start:stop],
            v[:, start:stop],
            causal=True,
            k_positions=torch.arange(start, stop),
        )
        for start, stop in itertools.pairwise(borders)
        if start < stop
    ]


@given(cuts=st.lists(st.integers(0, 9), max_size=4), seed=st.integers(0, 100), swap=st.booleans())
def test_merged_pieces_equal_all_keys_at_once(cuts: list[int], seed: int, swap: bool) -> None:
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(2, 9, 3, 4, generator=generator).double() for _ in range(3))
    expected = naive_attention(q, k, v, causal=True)
    parts = _parts(q, k, v, cuts)
    if swap:
        parts.reverse()
    out, lse = parts[0]
    for part in parts[1:]:
        out, lse = merge(out, lse, *part)
    torch.testing.assert_close((out, lse), expected)


def test_nothing_merged_with_nothing_is_nothing_and_not_nan() -> None:
    out, lse = torch.zeros(1, 2, 1, 4), torch.full((1, 1, 2), -torch.inf)
    block_out, block_lse = torch.zeros(1, 2, 1, 4), torch.tensor([[[0.5, -torch.inf]]])
    block_out[:, 0] = 1
    merged_out, merged_lse = merge(out, lse, block_out, block_lse)
    assert merged_lse.tolist() == [[[0.5, -torch.inf]]]
    assert merged_out[0, 0].eq(1).all()
    assert merged_out[0, 1].eq(0).all()


def test_far_apart_lse_do_not_overflow() -> None:
    low, high = torch.full((1, 1, 1), -1e4), torch.full((1, 1, 1), 1e4)
    zeros, ones = torch.zeros(1, 1, 1, 4), torch.ones(1, 1, 1, 4)
    for first, second in (((zeros, low), (ones, high)), ((ones, high), (zeros, low))):
        out, lse = merge(*first, *second)
        assert torch.equal(out, ones)
        assert torch.equal(lse, high)


def test_merging_in_place_changes_only_the_rows_of_the_view() -> None:
    out, lse = torch.randn(2, 1200, 3, 4), torch.randn(2, 3, 1200)
    block_out, block_lse = torch.randn(2, 700, 3, 4).bfloat16(), torch.randn(2, 3, 700)
    rows = slice(500, 1200)
    expected = merge(out[:, rows], lse[:, :, rows], block_out, block_lse)
    before = out.clone(), lse.clone()
    merge_(out[:, rows], lse[:, :, rows], block_out, block_lse)
    torch.testing.assert_close((out[:, rows], lse[:, :, rows]), expected)
    assert torch.equal(out[:, :500], before[0][:, :500])
    assert torch.equal(lse[:, :, :500], before[1][:, :, :500])


def test_rejects_shapes_that_disagree() -> None:
    out, lse = torch.zeros(1, 4, 2, 8), torch.zeros(1, 2, 4)
    with pytest.raises(LayoutError, match=r"shapes .*\(1, 4, 2\).* do not match"):
        merge(out, lse, out, lse.transpose(1, 2))
