"""The product of worlds, layouts, masks, schedules and wirings, on virtual ranks."""

import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from ringctx.parallel.comm import (
    Group,
    SoloGroup,
)
from ringctx.parallel.layout import LAYOUTS
from tests.parallel.ring_cases import (
    MASKS,
    SCHEDULES,
    TOPOLOGIES,
    Case,
    RankResult,
    assert_matches_oracle,
    attend_on_rank,
)
from tests.virtual_ranks import run_virtual

# Even and odd lengths, GQA, MQA with an odd number of heads, MHA on one token.
SHAPES: tuple[dict[str, Any], ...] = (
    {"batch": 1, "tokens": 6, "heads": 4, "kv_heads": 2},
    {"batch": 2, "tokens": 5, "heads": 5, "kv_heads": 1},
    {"batch": 2, "tokens": 1, "heads": 3, "kv_heads": 3},
    {"batch": 1, "tokens": 9, "heads": 3, "kv_heads": 3},
)
WORLDS = (1, 2, 3, 4, 8)


def _fits(case: Case) -> bool:
    node_divides = case.topology != "two_level" or case.world_size % case.node == 0
    return node_divides and case.seq_len > max(case.documents, case.window or 0)


def _exact(i: int, world_size: int, layout: str, mask: dict[str, Any], schedule: str) -> Case:
    """Of the shapes and wires that fit, those whose turn it is."""
    choices = (
        Case(
            world_size=world_size,
            layout=layout,
            schedule=schedule,
            topology=TOPOLOGIES[(i // 5 + i + turn) % len(TOPOLOGIES)],
            node=(2, 4)[i // 4 % 2] if world_size == 8 else min(2, world_size),
            dtype=(torch.float32, torch.float64)[i // 3 % 2],
            **mask,
            **SHAPES[(i // 7 + i + turn // len(TOPOLOGIES)) % len(SHAPES)],
        )
        for turn in range(len(TOPOLOGIES) * len(SHAPES))
    )
    return next(case for case in choices if _fits(case))


# Every world x layout x mask x schedule, with shapes, dtypes and wires in turn.
EXACT = [
    _exact(i, *what) for i, what in enumerate(itertools.product(WORLDS, LAYOUTS, MASKS, SCHEDULES))
]
# In every world long enough for an error's mean to mean something.
ROUNDED = [
    Case(
        world_size=world_size,
        layout=layout,
        schedule=schedule,
        topology=TOPOLOGIES[i // 3 % len(TOPOLOGIES)] if world_size != 3 else "cables",
        node=min(2, world_size),
        dtype=torch.bfloat16,
        batch=2,
        tokens={1: 97, 2: 49, 3: 33, 4: 25, 8: 13}[world_size],
        heads=4,
        kv_heads=(1, 2, 4)[i // 2 % 3],
        head_dim=16,
        **(mask | ({"window": 40} if "window" in mask else {})),
    )
    for i, (world_size, layout, mask, schedule) in enumerate(
        itertools.product(WORLDS, LAYOUTS, MASKS, SCHEDULES)
    )
]
# A double ring goes round its nodes while the next node gets its copy.
NODES = [
    Case(
        world_size=world_size,
        layout=LAYOUTS[i % len(LAYOUTS)],
        schedule="two_way",
        topology="two_level",
        node=node,
        dtype=torch.float64,
        tokens=2,
        head_dim=4,
        **mask,
    )
    for i, ((world_size, node), mask) in enumerate(
        itertools.product(((6, 3), (8, 4), (9, 3), (12, 4)), MASKS)
    )
]


def test_the_product_leaves_nothing_out() -> None:
    masks = [Case(world_size=1, **mask) for mask in MASKS]
    for cases_ in (EXACT, ROUNDED):
        found = {
            (
                case.world_size,
                case.layout,
                (case.causal, case.window is None, case.sinks, case.documents),
                case.schedule,
            )
            for case in cases_
        }
        kinds = {(x.causal, x.window is None, x.sinks, x.documents) for x in masks}
        assert found == set(itertools.product(WORLDS, LAYOUTS, kinds, SCHEDULES))
        assert len(cases_) == len(found) == 480
        assert all(_fits(case) for case in cases_)
    # None of them is a mask that hides nothing.
    assert all(case.seq_len > (case.window or 0) for case in NODES)


@pytest.mark.proves("ring attention: every schedule, layout and mask, both passes", on="CPU")
@pytest.mark.parametrize("case", EXACT + ROUNDED + NODES, ids=str)
def test_equals_the_float64_oracle(case: Case) -> None:
    results = run_virtual(case.world_size, lambda group: attend_on_rank(group, case))
    assert_matches_oracle(case, results)


@pytest.mark.parametrize(
    ("case", "parts", "turns"),
    [
        (Case(world_size=3, tokens=300, layout="contiguous"), 2, 1),
        (Case(world_size=2, tokens=602, window=300, sinks=5, documents=3), 2, 1),
        (Case(world_size=12, tokens=4), 1, 2),
        (Case(world_size=12, tokens=3, layout="striped", causal=False, batch=2), 1, 2),
        (Case(world_size=10, tokens=256, layout="contiguous", causal=False), 2, 2),
    ],
    ids=str,
)
def test_all_gather_in_two_parts_and_from_more_ranks_than_at_once(
    case: Case, parts: int, turns: int
) -> None:
    case = replace(
        case, schedule="all_gather", dtype=torch.float64, heads=2, kv_heads=1, head_dim=4
    )
    everywhere = tuple(range(case.world_size))
    plan = case.plan_in(SoloGroup(), ranks=everywhere, run_size=case.world_size)
    # The own shard is attended in the first ring step.
    assert plan.route(backward=False).num_steps == 1 + parts * turns
    results = run_virtual(case.world_size, lambda group: attend_on_rank(group, case))
    assert_matches_oracle(case, results)


@pytest.mark.parametrize("schedule", ["auto", *SCHEDULES])
@pytest.mark.parametrize(
    ("ranks", "run_size"),
    [((0, 1), 4), ((1, 2, 3), 4), ((0, 2, 5), 12), ((0, 1, 11), 12), ((3, 4, 7, 9, 10), 12)],
    ids=str,
)
def test_some_ranks_of_a_circle_of_cables_match_the_oracle(
    ranks: tuple[int, ...], run_size: int, schedule: str
) -> None:
    for i, mask in enumerate(MASKS):
        case = Case(
            world_size=len(ranks),
            layout=LAYOUTS[i % len(LAYOUTS)],
            schedule=schedule,
            topology="cables",
            dtype=torch.float64,
            tokens=4,
            head_dim=4,
            **mask,
        )

        def body(group: Group, case: Case = case) -> RankResult:
            plan = case.plan_in(group, ranks=ranks, run_size=run_size)
            assert not plan.wiring.closed
            return attend_on_rank(group, case, plan)

        assert_matches_oracle(case, run_virtual(case.world_size, body))


@st.composite
def cases(draw: st.DrawFn) -> Case:
    topology = draw(st.sampled_from(TOPOLOGIES))
    kv_heads = draw(st.integers(1, 3))
    causal = draw(st.booleans())
    window = draw(st.none() | st.integers(1, 40)) if causal else None
    nodes, node = draw(st.sampled_from([(1, 3), (2, 1), (2, 2), (3, 2), (2, 3), (2, 4)]))
    case = Case(
        world_size=nodes * node if topology == "two_level" else draw(st.sampled_from((1, 2, 3, 5))),
        node=node,
        layout=draw(st.sampled_from(LAYOUTS)),
        causal=causal,
        window=window,
        sinks=draw(st.integers(0, 5)) if window else 0,
        documents=draw(st.integers(1, 5)),
        schedule=draw(st.sampled_from(["auto", *SCHEDULES])),
        topology=topology,
        dtype=torch.float64,
        tokens=draw(st.integers(1, 12)),
        heads=kv_heads * draw(st.integers(1, 3)),
        kv_heads=kv_heads,
        head_dim=4,
    )
    assume(case.seq_len > case.documents)
    return case


@settings(max_examples=100, deadline=None)
@given(case=cases())
def test_any_case_equals_the_float64_oracle(case: Case) -> None:
    results = run_virtual(case.world_size, lambda group: attend_on_rank(group, case))
    assert_matches_oracle(case, results)
