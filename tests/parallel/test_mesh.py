"""Degrees follow the length: what a world can hold, and what it is told when it cannot."""

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st

from ringctx.config import ParallelConfig
from ringctx.errors import ConfigError
from ringctx.parallel.mesh import Mesh, World, step_layout, step_layouts
from tests.ranks import run_ranks


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
