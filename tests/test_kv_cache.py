"""Softmax attention in pieces: the same as at once, and no more kept than is seen."""

import pytest
import torch

from ringctx.kv_cache import KeyCache, extend_attention
from ringctx.ops.naive import naive_attention
from tests.tolerances import assert_close

PIECES = (7, 1, 0, 1, 20, 3, 1, 1, 1, 12)


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize(
    ("window", "sinks"), [(None, 0), (1, 0), (5, 0), (5, 3), (1, 2), (9, 30), (100, 4)]
)
def test_pieces_equal_the_whole_and_only_what_is_seen_is_kept(
    kv_heads: int, window: int | None, sinks: int
) -> None:
    length = sum(PIECES)
    q, k, v = (
        torch.randn(2, length, heads, 8, dtype=torch.float64) for heads in (4, kv_heads, kv_heads)
    )
    expected, _ = naive_attention(q, k, v, causal=True, window=window, sinks=sinks)
    cache: KeyCache | None = None
    outs = []
    for piece in zip(*(x.split(PIECES, dim=1) for x in (q, k, v)), strict=True):
        out, cache = extend_attention(*piece, cache=cache, window=window, sinks=sinks)
        outs.append(out)
        if window is not None:
            assert cache.k.shape[1] <= window - 1 + sinks
    assert cache is not None and cache.num_seen == length
    assert_close(torch.cat(outs, 1), expected)


def test_a_cache_is_not_changed_by_what_follows_it() -> None:
    q, k, v = torch.randn(3, 1, 6, 2, 8, dtype=torch.float64)
    _, before = extend_attention(q, k, v, cache=None, window=4, sinks=1)
    kept = before.k.clone()
    first, _ = extend_attention(q, k, v, cache=before, window=4, sinks=1)
    again, _ = extend_attention(q, k, v, cache=before, window=4, sinks=1)
    assert torch.equal(before.k, kept) and torch.equal(first, again)
