"""Cross entropy of a linear head, a chunk of tokens at a time: the logits never exist at once.

The gradients are made in the forward pass, while a chunk's probabilities are at hand, so the head
costs three matrix products and no recompute. Price: the gradients of both inputs are held until
backward. torch's own `linear_cross_entropy` does the same but returns the loss in the input's
dtype; a bf16 sum over a step keeps only three digits, so this one sums in fp32.
Shapes: N tokens, E width, V vocabulary.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

__all__ = ["IGNORE_INDEX", "linear_cross_entropy_sum"]

IGNORE_INDEX = -100


def linear_cross_entropy_sum(
    hidden: Tensor, weight: Tensor, targets: Tensor, *, chunk: int | None
) -> Tensor:
    """Sum of the token losses -log softmax(hidden @ weight.T)[target].

    Args:
        hidden: `[N, E]`.
        weight: `[V, E]`, same dtype.
        targets: `[N]`, int64; IGNORE_INDEX where a token has no target.
        chunk: tokens whose logits exist at once; None: all.

    Returns:
        A scalar in fp32 (float64 for float64 inputs).
    """
    size = hidden.shape[0] if chunk is None else chunk
    loss: Tensor = _LinearCrossEntropySum.apply(hidden, weight, targets, max(size, 1))  # type: ignore[no-untyped-call]
    return loss


def _accumulator_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


class _LinearCrossEntropySum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, chunk: int) -> Tensor:
        wide = _accumulator_dtype(hidden.dtype)
        with_gradients = any(ctx.needs_input_grad)
        grad_hidden = torch.empty_like(hidden) if with_gradients else None
        grad_weight = torch.zeros_like(weight, dtype=wide) if with_gradients else None
        loss = torch.zeros((), dtype=wide, device=hidden.device)
        for start in range(0, hidden.shape[0], chunk):
            part = slice(start, start + chunk)
            logits = F.linear(hidden[part], weight).to(wide)
            log_probs = F.log_softmax(logits, dim=-1)
            loss += F.nll_loss(log_probs, targets[part], reduction="sum", ignore_index=IGNORE_INDEX)
            if grad_hidden is not None and grad_weight is not None:
                grad_logits = _grad_logits(log_probs, targets[part]).to(hidden.dtype)
                grad_hidden[part] = grad_logits @ weight
                grad_weight += grad_logits.T @ hidden[part]
        ctx.save_for_backward(grad_hidden, grad_weight)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        grad_hidden, grad_weight = ctx.saved_tensors
        return (
            (grad_hidden * grad_loss).to(grad_hidden.dtype),
            (grad_weight * grad_loss).to(grad_hidden.dtype),
            None,
            None,
        )


def _grad_logits(log_probs: Tensor, targets: Tensor) -> Tensor:
    """Softmax - one_hot(target), zero where there is no target; reuses the memory of log_probs."""
    keep = targets != IGNORE_INDEX
    grad = log_probs.exp_()
    rows = keep.nonzero(as_tuple=True)[0]
    grad[rows, targets[rows]] -= 1
    return grad.mul_(keep[:, None])
