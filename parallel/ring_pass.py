"""The two passes of attention over a route: what travels, who attends it, where results go.

One idea: attention over all keys is the merge of attention over each piece, so it does not matter
which side travels, by which way, or in which order: a pass is a route (`routes.py`) and three
functions, what to do with the own shard, with a visitor, and with results that came home.

    forward     (out, lse) of each pair of pieces are merged, at the queries or on their way home
    backward    probabilities come again from the final lse, so any order of pieces is exact

Price: `traffic.py`; how pieces move: `travel.py`.
Shapes: B batch, T local tokens, H heads, Hkv key/value heads, D head dim.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from ringctx.ops import pair_attention
from ringctx.ops.lse import merge_
from ringctx.ops.pair_attention import PairSlice
from ringctx.parallel import comm
from ringctx.parallel.layout import Piece, Sharding
from ringctx.parallel.mask import Mask, pair_slices
from ringctx.parallel.routes import Route
from ringctx.parallel.travel import Tensors, Visits, rows_like, travel

__all__ = ["Place", "backward", "forward"]


@dataclass(frozen=True, slots=True)
class Place:
    """One rank's place in a call of attention."""

    group: comm.Group
    sharding: Sharding
    mask: Mask
    scale: float

    @property
    def rank(self) -> int:
        """This rank within the group."""
        return comm.group_rank(self.group)

    @property
    def own(self) -> Piece:
        """The whole local shard."""
        return self.sharding.shard(self.rank)

    def slices(self, *, q: Piece, k: Piece) -> tuple[PairSlice, ...]:
        """The visible part of two pieces."""
        return pair_slices(self.mask, self.sharding, q=q, k=k)

    def wide(self, dtype: torch.dtype) -> torch.dtype:
        """The dtype of accumulators: at least fp32; on one rank there is nothing to add up."""
        alone = self.sharding.world_size == 1
        return dtype if alone else torch.promote_types(dtype, torch.float32)


def forward(
    q: Tensor, k: Tensor, v: Tensor, *, place: Place, route: Route
) -> tuple[Tensor, Tensor]:
    """`(out, lse)` of the local queries: `[B, T, H, D]` as q, and `[B, H, T]` in at least fp32.

    Args:
        q: `[B, T, H, D]`, contiguous, like k and v.
        k: `[B, T, Hkv, D]`.
        v: `[B, T, Hkv, D]`.
        place: this rank's.
        route: of this pass, the same on all ranks.
    """
    own, scale = place.own, place.scale
    out, lse = q.new_empty(0), q.new_empty(0)

    # A sum that is carried along keeps its precision; one part alone is as its kernel left it.
    part_dtype = q.dtype if route.returns == "direct" else place.wide(q.dtype)

    def attend_own() -> None:
        nonlocal out, lse
        out, lse = pair_attention.attend_pair(q, k, v, place.slices(q=own, k=own), scale=scale)
        if place.sharding.world_size > 1:
            out = out.to(place.wide(q.dtype))

    def attend_keys(piece: Piece, guest: Tensors) -> None:
        keys, values = guest
        slices = place.slices(q=own, k=piece)
        pair_attention.attend_pair_(out, lse, q, keys, values, slices, scale=scale)

    def attend_queries(piece: Piece, guest: Tensors) -> Tensors:
        (queries,) = guest
        slices = place.slices(q=piece, k=own)
        part_out, part_lse = pair_attention.attend_pair(queries, k, v, slices, scale=scale)
        return part_out.to(part_dtype).contiguous(), part_lse.contiguous()

    def empty(piece: Piece) -> Tensors:
        return rows_like(q, piece, part_dtype), rows_like(lse, piece)

    def receive(piece: Piece, result: Tensors) -> None:
        merge_(out[:, piece.rows], lse[:, :, piece.rows], *result)

    def join(into: Tensors, result: Tensors) -> None:
        merge_(*into, *result)

    if route.travels == "kv":
        travel(group=place.group, route=route, visits=Visits((k, v), attend_own, attend_keys))
    else:
        travel(
            group=place.group,
            route=route,
            visits=Visits((q,), attend_own, attend_queries, empty, receive, join),
        )
    return out.to(q.dtype), lse


def backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    out: Tensor,
    lse: Tensor,
    place: Place,
    route: Route,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the local q, k and v, shaped and typed as they are.

    Args:
        grad_out: `[B, T, H, D]`, contiguous, like all others.
        q: as in `forward`.
        k: as in `forward`.
        v: as in `forward`.
        out: what `forward` returned.
        lse: what `forward` returned.
        place: this rank's.
        route: of this pass, the same on all ranks.
    """
    differentiate, own, scale = pair_attention.differentiate_pair_, place.own, place.scale
    wide = torch.promote_types(q.dtype, torch.float32)
    grad_q = grad_k = grad_v = q.new_empty(0)

    def attend_own() -> None:
        nonlocal grad_q, grad_k, grad_v
        slices, inputs = place.slices(q=own, k=own), (grad_out, q, k, v)
        grads = pair_attention.differentiate_pair(
            *inputs, out=out, lse=lse, slices=slices, scale=scale
        )
        grad_q, grad_k, grad_v = (grad.to(place.wide(grad.dtype)) for grad in grads)

    def attend_keys(piece: Piece, guest: Tensors) -> Tensors:
        shares = tuple(torch.zeros_like(x, dtype=wide) for x in guest)
        slices = place.slices(q=own, k=piece)
        inputs = (grad_out, q, *guest)
        differentiate(grad_q, *shares, *inputs, out=out, lse=lse, slices=slices, scale=scale)
        return shares

    def attend_queries(piece: Piece, guest: Tensors) -> Tensors:
        queries, grads, piece_lse, delta = guest
        share = torch.zeros_like(queries, dtype=wide)
        stand_in = _with_delta(grads, delta)
        differentiate(
            share,
            grad_k,
            grad_v,
            *(grads, queries, k, v),
            out=stand_in,
            lse=piece_lse,
            slices=place.slices(q=piece, k=own),
            scale=scale,
        )
        return (share,)

    def receive(piece: Piece, result: Tensors) -> None:
        sums = (grad_k, grad_v) if route.travels == "kv" else (grad_q,)
        for total, share in zip(sums, result, strict=True):
            total[:, piece.rows] += share

    def empty(piece: Piece) -> Tensors:
        owners = (k, v) if route.travels == "kv" else (q,)
        return tuple(rows_like(x, piece, wide) for x in owners)

    if route.travels == "kv":
        travel(
            group=place.group,
            route=route,
            visits=Visits((k, v), attend_own, attend_keys, empty, receive, _add),
        )
    else:
        guests = (q, grad_out, lse, _delta(grad_out, out))
        travel(
            group=place.group,
            route=route,
            visits=Visits(guests, attend_own, attend_queries, empty, receive, _add),
        )
    return grad_q.to(q.dtype), grad_k.to(k.dtype), grad_v.to(v.dtype)


def _add(into: Tensors, result: Tensors) -> None:
    for total, share in zip(into, result, strict=True):
        total += share


def _delta(grad_out: Tensor, out: Tensor) -> Tensor:
    """What the normalisation of each row's softmax takes back, `[B, H, T]`, in at least fp32."""
    wide = torch.promote_types(out.dtype, torch.float32)
    delta = (grad_out.to(wide) * out.to(wide)).sum(-1)
    return delta.transpose(1, 2).contiguous()


def _with_delta(grad_out: Tensor, delta: Tensor) -> Tensor:
    """Some out whose product with grad_out is delta: all that a backward uses out for."""
    wide = grad_out.to(delta.dtype)
    # In units of its largest entry no row is too small to be squared.
    unit = wide.abs().amax(-1, keepdim=True)
    direction = wide / unit
    factor = delta.transpose(1, 2).unsqueeze(-1) / unit / direction.square().sum(-1, keepdim=True)
    # A row whose gradient is 0 takes no part: 0 / 0.
    along = torch.where(unit > 0, direction * factor, 0.0)
    return along.to(grad_out.dtype)
