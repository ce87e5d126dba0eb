"""A route as text: which pieces each rank attends at each ring step, and from where they came.

One idea: a column a rank, a row a ring step; the arrow shows the direction round the ring.

    step   rank 0         rank 1         rank 2         rank 3
    0      own            own            own            own
    1      >3[0:4]        >0[0:4]        >1[0:4]        >2[0:4]

`>` came from the rank before, `<` from the rank after, `~` from elsewhere; `3[0:4]` is rows 0 to 3
of the shard of rank 3, `(...)` is only passed on, `+2` is the sum for 2[...] on its way.
"""

from collections import defaultdict

from ringctx.parallel.layout import Piece
from ringctx.parallel.routes import Hop, Route

__all__ = ["render_route"]


def render_route(route: Route, *, world_size: int) -> str:
    """The table of all ranks, ring steps downwards.

    Args:
        route: of one pass.
        world_size: ranks that share the sequence.
    """
    cells: dict[tuple[int, int], list[str]] = defaultdict(list)
    for rank in range(world_size):
        cells[0, rank].append("own")
        for todo in route.program(rank).steps:
            for due, hops in todo.guests:
                for hop in hops:
                    if hop.dst == rank:
                        cells[due, rank].append(_visitor(route, hop, world_size))
            for due, hops in todo.results:
                for hop in hops:
                    if hop.dst == rank:
                        cells[due, rank].append(_result(route, hop, world_size))
    return "\n".join([_headline(route), *_table(cells, route.num_steps, world_size)])


def _headline(route: Route) -> str:
    what = "keys and values travel" if route.travels == "kv" else "queries travel"
    how = {
        "none": "nothing comes home",
        "direct": "results go straight home",
        "carried": "sums are carried along, then home",
    }[route.returns]
    return f"{route.schedule}: {what}; {how}"


def _visitor(route: Route, hop: Hop, world_size: int) -> str:
    chain = route.chains[hop.chain]
    name = f"{_arrow(hop, world_size)}{_name(chain.piece)}"
    attended = chain.attends[chain.path[1:].index(hop.dst)]
    return name if attended else f"({name})"


def _result(route: Route, hop: Hop, world_size: int) -> str:
    piece = route.chains[hop.chain].piece
    home = "home" if hop.dst == piece.owner else f"+{piece.owner}"
    return f"{_arrow(hop, world_size)}{home}[{piece.start}:{piece.stop}]"


def _arrow(hop: Hop, world_size: int) -> str:
    ahead = (hop.dst - hop.src) % world_size
    if ahead == 1:
        return ">"
    return "<" if ahead == world_size - 1 else f"~{hop.src}:"


def _name(piece: Piece) -> str:
    return f"{piece.owner}[{piece.start}:{piece.stop}]"


def _table(cells: dict[tuple[int, int], list[str]], steps: int, world_size: int) -> list[str]:
    """Several pieces at one step and rank stand below each other."""
    columns = [[f"rank {rank}"] for rank in range(world_size)]
    labels = ["step"]
    for step in range(steps):
        height = max(1, *(len(cells[step, rank]) for rank in range(world_size)))
        labels += [str(step), *[""] * (height - 1)]
        for rank, column in enumerate(columns):
            here = cells[step, rank]
            column += [*here, *[""] * (height - len(here))]
    widths = [max(map(len, column)) + 2 for column in columns]
    rows = zip(labels, *columns, strict=True)
    lines = []
    for label, *row in rows:
        padded = (f"{cell:{width}}" for cell, width in zip(row, widths, strict=True))
        lines.append(f"{label:6}{''.join(padded)}".rstrip())
    return lines
