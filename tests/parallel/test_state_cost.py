"""The price of an exchange of states is what moves, and `auto` follows it."""

import itertools

import pytest
import torch

from ringctx.config import TopologyConfig
from ringctx.parallel.comm import LocalGroup, record_traffic
from ringctx.parallel.layout import Sharding
from ringctx.parallel.parts import Chain, chain_of
from ringctx.parallel.state_cost import (
    ExchangeCost,
    StateShape,
    choose_exchange,
    exchange_cost,
)
from ringctx.parallel.topology import Wiring, wire_up
from tests.parallel.lightning_cases import (
    DOCUMENTS,
    LightningCase,
    bounds_of,
    differentiate_on_rank,
)
from tests.virtual_ranks import run_virtual

METHODS = ("all_gather", "ring")
LAYOUTS = ("contiguous", "zigzag")
# MiniMax's shape: 4 MiB a state.
SHAPE = StateShape(heads=64, key_dim=128, value_dim=128)


def _wiring(world_size: int, topology: TopologyConfig | None = None) -> Wiring:
    return wire_up(topology, ranks=tuple(range(world_size)), world_size=world_size)


def _chain(world_size: int, layout: str, documents: str = "one", *, tokens: int = 16384) -> Chain:
    seq_len = tokens * world_size
    bounds = bounds_of(documents, seq_len=seq_len, world_size=world_size)
    return chain_of(Sharding(seq_len, world_size, layout), torch.tensor(bounds, dtype=torch.int32))


def _cost(
    method: str, chain: Chain, *, wiring: Wiring | None = None, backward: bool = False
) -> ExchangeCost:
    wiring = wiring or _wiring(chain.sharding.world_size)
    return exchange_cost(method, backward=backward, shape=SHAPE, chain=chain, wiring=wiring)


