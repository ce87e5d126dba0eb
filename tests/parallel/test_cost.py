"""The cost function: its bytes are those that move, its closed forms hold, its choice is stable."""

import itertools
import subprocess
import sys
import time
from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch

from ringctx.config import TopologyConfig
from ringctx.parallel import ring_attention
from ringctx.parallel.comm import LocalGroup, record_traffic
from ringctx.parallel.cost import (
    SCHEDULES,
    Choice,
    PassCost,
    bytes_between,
    choose,
    pass_cost,
    route_of_pass,
)
from ringctx.parallel.layout import Sharding
from ringctx.parallel.mask import Mask
from ringctx.parallel.topology import Wiring, wire_up
from ringctx.parallel.traffic import Shape
from tests.virtual_ranks import run_virtual

TOPOLOGIES = {
    "switch": TopologyConfig(),
    "cables": TopologyConfig(kind="cables"),
    "fully_connected": TopologyConfig(kind="fully_connected"),
    "two_level": TopologyConfig(kind="two_level", ranks_per_node=2),
}
MASKS: dict[str, dict[str, Any]] = {
    "causal": {},
    "full": {"causal": False},
    "window": {"window": 5},
    "sinks": {"window": 5, "sinks": 2},
    "documents": {"cu_seqlens": (0, 7, 9, 30, 48)},
    "full documents": {"causal": False, "cu_seqlens": (0, 20, 48)},
}
MHA = Shape(heads=8, kv_heads=8, head_dim=128)
GQA = Shape(heads=8, kv_heads=1, head_dim=128)


def wired(topology: TopologyConfig | None, ranks: int) -> Wiring:
    return wire_up(topology, ranks=tuple(range(ranks)), world_size=ranks)


def cost(
    schedule: str,
    *,
    backward: bool = False,
    shape: Shape = MHA,
    ranks: int = 8,
    local_len: int = 4096,
    layout: str = "zigzag",
    mask: Mask = Mask(),  # noqa: B008
    topology: TopologyConfig | None = None,
) -> PassCost:
    return pass_cost(
        schedule,
        backward=backward,
        shape=shape,
        sharding=Sharding(ranks * local_len, ranks, layout),
        mask=mask,
        wiring=wired(topology, ranks),
    )


def choice(shape: Shape, ranks: int, local_len: int, mask: Mask, topology: str) -> Choice:
    return choose(
        shape=shape,
        sharding=Sharding(ranks * local_len, ranks, "zigzag"),
        mask=mask,
        wiring=wired(TOPOLOGIES[topology], ranks),
    )


# What moves


def _measured(
    schedule: str, world_size: int, layout: str, mask: dict[str, Any], topology: TopologyConfig
) -> list[np.ndarray[Any, Any]]:
    """Bytes between ranks, forward and backward, as the ledgers of virtual ranks count them."""
    tokens, heads, kv_heads, head_dim = 48 // world_size, 4, 2, 8

    def body(group: LocalGroup) -> list[Counter[int]]:
        shapes = [(2, tokens, h, head_dim) for h in (heads, kv_heads, kv_heads)]
        inputs = [torch.randn(shape).bfloat16().requires_grad_() for shape in shapes]
        arguments = dict(mask)
        if "cu_seqlens" in mask:
            arguments["cu_seqlens"] = torch.tensor(mask["cu_seqlens"], dtype=torch.int32)
        with record_traffic() as ledger:
            out = ring_attention(
                *inputs,
                group=group,
                layout=layout,
                schedule=schedule,
                topology=topology,
                **arguments,
            )
        forward = Counter(ledger.sent)
        out.sum().backward()
        return [forward, ledger.sent - forward]

    sent = run_virtual(world_size, body)
    tables = []
    for i in range(2):
        table = np.zeros((world_size, world_size), dtype=np.int64)
        for rank, counters in enumerate(sent):
            for peer, moved in counters[i].items():
                table[rank, peer] = moved
        tables.append(table)
    return tables


@pytest.mark.proves("cost function: predicted bytes equal those that move", on="CPU")
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("topology", TOPOLOGIES)
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_predicts_the_bytes_between_every_two_ranks(
    schedule: str, topology: str, mask: str
) -> None:
    shape = Shape(batch=2, heads=4, kv_heads=2, head_dim=8)
    for world_size, layout in ((4, "zigzag"), (2, "contiguous"), (8, "zigzag"), (4, "striped")):
        given = MASKS[mask]
        measured = _measured(schedule, world_size, layout, given, TOPOLOGIES[topology])
        for backward in (False, True):
            predicted = bytes_between(
                schedule,
                backward=backward,
                shape=shape,
                sharding=Sharding(48, world_size, layout),
                mask=Mask(**given),
                wiring=wired(TOPOLOGIES[topology], world_size),
            )
            assert (predicted == measured[backward]).all(), (world_size, layout, backward)


