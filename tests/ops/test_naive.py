"""The oracle against torch's own attention, and its tiled twins against the oracle."""

import itertools

import pytest
import torch
from torch.nn import functional

from ringctx.ops.naive import (
    BlockMask,
    naive_attention,
    naive_block_backward,
    naive_block_forward,
)


def _inputs(*, tokens: int, keys: int, dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
    shapes = [(2, tokens, 4, 8), (2, keys, 2, 8), (2, keys, 2, 8), (2, tokens, 4, 8)]
    return [torch.randn(shape).to(dtype).requires_grad_() for shape in shapes]


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("scale", [None, 0.3])
def test_oracle_equals_torch_s_attention_in_double(causal: bool, scale: float | None) -> None:
    q, k, v, grad_out = _inputs(tokens=7, keys=7)
    out, lse = naive_attention(q, k, v, causal=causal, scale=scale)
    expected = functional.scaled_dot_product_attention(
        q.transpose(1, 2),
        k.transpose(1, 2),
        v.transpose(1, 2),
        is_causal=causal,
        scale=scale,
        enable_gqa=True,
    ).transpose(1, 2)
    torch.testing.assert_close(out, expected)
    for ours, theirs in zip(
        torch.autograd.grad(out, (q, k, v), grad_out),
        torch.autograd.grad(expected, (q, k, v), grad_out),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs)
    assert lse.shape == (2, 4, 7)


@pytest.mark.parametrize("window", [None, 1, 3, 9])
@pytest.mark.parametrize("sinks", [0, 1, 4])
@pytest.mark.parametrize("cu_seqlens", [None, (0, 1, 6, 9), (0, 9)])
def test_oracle_s_masks_are_torch_s_attention_under_a_mask_of_single_pairs(
    window: int | None, sinks: int, cu_seqlens: tuple[int, ...] | None
) -> None:
    q, k, v, grad_out = _inputs(tokens=9, keys=9)
    visible = torch.zeros(9, 9, dtype=torch.bool)
    for first, end in itertools.pairwise(cu_seqlens or (0, 9)):
        for query in range(first, end):
            for key in range(first, query + 1):
                near = window is None or key > query - window
                visible[query, key] = near or key < first + sinks
    out, lse = naive_attention(
        q, k, v, causal=True, window=window, sinks=sinks, cu_seqlens=cu_seqlens
    )
    expected = functional.scaled_dot_product_attention(
        q.transpose(1, 2),
        k.transpose(1, 2),
        v.transpose(1, 2),
        attn_mask=visible,
        enable_gqa=True,
    ).transpose(1, 2)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(
        torch.autograd.grad(out, (q, k, v), grad_out),
        torch.autograd.grad(expected, (q, k, v), grad_out),
    )
    # The first of its document sees itself alone.
    own_score = (q[:, 0].unflatten(1, (2, 2)) * k[:, 0, :, None]).sum(-1).flatten(1) * 8**-0.5
    torch.testing.assert_close(lse[:, :, 0], own_score)


def test_documents_without_causal_see_all_of_themselves_at_any_positions() -> None:
    q, k, v, _ = _inputs(tokens=9, keys=9)
    bounds = torch.tensor([0, 4, 9], dtype=torch.int32)
    out, _ = naive_attention(q, k, v, causal=False, cu_seqlens=bounds)
    for rows in (slice(0, 4), slice(4, 9)):
        alone, _ = naive_attention(q[:, rows], k[:, rows], v[:, rows], causal=False)
        torch.testing.assert_close(out[:, rows], alone)
    order = torch.randperm(9)
    mixed, _ = naive_attention(
        q, k[:, order], v[:, order], causal=False, cu_seqlens=bounds, k_positions=order
    )
    torch.testing.assert_close(mixed, out)


def test_lse_is_the_log_of_the_sum_of_exponentials() -> None:
    q, k, v, _ = _inputs(tokens=3, keys=5)
    _, lse = naive_attention(q, k, v, causal=False)
    # Query head 3 shares key head 1.
    scores = (q[1, 2, 3] * k[1, :, 1]).sum(-1) * 8**-0.5
    torch.testing.assert_close(lse[1, 3, 2], scores.exp().sum().log())


def test_positions_decide_what_is_visible_and_empty_rows_are_exact() -> None:
    q, k, v, grad_out = _inputs(tokens=2, keys=2)
    out, lse = naive_attention(
        q, k, v, causal=True, q_positions=torch.tensor([0, 5]), k_positions=torch.tensor([3, 4])
    )
    assert (out[:, 0] == 0).all()
    assert (lse[:, :, 0] == -torch.inf).all()
    full, full_lse = naive_attention(q, k, v, causal=False)
    torch.testing.assert_close(out[:, 1], full[:, 1])
    torch.testing.assert_close(lse[:, :, 1], full_lse[:, :, 1])
    grads = torch.autograd.grad(out, (q, k, v), grad_out)
    assert all(grad.isfinite().all() for grad in grads)
    assert (grads[0][:, 0] == 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("tokens", "keys", "mask"),
    [
        (1, 1, "causal"),
        (5, 3, "full"),
        (300, 300, "causal"),
        (300, 300, "anticausal"),
        (513, 2, "full"),
    ],
)
def test_tiled_blocks_match_the_oracle(
    dtype: torch.dtype, tokens: int, keys: int, mask: BlockMask
) -> None:
    q, k, v, grad_out = _inputs(tokens=tokens, keys=keys, dtype=dtype)
    # Keys i and later are what a query at position -i sees of keys at 0, -1, -2, ...
    sign = -1 if mask == "anticausal" else 1
    oracle, oracle_lse = naive_attention(
        q,
        k,
        v,
        causal=mask != "full",
        q_positions=sign * torch.arange(tokens),
        k_positions=sign * torch.arange(keys),
    )
    oracle_grads = torch.autograd.grad(oracle, (q, k, v), grad_out.double())
    with torch.no_grad():
        scale = 8**-0.5
        out, lse = naive_block_forward(q, k, v, mask=mask, scale=scale)
        grads = naive_block_backward(grad_out, q, k, v, out=out, lse=lse, mask=mask, scale=scale)
    assert out.dtype == lse.dtype == dtype
    torch.testing.assert_close(out, oracle.to(dtype))
    torch.testing.assert_close(lse, oracle_lse.to(dtype))
    for grad, expected in zip(grads, oracle_grads, strict=True):
        torch.testing.assert_close(grad, expected, rtol=1e-5, atol=1e-5)
