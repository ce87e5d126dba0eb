"""Draws the pictures of docs/ring_attention.md: who holds what, what is attended, what moves when.

One idea: nothing is drawn by hand. Layouts, slices and routes are those that the code runs with, so
a picture changes when they do. `python docs/draw_ring.py` writes docs/pictures/ring_*.png.
"""

from collections import defaultdict
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import FancyArrowPatch, Patch, Rectangle

from ringctx.config import TopologyConfig
from ringctx.parallel.cost import route_of_pass
from ringctx.parallel.layout import LAYOUTS, Piece, Sharding
from ringctx.parallel.mask import Mask, pair_slices
from ringctx.parallel.pair_counts import visible_pairs
from ringctx.parallel.routes import Hops, Route
from ringctx.parallel.topology import wire_up
from ringctx.parallel.traffic import Shape

PICTURES = Path(__file__).parent / "pictures"
# Okabe and Ito: told apart by colour-blind readers, and every rank is also named by its number.
COLORS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7")
KIND_COLORS = {"full": "#56B4E9", "causal": "#E69F00", "anticausal": "#8C4A86"}
BROKEN = (0, (3, 2))
RANKS = 4
MHA = Shape(heads=8, kv_heads=8, head_dim=64, dtype=torch.bfloat16)


def main() -> None:
    """Write all pictures."""
    save(layouts(), "ring_layouts")
    save(masks(), "ring_masks")
    for name, (carried, *panels) in ROUTES.items():
        save(routes(carried, *panels), f"ring_{name}")


def save(figure: Figure, name: str) -> None:
    """As PNG, the same bytes every time."""
    FigureCanvasAgg(figure)
    figure.savefig(PICTURES / f"{name}.png", dpi=110, metadata={"Software": None})


def layouts() -> Figure:
    """Three strips of 16 tokens, and the causal work that each gives to the ranks."""
    figure = Figure(figsize=(10, 3.6), layout="constrained")
    grid = figure.subplots(3, 2, width_ratios=(3, 1))
    for (strip, bars), layout in zip(grid, LAYOUTS, strict=True):
        sharding = Sharding(16, RANKS, layout)
        for rank in range(RANKS):
            for run in sharding.runs(rank):
                for i in range(run.length):
                    _box(strip, run.first + i * run.stride, 0, str(rank), COLORS[rank])
        strip.set(xlim=(-0.1, 16.1), ylim=(-0.1, 1.1))
        strip.set_title(layout, loc="left", fontsize=11)
        strip.axis("off")
        bars.bar(range(RANKS), causal_work(sharding), color=COLORS[:RANKS], width=0.8)
        bars.set_ylim(0, 64)
        bars.set_xticks(range(RANKS), [f"rank {rank}" for rank in range(RANKS)], fontsize=8)
        bars.set_yticks([])
        bars.spines[["top", "left", "right"]].set_visible(False)
    grid[0, 1].set_title("causal work of each rank", fontsize=10)
    figure.suptitle("Who holds which of 16 tokens: the number is the rank", fontsize=12)
    return figure


def causal_work(sharding: Sharding) -> list[int]:
    """Visible pairs of each rank's queries with all keys."""
    ranks = np.repeat(np.arange(RANKS), RANKS)
    pieces = [sharding.shard(owner) for _ in range(RANKS) for owner in range(RANKS)]
    pairs = visible_pairs(Mask(), sharding, pieces=pieces, ranks=ranks, keys=True)
    return [int(count) for count in pairs.reshape(RANKS, RANKS).sum(axis=1)]


def _box(axes: Any, x: float, y: float, text: str, color: str) -> None:
    axes.add_patch(Rectangle((x + 0.04, y), 0.92, 1, color=color))
    axes.text(x + 0.5, y + 0.47, text, ha="center", va="center", color="white", fontsize=12)


