"""Attention over ulysses x ring: exact in every layout, and no more bytes than its two parts."""

import itertools
import warnings
from dataclasses import replace
from typing import Any, get_args

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from ringctx.config import Schedule, TopologyConfig
from ringctx.errors import LayoutError
from ringctx.parallel import ring_attention
from ringctx.parallel.comm import Group, LocalGroup, SoloGroup, group_rank, record_traffic
from ringctx.parallel.context_attention import context_attention
from ringctx.parallel.layout import LAYOUTS
from ringctx.parallel.mesh import context_mesh
from ringctx.parallel.ulysses import ulysses_attention
from tests.parallel.context_cases import (
    ContextCase,
    RankResult,
    assert_matches_oracle,
    differentiate_on_rank,
)
from tests.ranks import run_ranks
from tests.virtual_ranks import run_virtual

MASKS: tuple[dict[str, Any], ...] = (
    {},
    {"causal": False},
    {"window": 7, "sinks": 2},
    {"documents": (9, 1, 12)},
    {"window": 4, "documents": (6, 11)},
)
DEGREES = ((1, 1), (2, 1), (2, 2), (4, 2), (4, 4), (6, 2), (6, 3), (8, 2), (8, 4))
EXACT = [
    ContextCase(
        world_size=world_size,
        ulysses_degree=ulysses_degree,
        layout=layout,
        batch=2,
        tokens=5,
        heads=12,
        kv_heads=kv_heads,
        **mask,
    )
    for (world_size, ulysses_degree), layout, kv_heads, mask in itertools.product(
        DEGREES, LAYOUTS, (1, 4, 12), MASKS
    )
]
ROUNDED = [
    ContextCase(
        world_size=world_size,
        ulysses_degree=ulysses_degree,
        layout=layout,
        dtype=torch.bfloat16,
        tokens=33,
        head_dim=16,
    )
    for (world_size, ulysses_degree), layout in itertools.product(((2, 2), (4, 2), (6, 3)), LAYOUTS)
    if 8 % ulysses_degree == 0
]


def _attend(group: Group, case: ContextCase, **settings: Any) -> RankResult:
    mesh = context_mesh(group, ulysses_degree=case.ulysses_degree, layout=case.layout)
    assert mesh.cp_rank == group_rank(group)
    return differentiate_on_rank(
        case,
        mesh.cp_rank,
        lambda q, k, v: context_attention(q, k, v, mesh=mesh, **case.mask, **settings),
    )


@pytest.mark.proves("context attention (ulysses x ring), forward and backward", on="CPU")
@pytest.mark.parametrize("case", EXACT + ROUNDED, ids=str)
def test_equals_the_float64_oracle(case: ContextCase) -> None:
    results = run_virtual(case.world_size, lambda group: _attend(group, case))
    assert_matches_oracle(case, results)


@pytest.mark.parametrize("schedule", get_args(Schedule))
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_schedule_and_topology_gives_the_same_result(layout: Any, schedule: str) -> None:
    kinds = (
        TopologyConfig(kind="cables"),
        TopologyConfig(kind="fully_connected"),
        TopologyConfig(kind="two_level", ranks_per_node=2),
    )
    for topology, mask in zip(kinds, MASKS[2:], strict=True):
        case = ContextCase(world_size=8, ulysses_degree=2, layout=layout, heads=4, **mask)
        settings = {"schedule": schedule, "topology": topology}
        results = run_virtual(8, lambda group: _attend(group, case, **settings))  # noqa: B023
        assert_matches_oracle(case, results)


OVER_GLOO = [
    ContextCase(world_size=4, ulysses_degree=2, batch=2),
    ContextCase(world_size=4, ulysses_degree=2, layout="striped", window=5, kv_heads=1),
    ContextCase(
        world_size=4, ulysses_degree=4, layout="contiguous", documents=(5, 8), causal=False
    ),
    ContextCase(world_size=8, ulysses_degree=4, window=9, sinks=1, documents=(17,)),
    ContextCase(world_size=6, ulysses_degree=3, heads=12, kv_heads=4),
    ContextCase(world_size=4, ulysses_degree=2, dtype=torch.bfloat16, tokens=33, head_dim=16),
]


def _attend_over_gloo(case: ContextCase) -> RankResult:
    assert dist.group.WORLD is not None
    return _attend(dist.group.WORLD, case)


@pytest.mark.proves("context attention (ulysses x ring), forward and backward", on="CPU/gloo")
@pytest.mark.parametrize("case", OVER_GLOO, ids=str)
def test_equals_the_float64_oracle_over_gloo(case: ContextCase) -> None:
    assert_matches_oracle(case, run_ranks(case.world_size, _attend_over_gloo, case))


