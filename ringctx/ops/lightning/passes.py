"""The two passes of lightning attention, and how states of other ranks come into them.

One idea: the state that enters a fragment only adds to the states within it, decayed, so everything
may start from zero. With a `Carry`, what a rank's tokens leave is worked out first and sent at
once; the inside of chunks is computed while states travel, for as long as they do; then what came
in takes part in the rest. Backward is the mirror, with one exchange in the other direction.

Two orders of work, both exact: `streamed.py` (torch) goes through the sequence in groups of chunks
that stay in the cache, `staged.py` runs each stage over the whole sequence, as suits a GPU.
Shapes: as `stages.py`.
"""

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from ringctx.ops.lightning.stages import Problem

__all__ = ["Arrival", "Backward", "Carry", "Forward", "Passes", "entry_decays"]


class Arrival(Protocol):
    """An exchange under way."""

    def ready(self) -> bool:
        """Whether `wait` would return at once; where that cannot be known, False."""

    def wait(self) -> Tensor:
        """What comes in, `[slots, B, H, K, V]`, by entry slot.

        Backward: the gradients of the leaving states, by exit slot.
        """


class Carry(Protocol):
    """Fetches the states that come from elsewhere, while the work inside chunks goes on."""

    def start(self, leaving: Tensor, decays: Tensor, *, backward: bool) -> Arrival:
        """Start an exchange; never blocks.

        Args:
            leaving: `[slots, B, H, K, V]`, wide: the state at the end of the fragment of each exit
                slot if nothing came in; backward: the gradient of the state that enters the
                fragment of each entry slot if none came from behind.
            decays: `[entry slots, 1 or B, H]`, float64: log decay of the fragment of each entry
                slot.
            backward: which way states go.
        """


@dataclass(frozen=True, eq=False)
class Forward:
    """What a forward pass gives."""

    out: Tensor
    """`[B, T, H, V]` in the dtype of v."""
    leaving: Tensor
    """`[exit slots, B, H, K, V]`, wide: the states after the last tokens; with a carry, without
    what came in."""
    kept: tuple[Tensor | None, ...]
    """For backward."""


@dataclass(frozen=True, eq=False)
class Backward:
    """What a backward pass gives."""

    q: Tensor
    k: Tensor
    v: Tensor
    log_decay: Tensor | None
    """`[B, T, H]`, float64: of each token's log decay, if asked for."""
    entering: Tensor
    """`[entry slots, B, H, K, V]`, wide: of the states that come in; with a carry, without what
    came from behind."""


class Passes(Protocol):
    """One implementation; inputs are contiguous `[B, T, H, D]` of one dtype and device."""

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
        """The output and the leaving states.

        Args:
            q: queries.
            k: keys.
            v: values.
            problem: chunks, decay and scale.
            initial: `[entry slots, B, H, K, V]`, wide: states that come in; None: zeros.
            carry: who fetches them instead.
        """

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
        """All gradients.

        Args:
            grad_out: of the output.
            q: queries.
            k: keys.
            v: values.
            problem: as forward.
            grad_leaving: of the leaving states, by exit slot; None: zeros.
            kept: from forward.
            carry: as forward.
            of_decay: whether the gradient of the log decay is asked for.
        """


def entry_decays(problem: Problem) -> Tensor:
    """Log decay of the fragment of each entry slot, `[slots, 1 or B, H]`, float64."""
    chunks, of_chunk = problem.chunks, problem.decay.of_chunk
    decays = of_chunk.new_zeros((chunks.num_entries, *of_chunk.shape[1:]))
    for index, fragment in enumerate(chunks.fragments):
        if fragment.entry is not None:
            of_fragment = of_chunk[chunks.first[index] : chunks.first[index + 1]]
            decays[fragment.entry] = of_fragment.sum(0)
    return decays
