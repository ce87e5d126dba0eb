"""Block kernels: each against the oracle, from a given lse; which is chosen; CUDA by its shapes."""

from typing import get_args

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional

from ringctx.errors import LayoutError
from ringctx.ops import block_attention
from ringctx.ops.block_attention import (
    BlockMask,
    block_backward,
    block_forward,
    check_heads,
    choose_kernel,
)
from ringctx.ops.lse import merge
from ringctx.ops.naive import naive_attention
from tests.kernel_calls import count_kernel_calls
from tests.tolerances import assert_lse_matches, assert_matches

SCALE = 0.2


def _inputs(
    tokens: int, keys: int, heads: tuple[int, int], dtype: torch.dtype, head_dim: int = 16
) -> list[Tensor]:
    """q, k, v, grad_out."""
    query, kv = (2, tokens, heads[0], head_dim), (2, keys, heads[1], head_dim)
    return [torch.randn(shape).to(dtype) for shape in (query, kv, kv, query)]


def _oracle(q: Tensor, k: Tensor, v: Tensor, grad_out: Tensor, *, mask: BlockMask) -> list[Tensor]:
    # In reversed time, keys i and later are those up to i.
    time: Tensor | slice = slice(None)
    if mask == "anticausal":
        time = torch.arange(q.shape[1] - 1, -1, -1)
    inputs = [x.double().requires_grad_() for x in (q, k, v)]
    out, lse = naive_attention(*(x[:, time] for x in inputs), causal=mask != "full", scale=SCALE)
    out, lse = out[:, time], lse[:, :, time]
    return [out.detach(), lse.detach(), *torch.autograd.grad(out, inputs, grad_out.double())]