def masks() -> Figure:
    """What each rank attends of each other's keys, as slices."""
    seq_len = 48
    documents = (0, 9, 30, 48)
    cases = (
        ("causal, contiguous", Mask(), "contiguous"),
        ("causal, zigzag", Mask(), "zigzag"),
        ("causal, striped", Mask(), "striped"),
        ("window of 8, zigzag", Mask(window=8), "zigzag"),
        ("window of 8 and 2 sinks, zigzag", Mask(window=8, sinks=2), "zigzag"),
        ("documents of 9, 21 and 18, zigzag", Mask(cu_seqlens=documents), "zigzag"),
    )
    figure = Figure(figsize=(10, 7.6), layout="constrained")
    for axes, (title, mask, layout) in zip(figure.subplots(2, 3).flat, cases, strict=True):
        draw_mask(axes, mask, Sharding(seq_len, RANKS, layout))
        axes.set_title(title, fontsize=11)
    handles = [Patch(facecolor=color, label=kind) for kind, color in KIND_COLORS.items()]
    handles.append(
        Patch(facecolor="white", edgecolor="0.6", label="never computed, often not sent")
    )
    figure.legend(handles=handles, loc="outside lower center", ncols=4, fontsize=10)
    return figure


def draw_mask(axes: Any, mask: Mask, sharding: Sharding) -> None:
    """Rows are queries and columns keys, rank by rank, in the order in which they are held."""
    n, half = sharding.local_len, sharding.local_len / 2
    for q in (sharding.shard(rank) for rank in range(RANKS)):
        for k in (sharding.shard(rank) for rank in range(RANKS)):
            for part in pair_slices(mask, sharding, q=q, k=k):
                for tile in range(part.count):
                    row = q.owner * n + part.q_start + tile * (part.q_len + part.gap)
                    column = k.owner * n + part.k_start + tile * (part.k_len + part.gap)
                    _draw_tile(axes, part.kind, row, column, part.q_len, part.k_len)
    for edge in range(RANKS + 1):
        axes.axhline(edge * n, color="0.3", linewidth=1.2)
        axes.axvline(edge * n, color="0.3", linewidth=1.2)
    if sharding.layout == "zigzag":
        for middle in range(RANKS):
            axes.axhline(middle * n + half, color="0.75", linewidth=0.6, zorder=0)
            axes.axvline(middle * n + half, color="0.75", linewidth=0.6, zorder=0)
    axes.set(xlim=(0, RANKS * n), ylim=(RANKS * n, 0), aspect="equal")
    ticks = [(rank + 0.5) * n for rank in range(RANKS)]
    axes.set_xticks(ticks, [f"k {rank}" for rank in range(RANKS)], fontsize=9)
    axes.set_yticks(ticks, [f"q {rank}" for rank in range(RANKS)], fontsize=9)
    axes.tick_params(length=0)


def _draw_tile(axes: Any, kind: str, row: int, column: int, rows: int, columns: int) -> None:
    for i in range(rows):
        first, end = {
            "full": (0, columns),
            "causal": (0, i + 1),
            "anticausal": (i, columns),
        }[kind]
        axes.add_patch(
            Rectangle((column + first, row + i), end - first, 1, color=KIND_COLORS[kind], lw=0)
        )
    axes.add_patch(
        Rectangle((column, row), columns, rows, fill=False, edgecolor="white", linewidth=0.8)
    )


@dataclass(frozen=True)
class Panel:
    """One pass of a schedule, causal and zigzag, on the topology that shows it best."""

    title: str
    schedule: str
    topology: TopologyConfig
    backward: bool = False


CABLES = TopologyConfig(kind="cables")
PAIRS = TopologyConfig(kind="fully_connected")
NODES = TopologyConfig(kind="two_level", ranks_per_node=2)
KEYS = ("K/V", "dK and dV on their way home")
QUERIES = (
    "Q (backward: Q, dO, lse and delta)",
    "results on their way home: out and lse (backward: dQ)",
)
# Name: what the full and the broken arrows carry, and the panels.
ROUTES = {
    "one_way": (
        KEYS,
        Panel("one_way forward", "one_way", TopologyConfig()),
        Panel("one_way backward", "one_way", TopologyConfig(), backward=True),
    ),
    "two_way": (
        KEYS,
        Panel("two_way forward, on cables", "two_way", CABLES),
        Panel("two_way backward, on cables", "two_way", CABLES, backward=True),
    ),
    "token_ring": (
        QUERIES,
        Panel("token_ring, switch or fully connected", "token_ring", PAIRS),
        Panel("token_ring on cables", "token_ring", CABLES),
    ),
    "all_gather": (
        KEYS,
        Panel("all_gather forward", "all_gather", PAIRS),
        Panel("all_gather backward", "all_gather", PAIRS, backward=True),
    ),
    "double_ring": (
        KEYS,
        Panel("two_way forward, on two nodes of two ranks", "two_way", NODES),
        Panel("two_way backward, on two nodes of two ranks", "two_way", NODES, backward=True),
    ),
}


