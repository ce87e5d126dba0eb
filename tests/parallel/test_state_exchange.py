"""Both ways of exchanging states fold them exactly, and send nothing that is not needed."""

import itertools
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache

import pytest
import torch
from torch import Tensor

from ringctx.errors import LayoutError
from ringctx.parallel.comm import LocalGroup, Pending, Transfer, record_traffic
from ringctx.parallel.layout import Sharding
from ringctx.parallel.parts import Chain, chain_of
from ringctx.parallel.state_exchange import METHODS, StateExchange, UnderWay, check_exchange
from tests.parallel.lightning_cases import DOCUMENTS, bounds_of
from tests.parallel.ring_cases import Case, assert_matches_oracle, attend_on_rank
from tests.virtual_ranks import VirtualGroup, run_virtual

LAYOUTS = ("contiguous", "zigzag")
BATCH, HEADS = 2, 3
SHAPE = (BATCH, HEADS, 4, 5)
PART_LEN = 4


@dataclass(frozen=True, kw_only=True)
class _Case:
    world_size: int
    layout: str
    documents: str
    backward: bool = False
    data_decay: bool = False
    dtype: torch.dtype = torch.float64

    @property
    def chain(self) -> Chain:
        parts = 2 if self.layout == "zigzag" and self.world_size > 1 else 1
        seq_len = PART_LEN * parts * self.world_size
        bounds = bounds_of(self.documents, seq_len=seq_len, world_size=self.world_size)
        sharding = Sharding(seq_len, self.world_size, self.layout)
        return chain_of(sharding, torch.tensor(bounds, dtype=torch.int32))