def _attend_compiled(case: ContextCase) -> tuple[RankResult, RankResult]:
    group = dist.group.WORLD
    assert group is not None
    mesh = context_mesh(group, ulysses_degree=case.ulysses_degree, layout=case.layout)

    def block(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return context_attention(lambda: q * 2, k * 3, v.sin(), mesh=mesh, **case.mask).cos()

    # The compiler warns about its own doings.
    warnings.simplefilter("ignore")
    compiled = torch.compile(block, backend="aot_eager")
    rank = mesh.cp_rank
    return differentiate_on_rank(case, rank, block), differentiate_on_rank(case, rank, compiled)


@pytest.mark.slow
def test_a_compiled_block_around_it_gives_the_same_numbers() -> None:
    case = ContextCase(world_size=4, ulysses_degree=2, window=5)
    for eager, compiled in run_ranks(4, _attend_compiled, case):
        for a, b in zip(vars(eager).values(), vars(compiled).values(), strict=True):
            torch.testing.assert_close(a, b)


def _moved(group: LocalGroup, case: ContextCase, attend: Any) -> int:
    *inputs, grad_out = case.local_inputs(group.rank())
    for x in inputs:
        x.requires_grad_()
    with record_traffic() as ledger:
        attend(*inputs).backward(grad_out)
    return ledger.moved_bytes


@pytest.mark.proves("context attention: bytes moved equal the formulas", on="CPU")
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("heads", "kv_heads"), [(8, 4), (8, 1)])
def test_moves_the_bytes_of_ulysses_and_of_a_shorter_ring(
    layout: Any, heads: int, kv_heads: int
) -> None:
    world_size, degree = 6, 2
    case = ContextCase(
        world_size=world_size, layout=layout, heads=heads, kv_heads=kv_heads, ulysses_degree=degree
    )
    # One rank of the ring holds twice the tokens, and half of the heads (but not of one head).
    ring = replace(
        case,
        world_size=world_size // degree,
        tokens=degree * case.local_len,
        heads=heads // degree,
        kv_heads=max(1, kv_heads // degree),
        ulysses_degree=1,
    )
    ring_bytes = run_virtual(
        ring.world_size,
        lambda group: _moved(
            group, ring, lambda q, k, v: ring_attention(q, k, v, group=group, layout=layout)
        ),
    )

    def body(group: LocalGroup) -> tuple[int, int]:
        mesh = context_mesh(group, ulysses_degree=degree, layout=layout)
        moved = _moved(group, case, lambda q, k, v: context_attention(q, k, v, mesh=mesh))
        return moved, group_rank(mesh.ring_group)

    per_head = case.local_len * case.head_dim * case.dtype.itemsize * (degree - 1)
    # q, out, k and v; and their gradients.
    exchanged = 2 * 2 * per_head * (heads // degree + max(1, kv_heads // degree))
    for moved, ring_rank in run_virtual(world_size, body):
        assert moved == exchanged + ring_bytes[ring_rank]


@pytest.mark.parametrize("degree", [1, 4])
def test_degrees_at_the_ends_are_bit_equal_to_ring_and_ulysses(degree: int) -> None:
    case = ContextCase(world_size=4, ulysses_degree=degree, window=5)

    def body(group: Group) -> bool:
        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            alone = ring_attention if degree == 1 else ulysses_attention
            return alone(q, k, v, group=group, **case.mask)

        results = (
            _attend(group, case),
            differentiate_on_rank(case, group_rank(group), attend),
        )
        pairs = zip(*(vars(result).values() for result in results), strict=True)
        return all(torch.equal(a, b) for a, b in pairs)

    assert all(run_virtual(4, body))


def test_takes_functions_that_make_the_inputs() -> None:
    for degree in (1, 2):
        case = ContextCase(world_size=4, ulysses_degree=degree)

        def body(group: Group, case: ContextCase = case) -> RankResult:
            mesh = context_mesh(group, ulysses_degree=case.ulysses_degree)
            return differentiate_on_rank(
                case,
                mesh.cp_rank,
                lambda q, k, v: context_attention(lambda: q, lambda: k, lambda: v, mesh=mesh),
            )

        assert_matches_oracle(case, run_virtual(4, body))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layout": "striped"}, "layout='striped' on a mesh that was made for 'zigzag'"),
        ({"schedule": "fastest"}, "schedule='fastest' is not known; choose one of auto, one_way"),
        ({"sinks": 1}, "sinks=1"),
        ({"q": torch.zeros(1, 4, 9, 8)}, "9 query heads cannot be shared equally by 2 ranks"),
        ({"k": torch.zeros(1, 6, 3, 8), "v": torch.zeros(1, 6, 3, 8)}, "q holds 4 local tokens"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_rejects_what_cannot_work_on_all_ranks(changes: dict[str, Any], message: str) -> None:
    inputs = {name: torch.zeros(1, 4, heads, 8) for name, heads in (("q", 6), ("k", 3), ("v", 3))}

    def body(group: Group) -> None:
        mesh = context_mesh(group, ulysses_degree=2)
        with record_traffic() as ledger, pytest.raises(LayoutError, match=message):
            context_attention(**(inputs | {"mesh": mesh} | changes))
        assert not ledger.moved_bytes

    run_virtual(4, body)


def test_rejects_nodes_that_do_not_fit_the_ring() -> None:
    topology = TopologyConfig(kind="two_level", ranks_per_node=3)

    def body(group: Group) -> None:
        mesh = context_mesh(group, topology=topology)
        q = torch.zeros(1, 4, 2, 8)
        with record_traffic() as ledger, pytest.raises(LayoutError, match="ranks_per_node=3"):
            context_attention(q, q, q, mesh=mesh)
        assert not ledger.moved_bytes

    run_virtual(4, body)


def test_one_rank_is_a_mesh_too() -> None:
    case = ContextCase(world_size=1, ulysses_degree=4, tokens=7, documents=(3,))
    assert_matches_oracle(case, [_attend(SoloGroup(), case)])
