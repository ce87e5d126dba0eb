"""The layout of a step follows its length: which ranks share a sequence, which take others.

All sequences of a step have one length, so the context-parallel degree is chosen per step:
cp = max(1, len / tokens_per_rank) and dp = world / cp. Tokens per rank, memory and the number of
forwards are then the same for every length, short sequences pay for no ring, and long ones get as
long a ring as they need. cp groups are contiguous ranks, dp groups the strided rest; the process
groups are made once, for the degrees that a plan uses. Within a cp group of u * r ranks, u of them
share the heads (Ulysses) and r, one of each such group, form a ring: see `context_attention`.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field, replace

import torch
import torch.distributed as dist

from ringctx.config import Layout, ParallelConfig, Schedule, StateExchange, TopologyConfig
from ringctx.errors import ConfigError, LayoutError
from ringctx.parallel.comm import Group, SoloGroup, group_rank, group_size
from ringctx.parallel.layout import check_layout
from ringctx.parallel.subgroup import subgroup

__all__ = [
    "ContextMesh",
    "Mesh",
    "SplitRanks",
    "StepLayout",
    "World",
    "context_mesh",
    "split_ranks",
    "step_layout",
    "step_layouts",
]


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
    """With whom this rank shares its rows in the steps of one sequence length.

    `context_mesh` makes one from a group. Without groups of its own it is the mesh of one rank.
    """

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
    state_exchange: StateExchange = "auto"
    """How the states of lightning attention travel between all ranks of `group`."""
    topology: TopologyConfig = field(default_factory=TopologyConfig)
    """How the ranks of the world are wired."""
    ulysses_group: Group = field(default_factory=SoloGroup)
    """The ranks of `group` that share the heads, in its order."""
    ring_group: Group = field(default_factory=SoloGroup)
    """The ranks of `group` with the same heads, in its order."""

    def __post_init__(self) -> None:
        """Raise LayoutError unless the two groups make up the whole."""
        degrees = f"{self.ulysses_degree} x {self.ring_degree}"
        if self.ulysses_degree * self.ring_degree != group_size(self.group):
            raise LayoutError(
                f"ulysses x ring groups of {degrees} ranks do not make up a group of "
                f"{group_size(self.group)}; let ringctx.parallel.context_mesh make the mesh"
            )

    @property
    def ulysses_degree(self) -> int:
        """Ranks that share the heads."""
        return group_size(self.ulysses_group)

    @property
    def ring_degree(self) -> int:
        """Ranks of the ring."""
        return group_size(self.ring_group)


@dataclass(frozen=True, kw_only=True)
class SplitRanks:
    """The two groups of one rank, as rising numbers within its cp group."""

    ulysses: tuple[int, ...]
    ring: tuple[int, ...]


def split_ranks(rank: int, *, cp_degree: int, ulysses_degree: int, layout: str) -> SplitRanks:
    """Split a cp group into groups that share heads and rings; pure.

    The ranks of a ulysses group are neighbours: cp_rank = ring_rank * ulysses_degree +
    ulysses_rank. Together they hold what one rank of a ring of cp_degree / ulysses_degree would
    hold, in the same layout. Striped, only ranks a ring apart do, so there the ranks of a ring are
    neighbours: cp_rank = ulysses_rank * ring_degree + ring_rank.

    Args:
        rank: within the cp group.
        cp_degree: ranks that share a row.
        ulysses_degree: ranks that share the heads; divides cp_degree.
        layout: one of `layout.LAYOUTS`.

    Raises:
        LayoutError: if the degrees do not divide, or the layout is unknown.
    """
    check_layout(layout)
    assert 0 <= rank < cp_degree, (rank, cp_degree)
    if ulysses_degree < 1 or cp_degree % ulysses_degree:
        fits = ", ".join(str(n) for n in range(1, cp_degree + 1) if cp_degree % n == 0)
        raise LayoutError(
            f"ulysses_degree={ulysses_degree} does not divide the {cp_degree} ranks that share a "
            f"sequence; choose one of {fits}"
        )
    near = cp_degree // ulysses_degree if layout == "striped" else ulysses_degree
    first = rank // near * near
    neighbours = tuple(range(first, first + near))
    apart = tuple(range(rank % near, cp_degree, near))
    if layout == "striped":
        return SplitRanks(ulysses=apart, ring=neighbours)
    return SplitRanks(ulysses=neighbours, ring=apart)


def context_mesh(
    group: Group,
    *,
    ulysses_degree: int = 1,
    layout: Layout = "zigzag",
    schedule: Schedule = "auto",
    state_exchange: StateExchange = "auto",
    topology: TopologyConfig | None = None,
) -> ContextMesh:
    """Make the mesh of one group, for `context_attention` and the layers of a model.

    Every rank of the group calls it, with the same arguments: it makes process groups, so once per
    group and not once per layer.

    Args:
        group: the ranks that share a sequence, in layout order.
        ulysses_degree: ranks that share the heads; at most the size of the group is used.
        layout: which tokens a rank holds.
        schedule: what travels in the ring.
        state_exchange: how the states of lightning attention travel.
        topology: how the ranks of the world are wired; None is a switch.

    Raises:
        LayoutError: if the degree does not divide the group, or the layout is unknown.
    """
    cp_degree, rank = group_size(group), group_rank(group)
    degree = min(ulysses_degree, cp_degree)
    ranks = split_ranks(rank, cp_degree=cp_degree, ulysses_degree=degree, layout=layout)
    return ContextMesh(
        group=group,
        cp_rank=rank,
        dp_rank=0,
        sizes=StepLayout(cp_degree=cp_degree, dp_degree=1, rows=1),
        layout=layout,
        schedule=schedule,
        state_exchange=state_exchange,
        topology=topology or TopologyConfig(),
        ulysses_group=subgroup(group, ranks.ulysses),
        ring_group=subgroup(group, ranks.ring),
    )


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
            f"tokens; lower curriculum.max_len (or len) to that, raise parallel.tokens_per_rank to "
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
        # Of equal degrees all lengths share one mesh, and with it the process groups.
        meshes = {
            degree: context_mesh(
                _cp_group(degree, world),
                ulysses_degree=parallel.ulysses_degree,
                layout=parallel.layout,
                schedule=parallel.schedule,
                state_exchange=parallel.state_exchange,
                topology=parallel.topology,
            )
            for degree in sorted({layout.cp_degree for layout in layouts.values()})
        }
        self._meshes = {
            length: replace(
                meshes[sizes.cp_degree], dp_rank=world.rank // sizes.cp_degree, sizes=sizes
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
    whole = dist.group.WORLD
    assert whole is not None, "init_process_group comes before the mesh"
    first = world.rank // degree * degree
    return subgroup(whole, range(first, first + degree))
