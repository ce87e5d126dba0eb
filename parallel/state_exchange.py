"""States go from part to part: the exchange that lightning attention makes once in each direction.

One idea: what comes into a part is a fold over the parts before it, S_in[p+1] = a_p S_in[p] + b_p,
where b_p is the state that part p would leave if nothing came in, and a_p its decay. Who folds is
the method; the numbers are the same bits:

    all_gather   each b_p straight to every rank that needs it, which folds for itself
                 0 -> 1, 2, 3    1 -> 2, 3    2 -> 3          one step, hidden behind other work
    ring         the folded state hops along the chain of parts
                 0 ------> 1 ------> 2 ------> 3              one state a rank, steps in a row

Nothing goes to a rank that a border between documents cuts off. Backward is the mirror: gradients
of states, from the last part to the first. `METHODS` takes others: recursive doubling, a pipeline.
Price: `state_cost.py`. Messages are wide (fp32, float64 for float64). With a decay that depends on
the data, all_gather sends the part's log decay along; a fixed one follows from the length, and in
the ring whoever folds has it.
Source: LASP (arXiv 2404.02882), LASP-2 (arXiv 2502.07563).
Shapes: B batch, H heads, K and V head dims.
"""

from collections.abc import Generator, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import pairwise
from types import MappingProxyType
from typing import Protocol

import torch
from torch import Tensor

from ringctx.errors import LayoutError
from ringctx.parallel import comm
from ringctx.parallel.parts import Chain

__all__ = ["METHODS", "Call", "Method", "StateExchange", "Steps", "UnderWay", "check_exchange"]

# Above any tag of ring and Ulysses attention (8 times their chains), and unlike the argument check.
_FIRST_TAG = 1 << 21


@dataclass(frozen=True, eq=False)
class Call:
    """One direction of one exchange, as one rank sees it."""

    group: comm.Group
    chain: Chain
    backward: bool
    # [slots, B, H, K, V]: what each part of this rank leaves if nothing comes in.
    leaving: Tensor
    # [slots, 1 or B, H]: log decay of each part of this rank.
    decays: Tensor
    # [1, H]: log decay of any part; None where it depends on the data.
    fixed_decay: Tensor | None

    @property
    def own(self) -> tuple[int, ...]:
        """The parts of this rank, by slot."""
        return self.chain.parts_of(comm.group_rank(self.group))

    def slot(self, part: int) -> int:
        """The slot of a part of this rank."""
        return self.chain.parts[part].slot

    def rank_of(self, part: int) -> int:
        """Who holds a part."""
        return self.chain.parts[part].rank

    def tag(self, part: int) -> int:
        """Of the state that a part leaves."""
        return _FIRST_TAG + 2 * part + self.backward

    def onward(self, part: int, incoming: Tensor | None, own: Tensor, decay: Tensor) -> Tensor:
        """What a part leaves, given what came in."""
        if not self.chain.passes(part, backward=self.backward):
            return own
        assert incoming is not None, (part, self.backward)
        # [1 or B, H] -> [1 or B, H, 1, 1]
        return torch.addcmul(own, decay.exp()[..., None, None], incoming)

    def decay_of(self, slot: int) -> Tensor:
        """Log decay of a part of this rank, `[1 or B, H]`; the same bits on every rank."""
        return self.decays[slot] if self.fixed_decay is None else self.fixed_decay

    def by_slot(self, incoming: Mapping[int, Tensor]) -> Tensor:
        """What came into the parts of this rank, `[slots, B, H, K, V]`; zeros where nothing did."""
        result = torch.zeros_like(self.leaving)
        for slot, part in enumerate(self.own):
            if part in incoming:
                result[slot] = incoming[part]
        return result


Steps = Generator[comm.Exchange, tuple[Tensor, ...], Tensor]
"""Yields every exchange that it has to wait for, is given what arrived, and returns what came in,
by slot. What it starts before the first yield leaves at once."""


class Method(Protocol):
    """A way for states to travel."""

    def __call__(self, call: Call) -> Steps:
        """The steps of one rank; nothing in them blocks."""


