"""Ring attention: K/V blocks travel from rank to rank, queries stay. Exact, forward and backward.

One idea: softmax over all keys is the merge of softmaxes over each rank's keys, so a rank attends
whichever block is at hand while the next one arrives. `one_way`, per ring step on each rank:

    forward    start passing K/V on and receiving the next -> attend this block -> merge -> wait
    backward   the same round; each block's dK/dV start on the rank after its owner, follow it from
               rank to rank one step behind, and reach the owner with their last hop

Price: forward sends (world_size - 1) local K/V; backward as many again and as many accumulators, in
fp32. Holds two received blocks, and in backward two of accumulators. Memory is linear in the shard.
Source: Liu et al. 2023 (arXiv 2310.01889); zigzag: zhuzilin/ring-flash-attention#2.
Shapes: B batch, T local tokens, H heads, Hkv key/value heads, D head dim.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args, overload

import torch
from torch import Tensor
from torch._compile import _disable_dynamo
from torch.autograd.function import once_differentiable

from ringctx.config import Schedule
from ringctx.errors import LayoutError
from ringctx.ops.block_attention import block_backward, block_forward, check_heads
from ringctx.ops.lse import merge_
from ringctx.parallel import comm
from ringctx.parallel.layout import local_len
from ringctx.parallel.mask import PairSlice, visible_slices

__all__ = ["ring_attention"]


# Tags of the first tensor of each kind; K and dK take the tag itself, V and dV the next.
_KV_TAG = 0
_GRAD_TAG = 2


@overload
def ring_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    group: comm.Group,
    layout: str = ...,
    causal: bool = ...,
    schedule: str = ...,
    scale: float | None = ...,
    return_lse: Literal[False] = ...,
) -> Tensor: ...
@overload
def ring_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    group: comm.Group,
    layout: str = ...,
    causal: bool = ...,
    schedule: str = ...,
    scale: float | None = ...,
    return_lse: Literal[True],
) -> tuple[Tensor, Tensor]: ...
# A compiled block breaks its graph here. Unlike torch.compiler.disable, this does not import the
# compiler (seconds) until the first call.
@_disable_dynamo
def ring_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    group: comm.Group,
    layout: str = "zigzag",
    causal: bool = True,
    schedule: str = "auto",
    scale: float | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Softmax attention over a sequence whose tokens are spread over the ranks of `group`.

    Every rank of the group calls it with its own shard, and with the same shapes and settings.

    Args:
        q: this rank's queries, `[B, T, H, D]`; any floating dtype, any strides.
        k: this rank's keys, `[B, T, Hkv, D]`; Hkv divides H and is never expanded.
        v: this rank's values, `[B, T, Hkv, D]`.
        group: the ranks that share the sequence, in layout order; `comm.SoloGroup()` for one rank.
        layout: which tokens the shards hold: "contiguous", "zigzag" or "striped".
        causal: whether a token sees only itself and earlier tokens.
        schedule: "one_way", or "auto" for the cheapest.
        scale: factor on the scores; None is 1 / sqrt(D).
        return_lse: also return the log of each query's softmax sum, without gradient.

    Returns:
        `[B, T, H, D]` in the dtype of q; with `return_lse` also `[B, H, T]`, natural log, in fp32
        (fp64 for fp64).

    Raises:
        LayoutError: if inputs, layout and group do not fit together; raised before any transfer.
    """
    check_heads(q, k, v)
    if q.shape[1] != k.shape[1]:
        raise LayoutError(f"q holds {q.shape[1]:,} local tokens and k, v {k.shape[1]:,}")
    if schedule not in get_args(Schedule):
        known = ", ".join(get_args(Schedule))
        raise LayoutError(f"schedule={schedule!r} is not known; choose one of {known}")
    world_size = comm.group_size(group)
    ring = _Ring(
        group=group,
        rank=comm.group_rank(group),
        world_size=world_size,
        local_len=local_len(q.shape[1] * world_size, world_size=world_size, layout=layout),
        layout=layout,
        causal=causal,
        scale=q.shape[3] ** -0.5 if scale is None else scale,
    )
    out, lse = _RingAttention.apply(q, k, v, ring)  # type: ignore[no-untyped-call]
    return (out, lse) if return_lse else out


@dataclass(frozen=True, slots=True)
class _Ring:
    """One call's place in the ring, and what its mask lets through."""

    group: comm.Group
    rank: int
    world_size: int
    local_len: int
    layout: str
    causal: bool
    scale: float

    def slices(self, ring_step: int) -> tuple[PairSlice, ...]:
        """The visible part of my queries x the block at hand after `ring_step` hops."""
        return visible_slices(
            layout=self.layout,
            causal=self.causal,
            q_rank=self.rank,
            kv_rank=(self.rank - ring_step) % self.world_size,
            world_size=self.world_size,
            local_len=self.local_len,
        )

    def accumulator_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """At least fp32; on one rank there is nothing to add up."""
        return dtype if self.world_size == 1 else torch.promote_types(dtype, torch.float32)


