"""Routes: every user gets every piece it needs once, results come home once, links are shared."""

from collections import Counter, defaultdict
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ringctx.config import TopologyConfig
from ringctx.parallel.layout import Piece, Sharding
from ringctx.parallel.mask import Mask
from ringctx.parallel.need import Needed, needed_pieces
from ringctx.parallel.routes import Route
from ringctx.parallel.topology import Wiring, wire_up
from ringctx.parallel.ways import build_route, travels_in
from tests.parallel.route_cases import sharded_masks, sharding_of, wirings

SCHEDULES = ("one_way", "two_way", "token_ring", "all_gather")
RINGS = SCHEDULES[:3]
Case = tuple[Sharding, Mask, Wiring, Route]


@st.composite
def routes(draw: st.DrawFn, most_ranks: int = 8) -> Case:
    sharding, mask = draw(sharded_masks(most_ranks))
    wiring = draw(wirings(sharding.world_size))
    route = build_route(
        draw(st.sampled_from(SCHEDULES)),
        sharding=sharding,
        mask=mask,
        wiring=wiring,
        returns_weight=draw(st.sampled_from([0.0, 0.7, 3.0])),
    )
    return sharding, mask, wiring, route


def check_guests(sharding: Sharding, mask: Mask, route: Route) -> None:
    """Each needed row is attended once, and held before it is passed on."""
    ranks = sharding.world_size
    attended = np.zeros((ranks, ranks, sharding.local_len), dtype=int)
    everywhere: defaultdict[Piece, dict[int, int]] = defaultdict(dict)
    for chain in route.chains:
        # A chain may start where an earlier one of the same piece passed.
        held = everywhere[chain.piece]
        held[chain.piece.owner] = -1
        hops = chain.guest_hops()
        assert len(hops) == len(chain.attends) and chain.attends[-1], chain
        rows = (hops.src, hops.dst, hops.departs, hops.arrives, chain.attends)
        for src, dst, departs, arrives, attends in zip(*rows, strict=True):
            assert 0 <= departs < arrives < route.num_steps
            assert held[int(src)] <= departs
            assert int(dst) not in held, chain
            held[int(dst)] = int(arrives)
            if attends:
                attended[dst, chain.piece.owner, chain.piece.rows] += 1
    needed = np.zeros_like(attended)
    for item in needed_pieces(sharding, mask, travels=travels_in(route.schedule)):
        needed[list(item.users), item.piece.owner, item.piece.rows] = 1
    assert (attended == needed).all()


def check_results(route: Route) -> None:
    """Replay: at the end of a step, what is due is added to what is held, then what leaves goes."""
    for chain in route.chains:
        hops = chain.result_hops(route.returns)
        users = [
            rank for rank, attends in zip(chain.path[1:], chain.attends, strict=True) if attends
        ]
        if route.returns == "none":
            assert not len(hops)
            continue
        guests = chain.guest_hops()
        held: defaultdict[int, Counter[int]] = defaultdict(Counter)
        moving: dict[int, list[tuple[int, Counter[int]]]] = defaultdict(list)
        for step in range(route.num_steps):
            arrived = [int(d) for d, a in zip(guests.dst, guests.arrives, strict=True) if a == step]
            for rank in set(arrived) & set(users):
                held[rank][rank] += 1
            for dst, what in moving.pop(step, []):
                held[dst] += what
            for src, dst, departs, arrives in zip(
                hops.src.tolist(), hops.dst.tolist(), hops.departs, hops.arrives, strict=True
            ):
                if departs == step:
                    assert arrives > departs and held[src], chain
                    moving[int(arrives)].append((dst, held.pop(src)))
        assert not moving
        at_home = held.pop(chain.piece.owner, Counter())
        assert at_home == Counter(users), chain
        assert not any(held.values()), chain


@settings(max_examples=400, deadline=None)
@given(case=routes())
def test_every_user_gets_every_needed_row_once_and_nobody_else_keeps_any(case: Case) -> None:
    sharding, mask, _, route = case
    check_guests(sharding, mask, route)


@settings(max_examples=400, deadline=None)
@given(case=routes())
def test_every_result_comes_home_once(case: Case) -> None:
    check_results(case[3])