@pytest.mark.proves("block attention kernels, forward and backward", on="CPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
@pytest.mark.parametrize(
    ("tokens", "keys", "mask"),
    [
        (2, 2, "causal"),
        (7, 7, "causal"),
        (7, 3, "full"),
        (1, 600, "full"),
        (600, 600, "causal"),
        (2, 2, "anticausal"),
        (7, 7, "anticausal"),
        (600, 600, "anticausal"),
    ],
)
@pytest.mark.parametrize("heads", [(3, 3), (4, 2), (5, 1)], ids=["MHA", "GQA", "MQA"])
def test_cpu_flash_matches_the_oracle(
    tokens: int, keys: int, mask: BlockMask, heads: tuple[int, int], dtype: torch.dtype
) -> None:
    q, k, v, grad_out = _inputs(tokens, keys, heads, dtype)
    out, lse = block_forward(q, k, v, mask=mask, scale=SCALE)
    grads = block_backward(grad_out, q, k, v, out=out, lse=lse, mask=mask, scale=SCALE)
    assert lse.is_contiguous() and lse.dtype == dtype
    names = ("out", "lse", "grad_q", "grad_k", "grad_v")
    oracle = _oracle(q, k, v, grad_out, mask=mask)
    for name, actual, expected in zip(names, (out, lse, *grads), oracle, strict=True):
        assert_matches(name, actual, expected, flash=actual)


@pytest.mark.proves("block attention kernels, forward and backward", on="CPU")
@pytest.mark.parametrize("mask", get_args(BlockMask))
@pytest.mark.parametrize("heads", [(3, 3), (4, 2), (5, 1)], ids=["MHA", "GQA", "MQA"])
def test_cpu_flash_in_bf16_is_as_good_as_torch_s_own(
    mask: BlockMask, heads: tuple[int, int]
) -> None:
    q, k, v, grad_out = _inputs(131, 131, heads, torch.bfloat16)
    out, lse = block_forward(q, k, v, mask=mask, scale=SCALE)
    grads = block_backward(grad_out, q, k, v, out=out, lse=lse, mask=mask, scale=SCALE)
    flash, *flash_grads = _torch_attention(q, k, v, grad_out, mask=mask)
    oracle, oracle_lse, *oracle_grads = _oracle(q, k, v, grad_out, mask=mask)
    assert_lse_matches(lse, oracle_lse, dtype=torch.bfloat16)
    names = ("out", "grad_q", "grad_k", "grad_v")
    actuals, flashes = (out, *grads), (flash, *flash_grads)
    for name, actual, expected, other in zip(
        names, actuals, (oracle, *oracle_grads), flashes, strict=True
    ):
        assert actual.dtype == torch.bfloat16
        assert_matches(name, actual, expected, flash=other)


def _torch_attention(
    q: Tensor, k: Tensor, v: Tensor, grad_out: Tensor, *, mask: BlockMask
) -> tuple[Tensor, ...]:
    """Torch's public attention in the dtype of q, under a boolean mask."""
    inputs = [x.clone().requires_grad_() for x in (q, k, v)]
    visible = torch.ones(q.shape[1], k.shape[1], dtype=torch.bool)
    visible = {"full": visible, "causal": visible.tril(), "anticausal": visible.triu()}[mask]
    query, key, value = (x.transpose(1, 2) for x in inputs)
    out = functional.scaled_dot_product_attention(
        query, key, value, attn_mask=visible, scale=SCALE, enable_gqa=True
    ).transpose(1, 2)
    return out.detach(), *torch.autograd.grad(out, inputs, grad_out)


def test_gradients_of_blocks_add_up_to_those_of_all_keys() -> None:
    q, k, v, grad_out = _inputs(9, 10, (4, 2), torch.float64)
    blocks = [slice(0, 3), slice(3, 10)]
    parts = [block_forward(q, k[:, s], v[:, s], mask="full", scale=SCALE) for s in blocks]
    out, lse = merge(*parts[0], *parts[1])
    grads = [
        block_backward(grad_out, q, k[:, s], v[:, s], out=out, lse=lse, mask="full", scale=SCALE)
        for s in blocks
    ]
    _, _, *expected = _oracle(q, k, v, grad_out, mask="full")
    torch.testing.assert_close(grads[0][0] + grads[1][0], expected[0])
    for i in (1, 2):
        torch.testing.assert_close(torch.cat([grads[0][i], grads[1][i]], 1), expected[i])


def _strided(x: Tensor) -> list[Tensor]:
    """The same values: rows of a longer tensor, heads in front, and a last dimension with gaps."""
    rows = torch.cat([torch.full_like(x, torch.nan), x], 1)[:, x.shape[1] :]
    heads_first = x.transpose(1, 2).contiguous().transpose(1, 2)
    gaps = x.repeat_interleave(2, -1)[..., ::2]
    return [rows, heads_first, gaps]


@pytest.mark.parametrize("mask", ["causal", "anticausal"])
@pytest.mark.parametrize("kind", range(3), ids=["rows", "heads first", "gaps"])
def test_strides_do_not_matter(kind: int, mask: BlockMask) -> None:
    inputs = _inputs(6, 6, (4, 2), torch.float32)
    results = []
    for q, k, v, grad_out in (inputs, [_strided(x)[kind] for x in inputs]):
        out, lse = block_forward(q, k, v, mask=mask, scale=SCALE)
        # The ring hands over rows of the final out and lse.
        out, lse = _strided(out)[0], torch.cat([lse, lse], -1)[:, :, 6:]
        grads = block_backward(grad_out, q, k, v, out=out, lse=lse, mask=mask, scale=SCALE)
        results.append((out, lse, *grads))
    torch.testing.assert_close(results[1], results[0])


@pytest.mark.parametrize(
    ("device", "dtype", "head_dim", "kernel"),
    [
        ("cpu", torch.float32, 64, "cpu_flash"),
        ("cpu", torch.float64, 7, "cpu_flash"),
        ("cpu", torch.bfloat16, 512, "cpu_flash"),
        ("cuda", torch.bfloat16, 128, "cuda_flash"),
        ("cuda", torch.float16, 256, "cuda_flash"),
        ("cuda", torch.float32, 512, "cuda_efficient"),
        ("cuda", torch.bfloat16, 264, "naive"),
        ("cuda", torch.bfloat16, 36, "naive"),
        ("cuda", torch.float32, 6, "naive"),
        ("cuda", torch.float64, 64, "naive"),
        ("mps", torch.float32, 64, "naive"),
    ],
)
def test_capabilities_choose_the_kernel(
    device: str, dtype: torch.dtype, head_dim: int, kernel: str
) -> None:
    assert choose_kernel(device, dtype, head_dim) == kernel


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("mask", get_args(BlockMask))
def test_no_mask_on_the_cpu_runs_on_the_naive_kernel(
    mask: BlockMask, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = count_kernel_calls(monkeypatch)
    q, k, v, grad_out = _inputs(5, 5, (4, 2), dtype, head_dim=7)
    out, lse = block_forward(q, k, v, mask=mask, scale=SCALE)
    block_backward(grad_out, q, k, v, out=out, lse=lse, mask=mask, scale=SCALE)
    assert calls == {("cpu_flash", "forward"): 1, ("cpu_flash", "backward"): 1}


@pytest.mark.parametrize("mask", get_args(BlockMask))
def test_head_dims_that_flash_cannot_take_run_on_the_naive_kernel(
    mask: BlockMask, monkeypatch: pytest.MonkeyPatch
) -> None:
    q, k, v, grad_out = _inputs(5, 5, (4, 2), torch.float32)
    monkeypatch.setattr(block_attention, "_CAPABILITIES", ())
    out, lse = block_forward(q, k, v, mask=mask, scale=SCALE)
    grads = block_backward(grad_out, q, k, v, out=out, lse=lse, mask=mask, scale=SCALE)
    oracle = _oracle(q, k, v, grad_out, mask=mask)
    for name, actual, expected in zip("olqkv", (out, lse, *grads), oracle, strict=True):
        assert_matches(name, actual, expected, flash=actual)


@pytest.mark.proves("block attention kernels, forward and backward", on="FakeTensor (CUDA shapes)")
@pytest.mark.parametrize("tokens", [1, 31, 64])
@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (5, 1)], ids=["MHA", "GQA", "MQA"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("mask", get_args(BlockMask))
def test_cuda_kernels_return_the_promised_shapes(
    mask: BlockMask, tokens: int, dtype: torch.dtype, heads: tuple[int, int]
) -> None:
    # Filling a fake tensor with NaN needs a real device.
    torch.use_deterministic_algorithms(False)
    with FakeTensorMode():
        # A view of some rows, as the ring makes it. Indexing needs a real device; narrow does not.
        longer = torch.empty(2, 2 * tokens, heads[0], 64, device="cuda", dtype=dtype)
        q = longer.narrow(1, tokens, tokens)
        k = torch.empty(2, tokens, heads[1], 64, device="cuda", dtype=dtype)
        v, grad_out = torch.empty_like(k), torch.empty_like(q)
        out, lse = block_forward(q, k, v, mask=mask, scale=SCALE)
        assert (out.shape, out.dtype) == (q.shape, dtype)
        assert (lse.shape, lse.dtype) == ((2, heads[0], tokens), torch.float32)
        assert lse.is_contiguous()
        grads = block_backward(grad_out, q, k, v, out=out, lse=lse, mask=mask, scale=SCALE)
        assert all(grad.device.type == "cuda" for grad in grads)
        assert [(x.shape, x.dtype) for x in grads] == [(x.shape, dtype) for x in (q, k, v)]


@pytest.mark.gpu
@pytest.mark.proves("block attention kernels, forward and backward", on="GPU")
@pytest.mark.parametrize("mask", get_args(BlockMask))
@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (5, 1)], ids=["MHA", "GQA", "MQA"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
def test_cuda_kernels_match_the_oracle(
    dtype: torch.dtype, heads: tuple[int, int], mask: BlockMask
) -> None:
    inputs = _inputs(77, 77, heads, dtype, head_dim=64)
    oracle = _oracle(*inputs, mask=mask)
    q, k, v, grad_out = (x.cuda() for x in inputs)
    out, lse = block_forward(q, k, v, mask=mask, scale=SCALE)
    grads = block_backward(grad_out, q, k, v, out=out, lse=lse, mask=mask, scale=SCALE)
    tolerance = 2e-2 if dtype == torch.bfloat16 else 1e-4
    for actual, expected in zip((out, lse, *grads), oracle, strict=True):
        error = (actual.cpu() - expected).abs().max()
        assert error <= tolerance * expected.abs().max()


@pytest.mark.parametrize(
    ("q_shape", "k_shape", "v_shape", "message"),
    [
        ((1, 4, 3, 8), (1, 4, 2, 8), (1, 4, 2, 8), "3 query heads are not divisible by 2"),
        ((1, 4, 2, 8), (1, 4, 2, 8), (1, 4, 2, 16), "k and v must have one shape"),
        ((1, 4, 2, 8), (1, 4, 2, 16), (1, 4, 2, 16), "share batch and head dim"),
        ((1, 4, 2, 8), (1, 0, 2, 8), (1, 0, 2, 8), "not empty"),
    ],
)
def test_rejects_heads_that_do_not_fit(
    q_shape: tuple[int, ...], k_shape: tuple[int, ...], v_shape: tuple[int, ...], message: str
) -> None:
    with pytest.raises(LayoutError, match=message):
        check_heads(torch.zeros(q_shape), torch.zeros(k_shape), torch.zeros(v_shape))


def test_never_calls_a_kernel_with_an_empty_block_or_a_masked_rectangle() -> None:
    q, k, v, _ = _inputs(4, 3, (2, 2), torch.float32)
    with pytest.raises(AssertionError):
        block_forward(q, k[:, :0], v[:, :0], mask="full", scale=SCALE)
    for mask in ("causal", "anticausal"):
        with pytest.raises(AssertionError):
            block_forward(q, k, v, mask=mask, scale=SCALE)