def all_gather(call: Call) -> Steps:
    """Send every state straight to every rank that needs it."""
    sends_to, needed = _all_gather_plan(call.chain, comm.group_rank(call.group), call.backward)
    sends = [
        comm.Transfer(_message(call, slot), peer, call.tag(part))
        for slot, (part, peers) in enumerate(zip(call.own, sends_to, strict=True))
        for peer in peers
    ]
    shape = call.leaving.shape[1:]
    size = shape.numel() + (0 if call.fixed_decay is not None else call.decays[0].numel())
    # One allocation; each row is a message.
    arriving = call.leaving.new_empty(len(needed), size)
    recvs = [
        comm.Transfer(row, call.rank_of(part), call.tag(part))
        for part, row in zip(needed, arriving, strict=True)
    ]
    arrived = yield comm.exchange(sends, recvs, group=call.group)
    messages = dict(zip(needed, arrived, strict=True))
    states, decays = {}, {}
    for part, message in messages.items():
        states[part] = message[: shape.numel()].view(shape)
        decays[part] = (
            message[shape.numel() :].view(call.decays.shape[1:])
            if call.fixed_decay is None
            else call.fixed_decay
        )
    for slot, part in enumerate(call.own):
        states[part], decays[part] = call.leaving[slot], call.decay_of(slot)
    return call.by_slot(_folded(call, states, decays))


def _message(call: Call, slot: int) -> Tensor:
    state = call.leaving[slot].contiguous().view(-1)
    if call.fixed_decay is not None:
        return state
    return torch.cat([state, call.decays[slot].flatten()])


def _folded(
    call: Call, states: Mapping[int, Tensor], decays: Mapping[int, Tensor]
) -> dict[int, Tensor]:
    """What comes into each part of this rank, from the states of all parts that matter to it."""
    incoming: dict[int, Tensor] = {}
    arriving: Tensor | None = None
    for part in call.chain.order(backward=call.backward):
        if not call.chain.receives(part, backward=call.backward):
            arriving = None
        if part in call.own and arriving is not None:
            incoming[part] = arriving
        # A part that is not here ends a stretch that matters to no part of this rank.
        needed = part in states
        arriving = call.onward(part, arriving, states[part], decays[part]) if needed else None
    return incoming


# Where a rank's parts go: for each slot the ranks that need it, and the parts that it needs itself.
@lru_cache(maxsize=256)
def _all_gather_plan(
    chain: Chain, rank: int, backward: bool
) -> tuple[tuple[tuple[int, ...], ...], tuple[int, ...]]:
    own = chain.parts_of(rank)
    readers = tuple(chain.readers(part, backward=backward) for part in own)
    needed = {source for part in own for source in chain.sources(part, backward=backward)}
    return readers, tuple(sorted(needed.difference(own)))


def ring(call: Call) -> Steps:
    """Let the folded state hop from part to part.

    What does not depend on what comes in leaves at once, in one exchange that all ranks start with;
    the rest follows in the order of the chain, which is the same for all: nobody waits in a circle.
    """
    plan = _ring_plan(call.chain, comm.group_rank(call.group), call.backward)

    def receive(part: int) -> comm.Transfer:
        return comm.Transfer(torch.empty_like(call.leaving[0]), call.rank_of(part), call.tag(part))

    def send(part: int, tensor: Tensor, reader: int) -> comm.Transfer:
        return comm.Transfer(tensor.contiguous(), call.rank_of(reader), call.tag(part))

    at_once = comm.exchange(
        [send(hop.part, call.leaving[call.slot(hop.part)], hop.reader) for hop in plan.leave_now],
        [receive(hop.part) for hop in plan.arrive_now],
        group=call.group,
    )
    later = {hop: comm.expect([receive(hop.part)], group=call.group) for hop in plan.arrive_later}

    readers = [hop.reader for hop in plan.arrive_now]
    arrived = dict(zip(readers, (yield at_once), strict=True))
    leaving = []
    for hop in plan.in_order:
        if hop in later:
            (arrived[hop.reader],) = yield comm.exchange((), later[hop], group=call.group)
            continue
        slot = call.slot(hop.part)
        folded = call.onward(
            hop.part, arrived.get(hop.part), call.leaving[slot], call.decay_of(slot)
        )
        if hop.reader in call.own:
            arrived[hop.reader] = folded
        else:
            sends = [send(hop.part, folded, hop.reader)]
            leaving.append(comm.exchange(sends, (), group=call.group))
    for started in leaving:
        # Nothing arrives.
        () = yield started
    return call.by_slot(arrived)


@dataclass(frozen=True, slots=True)
class _Hop:
    """What leaves `part` is read by `reader`, its successor in the order."""

    part: int
    reader: int