@lru_cache(maxsize=64)
def _states(num_parts: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """What each part leaves, its log decay if the data decides, and that of a token if not."""
    generator = torch.Generator().manual_seed(num_parts)
    states = torch.randn((num_parts, *SHAPE), generator=generator, dtype=torch.float64)
    decays = -torch.rand((num_parts, BATCH, HEADS), generator=generator, dtype=torch.float64)
    return states.to(dtype), decays, torch.tensor([0.0, -0.1, -2.0], dtype=torch.float64)


def _incoming(group: LocalGroup, case: _Case, method: str) -> Tensor:
    exchange, leaving, decays = _prepared(group, case, method)
    return exchange.start(leaving, decays, backward=case.backward).wait()


def _incoming_everywhere(case: _Case, method: str) -> list[Tensor]:
    return run_virtual(case.world_size, lambda group: _incoming(group, case, method))


def _prepared(group: LocalGroup, case: _Case, method: str) -> tuple[StateExchange, Tensor, Tensor]:
    chain = case.chain
    states, decays, per_head = _states(len(chain.parts), case.dtype)
    own = list(chain.parts_of(group.rank()))
    if case.data_decay:
        return StateExchange(group, chain, method, None), states[own], decays[own]
    of_part = (per_head * chain.part_len).expand(len(own), 1, -1)
    return StateExchange(group, chain, method, per_head), states[own], of_part


def _expected(case: _Case) -> list[Tensor]:
    """By its definition: the states of all parts of the document, each decayed on its way."""
    chain = case.chain
    states, decays, per_head = _states(len(chain.parts), torch.float64)
    if not case.data_decay:
        decays = (per_head * chain.part_len).expand_as(decays)
    states = states if case.dtype == torch.float64 else states.to(case.dtype).double()

    def shared(part: int, other: int) -> bool:
        """Whether one document has the border of `part` and tokens of `other`."""
        low, high = sorted((chain.parts[part], chain.parts[other]), key=lambda p: p.start)
        return not any(low.stop <= border <= high.start for border in chain.bounds)

    total = []
    for part in range(len(chain.parts)):
        result = torch.zeros(SHAPE, dtype=torch.float64)
        others = range(part + 1, len(chain.parts)) if case.backward else range(part)
        for other in others:
            between = range(min(part, other) + 1, max(part, other))
            if shared(part, other):
                weight = sum((decays[p] for p in between), torch.zeros(BATCH, HEADS)).exp()
                result += weight[..., None, None] * states[other]
        total.append(result)
    return [torch.stack([total[p] for p in chain.parts_of(r)]) for r in range(case.world_size)]


CASES = [
    _Case(
        world_size=world_size,
        layout=layout,
        documents=documents,
        backward=backward,
        data_decay=data_decay,
    )
    for world_size, layout, documents, backward, data_decay in itertools.product(
        (1, 2, 3, 5), LAYOUTS, DOCUMENTS, (False, True), (False, True)
    )
]


@pytest.mark.proves("exchange of states: both ways fold exactly", on="CPU")
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("documents", DOCUMENTS)
def test_both_ways_give_the_fold_by_definition_in_the_same_bits(
    documents: str, layout: str
) -> None:
    for case in CASES:
        if case.layout != layout or case.documents != documents:
            continue
        gathered, ringed = (_incoming_everywhere(case, method) for method in METHODS)
        for one, other, expected in zip(gathered, ringed, _expected(case), strict=True):
            torch.testing.assert_close(one, expected, rtol=1e-13, atol=1e-13, msg=str(case))
            assert torch.equal(one, other), case


@pytest.mark.parametrize("method", METHODS)
def test_states_of_fp32_travel_in_fp32(method: str) -> None:
    case = _Case(world_size=3, layout="zigzag", documents="one", dtype=torch.float32)
    for data_decay in (False, True):
        typed = replace(case, data_decay=data_decay)
        incoming = _incoming_everywhere(typed, method)
        for found, expected in zip(incoming, _expected(typed), strict=True):
            assert found.dtype == torch.float32
            torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("method", METHODS)
def test_nothing_moves_between_ranks_that_no_document_joins(method: str, backward: bool) -> None:
    case = _Case(world_size=4, layout="contiguous", documents="at_one_edge", backward=backward)

    def body(group: LocalGroup) -> set[int]:
        with record_traffic() as ledger:
            _incoming(group, case, method)
        return set(ledger.sent) | set(ledger.received)

    peers = run_virtual(4, body)
    assert peers == [{1}, {0}, {3}, {2}]


@pytest.mark.parametrize("method", METHODS)
def test_ring_and_gather_send_one_state_a_part_and_reader(method: str) -> None:
    case = _Case(world_size=4, layout="zigzag", documents="one")

    def body(group: LocalGroup) -> dict[int, int]:
        with record_traffic() as ledger:
            _incoming(group, case, method)
        return dict(ledger.sent)

    state = 8 * BATCH * HEADS * 4 * 5
    for rank, sent in enumerate(run_virtual(4, body)):
        assert set(sent.values()) <= {state, 2 * state}
        neighbours = {rank - 1, rank + 1} & set(range(4))
        assert set(sent) == (neighbours if method == "ring" else set(range(4)) - {rank})


@dataclass
class _Noted:
    """A transfer that notes when it is waited for."""

    pending: Pending
    waits: list[str]

    def wait(self) -> None:
        self.waits.append("wait")
        self.pending.wait()


@dataclass
class _Noting(VirtualGroup):
    waits: list[str] = field(default_factory=list)

    def start(self, sends: Sequence[Transfer], recvs: Sequence[Transfer]) -> Sequence[Pending]:
        return [_Noted(pending, self.waits) for pending in super().start(sends, recvs)]


@pytest.mark.parametrize("method", METHODS)
def test_start_waits_for_nothing(method: str) -> None:
    case = _Case(world_size=3, layout="zigzag", documents="at_one_edge")

    def body(group: LocalGroup) -> None:
        assert isinstance(group, VirtualGroup)
        noting = _Noting(group.rank(), group.size(), group.mail)
        exchange, leaving, decays = _prepared(noting, case, method)
        arrival = exchange.start(leaving, decays, backward=False)
        assert not noting.waits
        arrival.wait()
        assert noting.waits

    run_virtual(3, body)


@pytest.mark.parametrize("method", METHODS)
def test_two_directions_and_ring_attention_may_be_under_way_at_once(method: str) -> None:
    forward = _Case(world_size=4, layout="zigzag", documents="one", data_decay=True)
    backward = replace(forward, backward=True)
    attention = Case(world_size=4, schedule="one_way", causal=False)

    def body(group: LocalGroup) -> tuple[Tensor, Tensor, object]:
        under_way: list[UnderWay] = []
        for case in (forward, backward):
            exchange, leaving, decays = _prepared(group, case, method)
            under_way.append(exchange.start(leaving, decays, backward=case.backward))
        attended = attend_on_rank(group, attention)
        return under_way[0].wait(), under_way[1].wait(), attended

    ahead, back, attended = zip(*run_virtual(4, body), strict=True)
    for case, found in ((forward, ahead), (backward, back)):
        for one, expected in zip(found, _expected(case), strict=True):
            torch.testing.assert_close(one, expected)
    assert_matches_oracle(attention, list(attended))


@pytest.mark.parametrize("method", METHODS)
def test_two_calls_may_be_under_way_at_once(method: str) -> None:
    case = _Case(world_size=3, layout="zigzag", documents="one")

    def body(group: LocalGroup) -> tuple[Tensor, Tensor]:
        first, second = (_prepared(group, case, method) for _ in range(2))
        one = first[0].start(first[1], first[2], backward=False)
        other = second[0].start(2 * second[1], second[2], backward=False)
        return one.wait(), other.wait()

    for (one, other), expected in zip(run_virtual(3, body), _expected(case), strict=True):
        torch.testing.assert_close(one, expected)
        torch.testing.assert_close(other, 2 * expected)


def test_rejects_an_exchange_that_is_not_known() -> None:
    check_exchange("auto")
    with pytest.raises(LayoutError, match=r"'doubling' is not known; .* auto, all_gather, ring"):
        check_exchange("doubling")


@pytest.mark.parametrize("method", METHODS)
def test_asking_whether_it_is_ready_passes_states_on(method: str) -> None:
    case = _Case(world_size=4, layout="zigzag", documents="one")

    def body(group: LocalGroup) -> Tensor:
        exchange, leaving, decays = _prepared(group, case, method)
        arrival = exchange.start(leaving, decays, backward=False)
        # None of the ranks waits: with the ring each hop needs the one before.
        while not arrival.ready():
            time.sleep(1e-4)
        return arrival.wait()

    for found, expected in zip(run_virtual(4, body), _expected(case), strict=True):
        torch.testing.assert_close(found, expected)
