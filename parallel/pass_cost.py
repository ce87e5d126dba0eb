"""What one pass of attention costs on a topology: time, bytes on every link, memory.

One idea: a route is a table, so its price is a few sums over that table. Ring steps are taken in
lockstep, and a step lasts as long as the longer of

    compute     of the rank with most visible (query, key) pairs to attend in it
    transfers   due in it: bytes / rate on the busiest link, and the latency

Pieces that leave when a step begins travel during it; results that leave when it ends travel during
the next one. A transfer that may take several steps loads its links over all of them. Nothing is
run, and nothing measured: `traffic.py` says what a token weighs, `topology.py` what a link carries,
`pass_memory.py` what is held at a time.

Price: of the order of the hops in the route: milliseconds for 64 ranks, seconds for 1024.
"""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from ringctx.parallel.layout import Sharding
from ringctx.parallel.mask import Mask
from ringctx.parallel.pair_counts import visible_pairs
from ringctx.parallel.pass_memory import attended_hops, peak_bytes
from ringctx.parallel.routes import Route
from ringctx.parallel.topology import Ints, Wiring
from ringctx.parallel.traffic import Shape
from ringctx.parallel.ways import build_route, travels_in

__all__ = ["PassCost", "bytes_between", "pass_cost", "route_of_pass"]

Floats = npt.NDArray[np.float64]

# Keys are numbered by a dense table up to this size, beyond it by sorting.
_DENSE = 1 << 24
# Transfers that are laid on their links at once.
_CHUNK = 1 << 16


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PassCost:
    """The price of one pass under one schedule."""

    schedule: str
    time_s: float
    # Of which the slowest rank of each step computes.
    compute_s: float
    # Links by number (see `Wiring.link_name`), rising, and the bytes that each carries.
    links: Ints
    link_bytes: Ints
    # In words; None where nothing moves.
    busiest_link: str | None
    busiest_bytes: int
    # What each rank sends.
    sent_bytes: Ints
    ring_steps: int
    # Largest, of any rank at any time, beyond the local tensors that go in; what comes out counts.
    memory_bytes: int
    # Ranks that a rank exchanges anything with.
    peers: int
    # Groups of ranks that a rank takes part in: the one of the ring, and none for a rank alone.
    communicators: int

    @property
    def total_bytes(self) -> int:
        """What all ranks send."""
        return int(self.sent_bytes.sum())


def route_of_pass(
    schedule: str,
    *,
    backward: bool,
    shape: Shape,
    sharding: Sharding,
    mask: Mask,
    wiring: Wiring,
) -> Route:
    """The route that `ring_attention` runs.

    Args:
        schedule: any but "auto".
        backward: which of the two passes.
        shape: what a token weighs.
        sharding: the sequence and its layout.
        mask: who sees whom.
        wiring: the links between the ranks.
    """
    travels = travels_in(schedule)
    out = shape.guest_bytes(travels, backward=backward)
    home = shape.result_bytes(travels, "carried", backward=backward)
    return build_route(
        schedule, sharding=sharding, mask=mask, wiring=wiring, returns_weight=home / out
    )


@lru_cache(maxsize=256)
def pass_cost(
    schedule: str,
    *,
    backward: bool,
    shape: Shape,
    sharding: Sharding,
    mask: Mask,
    wiring: Wiring,
) -> PassCost:
    """Price one pass; arguments as for `route_of_pass`."""
    route = route_of_pass(
        schedule, backward=backward, shape=shape, sharding=sharding, mask=mask, wiring=wiring
    )
    moved = _Moved.on(route, shape, backward=backward)
    compute_s = _compute_s(route, moved, shape, sharding, mask, wiring, backward=backward)
    load = _LinkLoad.of(moved, wiring)
    links, link_bytes = _summed(load.link, load.bytes)
    busy_s = link_bytes / wiring.bytes_per_s(links)
    busiest = int(busy_s.argmax()) if len(links) else None
    ranks = sharding.world_size
    return PassCost(
        schedule=schedule,
        time_s=_lockstep(compute_s, load, wiring),
        compute_s=float(compute_s.sum()),
        links=links,
        link_bytes=link_bytes,
        busiest_link=None if busiest is None else wiring.link_name(int(links[busiest])),
        busiest_bytes=0 if busiest is None else int(link_bytes[busiest]),
        sent_bytes=_bincount(moved.src, moved.bytes, ranks),
        ring_steps=route.num_steps,
        memory_bytes=peak_bytes(
            route, shape=shape, sharding=sharding, mask=mask, backward=backward
        ),
        peers=_peers(moved, ranks),
        communicators=int(ranks > 1),
    )


