"""Ring attention: pieces of a sequence travel between the ranks that share it. Exact, both passes.

One idea: softmax over all keys is the merge of softmaxes over parts of them, so a rank attends what
is at hand while more arrives. What travels, by which way, is a schedule (`ways.py`): K/V or Q; one
way, both ways, or straight to whoever needs it; only what the mask needs. Forward and backward are
two passes and may use two schedules.

Price: bytes per token in `traffic.py`, per link in `cost.py`. Memory is linear in the shard.
Source: Liu et al. 2023 (arXiv 2310.01889); TokenRing (arXiv 2412.20501).
Shapes: B batch, T local tokens, H heads, Hkv key/value heads, D head dim.
"""

import math
from dataclasses import dataclass
from typing import Any, Literal, overload

import torch
import torch.distributed as dist
from torch import Tensor
from torch._compile import _disable_dynamo
from torch.autograd.function import once_differentiable

from ringctx.config import TopologyConfig
from ringctx.errors import LayoutError
from ringctx.ops.block_attention import check_heads
from ringctx.parallel import comm, ring_pass
from ringctx.parallel.argument_check import agreed_arguments
from ringctx.parallel.cost import choose, route_of_pass
from ringctx.parallel.layout import Sharding
from ringctx.parallel.mask import MaskSettings
from ringctx.parallel.routes import Route
from ringctx.parallel.topology import Wiring, wire_up
from ringctx.parallel.traffic import Shape
from ringctx.parallel.ways import check_schedule

__all__ = ["PassPlan", "RingAttention", "ring_attention", "wiring_of"]


@overload
def ring_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    group: comm.Group,
    layout: str = ...,
    causal: bool = ...,
    window: int | None = ...,
    sinks: int = ...,
    cu_seqlens: Tensor | None = ...,
    schedule: str = ...,
    topology: TopologyConfig | None = ...,
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
    window: int | None = ...,
    sinks: int = ...,
    cu_seqlens: Tensor | None = ...,
    schedule: str = ...,
    topology: TopologyConfig | None = ...,
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
    window: int | None = None,
    sinks: int = 0,
    cu_seqlens: Tensor | None = None,
    schedule: str = "auto",
    topology: TopologyConfig | None = None,
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
        window: with causal: a token sees itself and the window - 1 tokens before it.
        sinks: with a window: the first tokens, of each document where there are documents, that
            every later token sees besides.
        cu_seqlens: int32 `[documents + 1]` on the CPU: where documents begin in the whole sequence,
            and its length; for every row of the batch. Tokens see only their own document.
        schedule: "one_way", "two_way", "token_ring" or "all_gather"; "auto" for the cheapest.
        topology: how the ranks are wired; None is a switch. It decides ways, never results.
        scale: factor on the scores; None is 1 / sqrt(D).
        return_lse: also return the log of each query's softmax sum, without gradient.

    Returns:
        `[B, T, H, D]` in the dtype of q; with `return_lse` also `[B, H, T]`, natural log, in fp32
        (fp64 for fp64).

    Raises:
        LayoutError: if inputs, layout, mask and group do not fit together; before any transfer.
    """
    given = MaskSettings(causal=causal, window=window, sinks=sinks, cu_seqlens=cu_seqlens)
    with agreed_arguments(
        group,
        q=q,
        k=k,
        v=v,
        layout=layout,
        **vars(given),
        schedule=schedule,
        topology=topology,
        scale=scale,
        # One rank that runs no backward would leave the others waiting in theirs.
        differentiates=torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v)),
    ):
        check_heads(q, k, v)
        _check_scale(scale)
        if q.shape[1] != k.shape[1]:
            raise LayoutError(f"q holds {q.shape[1]:,} local tokens and k, v {k.shape[1]:,}")
        check_schedule(schedule)
        world_size = comm.group_size(group)
        sharding = Sharding(q.shape[1] * world_size, world_size, layout)
        mask = given.checked(sharding.seq_len)
        wiring = wiring_of(group, topology)
    (batch, _, heads, head_dim), kv_heads = q.shape, k.shape[2]
    scale = head_dim**-0.5 if scale is None else scale
    plan = PassPlan(
        ring_pass.Place(group=group, sharding=sharding, mask=mask, scale=scale),
        Shape(batch=batch, heads=heads, kv_heads=kv_heads, head_dim=head_dim, dtype=q.dtype),
        wiring,
        schedule,
    )
    comm.connect(group, q.device)
    out, lse = RingAttention.apply(q, k, v, plan)  # type: ignore[no-untyped-call]
    return (out, lse) if return_lse else out


def _check_scale(scale: float | None) -> None:
    if scale is not None and not (isinstance(scale, (int, float)) and math.isfinite(scale)):
        raise LayoutError(f"scale={scale!r} must be a finite number, or None for 1 / sqrt(D)")


def _own_precision(x: Tensor) -> torch.autocast:
    """The passes choose their precisions themselves: autocast would round sums to bf16."""
    return torch.autocast(x.device.type, enabled=False)


def wiring_of(group: comm.Group, topology: TopologyConfig | None) -> Wiring:
    """How the ranks of `group` are wired."""
    if isinstance(group, dist.ProcessGroup):
        ranks = tuple(dist.get_process_group_ranks(group))
        return wire_up(topology, ranks=ranks, world_size=dist.get_world_size())
    size = comm.group_size(group)
    return wire_up(topology, ranks=tuple(range(size)), world_size=size)


@dataclass(frozen=True, slots=True)
class PassPlan:
    """One call, and the routes of its passes."""

    place: ring_pass.Place
    shape: Shape
    wiring: Wiring
    schedule: str

    def route(self, *, backward: bool) -> Route:
        """Of one pass."""
        schedule, sharding, mask = self.schedule, self.place.sharding, self.place.mask
        if schedule == "auto":
            choice = choose(shape=self.shape, sharding=sharding, mask=mask, wiring=self.wiring)
            schedule = choice.backward if backward else choice.forward
        return route_of_pass(
            schedule,
            backward=backward,
            shape=self.shape,
            sharding=sharding,
            mask=mask,
            wiring=self.wiring,
        )


class RingAttention(torch.autograd.Function):
    """Saves the local q, k, v, out and lse; backward lets the pieces travel again."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, plan: PassPlan) -> tuple[Tensor, Tensor]:
        """`(out, lse)`; of these, out has a gradient."""
        q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
        route = plan.route(backward=False)
        with _own_precision(q):
            out, lse = ring_pass.forward(q, k, v, place=plan.place, route=route)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.plan, ctx.ledger = plan, comm.current_ledger()
        ctx.mark_non_differentiable(lse)
        # Nobody needs zeros for the gradient of lse.
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor, _: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        """Gradients of q, k and v."""
        q, k, v, out, lse = ctx.saved_tensors
        route = ctx.plan.route(backward=True)
        # Autograd may run this in a thread of its own, where no ledger is set.
        with comm.record_into(ctx.ledger), _own_precision(q):
            grads = ring_pass.backward(
                grad_out.contiguous(), q, k, v, out=out, lse=lse, place=ctx.plan.place, route=route
            )
        return *grads, None
