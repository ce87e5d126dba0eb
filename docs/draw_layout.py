"""Draws docs/pictures/layout.png: four ranks, and how a step's rows lie on them by length."""

from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, Rectangle

RANKS = 4
COLORS = ("#4878a8", "#e08a3c", "#5a9e6f", "#b05a7a", "#8a6fb0", "#6b8f9c", "#c7a53f", "#9a6a4f")
CASES = (
    ("2k tokens: 4 rows on each rank, no ring", 1, 4),
    ("8k tokens: 1 row on each rank, no ring", 1, 1),
    ("16k tokens: a row on each pair, rings of 2", 2, 1),
    ("32k tokens: one row on all, a ring of 4", 4, 1),
)


def main() -> None:
    """Write the picture."""
    figure = Figure(figsize=(10, 4.6), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, case in zip(figure.subplots(2, 2).flat, CASES, strict=True):
        draw_case(axes, *case)
    figure.suptitle("The same 32k tokens a step on 4 ranks of 8k: the layout follows the length")
    figure.savefig(Path(__file__).parent / "pictures" / "layout.png", dpi=110)


def draw_case(axes: Any, title: str, cp_degree: int, rows: int) -> None:
    """One length: what each rank holds, and who sends keys and values to whom."""
    for rank in range(RANKS):
        axes.text(rank + 0.46, -0.16, f"rank {rank}", ha="center", fontsize=9)
        blocks = held_blocks(rank, cp_degree, rows)
        for place, (row, name) in enumerate(blocks):
            height = 1 / len(blocks)
            bottom = 1 - (place + 1) * height
            axes.add_patch(
                Rectangle((rank, bottom), 0.92, height * 0.94, color=COLORS[row % len(COLORS)])
            )
            axes.text(
                rank + 0.46, bottom + height * 0.47, name, ha="center", va="center",
                color="white", fontsize=9,
            )  # fmt: skip
        if cp_degree > 1:
            draw_ring(axes, rank, cp_degree)
    axes.set(xlim=(-0.15, RANKS + 0.1), ylim=(-0.25, 1.5), title=title)
    axes.title.set_fontsize(10)
    axes.axis("off")


def held_blocks(rank: int, cp_degree: int, rows: int) -> list[tuple[int, str]]:
    """Row and label of each block on a rank, in zigzag order where a row is shared."""
    if cp_degree == 1:
        return [(rank * rows + row, f"row {rank * rows + row}") for row in range(rows)]
    row, own = divmod(rank, cp_degree)
    return [(row, f"row {row}, block {own}"), (row, f"row {row}, block {2 * cp_degree - 1 - own}")]


def draw_ring(axes: Any, rank: int, cp_degree: int) -> None:
    """An arrow to the next rank of the ring."""
    first = rank // cp_degree * cp_degree
    following = first + (rank + 1 - first) % cp_degree
    bend = -0.35 if following > rank else 0.35 / max(1, cp_degree - 2)
    axes.add_patch(
        FancyArrowPatch(
            (rank + 0.46, 1.02), (following + 0.46, 1.02), arrowstyle="-|>", mutation_scale=11,
            connectionstyle=f"arc3,rad={bend}", color="0.35",
        )
    )  # fmt: skip


if __name__ == "__main__":
    main()
