"""States on their way through the chunks, one after the other, as many at a time as one likes.

S_{n+1} = exp(b_C) S_n + U_n, or from the last chunk to the first G_{n-1} = exp(b_C) G_n + W_n. At
the borders of fragments states come in from their slots and leave into them.
"""

import torch
from torch import Tensor

from ringctx.ops.lightning.stages import Problem

__all__ = ["Scan"]


class Scan:
    """One run through all chunks.

    Args:
        problem: of the call.
        incoming: `[slots, B, H, K, V]`, wide: states by entry slot (backward: gradients by exit
            slot); None: zeros.
        like: any tensor `[., B, H, K, V]`, wide: for shape, dtype and device.
        backward: whether to run from the last chunk to the first.
    """

    def __init__(
        self, problem: Problem, incoming: Tensor | None, *, like: Tensor, backward: bool
    ) -> None:
        chunks = problem.chunks
        self._incoming, self._backward = incoming, backward
        self._begins, self._ends = chunks.opening, chunks.closing
        if backward:
            self._begins, self._ends = self._ends, self._begins
        self._decays = problem.decay.of_chunk.to(like.dtype).exp()[..., None, None]
        slots = chunks.num_entries if backward else chunks.num_exits
        self.outgoing = like.new_empty((slots, *like.shape[1:]))
        """What comes out at the other end of fragments, by slot."""
        self.state = like.new_zeros(like.shape[1:])
        """What goes into the next chunk."""

    def run(
        self,
        updates: Tensor,
        chunks: slice,
        *,
        states: Tensor | None = None,
        after: Tensor | None = None,
    ) -> None:
        """Go through some chunks; each run begins where the one before ended.

        Args:
            updates: `[n, B, H, K, V]`: U (backward: W); overwritten if no states are asked for.
            chunks: their numbers.
            states: `[n + 1, B, H, K, V]`, to be written: the states between chunks, so that [:n]
                are those that go into each, S_n (backward: [1:], G_n); None: not asked for.
            after: `[n, B, H, K, V]`, to be written: those that come out of each chunk, which the
                ends of fragments hide from `states`; None: not asked for.
        """
        count = chunks.stop - chunks.start
        order = range(count)[::-1] if self._backward else range(count)
        for index in order:
            number = chunks.start + index
            before, behind = (index + 1, index) if self._backward else (index, index + 1)
            begins = number in self._begins
            if begins:
                self._begin(number)
            if states is not None and (begins or index == order[0]):
                states[before].copy_(self.state)
            # Into its place at once: one pass over memory a chunk.
            out = updates[index] if states is None else states[behind]
            decay = self._decays[number]
            self.state = torch.addcmul(updates[index], decay, self.state, out=out)
            if after is not None:
                after[index].copy_(self.state)
            if number in self._ends:
                self._end(number)
        if states is None:
            # The memory of updates is the caller's.
            self.state = self.state.clone()

    def _begin(self, number: int) -> None:
        fragment = self._begins[number]
        slot = fragment.exit if self._backward else fragment.entry
        if self._incoming is None or slot is None:
            self.state = torch.zeros_like(self.state)
        else:
            self.state = self._incoming[slot]

    def _end(self, number: int) -> None:
        fragment = self._ends[number]
        slot = fragment.entry if self._backward else fragment.exit
        if slot is not None:
            self.outgoing[slot].copy_(self.state)
