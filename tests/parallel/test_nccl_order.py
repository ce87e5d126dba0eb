"""No schedule deadlocks under NCCL: a batch ends when all of it has met its other ends, in order.

NCCL ignores tags: between two ranks, the first send meets the first receive. A rank's batches run
one after the other, and in the worst case nothing is buffered. Replayed here for all ranks at once,
from what the executor really starts (small worlds) and from the tables (up to 256 ranks).
"""

import itertools
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch

from ringctx.config import TopologyConfig
from ringctx.parallel import ring_attention
from ringctx.parallel.comm import Pending, Transfer
from ringctx.parallel.cost import route_of_pass
from ringctx.parallel.layout import LAYOUTS, Sharding
from ringctx.parallel.mask import Mask
from ringctx.parallel.routes import Route
from ringctx.parallel.topology import wire_up
from ringctx.parallel.traffic import Shape
from tests.parallel.ring_cases import Case
from tests.virtual_ranks import VirtualGroup, run_virtual

SCHEDULES = ("one_way", "two_way", "token_ring", "all_gather")
TOPOLOGIES = {
    "switch": TopologyConfig(),
    "cables": TopologyConfig(kind="cables"),
    "two_level": TopologyConfig(kind="two_level", ranks_per_node=2),
}


@dataclass(frozen=True)
class Operation:
    """One end of a transfer, as NCCL sees it."""

    kind: str
    peer: int
    # What must agree at the two ends.
    content: object


@dataclass
class _Recorder(VirtualGroup):
    """Notes each exchange in the order of its tags; the tags are then forgotten."""

    batches: list[list[Operation]] = field(default_factory=list)

    def start(self, sends: Sequence[Transfer], recvs: Sequence[Transfer]) -> Sequence[Pending]:
        ends = [("send", x) for x in sends] + [("recv", x) for x in recvs]
        ends.sort(key=lambda end: end[1].tag)
        if ends:
            batch = [Operation(kind, x.peer, _content(x)) for kind, x in ends]
            self.batches.append(batch)
        return super().start(sends, recvs)


def _content(transfer: Transfer) -> tuple[int, tuple[int, ...], torch.dtype]:
    """K and V have one shape and one dtype: their tags tell them apart."""
    return transfer.tag, tuple(transfer.tensor.shape), transfer.tensor.dtype


def _replay(batches: Sequence[Sequence[Sequence[Operation]]]) -> None:
    """Raise AssertionError if some rank waits for ever."""
    world_size = len(batches)
    waiting = [deque(rank) for rank in batches]
    # Posted and not met, per (from, to): the ends of senders, and of receivers.
    sent: dict[tuple[int, int], deque[tuple[int, object]]] = {}
    expected: dict[tuple[int, int], deque[tuple[int, object]]] = {}
    open_ends = [0] * world_size
    ready = deque(range(world_size))

    def post(rank: int) -> None:
        for end in waiting[rank].popleft():
            open_ends[rank] += 1
            sends = end.kind == "send"
            pair = (rank, end.peer) if sends else (end.peer, rank)
            (sent if sends else expected).setdefault(pair, deque()).append((rank, end.content))
            if sent.get(pair) and expected.get(pair):
                (sender, gives), (receiver, takes) = sent[pair].popleft(), expected[pair].popleft()
                assert gives == takes, f"{pair}: {gives} meets {takes}"
                for met in (sender, receiver):
                    open_ends[met] -= 1
                    if not open_ends[met]:
                        ready.append(met)

    while ready:
        rank = ready.popleft()
        while waiting[rank] and not open_ends[rank]:
            post(rank)
    stuck = [rank for rank in range(world_size) if open_ends[rank] or waiting[rank]]
    assert not stuck, f"ranks {stuck[:8]} wait for ever"


