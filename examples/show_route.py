"""Show who gets what from whom: `python examples/show_route.py [schedule] [ranks] [topology]`.

Prints the routes of causal attention, and how a window shortens them. Nothing runs; a route is a
table that every rank works out for itself.
"""

import sys
from typing import Any, get_args

from ringctx.config import TopologyConfig, TopologyKind
from ringctx.parallel.cost import SCHEDULES, pass_cost, route_of_pass
from ringctx.parallel.layout import Sharding
from ringctx.parallel.mask import Mask
from ringctx.parallel.render_route import render_route
from ringctx.parallel.topology import wire_up
from ringctx.parallel.traffic import Shape


def main(schedule: str = "two_way", ranks: str = "4", topology: str = "cables") -> int:
    if schedule not in SCHEDULES or topology not in get_args(TopologyKind):
        print(f"schedules: {', '.join(SCHEDULES)}; topologies: {', '.join(get_args(TopologyKind))}")
        return 2
    if not ranks.isdecimal() or int(ranks) < 1:
        print(f"ranks: {ranks!r} is not a number of ranks; write for example 4")
        return 2
    world_size = int(ranks)
    kind = next(name for name in get_args(TopologyKind) if name == topology)
    # As large as divides the ranks: two nodes, where their number is even.
    halves = (n for n in range(world_size // 2, 0, -1) if world_size % n == 0)
    nodes = next(halves, 1) if kind == "two_level" else None
    wiring = wire_up(
        TopologyConfig(kind=kind, ranks_per_node=nodes),
        ranks=tuple(range(world_size)),
        world_size=world_size,
    )
    shape = Shape(heads=8, kv_heads=8, head_dim=64)
    sharding = Sharding(16 * world_size, world_size, "zigzag")
    for name, mask in (("causal", Mask()), ("a window of 5", Mask(window=5))):
        for backward in (False, True):
            case: dict[str, Any] = {
                "backward": backward,
                "shape": shape,
                "sharding": sharding,
                "mask": mask,
                "wiring": wiring,
            }
            route, cost = route_of_pass(schedule, **case), pass_cost(schedule, **case)
            print(f"\n{name}, {'backward' if backward else 'forward'}: ", end="")
            print(render_route(route, world_size=world_size))
            print(f"busiest link: {cost.busiest_bytes:,} bytes ({cost.busiest_link})")
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