@pytest.mark.proves("lightning attention: bytes moved equal the formulas", on="CPU")
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_bytes_equal_those_that_move(world_size: int, method: str, layout: str) -> None:
    for i, documents in enumerate(DOCUMENTS):
        case = LightningCase(
            world_size=world_size,
            layout=layout,
            exchange=method,
            documents=documents,
            data_decay=bool(i % 2),
            dtype=(torch.float64, torch.float32)[i // 2 % 2],
        )
        moved = run_virtual(world_size, lambda group, c=case: _moved(group, c))  # type: ignore[misc]
        shape = StateShape(
            batch=case.batch,
            heads=case.heads,
            key_dim=case.key_dim,
            value_dim=case.value_dim,
            dtype=case.dtype,
            data_decay=case.data_decay,
        )
        chain = chain_of(Sharding(case.seq_len, world_size, layout), case.cu_seqlens)
        costs = [
            exchange_cost(
                method, backward=backward, shape=shape, chain=chain, wiring=_wiring(world_size)
            )
            for backward in (False, True)
        ]
        for rank, (sent, received) in enumerate(moved):
            assert sent == sum(int(cost.sent_bytes[rank]) for cost in costs), case
            assert received == sum(int(cost.received_bytes[rank]) for cost in costs), case


def _moved(group: LocalGroup, case: LightningCase) -> tuple[int, int]:
    with record_traffic() as ledger:
        differentiate_on_rank(group, case)
    return ledger.sent.total(), ledger.received.total()


@pytest.mark.parametrize("world_size", [2, 3, 8, 17])
def test_bytes_of_one_document_are_those_of_the_table(world_size: int) -> None:
    p, last, state = world_size, world_size - 1, 4 << 20
    table = {
        ("all_gather", "contiguous"): [(p - 1 - r, r) for r in range(p)],
        ("all_gather", "zigzag"): [(p - 1 + r, 2 * p - 2 - r) for r in range(p)],
        ("ring", "contiguous"): [(int(r < last), int(r > 0)) for r in range(p)],
        # The way begins and ends on rank 0, and turns on the last.
        ("ring", "zigzag"): [
            (1 if r in (0, last) else 2, 1 if r in (0, last) else 2) for r in range(p)
        ],
    }
    steps = {("ring", "contiguous"): p - 1, ("ring", "zigzag"): 2 * p - 2}
    for (method, layout), expected in table.items():
        for backward in (False, True):
            cost = _cost(method, _chain(p, layout), backward=backward)
            sent, received = (x // state for x in (cost.sent_bytes, cost.received_bytes))
            assert cost.sent_bytes.sum() % state == 0
            # Zigzag is its own mirror image.
            if backward and layout == "contiguous":
                sent, received = received, sent
            assert [*zip(sent.tolist(), received.tolist(), strict=True)] == expected
            assert cost.steps == steps.get((method, layout), 1)


def test_data_decay_adds_one_number_a_head_to_gathered_states_alone() -> None:
    fixed, data = (StateShape(heads=3, key_dim=4, value_dim=5, data_decay=d) for d in (False, True))
    assert data.message_bytes("all_gather") - fixed.message_bytes("all_gather") == 3 * 4
    assert data.message_bytes("ring") == fixed.message_bytes("ring") == 4 * 3 * 4 * 5


@pytest.mark.parametrize(("documents", "steps"), [("at_rank_edges", 0), ("inside_every_part", 1)])
@pytest.mark.parametrize("method", METHODS)
def test_borders_between_documents_shorten_the_chain(
    documents: str, steps: int, method: str
) -> None:
    cost = _cost(method, _chain(8, "contiguous", documents))
    assert cost.steps == steps
    assert (cost.time_s > 0) == (steps > 0)


def test_every_hop_of_a_ring_takes_its_turn() -> None:
    topology = TopologyConfig(link_gbit=100.0, latency_us=20.0)
    contiguous, zigzag = (_chain(8, layout) for layout in LAYOUTS)
    hop_s = 20e-6 + (4 << 20) / 12.5e9
    for chain, hops in ((contiguous, 7), (zigzag, 14)):
        cost = _cost("ring", chain, wiring=_wiring(8, topology))
        assert cost.time_s == pytest.approx(hops * hop_s)
        assert cost.exposed_s == cost.time_s
    gathered = _cost("all_gather", contiguous, wiring=_wiring(8, topology))
    assert gathered.time_s == pytest.approx(20e-6 + 7 * (4 << 20) / 12.5e9)
    assert gathered.busiest_bytes == 7 * (4 << 20)
    assert gathered.busiest_link == "out of 0"


def test_gathering_hides_behind_the_work_inside_chunks() -> None:
    slow = TopologyConfig(flops=1e12)
    chain = _chain(4, "zigzag")
    hidden, exposed = (_cost("all_gather", chain, wiring=_wiring(4, t)) for t in (slow, None))
    assert hidden.time_s == exposed.time_s
    assert hidden.exposed_s == 0.0 < exposed.exposed_s < exposed.time_s


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("world_size", [1, 2, 4, 8, 16, 64])
def test_auto_gathers_on_a_switch(world_size: int, layout: str) -> None:
    chain, wiring = _chain(world_size, layout), _wiring(world_size)
    assert choose_exchange(shape=SHAPE, chain=chain, wiring=wiring) == "all_gather"


@pytest.mark.parametrize(("kind", "small", "large"), [("cables", 2, 32), ("two_level", 2, 32)])
def test_auto_takes_the_ring_where_many_transfers_share_links(
    kind: str, small: int, large: int
) -> None:
    for world_size, expected in ((small, "all_gather"), (large, "ring")):
        topology = TopologyConfig(
            kind=kind,  # type: ignore[arg-type]
            link_gbit=50.0,
            ranks_per_node=min(8, world_size) if kind == "two_level" else None,
        )
        wiring = _wiring(world_size, topology)
        for layout in LAYOUTS:
            chain = _chain(world_size, layout)
            assert choose_exchange(shape=SHAPE, chain=chain, wiring=wiring) == expected, layout


def test_auto_takes_the_lesser_of_what_is_left_to_wait_for() -> None:
    for world_size, layout, documents, kind in itertools.product(
        (2, 6, 12), LAYOUTS, ("one", "of_a_part_and_one", "at_rank_edges"), ("switch", "cables")
    ):
        chain = _chain(world_size, layout, documents, tokens=64)
        wiring = _wiring(world_size, TopologyConfig(kind=kind, link_gbit=10.0))  # type: ignore[arg-type]
        left = {
            method: sum(
                _cost(method, chain, wiring=wiring, backward=backward).exposed_s
                for backward in (False, True)
            )
            for method in METHODS
        }
        chosen = choose_exchange(shape=SHAPE, chain=chain, wiring=wiring)
        assert left[chosen] <= 1.02 * min(left.values())