def bytes_between(
    schedule: str,
    *,
    backward: bool,
    shape: Shape,
    sharding: Sharding,
    mask: Mask,
    wiring: Wiring,
) -> Ints:
    """Bytes that each rank sends to each other in one pass, `[source, destination]`."""
    route = route_of_pass(
        schedule, backward=backward, shape=shape, sharding=sharding, mask=mask, wiring=wiring
    )
    moved, ranks = _Moved.on(route, shape, backward=backward), sharding.world_size
    pair = moved.src * ranks + moved.dst
    return _bincount(pair, moved.bytes, ranks * ranks).reshape(ranks, ranks)


@dataclass(frozen=True, slots=True, eq=False)
class _Moved:
    """Every transfer of a pass: first the pieces', then the results'."""

    num_guests: int
    src: Ints
    dst: Ints
    bytes: Ints
    # The first and last ring step during which it is under way.
    first: Ints
    last: Ints

    @staticmethod
    def on(route: Route, shape: Shape, *, backward: bool) -> "_Moved":
        rows = np.array([chain.piece.length for chain in route.chains], dtype=np.int64)
        guest = shape.guest_bytes(route.travels, backward=backward)
        result = 0
        if route.returns != "none":
            result = shape.result_bytes(route.travels, route.returns, backward=backward)
        out, home = route.guests, route.results

        def both(name: str) -> Ints:
            return np.concatenate([getattr(out, name), getattr(home, name)])

        late = np.repeat([0, 1], [len(out), len(home)])
        weight = np.concatenate([rows[out.chain] * guest, rows[home.chain] * result])
        return _Moved(
            len(out),
            both("src"),
            both("dst"),
            weight,
            both("departs") + late,
            both("arrives") + late - 1,
        )


def _compute_s(
    route: Route,
    moved: _Moved,
    shape: Shape,
    sharding: Sharding,
    mask: Mask,
    wiring: Wiring,
    *,
    backward: bool,
) -> Floats:
    """What the slowest rank computes in each ring step; the own shard in the first."""
    every = np.arange(sharding.world_size)
    keys = route.travels == "kv"
    pieces = [sharding.shard(rank) for rank in every.tolist()]
    pieces += [chain.piece for chain in route.chains]
    hops = attended_hops(route)
    which = np.concatenate([every, len(every) + route.guests.chain[hops]])
    ranks = np.concatenate([every, moved.dst[hops]])
    steps = np.concatenate([np.zeros_like(every), route.guests.arrives[hops]])
    pairs = visible_pairs(mask, sharding, pieces=pieces, which=which, ranks=ranks, keys=keys)
    table = _bincount(ranks * route.num_steps + steps, pairs, len(every) * route.num_steps)
    slowest = table.reshape(len(every), route.num_steps).max(axis=0)
    flops: Floats = shape.flops(1.0, backward=backward) * slowest
    return flops / wiring.topology.flops


