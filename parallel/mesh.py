"""The layout of a step follows its length: which ranks share a sequence, which take others.

All sequences of a step have one length, so the context-parallel degree is chosen per step:
cp = max(1, len / tokens_per_rank) and dp = world / cp. Tokens per rank, memory and the number of
forwards are then the same for every length, short sequences pay for no ring, and long ones get as
long a ring as they need. cp groups are contiguous ranks, dp groups the strided rest; the process
groups are made once, for the degrees that a plan uses.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.distributed as dist

from ringctx.config import Layout, ParallelConfig, Schedule
from ringctx.errors import ConfigError
from ringctx.parallel.comm import Group, SoloGroup

__all__ = ["ContextMesh", "Mesh", "StepLayout", "World", "step_layout", "step_layouts"]


@dataclass(frozen=True, kw_only=True)
class World:
    """All ranks of the run, as this one sees them."""

    rank: int
    size: int
    device: torch.device


@dataclass(frozen=True, kw_only=True)
class StepLayout:
    """How the rows of one sequence length are spread; a pure function of length and world size."""

    cp_degree: int
    """Ranks that share a row."""
    dp_degree: int
    """Groups of such ranks, each with rows of its own."""
    rows: int
    """Rows of one forward on each group."""

    def num_rounds(self, num_rows: int) -> int:
        """Forwards that each rank makes for a step of `num_rows` rows."""
        return -(-num_rows // (self.dp_degree * self.rows))

    def rows_without_targets(self, num_rows: int) -> int:
        """Rows that fill up the last round."""
        return self.num_rounds(num_rows) * self.dp_degree * self.rows - num_rows


@dataclass(frozen=True, kw_only=True)
class ContextMesh:
    """With whom this rank shares its rows in the steps of one sequence length."""

    group: Group
    """The ranks that share a row, in layout order."""
    cp_rank: int
    """Index of this rank in `group`."""
    dp_rank: int
    """Index of `group` among the groups of the world."""
    sizes: StepLayout
    """How rows of this length are spread."""
    layout: Layout
    """Which tokens of a row a rank holds."""
    schedule: Schedule
    """What travels in the ring."""


def _largest_cp_degree(world_size: int, parallel: ParallelConfig) -> int:
    """The largest power of two that divides the world, within `parallel.max_cp_degree`."""
    whole = world_size & -world_size
    return min(whole, parallel.max_cp_degree or whole)


def step_layout(bucket_len: int, *, world_size: int, parallel: ParallelConfig) -> StepLayout:
    """Spread rows of one length over the world.

    Args:
        bucket_len: tokens of a row, a power of two.
        world_size: ranks of the run.
        parallel: tokens_per_rank and the degrees.

    Raises:
        ConfigError: if no allowed degree can hold the length, or the length is too short to be cut.
    """
    limit = _largest_cp_degree(world_size, parallel)
    per_rank = parallel.tokens_per_rank
    automatic = parallel.cp_degree == "auto"
    cp = max(1, bucket_len // per_rank) if automatic else int(parallel.cp_degree)
    if cp > limit and not automatic:
        raise ConfigError(
            f"parallel.cp_degree={cp} is above {limit}, the largest power of two that divides the "
            f"world of {world_size} ranks; lower it, use 'auto', or start another number of ranks"
        )
    if bucket_len > min(cp, limit) * per_rank:
        degree = limit if automatic else cp
        raise ConfigError(
            f"sequences of {bucket_len:,} tokens do not fit: {_why(degree, world_size, parallel)}, "
            f"and with parallel.tokens_per_rank={per_rank:,} that holds {degree * per_rank:,} "
            f"tokens; lower curriculum.max_len to that, raise parallel.tokens_per_rank to "
            f"{bucket_len // degree:,}, or raise the degree"
        )
    blocks = cp * (2 if parallel.layout == "zigzag" else 1)
    if cp > 1 and bucket_len < blocks:
        raise ConfigError(
            f"sequences of {bucket_len} tokens cannot be cut into {blocks} blocks for "
            f"parallel.cp_degree={cp} and layout {parallel.layout}; raise curriculum.min_len to "
            f"{blocks} or lower the degree"
        )
    return StepLayout(
        cp_degree=cp, dp_degree=world_size // cp, rows=max(1, per_rank * cp // bucket_len)
    )


def step_layouts(
    bucket_lens: Iterable[int], *, world_size: int, parallel: ParallelConfig
) -> dict[int, StepLayout]:
    """`step_layout` for every length of a plan; the longest is checked first."""
    longest_first = sorted(bucket_lens, reverse=True)
    return {
        length: step_layout(length, world_size=world_size, parallel=parallel)
        for length in longest_first
    }


def _why(degree: int, world_size: int, parallel: ParallelConfig) -> str:
    """Which rule sets the largest degree."""
    if parallel.cp_degree != "auto":
        return f"parallel.cp_degree is {degree}"
    if degree == parallel.max_cp_degree:
        return f"parallel.max_cp_degree is {degree}"
    return f"the largest power of two that divides the world of {world_size} ranks is {degree}"


class Mesh:
    """The meshes of every sequence length that a plan uses, with their process groups.

    Every rank of the world must make it, with the same arguments: it creates groups.
    """

    def __init__(
        self, bucket_lens: Iterable[int], *, world: World, parallel: ParallelConfig
    ) -> None:
        layouts = step_layouts(bucket_lens, world_size=world.size, parallel=parallel)
        groups = {
            degree: _cp_group(degree, world)
            for degree in sorted({layout.cp_degree for layout in layouts.values()})
        }
        self._meshes = {
            length: ContextMesh(
                group=groups[sizes.cp_degree],
                cp_rank=world.rank % sizes.cp_degree,
                dp_rank=world.rank // sizes.cp_degree,
                sizes=sizes,
                layout=parallel.layout,
                schedule=parallel.schedule,
            )
            for length, sizes in layouts.items()
        }

    def for_length(self, bucket_len: int) -> ContextMesh:
        """The mesh for rows of `bucket_len` tokens."""
        return self._meshes[bucket_len]


def _cp_group(degree: int, world: World) -> Group:
    """This rank's group of `degree` neighbours."""
    if degree == 1:
        return SoloGroup()
    if degree == world.size:
        whole = dist.group.WORLD
        assert whole is not None, "init_process_group comes before the mesh"
        return whole
    first = world.rank // degree * degree
    # Only the members take part, so that a world of n ranks does not make n / 2 groups.
    group = dist.new_group(list(range(first, first + degree)), use_local_synchronization=True)
    assert isinstance(group, dist.ProcessGroup)
    return group
