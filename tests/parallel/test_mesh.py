"""Degrees follow the length: what a world can hold, and what it is told when it cannot."""

from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st

from ringctx.config import ParallelConfig
from ringctx.errors import ConfigError, LayoutError
from ringctx.parallel import positions, unshard
from ringctx.parallel.comm import Group, LocalGroup, SoloGroup, group_size
from ringctx.parallel.layout import LAYOUTS
from ringctx.parallel.mesh import (
    Mesh,
    SplitRanks,
    World,
    context_mesh,
    split_ranks,
    step_layout,
    step_layouts,
)
from ringctx.parallel.subgroup import subgroup
from tests.ranks import run_ranks
from tests.virtual_ranks import run_virtual


@given(
    log_world=st.integers(0, 10),
    odd=st.sampled_from([1, 3, 5]),
    log_per_rank=st.integers(8, 14),
    log_len=st.integers(8, 22),
    steps=st.integers(1, 5),
)
def test_tokens_per_rank_and_forwards_are_the_same_for_every_length(
    log_world: int, odd: int, log_per_rank: int, log_len: int, steps: int
) -> None:
    world, per_rank, length = odd * 2**log_world, 2**log_per_rank, 2**log_len
    parallel = ParallelConfig(tokens_per_rank=per_rank)
    if length > 2**log_world * per_rank:
        with pytest.raises(ConfigError, match="do not fit"):
            step_layout(length, world_size=world, parallel=parallel)
        return
    layout = step_layout(length, world_size=world, parallel=parallel)
    assert layout.cp_degree == max(1, length // per_rank)
    assert layout.cp_degree * layout.dp_degree == world
    assert layout.rows * length == per_rank * layout.cp_degree
    tokens_per_step = steps * world * per_rank
    if tokens_per_step % length == 0:
        assert layout.num_rounds(tokens_per_step // length) == steps
        assert layout.rows_without_targets(tokens_per_step // length) == 0


@pytest.mark.parametrize(("world", "degrees"), [(24, {1, 2, 4, 8}), (48, {1, 2, 4, 8, 16})])
def test_worlds_that_are_not_powers_of_two_use_the_degrees_that_divide_them(
    world: int, degrees: set[int]
) -> None:
    parallel = ParallelConfig(tokens_per_rank=1024)
    lengths = [1024 * degree for degree in sorted(degrees)]
    layouts = step_layouts([256, *lengths], world_size=world, parallel=parallel)
    assert {layout.cp_degree for layout in layouts.values()} == degrees
    with pytest.raises(ConfigError, match=rf"holds {max(lengths):,} tokens; lower curriculum"):
        step_layout(2 * max(lengths), world_size=world, parallel=parallel)


def test_rows_that_do_not_divide_are_filled_up() -> None:
    layout = step_layout(256, world_size=3, parallel=ParallelConfig(tokens_per_rank=512))
    assert (layout.num_rounds(8), layout.rows_without_targets(8)) == (2, 4)


@pytest.mark.parametrize(
    ("length", "world", "settings", "message"),
    [
        (4096, 2, {"tokens_per_rank": 1024}, "raise parallel.tokens_per_rank to 2,048"),
        (
            4096,
            4,
            {"tokens_per_rank": 1024, "max_cp_degree": 2},
            "parallel.max_cp_degree is 2, and",
        ),
        (4096, 4, {"tokens_per_rank": 1024, "cp_degree": 2}, "parallel.cp_degree is 2, and"),
        (4096, 6, {"tokens_per_rank": 1024}, "divides the world of 6 ranks is 2, and"),
        (256, 3, {"cp_degree": 2}, "above 1, the largest power of two that divides"),
        (8, 8, {"cp_degree": 8}, "cannot be cut into 16 blocks"),
    ],
)
def test_a_length_that_no_degree_can_hold_is_refused_with_the_remedy(
    length: int, world: int, settings: dict[str, int], message: str
) -> None:
    parallel = ParallelConfig(**settings)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=message):
        step_layout(length, world_size=world, parallel=parallel)


def test_a_fixed_degree_is_used_for_every_length() -> None:
    parallel = ParallelConfig(tokens_per_rank=1024, cp_degree=2)
    layout = step_layout(256, world_size=4, parallel=parallel)
    assert (layout.cp_degree, layout.dp_degree, layout.rows) == (2, 2, 8)


def _check_groups() -> tuple[int, int, int]:
    rank = dist.get_rank()
    world = World(rank=rank, size=4, device=torch.device("cpu"))
    mesh = Mesh([64, 128, 256], world=world, parallel=ParallelConfig(tokens_per_rank=64))
    for length, degree in ((64, 1), (128, 2), (256, 4)):
        shared = mesh.for_length(length)
        assert shared.group.size() == shared.sizes.cp_degree == degree
        assert shared.group.rank() == shared.cp_rank == rank % degree
        assert shared.dp_rank == rank // degree
    pair = mesh.for_length(128).group
    assert isinstance(pair, dist.ProcessGroup)
    total = torch.tensor([rank])
    dist.all_reduce(total, group=pair)
    return rank, int(total), mesh.for_length(128).dp_rank


def test_groups_are_neighbours_and_work() -> None:
    assert run_ranks(4, _check_groups) == [(0, 1, 0), (1, 1, 0), (2, 5, 1), (3, 5, 1)]


@given(
    log_cp=st.integers(0, 4),
    log_ulysses=st.integers(0, 4),
    odd=st.sampled_from([1, 3]),
    layout=st.sampled_from(LAYOUTS),
    tokens=st.integers(1, 3),
)
def test_a_ulysses_group_holds_one_shard_of_the_ring_in_the_same_layout(
    log_cp: int, log_ulysses: int, odd: int, layout: str, tokens: int
) -> None:
    cp_degree, degree = odd * 2**log_cp, 2 ** min(log_cp, log_ulysses)
    ring_degree = cp_degree // degree
    seq_len = 2 * tokens * cp_degree
    # Any rank will do; the ends and one between.
    for rank in {0, cp_degree // 2, cp_degree - 1}:
        ranks = split_ranks(rank, cp_degree=cp_degree, ulysses_degree=degree, layout=layout)
        assert set(ranks.ulysses) & set(ranks.ring) == {rank}
        assert (len(ranks.ulysses), len(ranks.ring)) == (degree, ring_degree)
        held = [
            positions(seq_len, rank=peer, world_size=cp_degree, layout=layout)
            for peer in ranks.ulysses
        ]
        of_ring = positions(
            seq_len, rank=ranks.ring.index(rank), world_size=ring_degree, layout=layout
        )
        assert torch.equal(torch.cat(held).sort().values, of_ring)
        # In the group's own order they are laid out as a sequence of their own.
        for i, part in enumerate(held):
            own = positions(len(of_ring), rank=i, world_size=degree, layout=layout)
            assert torch.equal(of_ring[own], part)


def test_neighbours_share_heads_but_in_striped_a_ring() -> None:
    sizes = {"cp_degree": 8, "ulysses_degree": 2}
    assert split_ranks(5, layout="zigzag", **sizes) == SplitRanks(ulysses=(4, 5), ring=(1, 3, 5, 7))
    assert split_ranks(5, layout="striped", **sizes) == SplitRanks(
        ulysses=(1, 5), ring=(4, 5, 6, 7)
    )


def test_rejects_degrees_that_do_not_divide_and_groups_that_do_not_fit() -> None:
    def body(group: Group) -> None:
        with pytest.raises(LayoutError, match=r"ulysses_degree=4 does not .* one of 1, 2, 3, 6"):
            context_mesh(group, ulysses_degree=4)
        with pytest.raises(LayoutError, match="ulysses_degree=0 does not divide"):
            context_mesh(group, ulysses_degree=0)
        mesh = context_mesh(group, ulysses_degree=3)
        with pytest.raises(LayoutError, match="groups of 1 x 2 ranks do not make up a group of 6"):
            replace(mesh, ulysses_group=SoloGroup())

    run_virtual(6, body)


def test_groups_of_one_and_of_all_are_not_made_anew() -> None:
    def body(group: Group) -> None:
        flat = context_mesh(group)
        assert flat.ring_group is group
        assert (flat.ulysses_degree, flat.ring_degree) == (1, 4)
        heads = context_mesh(group, ulysses_degree=8)
        assert heads.ulysses_group is group
        assert (heads.ulysses_degree, heads.ring_degree) == (4, 1)

    run_virtual(4, body)


def test_a_subgroup_counts_peers_among_its_own() -> None:
    def body(group: LocalGroup) -> list[int]:
        ranks = [1, 2, 4] if group.rank() in (1, 2, 4) else [0, 3]
        members = subgroup(group, ranks)
        assert group_size(members) == len(ranks)
        whole = unshard(torch.tensor([[float(group.rank())]]), group=members, layout="contiguous")
        return [int(x) for x in whole[0]]

    expected = {0: [0, 3], 1: [1, 2, 4]}
    told = run_virtual(5, body)
    assert told == [expected[int(rank in (1, 2, 4))] for rank in range(5)]


def _check_split_groups() -> tuple[list[int], list[int]]:
    rank = dist.get_rank()
    world = World(rank=rank, size=8, device=torch.device("cpu"))
    parallel = ParallelConfig(tokens_per_rank=64, ulysses_degree=2)
    mesh = Mesh([64, 128, 256, 512], world=world, parallel=parallel)
    for length, (heads, ring) in {64: (1, 1), 128: (2, 1), 256: (2, 2), 512: (2, 4)}.items():
        shared = mesh.for_length(length)
        assert (shared.ulysses_degree, shared.ring_degree) == (heads, ring)
        assert shared.cp_rank == rank % shared.sizes.cp_degree
        assert shared.dp_rank == rank // shared.sizes.cp_degree
        assert shared.topology == parallel.topology
    shared = mesh.for_length(256)
    members = []
    for group in (shared.ulysses_group, shared.ring_group):
        mine = torch.tensor([[float(rank)]])
        whole = unshard(mine, group=group, layout="contiguous")
        members.append([int(x) for x in whole[0]])
    return members[0], members[1]


def test_a_mesh_of_heads_and_rings_works_over_gloo() -> None:
    told = run_ranks(8, _check_split_groups)
    for rank, (heads, ring) in enumerate(told):
        first = rank // 4 * 4
        assert heads == [rank // 2 * 2, rank // 2 * 2 + 1]
        assert ring == [first + rank % 2, first + rank % 2 + 2]