@dataclass(frozen=True, slots=True, eq=False)
class _LinkLoad:
    """Each transfer on each of its links."""

    link: Ints
    bytes: Ints
    first: Ints
    last: Ints

    @staticmethod
    def of(moved: _Moved, wiring: Wiring) -> "_LinkLoad":
        columns = (moved.bytes, moved.first, moved.last)
        parts = []
        for start in range(0, max(1, len(moved.src)), _CHUNK):
            some = slice(start, start + _CHUNK)
            used = wiring.occupied(moved.src[some], moved.dst[some])
            load = _LinkLoad(used.link, *(column[some][used.transfer] for column in columns))
            # Ways over many cables are added up before they fill the memory.
            parts.append(load.merged() if len(used.link) > 2 * _CHUNK else load)
        return _LinkLoad(
            *(
                np.concatenate([getattr(part, name) for part in parts])
                for name in _LinkLoad.__slots__
            )
        )

    def merged(self) -> "_LinkLoad":
        """One row for each link and span of steps."""
        span = self.last - self.first
        spans, links = int(span.max()) + 1, int(self.link.max()) + 1
        key, weight = _summed((self.first * spans + span) * links + self.link, self.bytes)
        first = key // links // spans
        return _LinkLoad(key % links, weight, first, first + key // links % spans)

    def rows(self, index: Ints | npt.NDArray[np.bool_]) -> "_LinkLoad":
        return _LinkLoad(*(getattr(self, name)[index] for name in self.__slots__))


def _lockstep(compute_s: Floats, load: _LinkLoad, wiring: Wiring) -> float:
    """When the last ring step ends."""
    steps = len(compute_s)
    spans = np.flatnonzero(np.bincount(load.last - load.first + 1)).tolist()
    # due_s[span][t]: what the links need for all that must move within steps t .. t + span - 1
    due_s = {span: _due_s(load, span, steps, wiring) for span in spans}
    ends = np.zeros(steps + 1)
    for step in range(steps):
        end = ends[step] + compute_s[step]
        for span, due in due_s.items():
            if (first := step + 1 - span) >= 0:
                end = max(end, ends[first] + due[first])
        ends[step + 1] = end
    return float(ends[-1])


def _due_s(load: _LinkLoad, span: int, steps: int, wiring: Wiring) -> Floats:
    length = load.last - load.first + 1
    if span > 1:
        # Shorter transfers count where they share a link with some of this span.
        load = load.rows(np.isin(load.link, load.link[length == span]))
        length = load.last - load.first + 1
        load, length = load.rows(length <= span), length[length <= span]
        # Each lies within these many spans.
        repeats = span - length + 1
        row = np.repeat(np.arange(len(length)), repeats)
        back = np.arange(len(row)) - np.repeat(np.cumsum(repeats) - repeats, repeats)
        load = load.rows(row)
        first = load.first - back
    else:
        load = load.rows(length == 1)
        first = load.first
    inside = (first >= 0) & (first + span <= steps)
    load, first = load.rows(inside), first[inside]
    due = np.zeros(steps)
    if len(first):
        links, index = _numbered(load.link)
        key, busy = _summed(first * len(links) + index, load.bytes)
        busy_s = busy / wiring.bytes_per_s(links)[key % len(links)]
        np.maximum.at(due, key // len(links), busy_s + wiring.topology.latency_us * 1e-6)
    return due


def _peers(moved: _Moved, ranks: int) -> int:
    """Most ranks that any one rank sends to or receives from."""
    ends = (moved.src, moved.dst)
    meets = np.zeros((ranks, ranks), dtype=bool)
    for one, other in (ends, ends[::-1]):
        meets[one, other] = True
    return int(meets.sum(axis=1).max())


def _bincount(index: Ints, weights: Ints, size: int) -> Ints:
    # In float64: exact up to 2^53.
    return np.bincount(index, weights=weights, minlength=size).astype(np.int64)


def _summed(key: Ints, weights: Ints) -> tuple[Ints, Ints]:
    """The distinct keys, rising, and the sum of each one's weights."""
    found, index = _numbered(key)
    return found, _bincount(index, weights, len(found))


def _numbered(key: Ints) -> tuple[Ints, Ints]:
    """The distinct keys, rising, and the place of each key among them."""
    if not len(key) or int(key.max()) >= _DENSE:
        found, index = np.unique(key, return_inverse=True)
        return found, index
    found = np.flatnonzero(np.bincount(key))
    place = np.zeros(int(found[-1]) + 1, dtype=np.int64)
    place[found] = np.arange(len(found))
    return found, place[key]
