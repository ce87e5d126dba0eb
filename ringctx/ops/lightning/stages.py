"""The stages of chunked linear attention, and what every implementation of them is given.

One idea: a pass is cut where another rank's state may be awaited. With chunks n = 0 .. N-1 of C
tokens, b_i the sum of log decays from the chunk's first token to token i, S_n the state that enters
chunk n and G_n the gradient of the state that leaves it:

    states        U_n = (exp(b_C - b) K_n)^T V_n                      what a chunk adds to the state
    scan          S_{n+1} = exp(b_C) S_n + U_n                        within a fragment
    intra         [(Q_n K_n^T) . M] V_n      M_ij = scale exp(b_i - b_j) for i >= j
    outputs       intra + scale (exp(b) Q_n) S_n
    state_grads   W_n = scale (exp(b) Q_n)^T dO_n
    scan, back    G_{n-1} = exp(b_C) G_n + W_n
    intra_grads   dQ, dK, dV of intra
    gradients     intra_grads + scale exp(b) (dO_n S_n^T), exp(b_C - b) (V_n G_n^T),
                  (exp(b_C - b) K_n) G_n

All exponents are <= 0. Source: Lightning Attention-2 (arXiv 2401.04658), with its decay counted so
that the current token is included, and simple gated linear attention (arXiv 2312.06635).
Shapes: B batch, T tokens, H heads, K and V head dims, N chunks; wide is fp32, float64 for float64.
"""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from ringctx.ops.lightning.chunks import Chunks

__all__ = ["Decay", "Gradients", "Problem", "Stages", "wide_dtype"]


def wide_dtype(x: Tensor) -> torch.dtype:
    """The dtype of states and sums for inputs like `x`."""
    return torch.promote_types(x.dtype, torch.float32)


@dataclass(frozen=True, eq=False)
class Decay:
    """The log decays of a call; one of the first two is None."""

    per_head: Tensor | None
    """`[H]`, wide: the same for every token."""
    running: Tensor | None
    """`[B, T, H]`, float64: sum of the log decays from the chunk's first token to this one."""
    of_chunk: Tensor
    """`[N, 1 or B, H]`, float64: sum over each chunk."""


@dataclass(frozen=True, eq=False)
class Problem:
    """What all stages of one call share."""

    chunks: Chunks
    decay: Decay
    scale: float


@dataclass(frozen=True, eq=False)
class Gradients:
    """Of q, k and v `[B, T, H, ...]`, and of the running decay b `[B, T, H]`, wide, if asked for.

    The last is q . dq - k . dk (linear_attention, section 1.3), from sums that are not yet rounded.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    running: Tensor | None


class Stages(Protocol):
    """One implementation; inputs are contiguous `[B, T, H, D]` of one dtype and device."""

    def states(self, k: Tensor, v: Tensor, problem: Problem) -> Tensor:
        """What every chunk adds to the state: U, `[N, B, H, K, V]`, wide."""

    def state_grads(self, q: Tensor, grad_out: Tensor, problem: Problem) -> Tensor:
        """What every chunk adds to the gradient of the state: W, `[N, B, H, K, V]`, wide."""

    def scan_(
        self, updates: Tensor, incoming: Tensor | None, problem: Problem, *, backward: bool
    ) -> Tensor:
        """Run a state through the chunks of each fragment, last to first if `backward`.

        Args:
            updates: U (backward: W); overwritten with S, the state entering each chunk (backward:
                with G, the gradient of the state leaving it).
            incoming: states by entry slot (backward: gradients by exit slot), `[slots, B, H, K,
                V]`, wide; None: zeros.
            problem: of the call.
            backward: whether to run from the last chunk to the first.

        Returns:
            What comes out at the other end, by exit slot (backward: by entry slot), same shape.
        """

    def intra(self, q: Tensor, k: Tensor, v: Tensor, problem: Problem) -> Tensor:
        """What tokens see of their own chunk, `[B, T, H, V]`, wide."""

    def outputs(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        states: Tensor,
        problem: Problem,
        *,
        intra: Tensor | None,
    ) -> Tensor:
        """The whole output, `[B, T, H, V]` in the dtype of v.

        Args:
            q: queries.
            k: keys.
            v: values.
            states: S.
            problem: of the call.
            intra: what `intra` returned, which may be overwritten; None: do its work here.
        """

    def intra_grads(
        self, grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, problem: Problem
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of q, k and v within chunks, wide."""

    def gradients(
        self,
        grad_out: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        states: Tensor,
        grad_states: Tensor,
        problem: Problem,
        intra: tuple[Tensor, Tensor, Tensor] | None,
        of_decay: bool,
    ) -> Gradients:
        """The whole gradients, in the dtypes of q, k and v.

        Args:
            grad_out: of the output.
            q: queries.
            k: keys.
            v: values.
            states: S.
            grad_states: G.
            problem: of the call.
            intra: what `intra_grads` returned, which may be overwritten; None: do its work here.
            of_decay: whether the gradient of the running decay is asked for.
        """