def routes(carried: tuple[str, str], *panels: Panel) -> Figure:
    """What moves when: one panel beside the other."""
    sharding = Sharding(512 * RANKS, RANKS, "zigzag")
    tables = [route_table(panel, sharding) for panel in panels]
    steps = [table.num_steps for table in tables]
    figure = Figure(figsize=(1.9 + 1.25 * sum(steps), 4.8), layout="constrained")
    grid = figure.subplots(1, len(panels), width_ratios=steps)
    for axes, panel, table in zip(grid, panels, tables, strict=True):
        RouteDrawing(axes, table, sharding, panel.topology).draw()
        axes.set_title(panel.title, fontsize=11)
    handles: list[Any] = [
        Patch(color=COLORS[0], label="attended"),
        Patch(facecolor="white", edgecolor=COLORS[0], label="sent on, not attended"),
        Line2D([], [], color="0.2", label=carried[0]),
        Line2D([], [], color="0.2", linestyle=BROKEN, label=carried[1]),
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=4, fontsize=9)
    return figure


def route_table(panel: Panel, sharding: Sharding) -> Route:
    """The route that a run would take."""
    wiring = wire_up(panel.topology, ranks=tuple(range(RANKS)), world_size=RANKS)
    return route_of_pass(
        panel.schedule,
        backward=panel.backward,
        shape=MHA,
        sharding=sharding,
        mask=Mask(),
        wiring=wiring,
    )


