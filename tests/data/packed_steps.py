"""Packed steps made up for tests: documents cut into pieces, pieces put into rows."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from hypothesis import strategies as st

from ringctx.data.steps import Step


class PlanByHand:
    """What loader, trainer and verify ask of a plan, for steps that were made by hand."""

    def __init__(self, *steps: Step) -> None:
        assert [step.step for step in steps] == list(range(len(steps)))
        self._steps = steps

    @property
    def bucket_lens(self) -> tuple[int, ...]:
        return tuple(sorted({step.bucket_len for step in self._steps}))

    def bucket_len(self, step: int) -> int:
        return self._steps[step].bucket_len

    def step(self, step: int) -> Step:
        return self._steps[step]


def concatenated(lengths: Sequence[int], *, rows: int, bucket_len: int, **settings: Any) -> Step:
    """A step of documents laid end to end; half of its last row is padding."""
    made: list[list[tuple[int, int, int]]] = [[] for _ in range(rows)]
    room = [bucket_len] * (rows - 1) + [bucket_len // 2]
    row = 0
    for document, length in enumerate(lengths):
        start = 0
        while start < length and row < rows:
            taken = min(room[row], length - start)
            made[row].append((document, start, taken))
            start, room[row] = start + taken, room[row] - taken
            row += room[row] == 0
    assert row == rows, "too few documents"
    return packed_step(made, bucket_len=bucket_len, lengths=lengths, **settings)


def packed_step(
    rows: Sequence[Sequence[tuple[int, int, int]]],
    *,
    bucket_len: int,
    lengths: Sequence[int],
    doc_mask: bool,
    step: int = 0,
    **settings: Any,
) -> Step:
    """A step of these rows; every piece is (document, start, length).

    Its targets are counted as a plan does where all tokens are targets.
    """
    pieces = [piece for row in rows for piece in row]
    ends = sum(start + length == lengths[document] for document, start, length in pieces)
    return Step(
        step=step,
        bucket_len=bucket_len,
        pieces=np.array(pieces, dtype=np.int64).reshape(-1, 3),
        num_targets=sum(length for *_, length in pieces) - ends,
        row_offsets=np.cumsum([0, *map(len, rows)]),
        doc_mask=doc_mask,
        **settings,
    )


@st.composite
def packed_steps(draw: st.DrawFn, *, bucket_len: int = 48) -> tuple[list[int], Step]:
    """Lengths of documents, and a step of pieces of them that do not overlap."""
    lengths = draw(st.lists(st.integers(1, 2 * bucket_len), min_size=1, max_size=8))
    rows: list[list[tuple[int, int, int]]] = [[]]
    room = bucket_len
    for document, length in enumerate(lengths):
        start = 0
        while start < length:
            if room == 0 or draw(st.integers(0, 4)) == 0:
                rows.append([])
                room = bucket_len
            taken = draw(st.integers(1, min(room, length - start)))
            rows[-1].append((document, start, taken))
            start, room = start + taken, room - taken
    step = packed_step(rows, bucket_len=bucket_len, lengths=lengths, doc_mask=draw(st.booleans()))
    return lengths, step
