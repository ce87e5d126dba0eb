"""Ring attention between real processes: gloo, its tags, its subgroups, and torch.compile."""

import itertools
import warnings
from dataclasses import replace
from typing import Any, get_args

import pytest
import torch
import torch.distributed as dist

from ringctx.config import TopologyKind
from ringctx.errors import LayoutError
from ringctx.parallel import ring_attention, shard, unshard
from ringctx.parallel.comm import Group, record_traffic
from tests.parallel.ring_cases import Case, RankResult, assert_matches_oracle, attend_on_rank
from tests.ranks import run_ranks

MASKS: tuple[dict[str, Any], ...] = (
    {},
    {"causal": False},
    {"window": 7, "sinks": 2, "documents": 3},
)
TOPOLOGIES: tuple[TopologyKind, ...] = get_args(TopologyKind)
SCHEDULES = ("one_way", "two_way", "token_ring", "all_gather")
CASES = [
    Case(
        world_size=world_size,
        schedule=schedule,
        layout=("zigzag", "contiguous", "striped")[i % 3],
        topology=TOPOLOGIES[(i // 2 + i) % len(TOPOLOGIES)],
        batch=1 + i % 2,
        tokens=5,
        **mask,
    )
    for i, (schedule, mask, world_size) in enumerate(itertools.product(SCHEDULES, MASKS, (2, 4, 8)))
] + [
    Case(world_size=1),
    Case(world_size=3, topology="cables", schedule="two_way"),
    Case(world_size=3, topology="cables", schedule="token_ring", documents=4),
    Case(world_size=3, topology="fully_connected", schedule="auto"),
    Case(world_size=2, dtype=torch.float64, tokens=1, layout="striped"),
    Case(world_size=3, dtype=torch.float64, heads=5, kv_heads=1, tokens=7, layout="contiguous"),
    Case(world_size=2, dtype=torch.bfloat16, tokens=33, head_dim=16, schedule="token_ring"),
    Case(world_size=4, dtype=torch.bfloat16, tokens=33, head_dim=16, layout="striped"),
    # A megabyte a message: more than a socket holds.
    Case(world_size=2, tokens=256, heads=2, kv_heads=2, head_dim=512),
    Case(world_size=3, tokens=256, heads=2, kv_heads=2, head_dim=512, schedule="token_ring"),
]


def _world() -> dist.ProcessGroup:
    assert dist.group.WORLD is not None
    return dist.group.WORLD


def _attend(case: Case) -> RankResult:
    return attend_on_rank(_world(), case)


@pytest.mark.proves("ring attention: every schedule, both passes", on="CPU/gloo")
@pytest.mark.parametrize("case", CASES, ids=str)
def test_equals_the_float64_oracle_over_gloo(case: Case) -> None:
    assert_matches_oracle(case, run_ranks(case.world_size, _attend, case))


def _attend_in_pairs(case: Case) -> tuple[RankResult, dict[int, int]]:
    # Ranks 0 and 3 share one sequence, 1 and 2 another; every rank makes every group.
    pairs = [[0, 3], [1, 2]]
    groups = [dist.new_group(pair) for pair in pairs]
    mine = next(i for i, pair in enumerate(pairs) if dist.get_rank() in pair)
    with record_traffic() as ledger:
        result = attend_on_rank(groups[mine], case)
    return result, dict(ledger.sent)


def test_peers_count_within_the_group_and_bytes_by_global_rank() -> None:
    case = Case(world_size=2)
    results, sent = zip(*run_ranks(4, _attend_in_pairs, case), strict=True)
    assert_matches_oracle(case, [results[0], results[3]])
    assert_matches_oracle(case, [results[1], results[2]])
    assert [list(peers) for peers in sent] == [[3], [2], [1], [0]]


def _attend_on_some(case: Case, ranks: list[int]) -> RankResult | None:
    group = dist.new_group(ranks)
    return attend_on_rank(group, case) if dist.get_rank() in ranks else None


@pytest.mark.parametrize("schedule", ["auto", *SCHEDULES])
@pytest.mark.parametrize("ranks", [[0, 1], [1, 2, 3]], ids=str)
def test_some_ranks_of_a_circle_of_cables_match_the_oracle(ranks: list[int], schedule: str) -> None:
    # The two ends are not neighbours: a path.
    case = Case(world_size=len(ranks), topology="cables", schedule=schedule, window=7, sinks=1)
    results = run_ranks(4, _attend_on_some, case, ranks)
    assert_matches_oracle(case, [x for x in results if x is not None])


def _attend_after_a_disagreement(case: Case) -> tuple[str, RankResult]:
    mine = replace(case, window=4 + dist.get_rank())
    with pytest.raises(LayoutError, match=r"(?s)not make the same call:\nwindow: ") as raised:
        _attend(mine)
    return str(raised.value), _attend(case)


def test_ranks_that_disagree_all_raise_and_can_still_use_their_group() -> None:
    case = Case(world_size=2, schedule="two_way")
    messages, results = zip(*run_ranks(2, _attend_after_a_disagreement, case), strict=True)
    assert len(set(messages)) == 1
    assert "rank 0 has 4; rank 1 has 5" in messages[0]
    assert_matches_oracle(case, list(results))


def _attend_compiled(case: Case) -> tuple[RankResult, RankResult]:
    inputs = case.whole_inputs()
    where = {"rank": dist.get_rank(), "world_size": case.world_size, "layout": case.layout}
    *leaves, grad_out = (shard(x, **where) for x in inputs)  # type: ignore[arg-type]
    settings = case.settings

    def block(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = ring_attention(q * 2, k * 3, v.sin(), group=_world(), **settings)  # type: ignore[call-overload]
        return out.cos()

    # The compiler warns about its own doings.
    warnings.simplefilter("ignore")
    results = []
    for attend in (block, torch.compile(block, backend="aot_eager")):
        qkv = [x.clone().requires_grad_() for x in leaves]
        out = attend(*qkv)
        results.append(RankResult(out.detach(), out, *torch.autograd.grad(out, qkv, grad_out)))
    return results[0], results[1]


@pytest.mark.slow
@pytest.mark.parametrize(
    "case",
    [
        Case(world_size=2),
        Case(world_size=2, schedule="two_way", window=5, sinks=1, documents=3, topology="cables"),
    ],
    ids=str,
)
def test_a_compiled_block_around_it_gives_the_same_numbers(case: Case) -> None:
    for eager, compiled in run_ranks(2, _attend_compiled, case):
        for name in ("out", "grad_q", "grad_k", "grad_v"):
            torch.testing.assert_close(getattr(compiled, name), getattr(eager, name))


def _unshard(layout: str) -> bool:
    whole = torch.arange(2 * 24 * 3.0).reshape(2, 24, 3)
    settings = {"rank": dist.get_rank(), "world_size": 3, "layout": layout}
    group: Group = _world()
    return torch.equal(unshard(shard(whole, **settings), group=group, layout=layout), whole)  # type: ignore[arg-type]


@pytest.mark.parametrize("layout", ["contiguous", "zigzag", "striped"])
def test_unshard_rebuilds_the_whole_over_gloo(layout: str) -> None:
    assert all(run_ranks(3, _unshard, layout))
