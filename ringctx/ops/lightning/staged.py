"""Both passes stage by stage, each over the whole sequence.

Price: states and their gradients exist for all chunks at once, `[N, B, H, K, V]` fp32 each, and
with a carry so does what the inside of chunks gives. Few, large launches, as suits a GPU.
Shapes: as `stages.py`.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from ringctx.ops.lightning.chunks import Chunks
from ringctx.ops.lightning.groups import groups_of
from ringctx.ops.lightning.passes import Backward, Carry, Forward, entry_decays
from ringctx.ops.lightning.stages import Problem, Stages

__all__ = ["StagedPasses"]


@dataclass(frozen=True, eq=False)
class StagedPasses:
    """See `passes.Passes`."""

    stages: Stages

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        problem: Problem,
        initial: Tensor | None,
        carry: Carry | None,
    ) -> Forward:
        """The output and the leaving states."""
        states = self.stages.states(k, v, problem)
        leaving = self.stages.scan_(states, initial, problem, backward=False)
        intra = None
        if carry is not None:
            arrival = carry.start(leaving, entry_decays(problem), backward=False)
            intra = self.stages.intra(q, k, v, problem)
            initial = arrival.wait()
            _add_entering_(states, initial, problem)
        out = self.stages.outputs(q, k, v, states, problem, intra=intra)
        return Forward(out, leaving, (initial,))

    def backward(
        self,
        grad_out: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        problem: Problem,
        grad_leaving: Tensor | None,
        kept: tuple[Tensor | None, ...],
        carry: Carry | None,
        of_decay: bool,
    ) -> Backward:
        """All gradients."""
        (initial,) = kept
        grad_states = self.stages.state_grads(q, grad_out, problem)
        entering = self.stages.scan_(grad_states, grad_leaving, problem, backward=True)
        if carry is not None:
            arrival = carry.start(entering, entry_decays(problem), backward=True)
        # Computed again, while gradients are on their way.
        states = self.stages.states(k, v, problem)
        leaving = self.stages.scan_(states, initial, problem, backward=False)
        intra = None
        if carry is not None:
            intra = self.stages.intra_grads(grad_out, q, k, v, problem)
            grad_leaving = arrival.wait()
            _add_leaving_(grad_states, grad_leaving, problem)
        ends = None
        if of_decay:
            ends = _ends(states, leaving, grad_states, grad_leaving, problem.chunks)
        grads = self.stages.gradients(
            grad_out,
            q,
            k,
            v,
            states=states,
            grad_states=grad_states,
            problem=problem,
            intra=intra,
            of_decay=of_decay,
        )
        of_tokens = None
        if ends is not None:
            assert grads.running is not None
            of_tokens = _decay_gradient(grads.running, ends, problem)
        return Backward(grads.q, grads.k, grads.v, of_tokens, entering)


def _add_entering_(states: Tensor, incoming: Tensor, problem: Problem) -> None:
    """Add what came in to the state that enters each chunk of the fragment."""
    for index, fragment in enumerate(problem.chunks.fragments):
        if fragment.entry is not None:
            numbers = slice(problem.chunks.first[index], problem.chunks.first[index + 1])
            of_chunk = problem.decay.of_chunk[numbers]
            before = _sum_of_earlier(of_chunk).to(states.dtype).exp_()
            states[numbers].addcmul_(before[..., None, None], incoming[fragment.entry])


def _add_leaving_(grad_states: Tensor, incoming: Tensor, problem: Problem) -> None:
    """Add what came from behind to the gradient of the state that leaves each chunk."""
    for index, fragment in enumerate(problem.chunks.fragments):
        if fragment.exit is not None:
            numbers = slice(problem.chunks.first[index], problem.chunks.first[index + 1])
            of_chunk = problem.decay.of_chunk[numbers].flip(0)
            after = _sum_of_earlier(of_chunk).flip(0).to(grad_states.dtype).exp_()
            grad_states[numbers].addcmul_(after[..., None, None], incoming[fragment.exit])


def _sum_of_earlier(of_chunk: Tensor) -> Tensor:
    """Of each chunk, of those before it; no bit depends on the chunk itself or later ones."""
    return torch.cat([torch.zeros_like(of_chunk[:1]), of_chunk[:-1]]).cumsum(0)


def _inner(states: Tensor, grads: Tensor) -> Tensor:
    """`<S, G>` of each chunk or slot, `[., B, H]`."""
    return torch.einsum("nbhkv,nbhkv->nbh", states, grads)


def _ends(
    states: Tensor,
    leaving: Tensor,
    grad_states: Tensor,
    grad_leaving: Tensor | None,
    chunks: Chunks,
) -> Tensor:
    """`<S, G>` of the state that leaves each chunk and its gradient, `[N, B, H]`."""
    ends = torch.zeros_like(states[..., 0, 0])
    # The state that enters the next chunk, but for the last of a fragment.
    ends[:-1] = _inner(states[1:], grad_states[:-1])
    last = torch.tensor(chunks.first[1:], device=ends.device) - 1
    ends[last] = 0.0
    if grad_leaving is not None:
        has_exit = [fragment.exit is not None for fragment in chunks.fragments]
        ends[last[torch.tensor(has_exit, device=ends.device)]] = _inner(leaving, grad_leaving)
    return ends


def _decay_gradient(running: Tensor, ends: Tensor, problem: Problem) -> Tensor:
    """From the gradient of the running decay to that of each token's, `[B, T, H]`, float64.

    dg_t = sum over s >= t in the chunk of db_s, plus <S, G> of the state that leaves the chunk.
    Summed over a whole fragment the second term would cancel, and the rounding of the first grow
    with its length.
    """
    grad = running.double()
    last = torch.tensor([start + n - 1 for start, n in problem.chunks.bounds], device=grad.device)
    grad[:, last] += ends.transpose(0, 1)
    for group in groups_of(problem.chunks, most_rows=1 << 16, device=grad.device):
        # [n, B, H, L, 1]
        taken = group.take(grad.unsqueeze(-1))
        group.put_(grad.unsqueeze(-1), taken.flip(3).cumsum_(3).flip(3))
    return grad
