"""Attention of one query block with one key/value block: forward, and backward from a given lse.

One idea: every flash backward recomputes the probabilities from an lse that it is handed. Handed
the lse of *all* keys, it returns this block's exact share of the gradients, so blocks can be
computed anywhere, in any order. Kernels, chosen by device, dtype and head dim before any is called:

    cpu_flash        aten::_scaled_dot_product_flash_attention_for_cpu; fp16, bf16, fp32, fp64
    cuda_flash       aten::_flash_attention_forward; fp16, bf16; not yet run on hardware
    cuda_efficient   aten::_scaled_dot_product_efficient_attention; fp32; not yet run on hardware.
                     Here alone a block's K/V are expanded to all query heads
    naive            all else, slowly: matrix products in fp32 or fp64, a tile of rows at a time

Price: low-precision inputs round each block's result once; `lse.merge_` joins them in fp32.
Masked blocks are square: CPU kernels align the diagonal top-left, flash-attn bottom-right. An
anticausal block, the lower edge of a window, is a causal one with time reversed: where a kernel has
no such mask itself, its inputs are copied in reverse order.
Shapes: B batch, T query tokens, S key tokens, H heads, Hkv key/value heads, D head dim.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, cast

import torch
from torch import Tensor
from torch.nn import functional

from ringctx.errors import LayoutError
from ringctx.ops.naive import BlockMask, naive_block_backward, naive_block_forward

__all__ = [
    "BlockMask",
    "Kernel",
    "block_backward",
    "block_forward",
    "check_heads",
    "choose_kernel",
]

Kernel = Literal["cpu_flash", "cuda_flash", "cuda_efficient", "naive"]

# The efficient kernel's backward reads the lse in whole tiles of this many rows.
_EFFICIENT_LSE_TILE = 32


@dataclass(frozen=True, slots=True)
class _Capability:
    kernel: Kernel
    device_type: str
    dtypes: frozenset[torch.dtype]
    head_dim_multiple: int = 1
    max_head_dim: int | None = None

    def fits(self, device_type: str, dtype: torch.dtype, head_dim: int) -> bool:
        short_enough = self.max_head_dim is None or head_dim <= self.max_head_dim
        divides = head_dim % self.head_dim_multiple == 0
        return device_type == self.device_type and dtype in self.dtypes and short_enough and divides


_HALF = frozenset({torch.float16, torch.bfloat16})
_SINGLE = frozenset({torch.float32})
_DOUBLE = frozenset({torch.float64})
# The first that fits is used.
_CAPABILITIES = (
    _Capability("cpu_flash", "cpu", _HALF | _SINGLE | _DOUBLE),
    _Capability("cuda_flash", "cuda", _HALF, head_dim_multiple=8, max_head_dim=256),
    _Capability("cuda_efficient", "cuda", _SINGLE, head_dim_multiple=4),
)


def choose_kernel(device_type: str, dtype: torch.dtype, head_dim: int) -> Kernel:
    """Name the kernel that attends blocks of this kind."""
    for capability in _CAPABILITIES:
        if capability.fits(device_type, dtype, head_dim):
            return capability.kernel
    return "naive"


def check_heads(q: Tensor, k: Tensor, v: Tensor) -> None:
    """Raise LayoutError unless the kernels can attend these tensors, whatever their lengths."""
    shapes = f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"
    if not q.ndim == k.ndim == v.ndim == 4 or 0 in (*q.shape, *k.shape):
        raise LayoutError(f"q, k and v must be [B, T, H, D] and not empty; got {shapes}")
    if k.shape != v.shape:
        raise LayoutError(f"k and v must have one shape; got {shapes}")
    if q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3]:
        raise LayoutError(f"q, k and v must share batch and head dim; got {shapes}")
    if q.shape[2] % k.shape[2]:
        raise LayoutError(
            f"{q.shape[2]} query heads are not divisible by {k.shape[2]} key/value heads; "
            "each key/value head serves the same number of query heads"
        )
    if not q.dtype == k.dtype == v.dtype or not q.is_floating_point():
        raise LayoutError(
            f"q, k and v must share one floating dtype; got {q.dtype}, {k.dtype}, {v.dtype}"
        )
    if not q.device == k.device == v.device:
        raise LayoutError(f"q, k and v are on devices {q.device}, {k.device}, {v.device}")


def block_forward(
    q: Tensor, k: Tensor, v: Tensor, *, mask: BlockMask, scale: float
) -> tuple[Tensor, Tensor]:
    """Attend one block pair.

    Args:
        q: `[B, T, H, D]`; may be a view of some rows, like k and v.
        k: `[B, S, Hkv, D]`.
        v: `[B, S, Hkv, D]`.
        mask: "full"; or, only for T = S, "causal": query i sees keys 0 .. i, or "anticausal":
            query i sees keys i .. T-1.
        scale: factor on the scores.

    Returns:
        `(out, lse)`: `[B, T, H, D]` in the dtype of q, and contiguous `[B, H, T]` in fp32 (fp64 for
        fp64), natural log, over this block's keys alone.
    """
    _check_block(q, k, mask=mask)
    kernel = _KERNELS[choose_kernel(q.device.type, q.dtype, q.shape[3])]
    if mask == "anticausal" and not kernel.has_anticausal:
        q, k, v = (x.flip(1) for x in (q, k, v))
        out, lse = block_forward(q, k, v, mask="causal", scale=scale)
        return out.flip(1), lse.flip(2)
    q, k, v = (_dense_heads(x) for x in (q, k, v))
    out, lse = kernel.forward(q, k, v, mask=mask, scale=scale)
    return out, _normalised_lse(lse, q)


def block_backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    out: Tensor,
    lse: Tensor,
    mask: BlockMask,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """One block pair's share of the gradients, given the result over all keys.

    Args:
        grad_out: gradient of `out`, `[B, T, H, D]`.
        q: as in `block_forward`.
        k: as in `block_forward`.
        v: as in `block_forward`.
        out: final output of these queries, over all their keys, `[B, T, H, D]`.
        lse: final lse of these queries, `[B, H, T]`.
        mask: as in `block_forward`.
        scale: as in `block_forward`.

    Returns:
        `(grad_q, grad_k, grad_v)`, shaped and typed as q, k and v.
    """
    _check_block(q, k, mask=mask)
    kernel = _KERNELS[choose_kernel(q.device.type, q.dtype, q.shape[3])]
    if mask == "anticausal" and not kernel.has_anticausal:
        grad_out, q, k, v, out = (x.flip(1) for x in (grad_out, q, k, v, out))
        grads = block_backward(
            grad_out, q, k, v, out=out, lse=lse.flip(2), mask="causal", scale=scale
        )
        grad_q, grad_k, grad_v = (grad.flip(1) for grad in grads)
        return grad_q, grad_k, grad_v
    grad_out, q, k, v, out = (_dense_heads(x) for x in (grad_out, q, k, v, out))
    return kernel.backward(grad_out, q, k, v, out=out, lse=lse, mask=mask, scale=scale)


def _check_block(q: Tensor, k: Tensor, *, mask: BlockMask) -> None:
    # The CPU kernel divides by the number of keys: an empty block would kill the process.
    assert q.numel() and k.numel(), (q.shape, k.shape)
    assert mask == "full" or q.shape[1] == k.shape[1], (q.shape, k.shape)


def _dense_heads(x: Tensor) -> Tensor:
    # The kernels take any strides but the last one, which they take to be 1 without a check.
    return x if x.stride(-1) == 1 else x.contiguous()


def _normalised_lse(lse: Tensor, q: Tensor) -> Tensor:
    """Bring what a kernel returned to contiguous `[B, H, T]`, fp32 or fp64."""
    assert lse.shape[:2] == (q.shape[0], q.shape[2]), (lse.shape, q.shape)
    # Some kernels pad the rows to whole tiles; the CPU's has the heads last in memory.
    rows = lse.narrow(2, 0, q.shape[1]).to(torch.promote_types(q.dtype, torch.float32))
    return rows.clone(memory_format=torch.contiguous_format)


def _heads_first(*tensors: Tensor) -> list[Tensor]:
    # [B, T, H, D] -> [B, H, T, D], as a view; and back
    return [x.transpose(1, 2) for x in tensors]


def _cpu_flash_forward(
    q: Tensor, k: Tensor, v: Tensor, *, mask: BlockMask, scale: float
) -> tuple[Tensor, Tensor]:
    attend = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    out, lse = attend(*_heads_first(q, k, v), 0.0, mask == "causal", scale=scale)
    return out.transpose(1, 2), lse


def _cpu_flash_backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    out: Tensor,
    lse: Tensor,
    mask: BlockMask,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    differentiate = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
    inputs = _heads_first(grad_out, q, k, v, out)
    grad_q, grad_k, grad_v = _heads_first(
        *differentiate(*inputs, lse, 0.0, mask == "causal", scale=scale)
    )
    return grad_q, grad_k, grad_v


def _cuda_flash_forward(
    q: Tensor, k: Tensor, v: Tensor, *, mask: BlockMask, scale: float
) -> tuple[Tensor, Tensor]:
    inputs = (q, k, v, None, None, q.shape[1], k.shape[1])
    out, lse, *_ = torch.ops.aten._flash_attention_forward(
        *inputs, 0.0, mask == "causal", False, scale=scale, **_flash_window(mask)
    )
    return out, lse


def _cuda_flash_backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    out: Tensor,
    lse: Tensor,
    mask: BlockMask,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    # Random state: read only with dropout.
    seed = torch.zeros(2, dtype=torch.uint64, device=q.device)
    offset = torch.zeros((), dtype=torch.uint64, device=q.device)
    lengths = (q.shape[1], k.shape[1])
    # Not `contiguous()`, which asks for the device even when the tensor is fake.
    if not lse.is_contiguous():
        lse = lse.clone(memory_format=torch.contiguous_format)
    inputs = (grad_out, q, k, v, out, lse, None, None, *lengths)
    grads = torch.ops.aten._flash_attention_backward(
        *inputs, 0.0, mask == "causal", seed, offset, scale=scale, **_flash_window(mask)
    )
    return cast(tuple[Tensor, Tensor, Tensor], tuple(grads))


def _flash_window(mask: BlockMask) -> dict[str, int]:
    """No key before a query's own, and any after it; by default any on both sides."""
    return {"window_size_left": 0, "window_size_right": -1} if mask == "anticausal" else {}


