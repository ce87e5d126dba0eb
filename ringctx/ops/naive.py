"""Slow and certain twins of the fast paths: what the tests compare with, and the last resort.

`naive_attention` is the oracle: float64, the whole score matrix, autograd for its gradients.
`naive_block_forward` and `naive_block_backward` have the interface of the block kernels and run on
any device and dtype, in fp32 (fp64 for fp64), with the scores of one tile of query rows at a time.
Shapes: B batch, T query tokens, S key tokens, H heads, Hkv key/value heads, G = H/Hkv, D head dim.
"""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

__all__ = ["BlockMask", "naive_attention", "naive_block_backward", "naive_block_forward"]

# Query i of a square block sees keys 0 .. i (causal), or keys i and later (anticausal).
BlockMask = Literal["full", "causal", "anticausal"]

_TILE = 256


def naive_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool,
    window: int | None = None,
    sinks: int = 0,
    cu_seqlens: Tensor | Sequence[int] | None = None,
    scale: float | None = None,
    q_positions: Tensor | None = None,
    k_positions: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Softmax attention by the definition, in float64. Differentiable.

    Args:
        q: `[B, T, H, D]`, any floating dtype.
        k: `[B, S, Hkv, D]`.
        v: `[B, S, Hkv, D]`.
        causal: whether a query sees only keys at its own and earlier positions.
        window: a query sees only keys less than this many positions before its own; None for all.
        sinks: with a window: positions at the start of each document that stay visible.
        cu_seqlens: where documents start, and the end of the last, rising from 0; a query sees
            only keys of its own document. None is one document.
        scale: factor on the scores; None is 1 / sqrt(D).
        q_positions: int64 `[T]`; None is 0 .. T-1.
        k_positions: int64 `[S]`; None is 0 .. S-1.

    Returns:
        `(out, lse)`: float64 `[B, T, H, D]`, and float64 `[B, H, T]`, natural log. A query that
        sees no key has out 0 and lse -inf.
    """
    q, k, v = q.double(), k.double(), v.double()
    queries = torch.arange(q.shape[1]) if q_positions is None else q_positions
    keys = torch.arange(k.shape[1]) if k_positions is None else k_positions
    scores = _scores(q, k, scale=q.shape[-1] ** -0.5 if scale is None else scale)
    visible = _visible(
        queries[:, None].cpu(),
        keys[None, :].cpu(),
        causal=causal,
        window=window,
        sinks=sinks,
        cu_seqlens=cu_seqlens,
    )
    scores = scores.masked_fill(~visible.to(q.device), -torch.inf)
    lse = scores.logsumexp(-1)
    # -inf - -inf in rows without keys: replaced before and after, so that no gradient is NaN.
    empty = lse == -torch.inf
    weights = (scores - lse.masked_fill(empty, 0.0).unsqueeze(-1)).exp()
    return _weighted_values(weights, v), lse.flatten(1, 2)


def _visible(
    queries: Tensor,
    keys: Tensor,
    *,
    causal: bool,
    window: int | None,
    sinks: int,
    cu_seqlens: Tensor | Sequence[int] | None,
) -> Tensor:
    """The mask by its definition, from positions that broadcast: bool, True where a query sees."""
    if cu_seqlens is None:
        document = document_of_key = start = torch.zeros((), dtype=torch.int64)
    else:
        bounds = torch.as_tensor(cu_seqlens, dtype=torch.int64).cpu()
        document, document_of_key = (
            torch.bucketize(x, bounds, right=True) - 1 for x in (queries, keys)
        )
        start = bounds[document]
    visible = (document == document_of_key).expand(
        torch.broadcast_shapes(queries.shape, keys.shape)
    )
    if causal:
        visible = visible & (keys <= queries)
    if window is not None:
        visible = visible & ((keys > queries - window) | (keys < start + sinks))
    return visible


def naive_block_forward(
    q: Tensor, k: Tensor, v: Tensor, *, mask: BlockMask, scale: float
) -> tuple[Tensor, Tensor]:
    """Attend one block pair; see `block_attention.block_forward`."""
    wide = _accumulator_dtype(q)
    keys, values = k.to(wide), v.to(wide)
    outs, lses = [], []
    for rows in _tiles(q.shape[1]):
        scores = _tile_scores(q[:, rows].to(wide), keys, rows, mask=mask, scale=scale)
        lse = scores.logsumexp(-1)
        outs.append(_weighted_values((scores - lse.unsqueeze(-1)).exp_(), values))
        lses.append(lse.flatten(1, 2))
    return torch.cat(outs, 1).to(q.dtype), torch.cat(lses, -1)


def naive_block_backward(
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
    """Gradients of one block pair from the final lse; see `block_attention.block_backward`."""
    wide = _accumulator_dtype(q)
    keys, values = k.to(wide), v.to(wide)
    grad_k, grad_v = torch.zeros_like(keys), torch.zeros_like(values)
    grad_qs = []
    for rows in _tiles(q.shape[1]):
        queries, grads = _grouped(q[:, rows].to(wide), k), _grouped(grad_out[:, rows].to(wide), k)
        scores = _tile_scores(q[:, rows].to(wide), keys, rows, mask=mask, scale=scale)
        weights = (scores - lse[:, :, rows].reshape(scores.shape[:-1]).unsqueeze(-1)).exp_()
        # delta: what the softmax's normalisation takes back from every score of a row.
        delta = torch.einsum("btkgd,btkgd->bkgt", grads, _grouped(out[:, rows].to(wide), k))
        grad_weights = torch.einsum("btkgd,bskd->bkgts", grads, values)
        grad_scores = weights * (grad_weights - delta.unsqueeze(-1)) * scale
        grad_v += torch.einsum("bkgts,btkgd->bskd", weights, grads)
        grad_k += torch.einsum("bkgts,btkgd->bskd", grad_scores, queries)
        grad_qs.append(torch.einsum("bkgts,bskd->btkgd", grad_scores, keys).flatten(2, 3))
    return torch.cat(grad_qs, 1).to(q.dtype), grad_k.to(k.dtype), grad_v.to(v.dtype)


def _accumulator_dtype(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _tiles(tokens: int) -> list[slice]:
    return [slice(start, min(start + _TILE, tokens)) for start in range(0, tokens, _TILE)]


def _grouped(x: Tensor, k: Tensor) -> Tensor:
    """Split the query heads by the key/value head that they share."""
    # [B, T, H, D] -> [B, T, Hkv, G, D]
    return x.reshape(*x.shape[:2], k.shape[2], -1, x.shape[3])


def _scores(q: Tensor, k: Tensor, *, scale: float) -> Tensor:
    # [B, T, H, D] x [B, S, Hkv, D] -> [B, Hkv, G, T, S]
    return torch.einsum("btkgd,bskd->bkgts", _grouped(q, k), k) * scale


def _tile_scores(q: Tensor, k: Tensor, rows: slice, *, mask: BlockMask, scale: float) -> Tensor:
    scores = _scores(q, k, scale=scale)
    if mask != "full":
        queries = torch.arange(rows.start, rows.stop, device=q.device)[:, None]
        keys = torch.arange(k.shape[1], device=q.device)
        hidden = keys > queries if mask == "causal" else keys < queries
        scores.masked_fill_(hidden, -torch.inf)
    return scores


def _weighted_values(weights: Tensor, v: Tensor) -> Tensor:
    # [B, Hkv, G, T, S] x [B, S, Hkv, D] -> [B, T, H, D]
    return torch.einsum("bkgts,bskd->btkgd", weights, v).flatten(2, 3)