class _Belt:
    """Passes pairs of tensors (K and V, or dK and dV) to the next rank, world_size - 1 times.

    Two pairs of receive buffers take turns: one is free again when what it received has been sent
    on, and that belongs to the exchange that fills the other.
    """

    def __init__(
        self, ring: _Ring, *, like: Sequence[Tensor], dtype: torch.dtype, tag: int
    ) -> None:
        self._ring = ring
        self._hops_left = ring.world_size - 1
        self._tag = tag
        self._free = [
            tuple(torch.empty_like(x, dtype=dtype) for x in like)
            for _ in range(min(2, self._hops_left))
        ]

    def pass_on(self, pair: Sequence[Tensor]) -> comm.Exchange:
        """Start sending `pair` and receiving the previous rank's; after the last hop, nothing."""
        ring = self._ring
        sends: list[comm.Transfer] = []
        recvs: list[comm.Transfer] = []
        if self._hops_left:
            self._hops_left -= 1
            arriving = self._free.pop(0)
            self._free.append(arriving)
            next_rank, prev_rank = ((ring.rank + i) % ring.world_size for i in (1, -1))
            sends = [comm.Transfer(x, next_rank, self._tag + i) for i, x in enumerate(pair)]
            recvs = [comm.Transfer(x, prev_rank, self._tag + i) for i, x in enumerate(arriving)]
        return comm.exchange(sends, recvs, group=ring.group)


class _RingAttention(torch.autograd.Function):
    """Saves the local q, k, v, out and lse; backward sends K/V round again."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, ring: _Ring) -> tuple[Tensor, Tensor]:
        q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
        out, lse = _one_way_forward(q, k, v, ring)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.ring, ctx.ledger = ring, comm.current_ledger()
        ctx.mark_non_differentiable(lse)
        return out, lse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor, _: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        # Autograd may run this in a thread of its own, where no ledger is set.
        with comm.record_into(ctx.ledger):
            grads = _one_way_backward(grad_out.contiguous(), *ctx.saved_tensors, ring=ctx.ring)
        return *grads, None


def _one_way_forward(q: Tensor, k: Tensor, v: Tensor, ring: _Ring) -> tuple[Tensor, Tensor]:
    kv_belt = _Belt(ring, like=(k, v), dtype=k.dtype, tag=_KV_TAG)
    arriving = kv_belt.pass_on((k, v))
    # Every token sees itself, so the own pair fills every row and starts the accumulators.
    out, lse = block_forward(q, k, v, causal=ring.causal, scale=ring.scale)
    out = out.to(ring.accumulator_dtype(q.dtype))
    for ring_step in range(1, ring.world_size):
        keys, values = arriving.wait()
        arriving = kv_belt.pass_on((keys, values))
        for part in ring.slices(ring_step):
            part_out, part_lse = block_forward(
                q[:, part.q],
                keys[:, part.k],
                values[:, part.k],
                causal=part.causal,
                scale=ring.scale,
            )
            merge_(out[:, part.q], lse[:, :, part.q], part_out, part_lse)
    return out.to(q.dtype), lse


def _one_way_backward(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, *, ring: _Ring
) -> tuple[Tensor, Tensor, Tensor]:
    wide = ring.accumulator_dtype(q.dtype)
    kv_belt = _Belt(ring, like=(k, v), dtype=k.dtype, tag=_KV_TAG)
    grad_belt = _Belt(ring, like=(k, v), dtype=wide, tag=_GRAD_TAG)
    arriving = kv_belt.pass_on((k, v))
    own = block_backward(grad_out, q, k, v, out=out, lse=lse, causal=ring.causal, scale=ring.scale)
    grad_q, grad_k, grad_v = (grad.to(wide) for grad in own)
    returning: comm.Exchange | None = None
    for ring_step in range(1, ring.world_size):
        keys, values = arriving.wait()
        arriving = kv_belt.pass_on((keys, values))
        shares = [
            (part, _part_backward(part, grad_out, q, keys, values, out=out, lse=lse, ring=ring))
            for part in ring.slices(ring_step)
        ]
        # What the ranks before me added to this block's gradients follows it one step behind.
        sums: Sequence[Tensor] = (
            [torch.zeros_like(x, dtype=wide) for x in (k, v)]
            if returning is None
            else returning.wait()
        )
        for part, (part_grad_q, part_grad_k, part_grad_v) in shares:
            grad_q[:, part.q] += part_grad_q
            sums[0][:, part.k] += part_grad_k
            sums[1][:, part.k] += part_grad_v
        returning = grad_belt.pass_on(sums)
    if returning is not None:
        # All that the other ranks added to the gradients of my own block.
        arrived_k, arrived_v = returning.wait()
        grad_k += arrived_k
        grad_v += arrived_v
    return grad_q.to(q.dtype), grad_k.to(k.dtype), grad_v.to(v.dtype)


def _part_backward(
    part: PairSlice,
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    out: Tensor,
    lse: Tensor,
    ring: _Ring,
) -> tuple[Tensor, Tensor, Tensor]:
    return block_backward(
        grad_out[:, part.q],
        q[:, part.q],
        k[:, part.k],
        v[:, part.k],
        out=out[:, part.q],
        lse=lse[:, :, part.q],
        causal=part.causal,
        scale=ring.scale,
    )
