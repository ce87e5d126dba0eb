"""Linear attention with decay, twice by its definition, in float64: what the fast paths must equal.

    S_t = exp(g_t) S_{t-1} + k_t^T v_t        o_t = scale q_t S_t

`naive_recurrent` runs these two lines token by token. `naive_quadratic` writes out what they sum
to, o_t = scale sum_{s <= t} exp(g_{s+1} + .. + g_t) (q_t . k_s) v_s, with the whole T x T matrix.
They share nothing but the reading of their arguments; gradients are autograd's.
Shapes: B batch, T tokens, H heads, K and V head dims; D documents, counted over all batch rows.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["naive_quadratic", "naive_recurrent"]


def naive_recurrent(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    log_decay: Tensor,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | Sequence[int] | None = None,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Attend token by token. Differentiable in every tensor.

    Args:
        q: `[B, T, H, K]`, any floating dtype.
        k: `[B, T, H, K]`.
        v: `[B, T, H, V]`.
        log_decay: `[H]` or `[B, T, H]`, <= 0; -inf forgets all that was before the token.
        initial_state: `[B, H, K, V]`; with cu_seqlens one for every document of every batch row,
            `[B * documents, H, K, V]`, row after row. None is zeros.
        cu_seqlens: where documents start in every row, and the end of the last, from 0 to T and not
            falling. An empty document passes its state on as it is. None is one document a row.
        scale: factor on the outputs; None is 1 / sqrt(K).

    Returns:
        `(out, state)`: float64 `[B, T, H, V]`, and float64 of the shape of initial_state.
    """
    rows = _rows(q, k, v, log_decay, initial_state, cu_seqlens, scale)
    tokens = list(zip(*(x.unbind() for x in (rows.q, rows.k, rows.v, rows.decay)), strict=True))
    outs, states = [], []
    for (start, stop), state in zip(rows.documents, rows.initial, strict=True):
        for query, key, value, decay in tokens[start:stop]:
            state = decay.exp()[:, None, None] * state + key[:, :, None] * value[:, None, :]
            outs.append(rows.scale * (query[:, :, None] * state).sum(1))
        states.append(state)
    out = torch.stack(outs) if outs else rows.v
    return out.reshape(v.shape), torch.stack(states)


def naive_quadratic(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    log_decay: Tensor,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | Sequence[int] | None = None,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Attend with dense masks; arguments and results of `naive_recurrent`.

    Memory `[H, B * T, B * T]` float64.
    """
    rows = _rows(q, k, v, log_decay, initial_state, cu_seqlens, scale)
    lengths = torch.tensor([stop - start for start, stop in rows.documents], device=q.device)
    documents = torch.arange(len(lengths), device=q.device)
    document = documents.repeat_interleave(lengths)
    # [T, D] and [T, T]: a token is of the document, or comes later in it than the other token.
    own = document[:, None] == documents
    later = (document[:, None] == document).tril(-1)
    seen = later | torch.eye(len(document), dtype=torch.bool, device=q.device)
    # Every pair has a sum of its own, of just the decays between: a difference of running sums
    # would cancel, and be NaN where they are infinite.
    between = torch.where(later, rows.decay.T[:, :, None], 0.0)
    from_start = torch.where(own, rows.decay.T[:, :, None], 0.0)
    weights = between.cumsum(1).exp() * seen
    entering = from_start.cumsum(1).exp() * own
    scores = torch.einsum("thk,shk,hts->hts", rows.q, rows.k, weights)
    out = torch.einsum("hts,shv->thv", scores, rows.v)
    out = out + torch.einsum("thk,htd,dhkv->thv", rows.q, entering, rows.initial)
    kept = torch.einsum("hd,dhkv->dhkv", from_start.sum(1).exp(), rows.initial)
    added = torch.einsum("td,ht,thk,thv->dhkv", own.double(), between.sum(1).exp(), rows.k, rows.v)
    return rows.scale * out.reshape(v.shape), kept + added


@dataclass(frozen=True, eq=False)
class _Rows:
    """All batch rows behind one another, as documents of one row; T and D count over all."""

    q: Tensor
    k: Tensor
    v: Tensor
    decay: Tensor
    """`[T, H]`, as are q, k and v `[T, H, ...]`; all float64."""
    initial: Tensor
    """`[D, H, K, V]`."""
    documents: list[tuple[int, int]]
    scale: float


def _rows(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | Sequence[int] | None,
    scale: float | None,
) -> _Rows:
    batch, tokens, heads, key_dim = q.shape
    bounds = [0, tokens] if cu_seqlens is None else torch.as_tensor(cu_seqlens).tolist()
    documents = [
        (row * tokens + start, row * tokens + stop)
        for row in range(batch)
        for start, stop in itertools.pairwise(bounds)
    ]
    shape = (len(documents), heads, key_dim, v.shape[-1])
    if initial_state is None:
        initial_state = q.new_zeros(shape)
    assert initial_state.shape == shape, (initial_state.shape, shape)
    decay = log_decay.expand(batch, tokens, heads)
    q, k, v, decay = (x.double().flatten(0, 1) for x in (q, k, v, decay))
    scale = key_dim**-0.5 if scale is None else scale
    return _Rows(q, k, v, decay, initial_state.double(), documents, scale)
