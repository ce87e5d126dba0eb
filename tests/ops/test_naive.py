"""The oracle against torch's own attention, and its tiled twins against the oracle."""

import pytest
import torch
from torch.nn import functional

from ringctx.ops.naive import naive_attention, naive_block_backward, naive_block_forward


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
    ("tokens", "keys", "causal"), [(1, 1, True), (5, 3, False), (300, 300, True), (513, 2, False)]
)
def test_tiled_blocks_match_the_oracle(
    dtype: torch.dtype, tokens: int, keys: int, causal: bool
) -> None:
    q, k, v, grad_out = _inputs(tokens=tokens, keys=keys, dtype=dtype)
    oracle, oracle_lse = naive_attention(q, k, v, causal=causal)
    oracle_grads = torch.autograd.grad(oracle, (q, k, v), grad_out.double())
    with torch.no_grad():
        scale = 8**-0.5
        out, lse = naive_block_forward(q, k, v, causal=causal, scale=scale)
        grads = naive_block_backward(
            grad_out, q, k, v, out=out, lse=lse, causal=causal, scale=scale
        )
    assert out.dtype == lse.dtype == dtype
    torch.testing.assert_close(out, oracle.to(dtype))
    torch.testing.assert_close(lse, oracle_lse.to(dtype))
    for grad, expected in zip(grads, oracle_grads, strict=True):
        torch.testing.assert_close(grad, expected, rtol=1e-5, atol=1e-5)
