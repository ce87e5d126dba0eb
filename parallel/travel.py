"""Moves pieces of a sequence along a route, and their results home.

One idea: what a rank does in a ring step follows from the table alone, so one loop serves every
schedule and both passes; a pass says only what leaves, and what to do with what comes (`Visits`).

    post receives of results, then of pieces; start sends of this ring step
    attend what has arrived -> merge what came home -> start sends of results

Price: holds the pieces that arrive in this ring step and those that leave with it.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ringctx.parallel import comm
from ringctx.parallel.layout import Piece
from ringctx.parallel.routes import Hop, Route

__all__ = ["Tensors", "Visits", "rows", "rows_like", "travel"]

Tensors = tuple[Tensor, ...]


@dataclass(frozen=True)
class Visits:
    """What a pass sends out, and what it does with its own shard, visitors, and their results."""

    # [B, T, ...] or [B, H, T]: cut by tokens.
    guests: Tensors
    attend_own: Callable[[], None]
    attend: Callable[[Piece, Tensors], Tensors | None]
    # For results that go home: memory to receive them in, what the owner does with them, and how
    # two that meet on the way become one (the first is overwritten).
    empty: Callable[[Piece], Tensors] | None = None
    receive: Callable[[Piece, Tensors], None] | None = None
    join: Callable[[Tensors, Tensors], None] | None = None


def travel(*, group: comm.Group, route: Route, visits: Visits) -> None:
    """Run every ring step of this rank.

    Args:
        group: the ranks that share the sequence.
        route: of this pass, the same on all ranks.
        visits: what this rank sends out and does with what comes.
    """
    program = route.program(comm.group_rank(group))
    pieces = _Pieces(group, route, visits.guests)
    results = _Results(group, route, visits)
    for step, todo in enumerate(program.steps):
        pieces.arrive(step)
        for due, hops in todo.results:
            results.expect(due, hops)
        for due, hops in todo.guests:
            pieces.start(due, hops)
        if step == 0:
            visits.attend_own()
        for index in todo.attends:
            chain = route.chains[index]
            result = visits.attend(chain.piece, pieces.held[chain.piece])
            if result is not None:
                results.add(index, result)
            # Else it would be held until the next piece has been attended.
            del result
        pieces.drop(step)
        results.arrive(step)
        for due, hops in todo.results:
            results.start(due, hops)


class _Traveller:
    """Exchanges under way, by the ring step at which they are waited for."""

    def __init__(self, group: comm.Group, *, lane: int) -> None:
        self._group = group
        self._lane = lane
        self._expected: dict[int, tuple[comm.Expected, list[int], int]] = {}
        self._due: dict[int, list[tuple[comm.Exchange, list[int], int]]] = {}

    def expect(self, due: int, recvs: list[tuple[Hop, Tensors]]) -> None:
        """Make ready for the next exchange that is due at this ring step."""
        expected = comm.expect(
            [x for hop, tensors in recvs for x in self._transfers(hop, hop.src, tensors)],
            group=self._group,
        )
        each = len(recvs[0][1]) if recvs else 0
        self._expected[due] = (expected, [hop.chain for hop, _ in recvs], each)

    def begin(self, due: int, sends: list[tuple[Hop, Tensors]]) -> None:
        """Start the exchange whose receives are expected."""
        expected, chains, each = self._expected.pop(due)
        exchange = comm.exchange(
            [x for hop, tensors in sends for x in self._transfers(hop, hop.dst, tensors)],
            expected,
            group=self._group,
        )
        self._due.setdefault(due, []).append((exchange, chains, each))

    def _transfers(self, hop: Hop, peer: int, tensors: Tensors) -> list[comm.Transfer]:
        # Up to four tensors a piece, on two lanes.
        first = (2 * hop.chain + self._lane) * 4
        return [comm.Transfer(x, peer, first + i) for i, x in enumerate(tensors)]

    def finish(self, step: int) -> list[tuple[int, Tensors]]:
        """(chain, what arrived), for all that is due."""
        arrived: list[tuple[int, Tensors]] = []
        for exchange, chains, each in self._due.pop(step, ()):
            flat = exchange.wait()
            arrived += [(chain, flat[i * each : (i + 1) * each]) for i, chain in enumerate(chains)]
        return arrived


class _Pieces:
    """The pieces at hand: own ones that leave, and visitors until they have been passed on."""

    def __init__(self, group: comm.Group, route: Route, own: Tensors) -> None:
        self._chains, self._own, self._rank = route.chains, own, comm.group_rank(group)
        self._way = _Traveller(group, lane=0)
        self._last_use = route.program(self._rank).last_use
        self.held: dict[Piece, Tensors] = {}

    def arrive(self, step: int) -> None:
        for index, tensors in self._way.finish(step):
            self.held[self._chains[index].piece] = tensors

    def start(self, due: int, hops: Sequence[Hop]) -> None:
        self._way.expect(due, [(x, self._buffers(x)) for x in hops if x.dst == self._rank])
        self._way.begin(due, [(x, self._leaving(x)) for x in hops if x.src == self._rank])

    def _leaving(self, hop: Hop) -> Tensors:
        piece = self._chains[hop.chain].piece
        if piece not in self.held:
            assert piece.owner == self._rank, (piece, self._rank)
            self.held[piece] = tuple(rows(x, piece).contiguous() for x in self._own)
        return self.held[piece]

    def _buffers(self, hop: Hop) -> Tensors:
        piece = self._chains[hop.chain].piece
        return tuple(rows_like(x, piece) for x in self._own)

    def drop(self, step: int) -> None:
        """What has been attended and sent on."""
        self.held = {p: tensors for p, tensors in self.held.items() if self._last_use[p] > step}


class _Results:
    """Sums on their way home."""

    def __init__(self, group: comm.Group, route: Route, visits: Visits) -> None:
        self._chains, self._rank, self._visits = route.chains, comm.group_rank(group), visits
        self._way = _Traveller(group, lane=1)
        self._held: dict[int, Tensors] = {}

    def add(self, index: int, result: Tensors) -> None:
        self._held[index] = result

    def arrive(self, step: int) -> None:
        for index, arrived in self._way.finish(step):
            chain = self._chains[index]
            if chain.piece.owner == self._rank:
                assert self._visits.receive is not None
                self._visits.receive(chain.piece, arrived)
            elif index in self._held:
                assert self._visits.join is not None
                self._visits.join(self._held[index], arrived)
            else:
                self._held[index] = arrived

    def expect(self, due: int, hops: Sequence[Hop]) -> None:
        """What peers will send at the end of this ring step."""
        self._way.expect(due, [(x, self._empty(x)) for x in hops if x.dst == self._rank])

    def start(self, due: int, hops: Sequence[Hop]) -> None:
        self._way.begin(due, [(x, self._held.pop(x.chain)) for x in hops if x.src == self._rank])

    def _empty(self, hop: Hop) -> Tensors:
        assert self._visits.empty is not None
        return self._visits.empty(self._chains[hop.chain].piece)


def rows(x: Tensor, piece: Piece) -> Tensor:
    """A piece of `[B, T, ...]` or `[B, H, T]`, as a view."""
    return x[:, piece.rows] if x.ndim == 4 else x[:, :, piece.rows]


def rows_like(x: Tensor, piece: Piece, dtype: torch.dtype | None = None) -> Tensor:
    """Unwritten memory for a piece of `x`, contiguous."""
    shape = list(x.shape)
    shape[1 if x.ndim == 4 else 2] = piece.length
    return x.new_empty(shape, dtype=dtype)