@dataclass
class RouteDrawing:
    """One pass: a box for each rank and ring step, in it a line for each owner's shard."""

    axes: Any
    route: Route
    sharding: Sharding
    topology: TopologyConfig
    # Half the width and half the height of a box.
    half: float = 0.27
    tall: float = 0.36

    @property
    def goes_round(self) -> bool:
        """Whether the last rank and the first are neighbours on the way."""
        return self.route.schedule != "all_gather" and self.topology.kind != "two_level"

    def draw(self) -> None:
        """Boxes, what is attended in each, and an arrow for each transfer."""
        ranks, steps = self.sharding.world_size, self.route.num_steps
        for rank, step in product(range(ranks), range(steps)):
            corner = (step - self.half, rank - self.tall)
            frame = Rectangle(corner, 2 * self.half, 2 * self.tall, fc="0.96", ec="0.7", lw=0.8)
            self.axes.add_patch(frame)
        for (rank, step, owner), pieces in self._held().items():
            for attended in (False, True):
                rows = [piece for piece, does in pieces if does is attended]
                for start, stop in _joined(rows):
                    self._chip(rank, step, Piece(owner, start, stop), attended=attended)
        for (owner, src, dst, departs, arrives), length in _hops(self.route, self.route.guests):
            self._arrow(owner, (departs, src), (arrives, dst), length, broken=False)
        for (owner, src, dst, departs, arrives), length in _hops(self.route, self.route.results):
            self._arrow(owner, (departs, src), (arrives, dst), length, broken=True)
        self._label(ranks, steps)

    def _label(self, ranks: int, steps: int) -> None:
        self.axes.set(xlim=(-0.55, steps - 0.45), ylim=(ranks - 0.4, -0.6))
        names = ["own shard", *(f"ring step {step}" for step in range(1, steps))]
        self.axes.set_xticks(range(steps), names, fontsize=9)
        self.axes.set_yticks(range(ranks), [f"rank {rank}" for rank in range(ranks)], fontsize=9)
        self.axes.tick_params(length=0)
        self.axes.spines[:].set_visible(False)
        node = self.topology.ranks_per_node
        for border in range(node or ranks, ranks, node or ranks):
            self.axes.axhline(border - 0.5, color="0.4", linewidth=1, linestyle=":")

    def _held(self) -> dict[tuple[int, int, int], list[tuple[Piece, bool]]]:
        """(rank, ring step, owner) -> pieces, and whether each is attended."""
        held: dict[tuple[int, int, int], list[tuple[Piece, bool]]] = defaultdict(list)
        for rank in range(self.sharding.world_size):
            held[rank, 0, rank].append((self.sharding.shard(rank), True))
        for chain in self.route.chains:
            piece, owner = chain.piece, chain.piece.owner
            arrivals = chain.arrivals().tolist()
            for rank, step, attends in zip(chain.path[1:], arrivals, chain.attends, strict=True):
                held[rank, step, owner].append((piece, attends))
            if chain.guest_hops().departs[0]:
                held[owner, int(chain.guest_hops().departs[0]), owner].append((piece, False))
        return held

    def _line(self, owner: int, rank: int) -> float:
        """Where a shard's line lies in the boxes of a rank."""
        return rank + self.tall * ((2 * owner + 1) / self.sharding.world_size - 1)

    def _chip(self, rank: int, step: int, piece: Piece, *, attended: bool) -> None:
        n, color = self.sharding.local_len, COLORS[piece.owner]
        height = 1.5 * self.tall / self.sharding.world_size
        width, left = 2 * self.half * piece.length / n, step - self.half
        left += 2 * self.half * piece.start / n
        y = self._line(piece.owner, rank)
        fill = color if attended else "white"
        self.axes.add_patch(Rectangle((left, y - height / 2), width, height, fc=fill, ec=color))
        self.axes.text(
            left + width / 2, y + 0.005, str(piece.owner), ha="center", va="center", fontsize=7.5,
            color="white" if attended else color,
        )  # fmt: skip

    def _arrow(
        self, owner: int, start: tuple[int, int], end: tuple[int, int], length: int, *, broken: bool
    ) -> None:
        (departs, src), (arrives, dst), ranks = start, end, self.sharding.world_size
        shift = 0.05 if broken else 0.0
        a = (departs + self.half, self._line(owner, src) + shift)
        b = (arrives - self.half, self._line(owner, dst) + shift)
        ways = [(a, b)]
        if self.goes_round and abs(src - dst) == ranks - 1:
            # Round the edge: out at one end of the picture and in at the other.
            turn = ranks if src > dst else -ranks
            ways = [(a, (b[0], b[1] + turn)), ((a[0], a[1] - turn), b)]
        for tail, head in ways:
            self.axes.add_patch(
                FancyArrowPatch(
                    tail,
                    head,
                    arrowstyle="-|>",
                    mutation_scale=8,
                    shrinkA=0,
                    shrinkB=0,
                    color=COLORS[owner],
                    linewidth=0.8 + 1.2 * length / self.sharding.local_len,
                    linestyle=BROKEN if broken else "solid",
                )
            )


def _hops(route: Route, hops: Hops) -> list[tuple[tuple[int, int, int, int, int], int]]:
    """(owner, src, dst, departs, arrives) of each transfer, and its rows; chains of one joined."""
    rows: dict[tuple[int, int, int, int, int], int] = defaultdict(int)
    columns = (hops.chain, hops.src, hops.dst, hops.departs, hops.arrives)
    for chain, src, dst, departs, arrives in zip(*map(np.ndarray.tolist, columns), strict=True):
        piece = route.chains[chain].piece
        rows[piece.owner, src, dst, departs, arrives] += piece.length
    return list(rows.items())


def _joined(pieces: list[Piece]) -> list[tuple[int, int]]:
    """Rows that pieces cover, neighbours as one."""
    spans: list[tuple[int, int]] = []
    for start, stop in sorted((piece.start, piece.stop) for piece in pieces):
        if spans and start <= spans[-1][1]:
            spans[-1] = (spans[-1][0], max(stop, spans[-1][1]))
        else:
            spans.append((start, stop))
    return spans


if __name__ == "__main__":
    main()
