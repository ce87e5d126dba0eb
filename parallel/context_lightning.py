"""Lightning attention over a sequence whose tokens are spread over ranks. Exact, both passes.

One idea: a rank needs of all earlier tokens only the state that they leave, [H, K, V] whatever
their number. Each rank works through its parts from zero states, sends what they leave, computes
the inside of its chunks while the states travel, and adds what came in. Backward is the mirror.

    rank 0   states of its parts -> send ----.   inside of chunks   + q . what came in   -> out
    rank 1   states of its parts -> send -----X  inside of chunks   + q . what came in   -> out
                                                 (while states travel)

Layouts are those of softmax layers, zigzag included, so a model may mix both kinds and no token
moves between them; documents may begin and end anywhere. Price: one state a part and direction, by
the ways of `state_exchange.py`, in bytes in `state_cost.py`; decay gradients are free.
Shapes: B batch, T local tokens, H heads, K and V head dims.
"""

import torch
from torch import Tensor
from torch._compile import _disable_dynamo

from ringctx.config import TopologyConfig
from ringctx.ops.lightning import lightning_attention
from ringctx.ops.lightning.backends import passes_for
from ringctx.ops.lightning.checks import check_inputs, check_log_decay, check_scale
from ringctx.ops.lightning.chunks import (
    CHUNK_LENS,
    check_chunk_len,
    cut,
    suited_chunk_len,
)
from ringctx.ops.lightning.function import attend
from ringctx.ops.lightning.stages import wide_dtype
from ringctx.parallel import comm
from ringctx.parallel.argument_check import agreed_arguments, is_checking
from ringctx.parallel.layout import Sharding
from ringctx.parallel.parts import Chain, chain_of
from ringctx.parallel.ring_attention import wiring_of
from ringctx.parallel.state_cost import StateShape, choose_exchange
from ringctx.parallel.state_exchange import StateExchange, check_exchange
from ringctx.parallel.topology import Wiring

__all__ = ["context_lightning"]


@_disable_dynamo
def context_lightning(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    log_decay: Tensor,
    group: comm.Group,
    layout: str = "zigzag",
    exchange: str = "auto",
    cu_seqlens: Tensor | None = None,
    scale: float | None = None,
    chunk_len: int | None = None,
    backend: str = "torch",
    topology: TopologyConfig | None = None,
) -> Tensor:
    """Linear attention with decay over a sequence whose tokens are spread over `group`.

    Every rank of the group calls it with its own shard, and with the same shapes and settings.
    S_t = exp(g_t) S_{t-1} + k_t^T v_t and o_t = scale q_t S_t, as in `ringctx.ops`.

    Args:
        q: this rank's queries, `[B, T, H, K]`; any floating dtype, any strides.
        k: this rank's keys, `[B, T, H, K]`.
        v: this rank's values, `[B, T, H, V]`.
        log_decay: `[H]`, the same on all ranks, or `[B, T, H]`, sharded like q; finite, at most 0.
            The gradient of `[H]` is this rank's share of a sum over the ranks.
        group: the ranks that share the sequence, in layout order; `comm.SoloGroup()` for one rank.
        layout: which tokens the shards hold: "contiguous" or "zigzag"; "striped" on one rank only.
        exchange: how states travel: "all_gather" or "ring"; "auto" for the cheapest.
        cu_seqlens: int32 `[documents + 1]` on the CPU: where documents begin in the whole sequence,
            and its length; for every row of the batch. A state ends with its document; empty
            documents are left out.
        scale: factor on the queries; None is 1 / sqrt(K).
        chunk_len: tokens of a chunk; None for what suits the documents. It changes cost, not
            results.
        backend: who computes the chunks, as in `ringctx.ops.lightning_attention`; "fla" on one rank
            only.
        topology: how the ranks are wired; None is a switch. It decides ways, never results.

    Returns:
        `[B, T, H, V]` in the dtype of v.

    Raises:
        LayoutError: if inputs, layout, documents and group do not fit together; before any
            transfer.
    """
    inputs = (q, k, v, log_decay)
    with agreed_arguments(
        group,
        q=q,
        k=k,
        v=v,
        log_decay=_told(log_decay),
        layout=layout,
        exchange=exchange,
        cu_seqlens=cu_seqlens,
        scale=scale,
        # What auto chooses depends on it.
        chunk_len=chunk_len,
        topology=topology,
        # One rank that runs no backward would leave the others waiting in theirs.
        differentiates=torch.is_grad_enabled() and any(map(_needs_gradient, inputs)),
    ):
        check_inputs(q, k, v)
        check_log_decay(log_decay, q)
        check_scale(scale)
        check_chunk_len(chunk_len)
        check_exchange(exchange)
        world_size = comm.group_size(group)
        chain = chain_of(Sharding(q.shape[1] * world_size, world_size, layout), cu_seqlens)
        wiring = wiring_of(group, topology)
        alone = world_size == 1 and backend == "fla"
        passes = None if alone else passes_for(backend, q=q, v=v)
    if passes is None:
        out, _ = lightning_attention(
            q,
            k,
            v,
            log_decay=log_decay,
            cu_seqlens=cu_seqlens,
            scale=scale,
            backend=backend,
            return_state=False,
        )
        return out
    comm.connect(group, q.device)
    fragments = chain.fragments_of(comm.group_rank(group))
    out, _ = attend(
        q,
        k,
        v,
        log_decay=log_decay,
        chunks=cut(fragments, chunk_len=chunk_len or suited_chunk_len(fragments)),
        passes=passes,
        scale=q.shape[-1] ** -0.5 if scale is None else scale,
        carry=_carry(q, v, log_decay, group, chain, wiring, exchange=exchange, chunk_len=chunk_len),
    )
    return out


def _carry(
    q: Tensor,
    v: Tensor,
    log_decay: Tensor,
    group: comm.Group,
    chain: Chain,
    wiring: Wiring,
    *,
    exchange: str,
    chunk_len: int | None,
) -> StateExchange | None:
    """What fetches the states of other ranks; None where there are none."""
    if comm.group_size(group) == 1:
        return None
    per_head = log_decay.detach().double() if log_decay.ndim == 1 else None
    if exchange == "auto":
        shape = StateShape(
            batch=q.shape[0],
            heads=q.shape[2],
            key_dim=q.shape[3],
            value_dim=v.shape[3],
            dtype=wide_dtype(q),
            data_decay=per_head is None,
            # Not what suits this rank's documents: all ranks must choose alike.
            chunk_len=chunk_len or CHUNK_LENS[-2],
        )
        exchange = choose_exchange(shape=shape, chain=chain, wiring=wiring)
    return StateExchange(group, chain, exchange, per_head)


def _needs_gradient(x: object) -> bool:
    return isinstance(x, Tensor) and x.requires_grad


def _told(log_decay: Tensor) -> object:
    """What debug mode compares: all of a decay that must be the same on all ranks."""
    if is_checking() and isinstance(log_decay, Tensor) and log_decay.ndim == 1:
        return f"{log_decay.dtype} {log_decay.tolist()}"
    return log_decay
