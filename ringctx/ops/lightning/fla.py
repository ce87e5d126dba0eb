"""flash-linear-attention's `chunk_simple_gla` in place of our kernels: optional, CUDA, 16 bits.

It is the same sum in the same convention (states `[.., K, V]`, the current token included), so only
arguments are arranged. What it does otherwise than our own backends, and what is done about it:

    products of fp32 inputs   in TF32, 10 bits           refused; fp16 and bf16 only
    states between chunks     rounded to 16 bits when    left so: about the rounding of the inputs;
                              the output is computed     the state that comes out is fp32
    gradient of `g_gamma`     none                       `g`, the same for all tokens, in its place
    empty documents           NaN                        taken out; they pass their state on
    odd K or V                backward fails             refused
    decay of -inf             NaN                        refused by the caller, as for all backends

The import takes seconds and is done at the first call.
"""

import importlib
import itertools
import warnings
from collections.abc import Callable, Sequence
from functools import cache, lru_cache
from typing import cast

import torch
from torch import Tensor

from ringctx.errors import LayoutError

__all__ = ["lightning_by_fla"]

Kernels = Callable[..., tuple[Tensor, Tensor]]

_DTYPES = (torch.float16, torch.bfloat16)
_INSTEAD = "choose backend='torch' or 'triton'"


def lightning_by_fla(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    log_decay: Tensor,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    scale: float | None,
) -> tuple[Tensor, Tensor]:
    """`lightning_attention` by flash-linear-attention; arguments were checked by the caller.

    Args:
        q: `[B, T, H, K]`, fp16 or bf16, on a CUDA device; K even.
        k: `[B, T, H, K]`.
        v: `[B, T, H, V]`; V even.
        log_decay: `[H]` or `[B, T, H]`, finite and <= 0.
        initial_state: `[B, H, K, V]`, or with cu_seqlens `[documents, H, K, V]`, fp32; None: zeros.
        cu_seqlens: int32 `[documents + 1]` on the CPU, from 0 to T, not falling; None: one document
            a row.
        scale: None is 1 / sqrt(K).

    Returns:
        `(out, state)` in the dtype of v, and fp32 of the shape of initial_state; both with
        gradients to every input.

    Raises:
        LayoutError: not installed, or tensors that its kernels cannot take.
    """
    _check(q, k, v)
    return attend_with(
        _kernels(),
        q,
        k,
        v,
        log_decay=log_decay,
        initial_state=initial_state,
        bounds=None if cu_seqlens is None else cu_seqlens.tolist(),
        scale=q.shape[-1] ** -0.5 if scale is None else scale,
    )


def attend_with(
    kernels: Kernels,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    log_decay: Tensor,
    initial_state: Tensor | None,
    bounds: Sequence[int] | None,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Arrange the arguments of `chunk_simple_gla`, and what it returns.

    Args:
        kernels: `chunk_simple_gla`, or what has its signature.
        q: and the other tensors, as for `lightning_by_fla`.
        k: keys.
        v: values.
        log_decay: of the heads or tokens.
        initial_state: or None.
        bounds: cu_seqlens as ints.
        scale: of the outputs.
    """
    states = q.shape[0] if bounds is None else len(bounds) - 1
    lengths = [q.shape[1]] * states if bounds is None else _lengths(bounds)
    full = [i for i, length in enumerate(lengths) if length]
    if not full or not q.shape[2]:
        return v * 1, _whole_state(initial_state, q, v, states)
    arguments: dict[str, object] = _decay(log_decay, q)
    if bounds is not None:
        # Without its duplicates, a list of bounds is that of the documents that are not empty.
        arguments |= _cu_seqlens(tuple(dict.fromkeys(bounds)), q.device)
    if initial_state is not None:
        some = initial_state if len(full) == states else initial_state[full]
        arguments["initial_state"] = some.contiguous()
    out, left = kernels(q, k, v, scale=scale, output_final_state=True, **arguments)
    if len(full) < states:
        whole = _whole_state(initial_state, q, v, states)
        left = whole.index_copy(0, torch.tensor(full, device=q.device), left)
    return out, left


def _check(q: Tensor, k: Tensor, v: Tensor) -> None:
    if not q.is_cuda:
        raise LayoutError(
            f"backend='fla' has kernels for CUDA devices only, but q is on {q.device}; choose "
            "backend='torch'"
        )
    if q.dtype not in _DTYPES:
        raise LayoutError(
            f"backend='fla' multiplies in 16 bits, or fp32 in TF32, and never wider, but q is "
            f"{q.dtype}; convert q, k and v to bfloat16 or float16, or {_INSTEAD}"
        )
    if q.shape[-1] % 2 or v.shape[-1] % 2:
        raise LayoutError(
            f"backend='fla' needs even head dims, but K={q.shape[-1]} and V={v.shape[-1]}; "
            f"{_INSTEAD}"
        )


@cache
def _kernels() -> Kernels:
    try:
        with warnings.catch_warnings():
            # Of optional parts that are not used here.
            warnings.simplefilter("ignore")
            module = importlib.import_module("fla.ops.simple_gla")
    except ImportError as error:
        raise LayoutError(
            "backend='fla' needs flash-linear-attention, which cannot be imported "
            f"({error}); pip install 'ringctx[fla]', or {_INSTEAD}"
        ) from error
    return cast(Kernels, module.chunk_simple_gla)


def _decay(log_decay: Tensor, q: Tensor) -> dict[str, object]:
    wide = log_decay.float()
    if wide.ndim == 1 and not (wide.requires_grad and torch.is_grad_enabled()):
        return {"g_gamma": wide}
    return {"g": wide.expand(q.shape[:3])}


@lru_cache(maxsize=16)
def _cu_seqlens(bounds: tuple[int, ...], device: torch.device) -> dict[str, object]:
    # Kept, because its kernels' tables are looked up by the identity of these tensors.
    on_cpu = torch.tensor(bounds)
    return {"cu_seqlens": on_cpu.to(device), "cu_seqlens_cpu": on_cpu}


def _whole_state(initial: Tensor | None, q: Tensor, v: Tensor, states: int) -> Tensor:
    if initial is not None:
        return initial
    return q.new_zeros(states, *q.shape[2:], v.shape[-1], dtype=torch.float32)


def _lengths(bounds: Sequence[int]) -> list[int]:
    return [stop - start for start, stop in itertools.pairwise(bounds)]