@settings(max_examples=30, deadline=None)
@given(case=routes(most_ranks=16))
def test_sixteen_ranks_keep_the_same_rules(case: Case) -> None:
    sharding, mask, _, route = case
    check_guests(sharding, mask, route)
    check_results(route)


@settings(max_examples=200, deadline=None)
@given(case=routes())
def test_rings_on_cables_hop_only_between_neighbours(case: Case) -> None:
    _, _, wiring, route = case
    # A plain ring needs a circle.
    planned = RINGS if wiring.closed else ("two_way", "token_ring")
    if wiring.topology.kind != "cables" or route.schedule not in planned:
        return
    for hops in (route.guests, route.results):
        used = wiring.occupied(hops.src, hops.dst)
        assert len(used.link) == len(hops)


@settings(max_examples=200, deadline=None)
@given(case=routes())
def test_programs_of_all_ranks_are_the_table(case: Case) -> None:
    sharding, _, _, route = case
    for name in ("guests", "results"):
        sends: Counter[tuple[int, ...]] = Counter()
        recvs: Counter[tuple[int, ...]] = Counter()
        for rank in range(sharding.world_size):
            program = route.program(rank).steps
            assert len(program) == route.num_steps
            for step, todo in enumerate(program):
                for due, hops in getattr(todo, name):
                    for hop in hops:
                        assert (hop.departs, hop.arrives) == (step, due)
                        row = (hop.chain, hop.src, hop.dst, step, due)
                        (sends if hop.src == rank else recvs)[row] += 1
        assert sends == recvs and sends.total() == len(getattr(route, name))
        assert max(sends.values(), default=1) == 1


@settings(max_examples=100, deadline=None)
@given(case=routes())
def test_each_attended_piece_is_in_the_program_once(case: Case) -> None:
    sharding, _, _, route = case
    attends = [
        (rank, chain)
        for rank in range(sharding.world_size)
        for todo in route.program(rank).steps
        for chain in todo.attends
    ]
    assert len(attends) == len(set(attends)) == sum(sum(c.attends) for c in route.chains)


# How near to the least that a mask allows


def busiest_rows(route: Route, wiring: Wiring, returns_weight: float) -> float:
    """Of any cable, in rows of the travelling piece."""
    load: defaultdict[int, float] = defaultdict(float)
    for hops, weight in ((route.guests, 1.0), (route.results, returns_weight)):
        used = wiring.occupied(hops.src, hops.dst)
        for transfer, link in zip(used.transfer.tolist(), used.link.tolist(), strict=True):
            load[link] += weight * route.chains[int(hops.chain[transfer])].piece.length
    return max(load.values(), default=0.0)


def least_rows(sharding: Sharding, mask: Mask, returns_weight: float) -> float:
    """What some cable must carry under any route.

    By hops: a piece takes at least those that join its owner and users, and so does its sum. By
    cuts: what goes into, and out of, any consecutive ranks has two cables each way; a result goes
    out of where its piece goes in.
    """
    ranks = sharding.world_size
    needed = needed_pieces(sharding, mask, travels="kv")
    hops = sum(item.piece.length * _fewest_hops(item, ranks) for item in needed)
    bound = hops * (1 + returns_weight) / ranks
    for first in range(ranks):
        for count in range(1, ranks):
            inside = {(first + i) % ranks for i in range(count)}
            into = out = 0
            for item in needed:
                length, owner = item.piece.length, item.piece.owner
                into += length * (owner not in inside and not inside.isdisjoint(item.users))
                out += length * (owner in inside and not inside.issuperset(item.users))
            bound = max(bound, into + returns_weight * out, out + returns_weight * into)
    return bound / 2


def _fewest_hops(item: Needed, ranks: int) -> int:
    """All of the circle but the longest way between two that hold the piece."""
    stops = sorted((item.piece.owner, *item.users))
    gaps = [(b - a) % ranks for a, b in pairwise([*stops, stops[0]])]
    return ranks - max(gaps)


