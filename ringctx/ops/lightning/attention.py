"""Lightning attention: linear attention with decay, a token at a time or a sequence at once. Exact.

    S_t = exp(g_t) S_{t-1} + k_t^T v_t        o_t = scale q_t S_t        (token t is included)

One idea: within chunks it is attention with a mask of decays, between chunks one state per head is
passed on, so cost is linear in the tokens and the state does not grow. `g` is the log decay, fixed
for each head or a function of the data.
Source: Lightning Attention-2 (arXiv 2401.04658); decay that depends on the data: simple gated
linear attention (arXiv 2312.06635), Mamba-2 (arXiv 2405.21060).
Shapes: B batch, T tokens, H heads, K and V head dims of keys and values.
"""

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor
from torch._compile import _disable_dynamo

from ringctx.errors import LayoutError
from ringctx.ops.lightning.backends import passes_for
from ringctx.ops.lightning.checks import (
    check_inputs,
    check_log_decay,
    check_scale,
    check_state,
    document_bounds,
)
from ringctx.ops.lightning.chunks import check_chunk_len, cut_documents
from ringctx.ops.lightning.fla import lightning_by_fla
from ringctx.ops.lightning.function import attend
from ringctx.ops.lightning.stages import wide_dtype

__all__ = ["lightning_attention", "lightning_step"]


@_disable_dynamo
def lightning_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    log_decay: Tensor,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    chunk_len: int | None = None,
    scale: float | None = None,
    backend: str = "torch",
    return_state: bool = True,
) -> tuple[Tensor, Tensor | None]:
    """Linear attention with decay over whole sequences, or over documents packed into one.

    Args:
        q: `[B, T, H, K]`; fp32, bf16, fp16 or float64.
        k: `[B, T, H, K]`.
        v: `[B, T, H, V]`.
        log_decay: `[H]`, or `[B, T, H]` for decay by token; finite, at most 0. Has a gradient.
        initial_state: `[B, H, K, V]`, with `cu_seqlens` `[documents, H, K, V]`; fp32, float64 for
            float64 inputs; None: zeros. Has a gradient.
        cu_seqlens: int32 `[documents + 1]` on the CPU, from 0 to T: where documents begin, and the
            end of the last; then B is 1. A document sees only itself; an empty one only passes its
            state on.
        chunk_len: tokens of a chunk; None for what suits the documents. It changes cost, not
            results.
        scale: factor on the queries; None is 1 / sqrt(K).
        backend: "torch", "triton" or "fla" (flash-linear-attention).
        return_state: whether to return the states after the last tokens.

    Returns:
        The output, `[B, T, H, V]` in the dtype of v, and the states after the last tokens, shape
        and dtype as `initial_state`; None unless asked for.

    Raises:
        LayoutError: if inputs do not fit together, or the backend cannot be used.
    """
    check_inputs(q, k, v)
    check_log_decay(log_decay, q)
    check_scale(scale)
    check_chunk_len(chunk_len)
    bounds = document_bounds(cu_seqlens, num_tokens=q.shape[1], batch=q.shape[0])
    check_state(initial_state, q, v, documents=None if cu_seqlens is None else len(bounds) - 1)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    filled = [i for i, (a, b) in enumerate(pairwise(bounds)) if b > a]
    if backend == "fla":
        out, states = lightning_by_fla(
            q,
            k,
            v,
            log_decay=log_decay,
            initial_state=initial_state,
            cu_seqlens=cu_seqlens,
            scale=scale,
        )
        return out, states if return_state else None
    passes = passes_for(backend, q=q, v=v)
    if not filled:
        passed_on = _passed_on(initial_state, q, v, bounds)
        # Nothing, but what it hangs on: gradients are zeros, as they are with tokens.
        out = v + 0 * (q.sum() + k.sum() + log_decay.sum())
        return out, passed_on.clone() if return_state else None
    chunks = cut_documents(
        [0, *(bounds[i + 1] for i in filled)],
        chunk_len=chunk_len,
        with_entries=initial_state is not None,
        with_exits=return_state,
    )
    # States by slot: [docs, H, K, V] <-> [slots, 1, H, K, V]; [B, H, K, V] <-> [1, B, H, K, V]
    packed = cu_seqlens is not None
    initial = initial_state
    if initial is not None:
        initial = initial[filled].unsqueeze(1) if packed else initial.unsqueeze(0)
    out, leaving = attend(
        q,
        k,
        v,
        log_decay=log_decay,
        chunks=chunks,
        passes=passes,
        scale=scale,
        initial=initial,
    )
    if not return_state:
        return out, None
    if not packed:
        return out, leaving[0]
    if len(filled) == len(bounds) - 1:
        return out, leaving[:, 0]
    where = torch.tensor(filled, device=leaving.device)
    return out, _passed_on(initial_state, q, v, bounds).index_copy(0, where, leaving[:, 0])


def _passed_on(initial: Tensor | None, q: Tensor, v: Tensor, bounds: Sequence[int]) -> Tensor:
    """States of documents without tokens."""
    if initial is not None:
        return initial
    count = len(bounds) - 1 if q.shape[0] == 1 else q.shape[0]
    shape = (count, q.shape[2], q.shape[3], v.shape[3])
    return q.new_zeros(shape, dtype=wide_dtype(q))


def lightning_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    log_decay: Tensor,
    state: Tensor,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """One token of each sequence; equals `lightning_attention` of one token. Differentiable.

    Args:
        q: `[B, H, K]`.
        k: `[B, H, K]`.
        v: `[B, H, V]`.
        log_decay: `[H]`, or `[B, H]`; finite, at most 0.
        state: `[B, H, K, V]`, the state before the token; fp32, float64 for float64 inputs.
        scale: factor on the queries; None is 1 / sqrt(K).

    Returns:
        The output, `[B, H, V]` in the dtype of v, and the state after the token.

    Raises:
        LayoutError: if inputs do not fit together.
    """
    for name, x in zip("qkv", (q, k, v), strict=True):
        if not isinstance(x, Tensor) or x.ndim != 3:
            found = list(x.shape) if isinstance(x, Tensor) else repr(x)
            raise LayoutError(f"{name} of one token must be [B, H, D], not {found}")
    whole = [x.unsqueeze(1) for x in (q, k, v)]
    check_inputs(*whole)
    by_token = isinstance(log_decay, Tensor) and log_decay.ndim > 1
    check_log_decay(log_decay.unsqueeze(1) if by_token else log_decay, whole[0])
    check_scale(scale)
    if not isinstance(state, Tensor):
        raise LayoutError(f"state={state!r} must be a tensor, [B, H, K, V]; zeros before the first")
    check_state(state, whole[0], whole[2], documents=None)
    wide = wide_dtype(q)
    decay = log_decay.to(wide).exp()[..., None, None]
    added = k.to(wide).unsqueeze(-1) * v.to(wide).unsqueeze(-2)
    state = decay * state + added
    scaled = q.to(wide) * (1 / math.sqrt(q.shape[-1]) if scale is None else scale)
    # No matrix product: autocast would round the state.
    out = (scaled.unsqueeze(-1) * state).sum(-2)
    return out.to(v.dtype), state
