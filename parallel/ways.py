"""Builds routes: for each schedule the chains by which every piece reaches all who need it.

One idea: closed forms, each cut short by need. On wires that form a ring there are few sensible
ways for a piece: all the way up, all the way down, or both; a handful of rules for the whole table
are tried, and the one that loads the busiest link least is kept (then: fewest bytes).

    one_way      up, to the next rank (Ring Attention, arXiv 2310.01889)
    two_way      up and down, each only as far as needed; on two levels a double ring (LoongTrain,
                 arXiv 2406.18485): once round inside each node while the next node gets its copy
    token_ring   queries travel: one way, results sent straight home (TokenRing, arXiv 2412.20501);
                 on cables both ways, results carried along
    all_gather   straight from the owner to each user, in groups of ranks
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import get_args

import numpy as np

from ringctx.config import Schedule
from ringctx.errors import LayoutError
from ringctx.parallel.layout import Piece, Sharding
from ringctx.parallel.mask import Mask
from ringctx.parallel.need import Needed, Travels, needed_pieces
from ringctx.parallel.routes import Chain, Returns, Route, Star
from ringctx.parallel.topology import Wiring

__all__ = ["build_route", "check_schedule", "travels_in"]

# all_gather: ranks that a rank hears from at once, and parts that a piece is sent in, so that the
# first is attended while the second travels.
_PEERS_AT_ONCE = 8
_PARTS = 2
_SHORTEST_PART = 128
# Up to this many ranks the rule is tried that looks at every user; more gain too little by it.
_FEW_RANKS = 16


def check_schedule(schedule: str) -> None:
    """Raise LayoutError unless it is a schedule or "auto"."""
    if schedule not in get_args(Schedule):
        known = ", ".join(get_args(Schedule))
        raise LayoutError(f"schedule={schedule!r} is not known; choose one of {known}")


def travels_in(schedule: str) -> Travels:
    """What a schedule moves."""
    return "q" if schedule == "token_ring" else "kv"


@dataclass(frozen=True, slots=True)
class _Leg:
    """One piece's way round the ring, in one direction."""

    piece: Piece
    users: frozenset[int]
    # +1: to the next rank; -1: to the previous one.
    step: int
    # After the last user: go on round to the owner, or turn back.
    goes_on: bool


@dataclass(frozen=True, slots=True)
class _Ring:
    """The ranks as a circle, or as a path where the circle is not closed."""

    size: int
    closed: bool
    # Results stop at every rank on the way.
    relays: bool

    def reach(self, owner: int, users: frozenset[int], step: int) -> int:
        """Hops to the farthest of the users."""
        return max((step * (user - owner) % self.size for user in users), default=0)

    def hops_to_nearest_side(self, piece: Piece, users: frozenset[int]) -> int:
        """Hops to the farthest of the users, in the direction in which that is nearer."""
        return min(self.reach(piece.owner, users, step) for step in (1, -1))

    def chain(self, leg: _Leg) -> Chain:
        owner = leg.piece.owner
        reach = self.reach(owner, leg.users, leg.step)
        path = tuple((owner + leg.step * hop) % self.size for hop in range(reach + 1))
        home: tuple[int, ...] = (owner,)
        if self.relays:
            hops, step = (self.size - reach, leg.step) if leg.goes_on else (reach, -leg.step)
            home = tuple((path[-1] + step * hop) % self.size for hop in range(1, hops + 1))
        attends = tuple(rank in leg.users for rank in path[1:])
        return Chain(leg.piece, path, attends, home, relays=self.relays)


