"""Which wires a transfer loads."""

from itertools import pairwise

import numpy as np
import pytest

from ringctx.config import TopologyConfig
from ringctx.errors import LayoutError
from ringctx.parallel.topology import Wiring, wire_up

CABLES = TopologyConfig(kind="cables")
TWO_LEVEL = TopologyConfig(kind="two_level", ranks_per_node=2, link_gbit=10.0, node_gbit=80.0)


def whole(topology: TopologyConfig | None, ranks: int) -> Wiring:
    return wire_up(topology, ranks=tuple(range(ranks)), world_size=ranks)


def links(wiring: Wiring, src: int, dst: int) -> list[str]:
    used = wiring.occupied(np.array([src]), np.array([dst]))
    assert not used.transfer.any()
    return [wiring.link_name(link) for link in used.link.tolist()]


def test_a_switch_is_a_port_out_and_a_port_in() -> None:
    assert links(whole(None, 4), 1, 3) == ["out of 1", "into 3"]


def test_private_links_are_one_for_each_pair_and_direction() -> None:
    full = whole(TopologyConfig(kind="fully_connected"), 4)
    assert links(full, 1, 3) == ["1 -> 3"] and links(full, 3, 1) == ["3 -> 1"]


def test_cables_are_taken_by_the_shorter_way() -> None:
    circle = whole(CABLES, 5)
    assert links(circle, 0, 2) == ["0 -> 1", "1 -> 2"]
    assert links(circle, 1, 4) == ["1 -> 0", "0 -> 4"]
    assert links(circle, 4, 0) == ["4 -> 0"]


@pytest.mark.parametrize("ranks", [2, 3, 4, 7])
def test_cables_lead_from_source_to_destination(ranks: int) -> None:
    circle = whole(CABLES, ranks)
    for src in range(ranks):
        for dst in set(range(ranks)) - {src}:
            way = [tuple(map(int, name.split(" -> "))) for name in links(circle, src, dst)]
            assert way[0][0] == src and way[-1][1] == dst
            assert all(a[1] == b[0] for a, b in pairwise(way))
            assert all((b - a) % ranks in (1, ranks - 1) for a, b in way)
            assert len(way) == min((dst - src) % ranks, (src - dst) % ranks)


def test_a_node_s_ranks_share_its_port_but_not_inside() -> None:
    nodes = whole(TWO_LEVEL, 4)
    assert links(nodes, 0, 1) == ["out of 0", "into 1"]
    assert links(nodes, 0, 3) == ["out of node 0", "into node 1"]
    inside, across = (
        nodes.bytes_per_s(nodes.occupied(np.array([0]), np.array([dst])).link) for dst in (1, 2)
    )
    assert (inside == 80e9 / 8).all() and (across == 10e9 / 8).all()


def test_inside_a_node_is_eight_times_faster_unless_told() -> None:
    nodes = whole(TopologyConfig(kind="two_level", ranks_per_node=2, link_gbit=10.0), 4)
    used = nodes.occupied(np.array([0]), np.array([1]))
    assert (nodes.bytes_per_s(used.link) == 80e9 / 8).all()


def test_many_transfers_at_once_are_as_one_by_one() -> None:
    for topology in (None, CABLES, TWO_LEVEL, TopologyConfig(kind="fully_connected")):
        wiring = whole(topology, 6)
        src, dst = (x.ravel() for x in np.nonzero(~np.eye(6, dtype=bool)))
        used = wiring.occupied(src, dst)
        for i, (a, b) in enumerate(zip(src.tolist(), dst.tolist(), strict=True)):
            mine = [wiring.link_name(link) for link in used.link[used.transfer == i].tolist()]
            assert sorted(mine) == sorted(links(wiring, a, b))


def test_part_of_a_circle_is_not_closed_and_uses_the_names_of_the_run() -> None:
    part = wire_up(CABLES, ranks=(2, 3, 4), world_size=8)
    assert not part.closed and whole(CABLES, 8).closed
    assert links(part, 0, 2) == ["2 -> 3", "3 -> 4"]
    assert wire_up(None, ranks=(2, 3, 4), world_size=8).closed


def test_counts_the_ranks_of_the_group_that_share_a_node() -> None:
    assert whole(None, 6).ranks_per_node == 6
    assert whole(TWO_LEVEL, 6).ranks_per_node == 2
    assert wire_up(TWO_LEVEL, ranks=(0, 2, 4), world_size=6).ranks_per_node == 1


@pytest.mark.parametrize("ranks", [(0, 1, 2), (0, 2, 1, 3), (1, 2, 3)])
def test_rejects_a_group_spread_unevenly_over_nodes(ranks: tuple[int, ...]) -> None:
    with pytest.raises(LayoutError, match=r"ranks_per_node=2 does not spread .* evenly"):
        wire_up(TWO_LEVEL, ranks=ranks, world_size=4)
