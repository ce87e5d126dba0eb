"""Which piece travels to whom, by which way, at which ring step: pure tables.

One idea: a route is a set of chains. A chain takes one piece of a shard from rank to rank; a star
takes one straight from its owner to each. Its users attend the piece as it passes. In passes whose
results belong to the owner (gradients of K/V, or outputs of queries that travel) they add them up
along the chain and send the sum home. All ranks work out the same table from shapes, mask and
wiring; nothing is negotiated.

    ring step t   beginning: what arrives at t is there; what departs at t leaves; then compute
    result at t   the end of ring step t, after its compute

Who builds chains from what the mask needs: `ways.py`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np

from ringctx.parallel.layout import Piece
from ringctx.parallel.need import Travels
from ringctx.parallel.topology import Ints

__all__ = ["Chain", "Hop", "Hops", "Program", "Returns", "RingStep", "Route", "Star"]

# No results leave; each user sends its own to the owner; one sum grows along the chain.
Returns = Literal["none", "direct", "carried"]


@dataclass(frozen=True, slots=True)
class Chain:
    """One piece's way through `path`, whose first rank has it already."""

    piece: Piece
    path: tuple[int, ...]
    # For each rank after the first: whether it attends the piece or only passes it on.
    attends: tuple[bool, ...]
    # After the last user: the way of the sum to the owner.
    home: tuple[int, ...]
    # Ring steps at which the first hop leaves and is there; each later hop takes one step.
    departs: int = 0
    arrives: int = 1
    # Ring steps that the first hop home takes.
    home_steps: int = 1
    # Whether the sum passes through ranks that add nothing to it, as cables demand.
    relays: bool = False

    def arrivals(self) -> Ints:
        """The ring step at which each rank after the first has the piece."""
        return self.arrives + np.arange(len(self.path) - 1)

    def attended_at(self, step: int) -> bool:
        """Whether the rank that has the piece at this ring step attends it."""
        return self.attends[step - self.arrives]

    def guest_hops(self) -> "Hops":
        """The way of the piece."""
        arrives = self.arrivals()
        departs = arrives - 1
        departs[:1] = self.departs
        return Hops.between(np.array(self.path), departs, arrives)

    def result_hops(self, returns: Returns) -> "Hops":
        """The way of what the users computed."""
        stops = np.flatnonzero(self.attends)
        if returns == "none" or not len(stops):
            return Hops.between(np.array([0]), np.array([]), np.array([]))
        path = np.array(self.path[1:])
        if returns == "direct":
            return _straight_home(path[stops], self.piece.owner, self.arrivals()[stops])
        if self.relays:
            stops = np.arange(stops[0], stops[-1] + 1)
        attended = self.arrivals()[stops]
        at_home = attended[-1] + self.home_steps + np.arange(len(self.home))
        steps = np.concatenate([attended, at_home])
        tour = np.concatenate([path[stops], np.array(self.home, dtype=np.int64)])
        return Hops.between(tour, steps[:-1], steps[1:])


@dataclass(frozen=True, slots=True)
class Star:
    """One piece straight from its owner, the first of `path`, to each other; results likewise."""

    piece: Piece
    path: tuple[int, ...]
    # For each rank after the first: the ring step at which it has the piece.
    arrives: tuple[int, ...]

    @property
    def attends(self) -> tuple[bool, ...]:
        """Nobody passes anything on."""
        return (True,) * len(self.arrives)

    def arrivals(self) -> Ints:
        """The ring step at which each rank after the first has the piece."""
        return np.array(self.arrives, dtype=np.int64)

    def attended_at(self, step: int) -> bool:
        """Whoever has the piece attends it."""
        del step
        return True

    def guest_hops(self) -> "Hops":
        """The ways of the piece."""
        arrives, users = self.arrivals(), np.array(self.path[1:])
        owner = np.full(len(users), self.piece.owner)
        return Hops(np.zeros_like(users), owner, users, arrives - 1, arrives)

    def result_hops(self, returns: Returns) -> "Hops":
        """The ways of what the users computed."""
        if returns == "none":
            return Hops.between(np.array([0]), np.array([]), np.array([]))
        return _straight_home(np.array(self.path[1:]), self.piece.owner, self.arrivals())


def _straight_home(users: Ints, owner: int, attended: Ints) -> "Hops":
    return Hops(np.zeros_like(users), users, np.full(len(users), owner), attended, attended + 1)