# A table of many ranks weighs megabytes, and packed rows bring a new mask every step.
@lru_cache(maxsize=32)
def build_route(
    schedule: str,
    *,
    sharding: Sharding,
    mask: Mask,
    wiring: Wiring,
    returns_weight: float = 0.0,
) -> Route:
    """The route of one pass.

    Args:
        schedule: "one_way", "two_way", "token_ring" or "all_gather".
        sharding: the sequence and its layout.
        mask: who sees whom.
        wiring: the links between the ranks.
        returns_weight: bytes of a result per byte of the piece that it is for; 0: none go home.

    Returns:
        The table, the same on every rank.
    """
    travels = travels_in(schedule)
    needed = needed_pieces(sharding, mask, travels=travels)
    returns: Returns = "carried" if returns_weight else "none"
    cables = wiring.topology.kind == "cables"
    ring = _Ring(sharding.world_size, wiring.closed, relays=cables)

    def route(chains: Iterable[Chain | Star]) -> Route:
        return Route(schedule, travels, returns, tuple(chains))

    if schedule == "all_gather":
        returns = "direct" if returns_weight else "none"
        return route(_all_gather(needed, ring))
    if schedule == "one_way":
        return route(ring.chain(leg) for leg in _one_way(needed, ring, step=1))
    if schedule == "two_way" and 1 < wiring.ranks_per_node < ring.size:
        return route(_double_ring(needed, ring.size, wiring.ranks_per_node))
    if schedule == "token_ring" and not cables:
        returns = "direct"
        ways = [_one_way(needed, ring, step=step) for step in (1, -1)]
    else:
        ways = [rule(needed, ring, sharding) for rule in _rules(needed, ring)]
    routes = [route([ring.chain(leg) for leg in legs]) for legs in ways]
    return min(routes, key=lambda route: _load(route, wiring, returns_weight))


def _load(route: Route, wiring: Wiring, returns_weight: float) -> tuple[float, float, float, int]:
    """What makes one table better than another, in units of one row: the less, the better.

    First the time if each ring step lasts as long as its busiest link, then that of the link that
    is busiest over all, then total bytes, then ring steps.
    """
    rows = np.array([chain.piece.length for chain in route.chains], dtype=float)
    guests, results = route.guests, route.results
    src, dst = (
        np.concatenate([getattr(table, end) for table in (guests, results)])
        for end in ("src", "dst")
    )
    weight = np.concatenate([rows[guests.chain], rows[results.chain] * returns_weight])
    # Results leave at the end of a ring step, beside the pieces of the next.
    step = np.concatenate([guests.departs, results.departs + 1])
    if not len(weight):
        return 0.0, 0.0, 0.0, route.num_steps
    used = wiring.occupied(src, dst)
    load = weight[used.transfer] / wiring.bytes_per_s(used.link)
    keys, index = np.unique(used.link * (step.max() + 1) + step[used.transfer], return_inverse=True)
    link, at = np.divmod(keys, step.max() + 1)
    each = np.bincount(index, weights=load)
    busiest = np.zeros(step.max() + 1)
    np.maximum.at(busiest, at, each)
    overall = np.bincount(np.unique(link, return_inverse=True)[1], weights=each)
    # Rounded: the last bits of a sum depend on the processor, the table must not.
    time_s, busiest_s = (float(f"{x:.3g}") for x in (busiest.sum(), overall.max()))
    return time_s, busiest_s, float(f"{weight.sum():.9g}"), route.num_steps


def _one_way(needed: Sequence[Needed], ring: _Ring, *, step: int) -> list[_Leg]:
    legs = []
    for piece, users in _each(needed):
        reach = ring.reach(piece.owner, users, step)
        legs.append(_Leg(piece, users, step, goes_on=ring.closed and 2 * reach >= ring.size))
    return legs


def _each(needed: Sequence[Needed]) -> Iterator[tuple[Piece, frozenset[int]]]:
    return ((item.piece, frozenset(item.users)) for item in needed)


_Rule = Callable[[Sequence[Needed], _Ring, Sharding], list[_Leg]]


def _rules(needed: Sequence[Needed], ring: _Ring) -> list[_Rule]:
    """The ways in which a whole table may use both directions of a ring."""
    if not ring.closed:
        return [_along_the_path]
    if all(ring.hops_to_nearest_side(piece, users) <= 1 for piece, users in _each(needed)):
        return [_shorter]
    rules: list[_Rule] = [_front_up_back_down, _half_each_way, _shorter]
    if ring.size <= _FEW_RANKS:
        rules.append(_nearest)
    return rules


def _along_the_path(needed: Sequence[Needed], ring: _Ring, _: Sharding) -> list[_Leg]:
    """Up to the users above, down to those below; no wire joins the ends."""
    del ring
    legs = []
    for piece, users in _each(needed):
        above = frozenset(user for user in users if user > piece.owner)
        legs += [
            _Leg(piece, some, step, goes_on=False)
            for some, step in ((above, 1), (users - above, -1))
            if some
        ]
    return legs


