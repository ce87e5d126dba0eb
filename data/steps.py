"""What one optimizer step trains on, over all ranks: rows of one length, made of pieces.

A row is one piece of one document, or, packed, several that follow one another; what is missing at
a packed row's end is padding. The target of a token is the next one of its document, peeked beyond
the piece's end; there is none at a document's end, in padding, or where a loss bit is off. So every
token but a document's first is a target once, however documents are cut or packed.
Price: 16 or 24 bytes a piece; with loss bits, one bit of each token of the step is read.
"""

import dataclasses
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ringctx.data.documents import Documents

__all__ = ["Step", "count_targets"]


@dataclass(frozen=True, eq=False)
class Step:
    """One step of a plan."""

    step: int
    bucket_len: int
    """Tokens of each row."""
    pieces: NDArray[np.int64]
    """`[rows, 2]`: document and start of each row; packed, `[n, 3]`: document, start, length."""
    num_targets: int
    """Tokens that have a target, over all rows."""
    row_offsets: NDArray[np.int64] | None = None
    """Packed: `[rows + 1]`, row r is pieces `row_offsets[r]` to `row_offsets[r + 1]`; None: every
    row is one piece of bucket_len tokens."""
    doc_mask: bool = False
    """Packed: tokens see only their own piece."""
    window: int | None = None
    """Largest attention window of any layer; None: as the model says."""
    rope_theta: float | None = None
    """Base of the rotary frequencies; None: the model's."""
    lr: float | None = None
    """Peak learning rate of the step's stage; None: `optim.lr`, over the whole run."""
    stage_steps: tuple[int, int] | None = None
    """With lr: first step of the stage, and the step after its last."""

    @property
    def num_rows(self) -> int:
        """Rows of the step."""
        return len(self.pieces) if self.row_offsets is None else len(self.row_offsets) - 1

    def __eq__(self, other: object) -> bool:
        """Whether both train the same on the same rows in the same order."""
        if not isinstance(other, Step):
            return NotImplemented
        return all(
            np.array_equal(mine, theirs) if isinstance(mine, np.ndarray) else mine == theirs
            for mine, theirs in (
                (getattr(self, field.name), getattr(other, field.name))
                for field in dataclasses.fields(self)
            )
        )


def count_targets(dataset: Documents, pieces: NDArray[np.int64]) -> int:
    """Tokens of pieces that have a target.

    Args:
        dataset: their documents.
        pieces: int64 `[n, 3]`: document, start, length.
    """
    documents, starts, lengths = pieces.T
    targets = np.minimum(lengths, dataset.lengths[documents] - starts - 1)
    if not dataset.has_loss_bits:
        return int(targets.sum())
    return int(dataset.read_loss(documents, starts + 1, targets).sum())
