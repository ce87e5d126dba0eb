"""The section `parallel`: how a step is spread over the ranks, and how they are wired."""

import math
from dataclasses import dataclass, field
from typing import Literal

from ringctx.config.checks import is_power_of_two, require

__all__ = [
    "Layout",
    "ParallelConfig",
    "Schedule",
    "StateExchange",
    "TopologyConfig",
    "TopologyKind",
]

Layout = Literal["contiguous", "zigzag", "striped"]
Schedule = Literal["auto", "one_way", "two_way", "token_ring", "all_gather"]
StateExchange = Literal["auto", "all_gather", "ring"]
TopologyKind = Literal["switch", "cables", "fully_connected", "two_level"]


@dataclass(frozen=True, kw_only=True)
class TopologyConfig:
    """How the ranks are wired; the cheapest schedule follows from it."""

    kind: TopologyKind = "switch"
    """switch: one full-duplex port a rank; cables: rank i wired to i + 1, in a circle;
    fully_connected: a link for every pair; two_level: fast nodes on a slow switch."""
    link_gbit: float = 400.0
    """Gbit/s (1e9 bits) of one link in each direction; two_level: of each node's port."""
    latency_us: float = 10.0
    """Microseconds that every transfer takes besides its bytes."""
    ranks_per_node: int | None = None
    """two_level: consecutive ranks that share a node."""
    node_gbit: float | None = None
    """two_level: Gbit/s of one rank's port inside its node; null: 8 times link_gbit."""
    flops: float = 3e14
    """FLOP/s that one rank's attention kernels reach."""

    def __post_init__(self) -> None:
        """Check ranges."""
        node, two_level = self.ranks_per_node, self.kind == "two_level"
        above_zero = {"link_gbit": self.link_gbit, "flops": self.flops}
        if self.node_gbit is not None:
            above_zero["node_gbit"] = self.node_gbit
        require(
            [
                *(
                    (
                        math.isfinite(value) and value > 0,
                        f"parallel.topology.{name}={value} must be above 0, and a finite number",
                    )
                    for name, value in above_zero.items()
                ),
                (
                    math.isfinite(self.latency_us) and self.latency_us >= 0,
                    f"parallel.topology.latency_us={self.latency_us} must be at least 0, and a "
                    "finite number",
                ),
                (
                    node is not None or not two_level,
                    "parallel.topology.kind=two_level needs parallel.topology.ranks_per_node: how "
                    "many consecutive ranks share a node, for example 8",
                ),
                (
                    node is None or two_level,
                    f"parallel.topology.ranks_per_node={node} has no use with parallel.topology."
                    f"kind={self.kind}: leave it out, or choose two_level",
                ),
                (
                    self.node_gbit is None or two_level,
                    f"parallel.topology.node_gbit={self.node_gbit} has no use with parallel."
                    f"topology.kind={self.kind}, which has no nodes: leave it out, or choose "
                    "two_level",
                ),
                (
                    node is None or node > 0,
                    f"parallel.topology.ranks_per_node={node} must be at least 1",
                ),
            ]
        )


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """How a step is spread over the ranks."""

    tokens_per_rank: int = 8192
    """Tokens that a rank holds in one forward, a power of two: sets the memory of activations."""
    cp_degree: int | Literal["auto"] = "auto"
    """Ranks that share a sequence: auto follows the length (max(1, len / tokens_per_rank))."""
    max_cp_degree: int | None = None
    """Longest ring; lengths that need more are refused. Null: as long as the world allows."""
    layout: Layout = "zigzag"
    """Which tokens of a sequence a rank holds; zigzag and striped balance causal work. L layers
    need runs of tokens: zigzag or contiguous."""
    ulysses_degree: int = 1
    """Of a ring's ranks, how many split the heads between them instead of the tokens; 1: none."""
    schedule: Schedule = "auto"
    """What travels in the ring. one_way: K/V, always to the next rank; two_way: K/V, both ways,
    each piece only as far as the mask needs it; token_ring: queries, and partial results home;
    all_gather: K/V, straight to every rank that needs them; auto: the cheapest of these by the
    formulas for the shape, the mask and the topology, in each pass by itself."""
    state_exchange: StateExchange = "auto"
    """How the states of L layers travel, one a head and part of the sequence. all_gather: every
    rank's to all, at once; ring: from rank to rank, the fewest bytes but one after the other; auto:
    the cheaper by the formulas."""
    topology: TopologyConfig = field(default_factory=TopologyConfig)
    """How the ranks are wired, which only `auto` and the routes ask: just the kind, as in
    `topology: cables`, or a section, as in `topology: {kind: cables, link_gbit: 50}`."""
    engine: Literal["fsdp2", "ddp"] = "fsdp2"
    """fsdp2 shards weights, gradients and optimizer over all ranks; ddp keeps a copy on each."""

    def __post_init__(self) -> None:
        """Check degrees by themselves; the world size is checked when it is known."""
        cp = self.cp_degree
        require(
            [
                (
                    is_power_of_two(self.tokens_per_rank),
                    f"parallel.tokens_per_rank={self.tokens_per_rank:,} must be a power of two, "
                    "so that it divides or is divided by every sequence length",
                ),
                (
                    cp == "auto" or is_power_of_two(int(cp)),
                    f"parallel.cp_degree={cp} must be 'auto' or a power of two",
                ),
                (
                    self.max_cp_degree is None or is_power_of_two(self.max_cp_degree),
                    f"parallel.max_cp_degree={self.max_cp_degree} must be a power of two, or null",
                ),
                (
                    is_power_of_two(self.ulysses_degree),
                    f"parallel.ulysses_degree={self.ulysses_degree} must be a power of two, as "
                    "every degree of context parallelism is; 1 is none",
                ),
                (
                    self.ulysses_degree <= min(self._cp_bounds(), default=self.ulysses_degree),
                    f"parallel.ulysses_degree={self.ulysses_degree} is above the "
                    f"{min(self._cp_bounds(), default=0)} ranks that may share a sequence; lower "
                    "it, or raise parallel.cp_degree or max_cp_degree",
                ),
                (
                    cp == "auto" or self.max_cp_degree is None or int(cp) <= self.max_cp_degree,
                    f"parallel.cp_degree={cp} is above parallel.max_cp_degree="
                    f"{self.max_cp_degree}; lower the one or raise the other",
                ),
            ]
        )

    def _cp_bounds(self) -> list[int]:
        """What the settings say of the largest ring."""
        degrees = (self.cp_degree, self.max_cp_degree)
        return [degree for degree in degrees if isinstance(degree, int)]