def _front_up_back_down(needed: Sequence[Needed], ring: _Ring, sharding: Sharding) -> list[_Leg]:
    """Zigzag, causal: everybody needs front blocks; back blocks only those below the owner."""
    del ring
    half = sharding.local_len // 2
    return [
        _Leg(part, users, 1 if part.stop <= half else -1, goes_on=True)
        for piece, users in _each(needed)
        for part in _cut(piece, half)
    ]


def _half_each_way(needed: Sequence[Needed], ring: _Ring, _: Sharding) -> list[_Leg]:
    """Half of every piece up, half down, all the way round; sums come home by going on."""
    del ring
    return [
        _Leg(part, users, step, goes_on=True)
        for piece, users in _each(needed)
        for part, step in zip(_halves(piece), (1, -1), strict=False)
    ]


def _nearest(needed: Sequence[Needed], ring: _Ring, _: Sharding) -> list[_Leg]:
    """To each user by the shorter way; half each way to the one opposite."""
    legs = []
    for piece, users in _each(needed):
        opposite = {u for u in users if 2 * ((u - piece.owner) % ring.size) == ring.size}
        above = {u for u in users if 2 * ((u - piece.owner) % ring.size) < ring.size}
        below = users - above - opposite
        # Where nobody is opposite, the piece stays whole.
        for i, part in enumerate(_halves(piece) if opposite else [piece]):
            for some, step in ((above, 1), (below, -1)):
                takes = frozenset(some | (opposite if (step == 1) == (i == 0) else set()))
                if takes:
                    legs.append(_Leg(part, takes, step, goes_on=False))
    return legs


def _shorter(needed: Sequence[Needed], ring: _Ring, _: Sharding) -> list[_Leg]:
    """Every piece in the one direction in which its users are nearer."""
    legs = []
    for piece, users in _each(needed):
        up, down = (ring.reach(piece.owner, users, step) for step in (1, -1))
        legs.append(
            _Leg(piece, users, 1 if up <= down else -1, goes_on=2 * min(up, down) > ring.size)
        )
    return legs


def _cut(piece: Piece, row: int) -> list[Piece]:
    """At a row of the shard, if it lies inside."""
    if not piece.start < row < piece.stop:
        return [piece]
    return [replace(piece, stop=row), replace(piece, start=row)]


def _halves(piece: Piece) -> list[Piece]:
    return _cut(piece, (piece.start + piece.stop) // 2)


def _all_gather(needed: Sequence[Needed], ring: _Ring) -> list[Star]:
    chains = []
    for piece, users in _each(needed):
        middle = (piece.start + piece.stop) // 2
        parts = _cut(piece, middle) if piece.length >= _PARTS * _SHORTEST_PART else [piece]
        away = sorted((user - piece.owner) % ring.size for user in users)
        path = (piece.owner, *((piece.owner + hops) % ring.size for hops in away))
        for i, part in enumerate(parts):
            arrives = tuple((hops - 1) // _PEERS_AT_ONCE * len(parts) + i + 1 for hops in away)
            chains.append(Star(part, path, arrives))
    return chains


def _double_ring(needed: Sequence[Needed], world_size: int, node_size: int) -> list[Chain]:
    """Each node that needs a piece gets it once, and passes it round while the next one gets it."""
    chains, nodes = [], world_size // node_size
    for piece, users in _each(needed):
        home_node, local = divmod(piece.owner, node_size)
        holder, held_at = piece.owner, 0
        for round_ in range(nodes):
            first = (home_node + round_) % nodes * node_size
            inside = [first + (local + i) % node_size for i in range(node_size)]
            last = max((i for i, rank in enumerate(inside) if rank in users), default=-1)
            if last < 0:
                continue
            path = tuple(inside[: last + 1])
            arrives = 1
            if round_:
                path, arrives = (holder, *path), max(1, round_ * node_size)
            chains.append(
                Chain(
                    piece,
                    path,
                    tuple(rank in users for rank in path[1:]),
                    (piece.owner,),
                    departs=held_at,
                    arrives=arrives,
                    home_steps=node_size if round_ else 1,
                )
            )
            if round_:
                holder, held_at = inside[0], arrives
    return chains
