"""What lightning attention asks of its inputs; every failure names the argument and a way out.

Values of a decay are looked at where that costs no wait: on the CPU. On a GPU the check is queued
with the rest and stops the program when it is reached.
"""

import math
from itertools import pairwise

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from ringctx.errors import LayoutError
from ringctx.ops.documents import check_cu_seqlens
from ringctx.ops.lightning.stages import wide_dtype

__all__ = [
    "check_inputs",
    "check_log_decay",
    "check_scale",
    "check_state",
    "document_bounds",
]

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def check_inputs(q: Tensor, k: Tensor, v: Tensor) -> None:
    """Raise LayoutError unless q, k and v fit together."""
    for name, x in zip("qkv", (q, k, v), strict=True):
        if not isinstance(x, Tensor):
            raise LayoutError(f"{name}={x!r} must be a tensor, [B, T, H, D]")
    shapes = f"q {list(q.shape)}, k {list(k.shape)}, v {list(v.shape)}"
    if any(x.ndim != 4 for x in (q, k, v)):
        raise LayoutError(f"q, k, v must be [B, T, H, D], not {shapes}")
    if q.shape != k.shape or q.shape[:3] != v.shape[:3]:
        raise LayoutError(
            f"{shapes}: q and k must be equal in all dims and v in the first three; every head has "
            "keys and values of its own (repeat those of grouped queries)"
        )
    if 0 in (q.shape[0], *q.shape[2:], v.shape[3]):
        raise LayoutError(f"{shapes}: only the number of tokens may be 0")
    if q.dtype not in _DTYPES or {k.dtype, v.dtype} != {q.dtype}:
        raise LayoutError(
            f"q, k, v are {q.dtype}, {k.dtype}, {v.dtype}; they must share one of "
            + ", ".join(map(str, _DTYPES))
        )
    # Where they are copied into buffers a stray one would pass, over the bus at every call.
    if {k.device, v.device} != {q.device}:
        raise LayoutError(
            f"q, k, v are on {q.device}, {k.device}, {v.device}; move them to one device"
        )


def check_log_decay(log_decay: Tensor, q: Tensor) -> None:
    """Raise LayoutError unless it is the logarithm of decays of the heads of q, at most 1."""
    if not isinstance(log_decay, Tensor):
        raise LayoutError(f"log_decay={log_decay!r} must be a tensor, [H] or [B, T, H]")
    per_head, per_token = (q.shape[2],), tuple(q.shape[:3])
    if tuple(log_decay.shape) not in (per_head, per_token):
        raise LayoutError(
            f"log_decay is {list(log_decay.shape)}; it must be [H] = {list(per_head)}, or [B, T, H]"
            f" = {list(per_token)} for a decay by token"
        )
    if not log_decay.is_floating_point() or log_decay.device != q.device:
        raise LayoutError(
            f"log_decay is {log_decay.dtype} on {log_decay.device}; it must be floating point, on "
            f"the device of q ({q.device})"
        )
    if log_decay.is_meta or isinstance(log_decay, FakeTensor) or not log_decay.numel():
        return
    bad = ~((log_decay <= 0) & log_decay.isfinite())
    if log_decay.is_cuda:
        torch._assert_async(~bad.any(), "log_decay must be finite and at most 0")
    elif bad.any():
        first = log_decay.detach()[bad][0].item()
        raise LayoutError(
            f"log_decay has {int(bad.sum())} of {bad.numel()} entries that are positive or not "
            f"finite, the first is {first:.6g}; it is the logarithm of a "
            "decay between 0 and 1: 0 keeps everything, -1e4 forgets everything"
        )


def check_scale(scale: float | None) -> None:
    """Raise LayoutError unless it is None or a finite number."""
    number = isinstance(scale, (int, float)) and not isinstance(scale, bool)
    if scale is not None and not (number and math.isfinite(scale)):
        raise LayoutError(f"scale={scale!r} must be a finite number, or None for 1 / sqrt(K)")


def check_state(state: Tensor | None, q: Tensor, v: Tensor, *, documents: int | None) -> None:
    """Raise LayoutError unless it is None or a state for each row, or document."""
    if state is None:
        return
    count = q.shape[0] if documents is None else documents
    expected = (count, q.shape[2], q.shape[3], v.shape[3])
    what = "[B, H, K, V]" if documents is None else "[documents, H, K, V]"
    if not isinstance(state, Tensor):
        raise LayoutError(f"the state is {state!r}; it must be a tensor, {what} = {list(expected)}")
    if tuple(state.shape) != expected:
        raise LayoutError(f"the state is {list(state.shape)}; it must be {what} = {list(expected)}")
    if state.dtype != wide_dtype(q) or state.device != q.device:
        raise LayoutError(
            f"the state is {state.dtype} on {state.device}; for inputs of {q.dtype} it must be "
            f"{wide_dtype(q)}, on the device of q ({q.device})"
        )


def document_bounds(cu_seqlens: Tensor | None, *, num_tokens: int, batch: int) -> list[int]:
    """Where documents begin, and the end of the last; those without tokens included.

    Raises:
        LayoutError: unless `cu_seqlens` is None, or int32 on the CPU, never falls, goes from 0 to
            `num_tokens`, and the batch is 1.
    """
    if cu_seqlens is None:
        return [0, num_tokens]
    check_cu_seqlens(cu_seqlens)
    if batch != 1:
        raise LayoutError(
            f"cu_seqlens packs documents into one row, but q has {batch}; join the rows into one, "
            "[1, B * T, H, D], and their documents"
        )
    bounds: list[int] = cu_seqlens.tolist()
    if len(bounds) < 2 or bounds[0] != 0 or bounds[-1] != num_tokens:
        ends = f"{bounds[0]} to {bounds[-1]}" if bounds else "nothing"
        raise LayoutError(
            f"cu_seqlens goes from {ends}; it must go from 0 to the number of tokens, {num_tokens}"
        )
    fall = next((i for i, (a, b) in enumerate(pairwise(bounds)) if b < a), None)
    if fall is not None:
        raise LayoutError(
            f"cu_seqlens falls from {bounds[fall]} to {bounds[fall + 1]} at document {fall}; it "
            "must rise, as each document begins where the one before ends"
        )
    return bounds