@dataclass(frozen=True, slots=True)
class Hop:
    """One transfer of a chain's piece, or of its results."""

    chain: int
    src: int
    dst: int
    departs: int
    arrives: int


@dataclass(frozen=True, slots=True, eq=False)
class Hops:
    """A table of transfers, a column each."""

    chain: Ints
    src: Ints
    dst: Ints
    departs: Ints
    arrives: Ints

    @staticmethod
    def between(path: Ints, departs: Ints, arrives: Ints) -> "Hops":
        """From each rank of a path to the next, for one chain."""
        return Hops(np.zeros(len(path) - 1, dtype=np.int64), path[:-1], path[1:], departs, arrives)

    @staticmethod
    def of(chains: Sequence["Hops"]) -> "Hops":
        """One table of those of several chains, numbered in order."""
        number = [np.full(len(hops), i) for i, hops in enumerate(chains)]
        names = ("src", "dst", "departs", "arrives")
        columns = [[getattr(hops, name) for hops in chains] for name in names]
        empty = np.array([], dtype=np.int64)
        joined = (
            np.concatenate([empty, *column]).astype(np.int64) for column in (number, *columns)
        )
        return Hops(*joined)

    def __len__(self) -> int:
        return len(self.chain)

    def touching(self, rank: int) -> tuple[Hop, ...]:
        """The rows that `rank` sends or receives, in the table's order."""
        mine = np.flatnonzero((self.src == rank) | (self.dst == rank))
        columns = (self.chain, self.src, self.dst, self.departs, self.arrives)
        rows = np.stack([column[mine] for column in columns], axis=1)
        return tuple(Hop(*row) for row in rows.tolist())


@dataclass(frozen=True, slots=True)
class RingStep:
    """What one rank does in one ring step; exchanges are grouped by the step they are due."""

    guests: tuple[tuple[int, tuple[Hop, ...]], ...]
    attends: tuple[int, ...]
    results: tuple[tuple[int, tuple[Hop, ...]], ...]


@dataclass(frozen=True, slots=True, eq=False)
class Program:
    """One rank's part in a route."""

    steps: tuple[RingStep, ...]
    # The ring step after which a piece that passes here may be dropped.
    last_use: dict[Piece, int]


@dataclass(frozen=True, eq=False)
class Route:
    """The chains of one pass."""

    schedule: str
    travels: Travels
    returns: Returns
    chains: tuple[Chain | Star, ...]

    @cached_property
    def guests(self) -> Hops:
        """Every hop of a piece."""
        return Hops.of([chain.guest_hops() for chain in self.chains])

    @cached_property
    def results(self) -> Hops:
        """Every hop of a result."""
        return Hops.of([chain.result_hops(self.returns) for chain in self.chains])

    @cached_property
    def num_steps(self) -> int:
        """Ring steps, the one on the own shard included."""
        ends = [int(hops.arrives.max()) for hops in (self.guests, self.results) if len(hops)]
        return max(ends, default=0) + 1

    @cached_property
    def _programs(self) -> "dict[int, Program]":
        return {}

    def program(self, rank: int) -> "Program":
        """What `rank` does; worked out once."""
        if rank not in self._programs:
            self._programs[rank] = self._program(rank)
        return self._programs[rank]

    def _program(self, rank: int) -> "Program":
        guests, results = self.guests.touching(rank), self.results.touching(rank)
        attends: dict[int, list[int]] = {}
        last_use: dict[Piece, int] = {}
        for hop in guests:
            chain = self.chains[hop.chain]
            if hop.dst == rank and chain.attended_at(hop.arrives):
                attends.setdefault(hop.arrives, []).append(hop.chain)
            step = hop.arrives if hop.dst == rank else hop.departs
            last_use[chain.piece] = max(step, last_use.get(chain.piece, 0))
        leaving, returning = _by_step(guests), _by_step(results)
        steps = (
            RingStep(leaving.get(step, ()), tuple(attends.get(step, ())), returning.get(step, ()))
            for step in range(self.num_steps)
        )
        return Program(tuple(steps), last_use)


def _by_step(hops: Sequence[Hop]) -> dict[int, tuple[tuple[int, tuple[Hop, ...]], ...]]:
    """Departure -> ((arrival, hops), ...)."""
    groups: dict[int, dict[int, list[Hop]]] = {}
    for hop in hops:
        groups.setdefault(hop.departs, {}).setdefault(hop.arrives, []).append(hop)
    return {
        departs: tuple((arrives, tuple(due[arrives])) for arrives in sorted(due))
        for departs, due in groups.items()
    }