def two_way_over_least(
    ranks: int, layout: str, mask: Mask, *, local_len: int, returns_weight: float
) -> float:
    sharding = sharding_of(ranks, local_len, layout)
    wiring = wire_up(TopologyConfig(kind="cables"), ranks=tuple(range(ranks)), world_size=ranks)
    route = build_route(
        "two_way", sharding=sharding, mask=mask, wiring=wiring, returns_weight=returns_weight
    )
    found = busiest_rows(route, wiring, returns_weight)
    return found / least_rows(sharding, mask, returns_weight)


def two_way_hops_over_fewest(ranks: int, layout: str, mask: Mask, *, local_len: int) -> float:
    """All rows that travel, times hops, over the least that joins owners and users."""
    sharding = sharding_of(ranks, local_len, layout)
    wiring = wire_up(TopologyConfig(kind="cables"), ranks=tuple(range(ranks)), world_size=ranks)
    route = build_route("two_way", sharding=sharding, mask=mask, wiring=wiring)
    moved = sum(int(route.chains[chain].piece.length) for chain in route.guests.chain.tolist())
    needed = needed_pieces(sharding, mask, travels="kv")
    fewest = sum(item.piece.length * _fewest_hops(item, ranks) for item in needed)
    return float(moved / fewest)


@pytest.mark.parametrize("ranks", range(3, 9))
@pytest.mark.parametrize("mask", [Mask(), Mask(causal=False)], ids=["causal", "full"])
@pytest.mark.parametrize("returns_weight", [0.0, 2.0], ids=["forward", "backward"])
def test_two_way_loads_cables_within_5_percent_of_the_least(
    ranks: int, mask: Mask, returns_weight: float
) -> None:
    ratio = two_way_over_least(ranks, "zigzag", mask, local_len=840, returns_weight=returns_weight)
    # Sums of causal attention pile up at the first ranks, which the bound does not see.
    far = 1.31 if returns_weight and mask.causal else 1.05
    assert 1 - 1e-9 <= ratio <= far


@pytest.mark.parametrize("ranks", range(3, 9))
@pytest.mark.parametrize("layout", ["contiguous", "zigzag"])
@pytest.mark.parametrize("returns_weight", [0.0, 2.0], ids=["forward", "backward"])
def test_two_way_loads_cables_within_10_percent_of_the_least_under_a_window(
    ranks: int, layout: str, returns_weight: float
) -> None:
    window = ranks * 840 // 16
    ratio = two_way_over_least(
        ranks, layout, Mask(window=window), local_len=840, returns_weight=returns_weight
    )
    # In contiguous shards the last tokens before a border are needed on one side of it only: one
    # wire, where the bound counts two.
    assert 1 - 1e-9 <= ratio <= (1.1 if layout == "zigzag" else 2.0)
    assert two_way_hops_over_fewest(ranks, layout, Mask(window=window), local_len=840) <= 1.1


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_window_and_document_traffic_falls_with_need(schedule: str) -> None:
    wiring = wire_up(TopologyConfig(kind="cables"), ranks=tuple(range(8)), world_size=8)
    sharding = sharding_of(8, 64, "contiguous")

    def moved(mask: Mask) -> int:
        route = build_route(schedule, sharding=sharding, mask=mask, wiring=wiring)
        return sum(int(route.chains[chain].piece.length) for chain in route.guests.chain.tolist())

    assert moved(Mask(window=17)) == 7 * 16
    # One document crosses a border, by 4 tokens of queries and 10 of keys.
    crossing = 4 if schedule == "token_ring" else 10
    # And one of five whole shards: those after, or before, a shard need it.
    longest = [4, 3, 2, 1]
    fewest = 64 * sum(longest) + crossing
    # Half of every piece to its users, half round the circle to them from the other side.
    both_ways = (64 * sum(up + 7 for up in longest) + crossing * (1 + 7)) // 2
    most = both_ways if schedule in ("two_way", "token_ring") else fewest
    assert fewest <= moved(Mask(cu_seqlens=(0, 54, 68, 128, 512 - 64, 512))) <= most
    assert moved(Mask(cu_seqlens=tuple(range(0, 513, 64)))) == 0
    assert moved(Mask(cu_seqlens=(0, 54, 68, *range(128, 513, 64)))) == crossing
