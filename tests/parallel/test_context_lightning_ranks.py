"""Lightning attention between real processes: gloo, its tags and its subgroups."""

import itertools

import pytest
import torch
import torch.distributed as dist

from ringctx.errors import LayoutError
from ringctx.parallel.comm import record_traffic
from ringctx.parallel.context_lightning import context_lightning
from tests.parallel.lightning_cases import (
    LightningCase,
    LightningResult,
    assert_matches_oracle,
    differentiate_on_rank,
)
from tests.ranks import run_ranks

DOCUMENTS = ("one", "at_one_edge", "around_edges", "of_seven", "random_2", "empty_ones")
CASES = [
    LightningCase(
        world_size=world_size,
        layout=layout,
        exchange=exchange,
        documents=DOCUMENTS[(i + i // 6) % len(DOCUMENTS)],
        data_decay=bool(i // 2 % 2),
        dtype=(torch.float64, torch.float32)[i // 3 % 2],
        chunk_len=(16, None)[i % 2],
    )
    for i, (world_size, layout, exchange, _) in enumerate(
        itertools.product((2, 3, 4), ("zigzag", "contiguous"), ("all_gather", "ring"), range(2))
    )
] + [
    LightningCase(world_size=1, documents="of_seven"),
    LightningCase(world_size=4, exchange="auto", heads=5, documents="of_one_token"),
    # A megabyte a message: more than a socket holds.
    LightningCase(world_size=2, batch=1, heads=1, key_dim=512, value_dim=256),
    LightningCase(
        world_size=3, batch=1, heads=1, key_dim=512, value_dim=256, exchange="ring", data_decay=True
    ),
]


def _world() -> dist.ProcessGroup:
    assert dist.group.WORLD is not None
    return dist.group.WORLD


def _differentiate(case: LightningCase) -> LightningResult:
    return differentiate_on_rank(_world(), case)


@pytest.mark.proves("lightning attention over ranks, forward and backward", on="CPU/gloo")
@pytest.mark.parametrize("case", CASES, ids=str)
def test_equals_the_float64_recurrence_over_gloo(case: LightningCase) -> None:
    assert_matches_oracle(case, run_ranks(case.world_size, _differentiate, case))


def _in_pairs(case: LightningCase) -> tuple[LightningResult, dict[int, int]]:
    # Ranks 0 and 3 share one sequence, 1 and 2 another; every rank makes every group.
    pairs = [[0, 3], [1, 2]]
    groups = [dist.new_group(pair) for pair in pairs]
    mine = next(i for i, pair in enumerate(pairs) if dist.get_rank() in pair)
    with record_traffic() as ledger:
        result = differentiate_on_rank(groups[mine], case)
    return result, dict(ledger.sent)


@pytest.mark.parametrize("exchange", ["all_gather", "ring"])
def test_subgroups_share_sequences_of_their_own(exchange: str) -> None:
    case = LightningCase(world_size=2, exchange=exchange)
    results, sent = zip(*run_ranks(4, _in_pairs, case), strict=True)
    assert_matches_oracle(case, [results[0], results[3]])
    assert_matches_oracle(case, [results[1], results[2]])
    assert [set(peers) for peers in sent] == [{3}, {2}, {1}, {0}]


def _after_a_disagreement(case: LightningCase) -> tuple[str, LightningResult]:
    rank = dist.get_rank()
    local = {name: case.local(name, x, rank) for name, x in case.whole_inputs().items()}
    local.pop("grad_out")
    exchange = ("all_gather", "ring")[rank]
    with pytest.raises(LayoutError, match="make the same call:\nexchange: ") as raised:
        context_lightning(**local, group=_world(), **case.settings | {"exchange": exchange})  # type: ignore[arg-type]
    return str(raised.value), _differentiate(case)


def test_ranks_that_disagree_all_raise_and_can_still_use_their_group() -> None:
    case = LightningCase(world_size=2)
    messages, results = zip(*run_ranks(2, _after_a_disagreement, case), strict=True)
    assert len(set(messages)) == 1
    assert_matches_oracle(case, list(results))
