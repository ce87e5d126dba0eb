"""Packed steps made up for tests: documents cut into pieces, pieces put into rows."""

from collections.abc import Sequence

import numpy as np
from hypothesis import strategies as st

from ringctx.data.plan import Step


def packed_step(
    rows: Sequence[Sequence[tuple[int, int, int]]],
    *,
    bucket_len: int,
    lengths: Sequence[int],
    doc_mask: bool,
    step: int = 0,
    window: int | None = None,
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
        window=window,
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