@dataclass(frozen=True)
class _RingPlan:
    """The hops of one rank, each kind in the order of the chain."""

    # What depends on nothing that comes in.
    leave_now: tuple[_Hop, ...]
    arrive_now: tuple[_Hop, ...]
    # All others, also those between two parts of this rank.
    in_order: tuple[_Hop, ...]
    # Those of them that come from other ranks.
    arrive_later: tuple[_Hop, ...]


@lru_cache(maxsize=256)
def _ring_plan(chain: Chain, rank: int, backward: bool) -> _RingPlan:
    order = chain.order(backward=backward)
    hops = [
        _Hop(part, reader)
        for part, reader in pairwise(order)
        if chain.receives(reader, backward=backward)
        and rank in (chain.parts[part].rank, chain.parts[reader].rank)
    ]

    def leaves(hop: _Hop) -> bool:
        return chain.parts[hop.part].rank == rank

    def is_local(hop: _Hop) -> bool:
        return leaves(hop) and chain.parts[hop.reader].rank == rank

    now = [h for h in hops if not chain.passes(h.part, backward=backward) and not is_local(h)]
    in_order = [hop for hop in hops if hop not in now]
    return _RingPlan(
        leave_now=tuple(hop for hop in now if leaves(hop)),
        arrive_now=tuple(hop for hop in now if not leaves(hop)),
        in_order=tuple(in_order),
        arrive_later=tuple(hop for hop in in_order if not leaves(hop)),
    )


METHODS: Mapping[str, Method] = MappingProxyType({"all_gather": all_gather, "ring": ring})


def check_exchange(exchange: str) -> None:
    """Raise LayoutError unless it is "auto" or one of `METHODS`."""
    if exchange != "auto" and exchange not in METHODS:
        raise LayoutError(
            f"exchange={exchange!r} is not known; choose one of auto, {', '.join(METHODS)}"
        )


@dataclass(frozen=True, eq=False)
class StateExchange:
    """Fetches the states that come from other ranks, for one call of lightning attention.

    A `ringctx.ops.lightning.passes.Carry`. Its traffic counts into the ledger of its making,
    backward too.
    """

    group: comm.Group
    chain: Chain
    method: str
    per_head: Tensor | None
    """Log decay of a token, `[H]`, float64; None where it depends on the data."""
    _ledger: comm.Ledger | None = field(default_factory=comm.current_ledger)

    def start(self, leaving: Tensor, decays: Tensor, *, backward: bool) -> "UnderWay":
        """Start the exchange of one direction, without blocking.

        Args:
            leaving: `[slots, B, H, K, V]`, wide; what each part of this rank leaves (backward: the
                gradient of the state that enters it) if nothing comes in. Not to be changed before
                the wait is over.
            decays: `[slots, 1 or B, H]`, wide or float64; log decay of each part. Read only where
                no border is inside the part.
            backward: whether gradients run from the last part to the first.

        Returns:
            What gives what comes in, by slot, like `leaving`; zeros where nothing does.
        """
        fixed = None
        if self.per_head is not None:
            fixed = (self.per_head.detach() * self.chain.part_len).to(leaving.dtype)[None]
        call = Call(
            group=self.group,
            chain=self.chain,
            backward=backward,
            leaving=leaving,
            decays=decays.to(leaving.dtype),
            fixed_decay=fixed,
        )
        return UnderWay(METHODS[self.method](call), self._ledger)


class UnderWay:
    """An exchange of one direction, a `ringctx.ops.lightning.passes.Arrival`.

    It goes on only when it is asked: what hops from rank to rank is passed on by `ready` or `wait`.
    """

    def __init__(self, steps: Steps, ledger: comm.Ledger | None) -> None:
        """Start the first step."""
        self._steps, self._ledger = steps, ledger
        self._awaited: comm.Exchange | None = None
        self._result: Tensor | None = None
        self._go_on(None)

    def ready(self) -> bool:
        """Whether `wait` would return at once."""
        while self._awaited is not None and self._awaited.done():
            self._go_on(self._awaited)
        return self._awaited is None

    def wait(self) -> Tensor:
        """What came in, by slot."""
        while self._awaited is not None:
            self._go_on(self._awaited)
        assert self._result is not None
        return self._result

    def _go_on(self, awaited: comm.Exchange | None) -> None:
        # Autograd may run backward in a thread of its own, where no ledger is set.
        with comm.record_into(self._ledger):
            try:
                if awaited is None:
                    self._awaited = next(self._steps)
                else:
                    self._awaited = self._steps.send(awaited.wait())
            except StopIteration as end:
                self._awaited, self._result = None, end.value