@pytest.mark.parametrize("topology", TOPOLOGIES)
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_bytes_on_links_and_of_ranks_are_those_between_ranks(schedule: str, topology: str) -> None:
    case: dict[str, Any] = {
        "backward": True,
        "shape": MHA,
        "sharding": Sharding(8 * 64, 8, "zigzag"),
        "mask": Mask(),
        "wiring": wired(TOPOLOGIES[topology], 8),
    }
    table, price = bytes_between(schedule, **case), pass_cost(schedule, **case)
    assert (table.sum(axis=1) == price.sent_bytes).all()
    links: Counter[int] = Counter()
    for src, dst in itertools.product(range(8), range(8)):
        used = case["wiring"].occupied(np.array([src]), np.array([dst])) if src != dst else None
        for link in used.link.tolist() if used else ():
            links[link] += int(table[src, dst])
    links = +links
    assert dict(zip(price.links.tolist(), price.link_bytes.tolist(), strict=True)) == dict(links)
    peers = ((table + table.T) > 0).sum(axis=1).max()
    assert price.peers == peers


# Time


def test_a_choice_for_64_ranks_takes_seconds_at_most() -> None:
    start_s = time.process_time()
    choice(MHA, 64, 1000, Mask(), "switch")
    assert time.process_time() - start_s < 8


def test_a_switch_takes_as_long_as_its_busiest_port() -> None:
    slow = TopologyConfig(link_gbit=1.0, latency_us=0.0, flops=1e18)
    price = cost("one_way", mask=Mask(causal=False), topology=slow)
    assert price.time_s == pytest.approx(price.busiest_bytes * 8 / 1e9, rel=1e-3)


def test_free_links_leave_only_compute() -> None:
    free = TopologyConfig(link_gbit=1e9, latency_us=0.0)
    for schedule, backward in itertools.product(SCHEDULES, (False, True)):
        price = cost(schedule, backward=backward, topology=free)
        assert price.time_s == pytest.approx(price.compute_s, rel=1e-3)


def test_compute_is_never_less_than_a_fair_share_and_even_in_zigzag() -> None:
    seq_len = 8 * 4096
    fair = MHA.flops(seq_len * (seq_len + 1) / 2, backward=False) / 8 / TopologyConfig().flops
    for schedule in SCHEDULES:
        assert cost(schedule, layout="contiguous").compute_s >= fair * (1 - 1e-12)
    assert cost("one_way").compute_s == pytest.approx(fair, rel=1e-12)


def test_every_exchange_pays_the_latency() -> None:
    fast = TopologyConfig(link_gbit=1e9, latency_us=1000.0, flops=1e18)
    assert cost("one_way", topology=fast).time_s == pytest.approx(7e-3, rel=1e-2)
    # Queries in steps 0 to 6, results one step after they were computed: the last in step 8.
    assert cost("token_ring", topology=fast).time_s == pytest.approx(9e-3, rel=1e-2)


def test_a_double_ring_crosses_the_slow_network_while_the_node_goes_round() -> None:
    two_level = TopologyConfig(
        kind="two_level", ranks_per_node=4, link_gbit=1.0, node_gbit=1e6, latency_us=0, flops=1e20
    )
    full = Mask(causal=False)
    price = cost("two_way", topology=two_level, mask=full)
    one_way = cost("one_way", topology=two_level, mask=full)
    # Every shard crosses once, four ranks share a port: 4 shards in all against 7 round the ring.
    assert price.busiest_bytes * 7 == one_way.busiest_bytes * 4
    assert price.time_s == pytest.approx(price.busiest_bytes * 8 / 1e9, rel=0.02)


@pytest.mark.parametrize("field", ["heads", "kv_heads", "head_dim", "batch"])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_more_bytes_never_cost_less(schedule: str, field: str) -> None:
    sizes: dict[str, Any] = {"heads": 8, "kv_heads": 4, "head_dim": 64, "batch": 1}
    shapes = [Shape(**(sizes | {field: sizes[field] * factor})) for factor in (1, 2)]
    for backward in (False, True):
        small, large = (cost(schedule, backward=backward, shape=shape) for shape in shapes)
        assert large.busiest_bytes >= small.busiest_bytes
        assert large.time_s >= small.time_s
        assert large.memory_bytes >= small.memory_bytes


# Memory


def test_all_gather_memory_does_not_grow_with_the_ranks() -> None:
    # Of few ranks, a rank needs only front blocks of some of its eight peers.
    few, many = (cost("all_gather", ranks=ranks).memory_bytes for ranks in (64, 256))
    assert many <= 1.01 * few


