"""Which wires a transfer loads: the physics that schedules are chosen by.

One idea: a transfer occupies a few directed links, each at its rate, and many transfers take as
long as the busiest link. What counts as a link:

    switch            the sender's port out, the receiver's port in
    fully_connected   the pair's own wire
    cables            every wire on the shorter way round the circle of global ranks
    two_level         inside a node as `switch`; between nodes the two nodes' ports alone
"""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from ringctx.config import TopologyConfig
from ringctx.errors import LayoutError

__all__ = ["Ints", "Occupied", "Wiring", "wire_up"]

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True, eq=False)
class Occupied:
    """Each transfer's links, flat: transfer[i] occupies link[i]."""

    transfer: Ints
    link: Ints


@dataclass(frozen=True, slots=True)
class Wiring:
    """A topology as the ranks of one group see it. Links are numbered; `link_name` tells which."""

    topology: TopologyConfig
    # Global rank of each rank of the group.
    ranks: tuple[int, ...]
    # Ranks of the whole run. Cables join the last of them to the first.
    world_size: int

    @property
    def closed(self) -> bool:
        """Whether the group's last rank is as near to its first as any two neighbours are."""
        return self.topology.kind != "cables" or len(self.ranks) == self.world_size

    @property
    def ranks_per_node(self) -> int:
        """Ranks of the group that share a node: all of them, but for two_level."""
        node = self.topology.ranks_per_node
        if node is None:
            return len(self.ranks)
        return sum(rank // node == self.ranks[0] // node for rank in self.ranks)

    def occupied(self, src: Ints, dst: Ints) -> Occupied:
        """The links of transfers between ranks of the group, `src[i]` to `dst[i]`."""
        ranks = np.array(self.ranks)
        a, b, n = ranks[src], ranks[dst], self.world_size
        every = np.arange(len(a))
        if self.topology.kind == "fully_connected":
            return Occupied(every, a * n + b)
        if self.topology.kind == "cables":
            return self._way_round(a, b)
        out, into = a, n + b
        if self.topology.ranks_per_node is not None:
            node_a, node_b = a // self.topology.ranks_per_node, b // self.topology.ranks_per_node
            crosses = node_a != node_b
            out = np.where(crosses, 2 * n + node_a, out)
            into = np.where(crosses, 3 * n + node_b, into)
        return Occupied(np.concatenate([every, every]), np.concatenate([out, into]))

    def _way_round(self, a: Ints, b: Ints) -> Occupied:
        """Wire i goes up from rank i, wire n + i down from it."""
        n = self.world_size
        up = (b - a) % n
        rising = 2 * up <= n
        hops = np.where(rising, up, n - up)
        transfer = np.repeat(np.arange(len(a)), hops)
        hop = np.arange(len(transfer)) - np.repeat(np.cumsum(hops) - hops, hops)
        upwards = rising[transfer]
        start = (a[transfer] + np.where(upwards, hop, -hop)) % n
        return Occupied(transfer, np.where(upwards, start, n + start))

    def bytes_per_s(self, link: Ints) -> npt.NDArray[np.float64]:
        """What each of the links carries."""
        gbit = np.full(len(link), self.topology.link_gbit)
        if self.topology.kind == "two_level":
            inside = self.topology.node_gbit or 8 * self.topology.link_gbit
            gbit = np.where(link < 2 * self.world_size, inside, gbit)
        return gbit * 1e9 / 8

    def link_name(self, link: int) -> str:
        """A link in words."""
        n = self.world_size
        if self.topology.kind == "fully_connected":
            return f"{link // n} -> {link % n}"
        kind, end = divmod(link, n)
        if self.topology.kind == "cables":
            return f"{end} -> {(end + (-1 if kind else 1)) % n}"
        return f"{('out of', 'into', 'out of node', 'into node')[kind]} {end}"


def wire_up(topology: TopologyConfig | None, *, ranks: tuple[int, ...], world_size: int) -> Wiring:
    """How the ranks of a group are wired.

    Args:
        topology: None is a switch.
        ranks: global rank of each rank of the group.
        world_size: ranks of the whole run.

    Raises:
        LayoutError: if the nodes of two_level do not fit the group.
    """
    if topology is not None and not isinstance(topology, TopologyConfig):
        raise LayoutError(
            f"topology={topology!r} must be a ringctx.config.TopologyConfig, such as "
            "TopologyConfig(kind='cables'), or None for a switch"
        )
    return _wire_up(topology or TopologyConfig(), ranks, world_size)


@lru_cache(maxsize=64)
def _wire_up(topology: TopologyConfig, ranks: tuple[int, ...], world_size: int) -> Wiring:
    if topology.ranks_per_node is not None:
        nodes = [rank // topology.ranks_per_node for rank in ranks]
        sizes = {nodes.count(node) for node in set(nodes)}
        if len(sizes) > 1 or nodes != sorted(nodes):
            raise LayoutError(
                f"topology.ranks_per_node={topology.ranks_per_node} does not spread the "
                f"{len(ranks)} ranks that share a sequence evenly over nodes; "
                "use a number that divides the group, or one at least as large"
            )
    return Wiring(topology, ranks, world_size)
