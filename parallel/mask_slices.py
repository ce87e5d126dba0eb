"""Rectangles with slanted edges, cut into the slices that attention kernels run.

One idea: an edge of a mask is a diagonal, j <= i + upper or j >= i + lower, over rows i and columns
j. By rows, such a rectangle falls into at most three parts: cut by one edge, by both or by none,
and by the other edge; each part is squares on its edges, which kernels mask themselves, and full
rectangles between them. Pure integers; no ranks, layouts or tensors.

    upper             both, width w: tiles of w rows       lower
    # # # . . .       . # # # . . . .                      . . # # # #
    # # # # . .       . . # # # . . .                      . . . # # #
    # # # # # .       . . . # # # . .                      . . . . # #
    full, causal      causal w x w, and left of it         anticausal, full
                      anticausal, a row smaller
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

from ringctx.ops.pair_attention import PairSlice

__all__ = ["Rectangle", "cut", "joined"]


@dataclass(frozen=True, slots=True)
class Rectangle:
    """Rows [r0, r1) x columns [c0, c1), but only i + lower <= j <= i + upper; None is no edge."""

    r0: int
    r1: int
    c0: int
    c1: int
    lower: int | None = None
    upper: int | None = None

    @property
    def is_empty(self) -> bool:
        """Whether it has no row or no column."""
        return self.r0 >= self.r1 or self.c0 >= self.c1

    @property
    def is_cut_below(self) -> bool:
        """Whether the lower edge hides anything."""
        return self.lower is not None and self.r1 - 1 + self.lower > self.c0


def cut(area: Rectangle) -> Iterator[PairSlice]:
    """Disjoint slices, none of them empty, that are together what the edges leave of `area`."""
    r0, r1, c0, c1 = area.r0, area.r1, area.c0, area.c1
    lower, upper = area.lower, area.upper
    # Rows that see a column at all. Rows far apart may have none between their edges.
    if upper is not None:
        r0 = max(r0, c0 - upper)
    if lower is not None:
        r1 = min(r1, c1 - lower)
    if r0 >= r1 or c0 >= c1 or (lower is not None and upper is not None and lower > upper):
        return
    # Rows [r0, last_cut) are cut by the upper edge, rows [first_cut, r1) by the lower one. A square
    # may end, or begin, with a row that its edge does not cut.
    last_cut, first_cut = r0, r1
    if upper is not None and r0 + upper < c1 - 1:
        last_cut = min(c1 - upper, r1)
    if lower is not None and r1 - 1 + lower > c0:
        first_cut = max(c0 - lower + 1, r0)
    if last_cut > first_cut:
        yield from _below_upper(r0, first_cut, c0, upper)
        yield from _band(first_cut, last_cut, lower, upper)
        yield from _above_lower(last_cut, r1, c1, lower)
        return
    if last_cut < first_cut < r1:
        first_cut -= 1
    yield from _below_upper(r0, last_cut, c0, upper)
    yield from _full(last_cut, first_cut, c0, c1)
    yield from _above_lower(first_cut, r1, c1, lower)


def _full(r0: int, r1: int, c0: int, c1: int) -> Iterator[PairSlice]:
    if r0 < r1 and c0 < c1:
        yield PairSlice(r0, r1 - r0, c0, c1 - c0, "full")


def _below_upper(r0: int, r1: int, c0: int, upper: int | None) -> Iterator[PairSlice]:
    """Rows that see the columns from c0 to their upper edge."""
    if r0 < r1:
        assert upper is not None
        yield from _full(r0, r1, c0, r0 + upper)
        yield PairSlice(r0, r1 - r0, r0 + upper, r1 - r0, "causal")


def _above_lower(r0: int, r1: int, c1: int, lower: int | None) -> Iterator[PairSlice]:
    """Rows that see the columns from their lower edge to c1."""
    if r0 < r1:
        assert lower is not None
        yield PairSlice(r0, r1 - r0, r0 + lower, r1 - r0, "anticausal")
        yield from _full(r0, r1, r1 + lower, c1)


def _band(r0: int, r1: int, lower: int | None, upper: int | None) -> Iterator[PairSlice]:
    """Rows that see the columns between their edges, in tiles of as many rows as columns."""
    assert lower is not None and upper is not None
    width = upper - lower + 1
    count, rest = divmod(r1 - r0, width)
    if count:
        yield PairSlice(r0, width, r0 + upper, width, "causal", count)
    if count and width > 1:
        # The tile's last row sees none of the columns left of the causal square.
        gap = 1 if count > 1 else 0
        yield PairSlice(r0, width - 1, r0 + lower, width - 1, "anticausal", count, gap)
    r0 = r1 - rest
    if rest:
        yield PairSlice(r0, rest, r0 + upper, rest, "causal")
        yield PairSlice(r0, rest, r0 + lower, rest, "anticausal")
        yield from _full(r0, r1, r1 + lower, r0 + upper)


def joined(parts: Iterable[PairSlice]) -> list[PairSlice]:
    """Join rectangles that lie side by side, and equal squares down a diagonal."""
    found = list(parts)
    masked = [part for part in found if part.kind != "full"]
    rectangles = _joined_rectangles([part for part in found if part.kind == "full"])
    merged: list[PairSlice] = []
    last_on: dict[tuple[object, ...], int] = {}
    for part in masked + rectangles:
        diagonal = (part.kind, part.q_len, part.k_len, part.k_start - part.q_start)
        last = last_on.get(diagonal)
        both = None if last is None else _joined_squares(merged[last], part)
        if last is not None and both is not None:
            merged[last] = both
        else:
            last_on[diagonal] = len(merged)
            merged.append(part)
    return merged


def _joined_squares(first: PairSlice, then: PairSlice) -> PairSlice | None:
    """The two as one slice, if they are evenly spaced tiles on a diagonal that they share."""
    between = then.q_start - first.q.stop
    # A single tile has no spacing of its own yet.
    spacings = {part.gap for part in (first, then) if part.count > 1} | {between}
    if first.q_len != first.k_len or between < 0 or len(spacings) > 1:
        return None
    return replace(first, count=first.count + then.count, gap=between)


def _joined_rectangles(parts: list[PairSlice]) -> list[PairSlice]:
    down: list[PairSlice] = []
    for part in sorted(parts, key=lambda part: (part.k_start, part.k_len, part.q_start)):
        above = down[-1] if down else None
        if above is not None and above.k == part.k and above.q.stop == part.q_start:
            down[-1] = replace(above, q_len=above.q_len + part.q_len)
        else:
            down.append(part)
    across: list[PairSlice] = []
    for part in sorted(down, key=lambda part: (part.q_start, part.q_len, part.k_start)):
        left = across[-1] if across else None
        if left is not None and left.q == part.q and left.k.stop == part.k_start:
            across[-1] = replace(left, k_len=left.k_len + part.k_len)
        else:
            across.append(part)
    return across
