"""Chunked linear attention as one step of autograd.

Saved for backward: q, k, v, the decay, and a few states, some per cent of the inputs.
Shapes: as `stages.py`.
"""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ringctx.ops.lightning.chunks import Chunks
from ringctx.ops.lightning.passes import Carry, Passes
from ringctx.ops.lightning.stages import Problem
from ringctx.ops.lightning.weights import chunk_decay

__all__ = ["attend"]


@dataclass(frozen=True, eq=False)
class _Call:
    chunks: Chunks
    passes: Passes
    scale: float
    carry: Carry | None


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    log_decay: Tensor,
    chunks: Chunks,
    passes: Passes,
    scale: float,
    initial: Tensor | None = None,
    carry: Carry | None = None,
) -> tuple[Tensor, Tensor]:
    """Decayed linear attention within fragments.

    Args:
        q: `[B, T, H, K]`.
        k: `[B, T, H, K]`.
        v: `[B, T, H, V]`.
        log_decay: `[H]` or `[B, T, H]`, any floating dtype, at most 0.
        chunks: which cover the T rows.
        passes: who computes.
        scale: factor on the queries.
        initial: `[entry slots, B, H, K, V]`, wide: states that come in; None: zeros.
        carry: who fetches them instead.

    Returns:
        The output, `[B, T, H, V]`, and the leaving states, `[exit slots, B, H, K, V]`; with a carry
        the latter are those of zero incoming states, without gradient.
    """
    assert initial is None or carry is None
    call = _Call(chunks, passes, scale, carry)
    out, leaving = _Attend.apply(q, k, v, log_decay.double(), initial, call)  # type: ignore[no-untyped-call]
    return out, leaving


class _Attend(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        log_decay: Tensor,
        initial: Tensor | None,
        call: _Call,
    ) -> tuple[Tensor, Tensor]:
        q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
        with _own_precision(q):
            problem = Problem(call.chunks, chunk_decay(log_decay, call.chunks, like=q), call.scale)
            result = call.passes.forward(
                q, k, v, problem=problem, initial=initial, carry=call.carry
            )
        ctx.save_for_backward(q, k, v, log_decay, *result.kept)
        ctx.call = call
        ctx.set_materialize_grads(False)
        if call.carry is not None:
            ctx.mark_non_differentiable(result.leaving)
        return result.out, result.leaving

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad_out: Tensor | None, grad_leaving: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        q, k, v, log_decay, *kept = ctx.saved_tensors
        grad_out = torch.zeros_like(v) if grad_out is None else grad_out.contiguous()
        of_decay, of_initial = ctx.needs_input_grad[3:5]
        with _own_precision(q):
            decay = chunk_decay(log_decay, ctx.call.chunks, like=q)
            grads = ctx.call.passes.backward(
                grad_out,
                q,
                k,
                v,
                problem=Problem(ctx.call.chunks, decay, ctx.call.scale),
                grad_leaving=grad_leaving,
                kept=tuple(kept),
                carry=ctx.call.carry,
                of_decay=of_decay,
            )
        of_tokens = grads.log_decay
        if of_tokens is not None and log_decay.ndim == 1:
            of_tokens = of_tokens.sum((0, 1))
        return grads.q, grads.k, grads.v, of_tokens, grads.entering if of_initial else None, None


def _own_precision(x: Tensor) -> AbstractContextManager[object]:
    """The passes choose their precisions themselves: autocast would round states to bf16."""
    # There is no autocast for it.
    if x.is_meta:
        return nullcontext()
    return torch.autocast(x.device.type, enabled=False)
