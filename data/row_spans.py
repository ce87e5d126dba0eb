"""Which spans of documents a rank holds of its rows: pure arithmetic on arrays of ints.

One idea: lay a rank's rows end to end on a line. Pieces of documents are intervals of the line, and
so are the runs of neighbours that the rank holds; what it reads is where the two overlap. Rows of
one piece, packed rows, rows cut over ranks and rows joined to one are then the same case.
Price: some ten array operations per overlap, of which there are as many as runs and pieces.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ringctx.data.balance import visible_pairs
from ringctx.data.steps import Step

__all__ = ["Line", "Runs", "Spans", "held_spans", "lay_out", "row_costs"]

Ints = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Line:
    """Rows end to end, and the pieces in them."""

    documents: Ints
    """`[pieces]`, in order."""
    starts: Ints
    """Where each piece begins in its document."""
    begins: Ints
    """Where each piece begins on the line."""
    ends: Ints
    """Where it ends."""
    row_len: int
    """Row i is [i * row_len, (i + 1) * row_len) of the line."""

    def borders(self, first_row: int, end_row: int) -> tuple[int, ...]:
        """Where pieces and paddings begin in some rows, and the end, from the first row on.

        What a row's pieces leave of it is a document of its own: no token of a piece sees it.
        """
        begin, end = first_row * self.row_len, end_row * self.row_len
        here = slice(*np.searchsorted(self.begins, (begin, end)))
        rows = np.arange(begin, end + 1, self.row_len)
        every = np.unique(np.concatenate([self.begins[here], self.ends[here], rows]))
        return tuple((every - begin).tolist())


@dataclass(frozen=True, eq=False)
class Runs:
    """Neighbours among the positions that a rank holds, both rising."""

    begins: Ints
    """`[runs]`: the position of each run's first token."""
    lengths: Ints
    """Tokens of each run."""

    @classmethod
    def of(cls, positions: Ints) -> "Runs":
        """Cut positions into runs."""
        breaks = np.flatnonzero(np.diff(positions) != 1) + 1
        firsts = np.concatenate([[0], breaks])
        return cls(positions[firsts], np.diff(np.append(firsts, len(positions))))

    def repeated(self, times: int, *, period: int) -> "Runs":
        """The same runs in each of so many rows on a line."""
        begins = (np.arange(times)[:, None] * period + self.begins).reshape(-1)
        return Runs(begins, np.tile(self.lengths, times))


@dataclass(frozen=True, eq=False)
class Spans:
    """Stretches of documents, in the order in which a rank holds them."""

    documents: Ints
    starts: Ints
    """Where each begins in its document."""
    lengths: Ints
    places: Ints
    """Where each begins among the tokens that the rank holds, padding included."""

    def stretches(self) -> Iterator[tuple[slice, slice]]:
        """Runs of spans without padding between them: their tokens, counted through, and places."""
        ends = np.cumsum(self.lengths)
        padding = self.places - (ends - self.lengths)
        last = np.append(np.flatnonzero(np.diff(padding)), len(padding) - 1)[: len(padding)]
        begin = 0
        for stop, before in zip(ends[last].tolist(), padding[last].tolist(), strict=True):
            yield slice(begin, stop), slice(begin + before, stop + before)
            begin = stop


def lay_out(step: Step, rows: Ints) -> Line:
    """The pieces of some rows of a step, end to end; rows that the step does not have are empty."""
    pieces, offsets = _packed(step)
    rows = np.minimum(rows, step.num_rows)
    # One more offset: the row beyond the last is empty.
    offsets = np.append(offsets, offsets[-1])
    firsts = offsets[rows]
    counts = offsets[rows + 1] - firsts
    documents, starts, lengths = pieces[_ranges(firsts, counts)].T
    row = np.repeat(np.arange(len(rows)), counts)
    # Tokens before each piece, in all rows and then in its own.
    before = np.cumsum(lengths) - lengths
    before -= before[(np.cumsum(counts) - counts)[row]]
    begins = row * step.bucket_len + before
    return Line(documents, starts, begins, begins + lengths, step.bucket_len)


def held_spans(line: Line, runs: Runs) -> Spans:
    """Where the pieces of a line and the runs of a rank overlap."""
    run_ends = runs.begins + runs.lengths
    # The runs that share a token with each piece.
    first = np.searchsorted(run_ends, line.begins, side="right")
    counts = np.searchsorted(runs.begins, line.ends, side="left") - first
    piece = np.repeat(np.arange(len(counts)), counts)
    run = _ranges(first, counts)
    begins = np.maximum(line.begins[piece], runs.begins[run])
    ends = np.minimum(line.ends[piece], run_ends[run])
    places = np.cumsum(runs.lengths) - runs.lengths
    return Spans(
        documents=line.documents[piece],
        starts=line.starts[piece] + begins - line.begins[piece],
        lengths=ends - begins,
        places=places[run] + begins - runs.begins[run],
    )


def row_costs(step: Step) -> Ints:
    """Pairs of tokens that see each other in each row of a step with document masks.

    Padding counts as what attention makes of it: one more document.
    """
    assert step.row_offsets is not None
    lengths = step.pieces[:, 2]
    pairs = np.append(0, np.cumsum(visible_pairs(lengths, window=step.window)))
    tokens = np.append(0, np.cumsum(lengths))
    padding = step.bucket_len - np.diff(tokens[step.row_offsets])
    return np.diff(pairs[step.row_offsets]) + visible_pairs(padding, window=step.window)


def _ranges(firsts: Ints, counts: Ints) -> Ints:
    """The numbers first, first + 1, ..., count of them, for each."""
    skipped = np.cumsum(counts) - counts
    return np.repeat(firsts - skipped, counts) + np.arange(int(counts.sum()))


def _packed(step: Step) -> tuple[Ints, Ints]:
    """Pieces with their lengths, and where each row begins among them."""
    if step.row_offsets is not None:
        return step.pieces, step.row_offsets
    lengths = np.full((step.num_rows, 1), step.bucket_len)
    return np.hstack([step.pieces, lengths]), np.arange(step.num_rows + 1)