def test_memory_shrinks_with_the_shard() -> None:
    for schedule, backward in itertools.product(SCHEDULES, (False, True)):
        long, short = (
            cost(schedule, backward=backward, local_len=n).memory_bytes for n in (16384, 4096)
        )
        # A merge widens a fixed number of rows at a time.
        assert short == pytest.approx(long / 4, rel=0.04)


# The choice


def test_one_rank_goes_one_way() -> None:
    alone = choice(MHA, 1, 64, Mask(), "switch")
    assert (alone.forward, alone.backward) == ("one_way", "one_way")
    assert alone.why == "one rank holds the whole sequence"


@pytest.mark.parametrize("mask", [Mask(), Mask(causal=False), Mask(window=100)], ids=str)
@pytest.mark.parametrize("topology", TOPOLOGIES)
@pytest.mark.parametrize("local_len", [2, 256, 16384])
def test_queries_never_travel_forward_under_gqa(topology: str, local_len: int, mask: Mask) -> None:
    picked = choice(GQA, 8, local_len, mask, topology)
    assert "token_ring" not in (picked.forward, picked.backward)
    assert "K/V weighs 1/8 of Q and out (8 query heads to 1 K/V head)" in picked.why


def test_mha_sends_queries_backward_where_transfers_count() -> None:
    for topology in ("switch", "cables"):
        picked = choice(MHA, 8, 1024, Mask(), topology)
        assert picked.forward != "token_ring"
        assert picked.backward == "token_ring"
        assert "Q with its results is lighter than K/V with theirs" in picked.why


def test_hidden_transfers_leave_the_simplest_schedule() -> None:
    picked = choice(GQA, 8, 1 << 18, Mask(), "cables")
    assert (picked.forward, picked.backward) == ("one_way", "one_way")
    assert "compute hides all transfers" in picked.why


def test_cables_go_both_ways_and_private_links_straight() -> None:
    assert choice(MHA, 8, 1024, Mask(), "cables").forward == "two_way"
    assert choice(MHA, 4, 1024, Mask(causal=False), "fully_connected").forward == "all_gather"


def test_a_window_says_how_little_leaves_its_rank() -> None:
    picked = choose(
        shape=MHA,
        sharding=Sharding(8 * 4096, 8, "contiguous"),
        mask=Mask(window=129),
        wiring=wired(None, 8),
    )
    share = 7 * 128 / (8 * 4096)
    assert f"window: only {share:.1%} of K/V leaves its rank" in picked.why


@pytest.mark.parametrize("topology", TOPOLOGIES)
@pytest.mark.parametrize("shape", [MHA, GQA], ids=["mha", "gqa"])
def test_the_choice_is_no_slower_than_either_ring(topology: str, shape: Shape) -> None:
    for mask, local_len in itertools.product((Mask(), Mask(causal=False)), (64, 1024, 16384)):
        picked = choice(shape, 8, local_len, mask, topology)
        for name, costs in (
            (picked.forward, picked.forward_costs),
            (picked.backward, picked.backward_costs),
        ):
            time_s = {c.schedule: c.time_s for c in costs}
            by_keys = min(time_s[s] for s in ("one_way", "two_way"))
            assert time_s[name] <= 1.02 * by_keys


_PRINT_CHOICES = """
from tests.parallel.test_cost import *
for topology, shape in itertools.product(TOPOLOGIES, (MHA, GQA)):
    picked = choice(shape, 8, 512, Mask(window=1000, sinks=3), topology)
    print(picked.forward, picked.backward, picked.why)
    print([repr(c.time_s) for c in (*picked.forward_costs, *picked.backward_costs)])
"""


def test_the_choice_is_the_same_in_every_process() -> None:
    printed = {
        subprocess.run(
            [sys.executable, "-c", _PRINT_CHOICES],
            env={"PYTHONHASHSEED": seed, "PYTHONPATH": "."},
            capture_output=True,
            check=True,
            text=True,
        ).stdout
        for seed in ("1", "2")
    }
    assert len(printed) == 1 and len(printed.pop()) > 100


def test_a_known_choice_takes_microseconds() -> None:
    given = (MHA, 8, 512, Mask(), "switch")
    first = choice(*given)
    start_s = time.perf_counter()
    for _ in range(1000):
        assert choice(*given) is first
    assert time.perf_counter() - start_s < 0.5


def test_prices_are_of_the_route_that_runs() -> None:
    case: dict[str, Any] = {
        "backward": False,
        "shape": MHA,
        "sharding": Sharding(8 * 64, 8, "zigzag"),
        "mask": Mask(),
        "wiring": wired(None, 8),
    }
    for schedule in SCHEDULES:
        route = route_of_pass(schedule, **case)
        assert pass_cost(schedule, **case).ring_steps == route.num_steps
