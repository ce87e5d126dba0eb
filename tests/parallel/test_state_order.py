"""No exchange of states deadlocks under NCCL, which pairs transfers in order and forgets tags.

As `test_nccl_order.py`, whose replay this is, on what is really started.
"""

import itertools
from typing import Any

import pytest
import torch

from ringctx.parallel.layout import Sharding
from ringctx.parallel.parts import chain_of
from ringctx.parallel.state_exchange import METHODS, StateExchange
from tests.parallel.lightning_cases import (
    DOCUMENTS,
    LightningCase,
    bounds_of,
    differentiate_on_rank,
)
from tests.parallel.test_nccl_order import Operation, _Recorder, _replay
from tests.virtual_ranks import run_virtual

LAYOUTS = ("contiguous", "zigzag")


@pytest.mark.proves("lightning attention: no deadlock in NCCL's order", on="CPU")
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("exchange", METHODS)
@pytest.mark.parametrize("documents", DOCUMENTS)
def test_what_is_started_pairs_up_in_order(documents: str, exchange: str, layout: str) -> None:
    for world_size in (2, 3, 4):
        case = LightningCase(
            world_size=world_size,
            layout=layout,
            exchange=exchange,
            documents=documents,
            tokens=4,
            batch=1,
        )
        _replay(_started(case))


def _started(case: LightningCase) -> list[list[list[Operation]]]:
    """Each rank's batches, forward and backward."""

    def body(group: Any) -> list[list[Operation]]:
        recorder = _Recorder(group.rank(), group.size(), group.mail)
        differentiate_on_rank(recorder, case)
        return recorder.batches

    return run_virtual(case.world_size, body)


@pytest.mark.proves("lightning attention: no deadlock up to 64 ranks", on="CPU")
@pytest.mark.parametrize(
    ("world_size", "layout", "exchange", "documents"),
    [
        *itertools.product(
            (16,), LAYOUTS, METHODS, ("one", "inside_every_other_part", "random_3", "after_edges")
        ),
        *itertools.product((64,), LAYOUTS, METHODS, ("one", "random_3")),
    ],
)
def test_large_worlds_pair_up_in_order(
    world_size: int, layout: str, exchange: str, documents: str
) -> None:
    seq_len = 8 * world_size
    bounds = bounds_of(documents, seq_len=seq_len, world_size=world_size)
    sharding = Sharding(seq_len, world_size, layout)
    chain = chain_of(sharding, torch.tensor(bounds, dtype=torch.int32))

    def body(group: Any) -> list[list[Operation]]:
        recorder = _Recorder(group.rank(), group.size(), group.mail)
        slots = len(chain.parts_of(group.rank()))
        states = StateExchange(recorder, chain, exchange, None)
        for backward in (False, True):
            states.start(
                torch.ones(slots, 1, 1, 2, 1), torch.zeros(slots, 1, 1), backward=backward
            ).wait()
        return recorder.batches

    batches = run_virtual(world_size, body)
    assert sum(len(batch) for rank in batches for batch in rank) >= world_size
    _replay(batches)


def test_replay_finds_a_hop_that_waits_for_the_way_back() -> None:
    batches = _started(LightningCase(world_size=3, exchange="ring", tokens=4))
    _replay(batches)
    # The middle rank: front half in and on, back half in and on.
    hops = [i for i, batch in enumerate(batches[1]) if len(batch) == 1]
    assert [batches[1][i][0].kind for i in hops] == ["recv", "send", "recv", "send"] * 2
    onward, back = hops[1:3]
    batches[1][onward], batches[1][back] = batches[1][back], batches[1][onward]
    with pytest.raises(AssertionError, match="wait for ever"):
        _replay(batches)