def _cuda_efficient_forward(
    q: Tensor, k: Tensor, v: Tensor, *, mask: BlockMask, scale: float
) -> tuple[Tensor, Tensor]:
    keys, values = (_expand_heads(x, q.shape[2]) for x in (k, v))
    out, lse, *_ = torch.ops.aten._scaled_dot_product_efficient_attention(
        *_heads_first(q, keys, values), None, True, 0.0, mask == "causal", scale=scale
    )
    return out.transpose(1, 2), lse


def _cuda_efficient_backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    out: Tensor,
    lse: Tensor,
    mask: BlockMask,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    keys, values = (_expand_heads(x, q.shape[2]) for x in (k, v))
    # Padded as the forward pads it; +inf makes the probability of a row that is not there 0.
    padding = -lse.shape[2] % _EFFICIENT_LSE_TILE
    padded_lse = functional.pad(lse, (0, padding), value=torch.inf).contiguous()
    inputs = _heads_first(grad_out, q, keys, values)
    # Random state: read only with dropout.
    state = torch.zeros((), dtype=torch.int64, device=q.device)
    grads = torch.ops.aten._scaled_dot_product_efficient_attention_backward(
        *inputs,
        None,
        out.transpose(1, 2),
        padded_lse,
        state,
        state,
        0.0,
        [True, True, True, False],
        mask == "causal",
        scale=scale,
    )
    grad_q, grad_k, grad_v = _heads_first(*grads[:3])
    return grad_q, _sum_heads(grad_k, k.shape[2]), _sum_heads(grad_v, k.shape[2])


def _expand_heads(x: Tensor, heads: int) -> Tensor:
    # [B, S, Hkv, D] -> [B, S, H, D]
    return x.repeat_interleave(heads // x.shape[2], dim=2)


def _sum_heads(x: Tensor, kv_heads: int) -> Tensor:
    # [B, S, H, D] -> [B, S, Hkv, D]
    return x.reshape(*x.shape[:2], kv_heads, -1, x.shape[3]).sum(3)


@dataclass(frozen=True, slots=True)
class _Passes:
    forward: Callable[..., tuple[Tensor, Tensor]]
    backward: Callable[..., tuple[Tensor, Tensor, Tensor]]
    has_anticausal: bool


_KERNELS: dict[Kernel, _Passes] = {
    "cpu_flash": _Passes(_cpu_flash_forward, _cpu_flash_backward, has_anticausal=False),
    "cuda_flash": _Passes(_cuda_flash_forward, _cuda_flash_backward, has_anticausal=True),
    "cuda_efficient": _Passes(
        _cuda_efficient_forward, _cuda_efficient_backward, has_anticausal=False
    ),
    "naive": _Passes(naive_block_forward, naive_block_backward, has_anticausal=True),
}