def _cases() -> list[Case]:
    masks: tuple[dict[str, Any], ...] = (
        {},
        {"causal": False},
        {"window": 3, "sinks": 1},
        {"documents": 3},
    )
    everything = itertools.product((2, 3, 4, 8), SCHEDULES, masks)
    cases = []
    for i, (world_size, schedule, mask) in enumerate(everything):
        topology = ("switch", "cables", "fully_connected", "two_level")[(i + i // 4) % 4]
        if topology == "two_level" and world_size % 2:
            topology = "cables"
        case = Case(
            world_size=world_size,
            schedule=schedule,
            layout=LAYOUTS[i % 3],
            topology=topology,  # type: ignore[arg-type]
            tokens=4,
            head_dim=2,
        )
        cases.append(replace(case, **mask))
    return cases


@pytest.mark.proves("ring attention: no deadlock in NCCL's order", on="CPU")
@pytest.mark.parametrize("case", _cases(), ids=str)
def test_what_is_started_pairs_up_in_order(case: Case) -> None:
    _replay(_started(case))


def _started(case: Case) -> list[list[list[Operation]]]:
    """Each rank's batches, forward and backward."""

    def body(group: Any) -> list[list[Operation]]:
        recorder = _Recorder(group.rank(), group.size(), group.mail)
        qkv = (x[:, : case.local_len] for x in case.whole_inputs()[:3])
        inputs = [x.clone().requires_grad_() for x in qkv]
        ring_attention(*inputs, group=recorder, **case.settings).sum().backward()  # type: ignore[call-overload]
        return recorder.batches

    return run_virtual(case.world_size, body)


def _batches(route: Route, rank: int) -> list[list[Operation]]:
    batches = []
    for step in route.program(rank).steps:
        for lane, groups in enumerate((step.guests, step.results)):
            for _, hops in groups:
                batch = [
                    Operation("send" if hop.src == rank else "recv", peer, (lane, hop.chain))
                    for hop in sorted(hops, key=lambda hop: hop.chain)
                    for peer in [hop.dst if hop.src == rank else hop.src]
                ]
                batches.append(batch)
    return batches


@pytest.mark.proves("ring attention: no deadlock up to 256 ranks", on="CPU")
@pytest.mark.parametrize(
    ("world_size", "schedule", "kind"),
    [
        *itertools.product((16,), SCHEDULES, TOPOLOGIES),
        *(
            pytest.param(256, schedule, kind, marks=pytest.mark.slow)
            for schedule in ("one_way", "two_way")
            for kind in ("cables", "two_level")
        ),
        pytest.param(256, "token_ring", "two_level", marks=pytest.mark.slow),
        pytest.param(128, "token_ring", "cables", marks=pytest.mark.slow),
        pytest.param(64, "all_gather", "switch", marks=pytest.mark.slow),
    ],
)
def test_tables_of_large_worlds_pair_up_in_order(world_size: int, schedule: str, kind: str) -> None:
    wiring = wire_up(TOPOLOGIES[kind], ranks=tuple(range(world_size)), world_size=world_size)
    # Backward has both lanes; forward's is one of them.
    route = route_of_pass(
        schedule,
        backward=True,
        shape=Shape(heads=8, kv_heads=2, head_dim=64, dtype=torch.bfloat16),
        sharding=Sharding(512 * world_size, world_size, "zigzag"),
        mask=Mask(),
        wiring=wiring,
    )
    _replay([_batches(route, rank) for rank in range(world_size)])


def test_replay_finds_a_deadlock() -> None:
    crossed = [
        [[Operation("send", 1 - rank, "x")], [Operation("recv", 1 - rank, "x")]]
        for rank in range(2)
    ]
    with pytest.raises(AssertionError, match="wait for ever"):
        _replay(crossed)


@pytest.mark.parametrize("kind", ["send", "recv"])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_replay_finds_two_tensors_of_one_shape_that_change_places(schedule: str, kind: str) -> None:
    batches = _started(Case(world_size=2, schedule=schedule, causal=False))
    _replay(batches)
    # Of one batch of rank 0, K and V, or what goes with queries in backward.
    swapped = next(
        (batch, first, second)
        for batch in batches[0]
        for first, second in itertools.combinations(range(len(batch)), 2)
        if batch[first].kind == batch[second].kind == kind
        and _without_tag(batch[first]) == _without_tag(batch[second])
    )
    batch, first, second = swapped
    batch[first], batch[second] = batch[second], batch[first]
    with pytest.raises(AssertionError, match="meets"):
        _replay(batches)


def _without_tag(operation: Operation) -> object:
    assert isinstance(operation.content, tuple)
    return operation.content[1:]
