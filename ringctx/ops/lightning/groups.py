"""Groups of chunks that are computed at once: how rows become batches of matrices, and back.

One idea: work through the sequence in groups of a few hundred rows, so that the copies in the order
of the matrix products, and all that comes between products, stay in the cache, whatever the length
of the sequence. Chunks of one length that follow one another are cut out by reshaping; where
documents make lengths change all the time, chunks are gathered, and padded with zeros.
Shapes: n chunks of L rows in a group, B batch, H heads, D head dim.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import groupby

import torch
from torch import Tensor

from ringctx.ops.lightning.chunks import Chunks

__all__ = ["Group", "groups_of"]

# So few groups of equal chunks are worth their calls even where padding would need fewer.
_FEW_RUNS = 4


@dataclass(frozen=True, eq=False)
class Group:
    """Some of the chunks, in order."""

    chunks: slice
    """Their numbers."""
    length: int
    """L, pads included."""
    rows: slice
    """Their rows, which have no gaps."""
    gathered: "Gathered | None" = None
    """Set where the lengths differ."""

    @property
    def count(self) -> int:
        """How many chunks, n."""
        count: int = self.chunks.stop - self.chunks.start
        return count

    def take(self, x: Tensor, *, into: Tensor | None = None) -> Tensor:
        """A copy of the rows of `[B, T, H, D]` as `[n, B, H, L, D]`; pads are zeros.

        Args:
            x: the whole sequence.
            into: contiguous memory for the result, of any dtype; None: fresh, in the dtype of x.
        """
        batch, _, heads, dim = x.shape
        if into is None:
            into = x.new_empty((self.count, batch, heads, self.length, dim))
        if self.gathered is None:
            into.copy_(self._in_order(x))
        else:
            chosen = x.index_select(1, self.gathered.index).unflatten(1, (-1, self.length))
            into.copy_(chosen.permute(1, 0, 3, 2, 4))
            into.masked_fill_(self.gathered.pads[:, None, None, :, None], 0.0)
        return into

    def put_(self, x: Tensor, values: Tensor) -> None:
        """Write `[n, B, H, L, D]` to the rows of `[B, T, H, D]`; pads are dropped."""
        if self.gathered is None:
            self._in_order(x).copy_(values)
        else:
            flat = values.permute(1, 0, 3, 2, 4).flatten(1, 2)[:, self.gathered.real]
            x[:, self.rows] = flat.to(x.dtype)

    def _in_order(self, x: Tensor) -> Tensor:
        """A view of the rows of `[B, T, H, D]` as `[n, B, H, L, D]`."""
        rows: Tensor = x[:, self.rows].unflatten(1, (self.count, self.length))
        return rows.permute(1, 0, 3, 2, 4)


@dataclass(frozen=True, eq=False)
class Gathered:
    """Chunks of several lengths."""

    index: Tensor
    """int64 `[n * L]`: the row of every place; pads repeat the last row of their chunk."""
    pads: Tensor
    """bool `[n, L]`."""
    real: Tensor
    """int64: the places that are no pads."""
    lengths: Tensor
    """int64 `[n]`: of the chunks."""


# Few: gathered groups hold some 20 bytes a token, on the device, and documents are new every step.
@lru_cache(maxsize=4)
def groups_of(chunks: Chunks, *, most_rows: int, device: torch.device) -> tuple[Group, ...]:
    """All chunks in groups.

    Args:
        chunks: of the call.
        most_rows: of a group, pads included; a group has at least one chunk.
        device: where gathered groups keep their indices.
    """
    runs = [(length, len(list(run))) for length, run in groupby(n for _, n in chunks.bounds)]
    gathered_groups = -(-len(chunks.bounds) * chunks.chunk_len // most_rows)
    if len(runs) <= max(_FEW_RUNS, 2 * gathered_groups):
        return tuple(_equal_groups(chunks, runs, most_rows))
    step = max(1, most_rows // chunks.chunk_len)
    return tuple(
        _gathered_group(chunks, slice(i, min(i + step, len(chunks.bounds))), device)
        for i in range(0, len(chunks.bounds), step)
    )


def _equal_groups(chunks: Chunks, runs: list[tuple[int, int]], most_rows: int) -> Iterator[Group]:
    first = 0
    for length, count in runs:
        step = max(1, most_rows // length)
        for start in range(first, first + count, step):
            stop = min(start + step, first + count)
            row = chunks.bounds[start][0]
            yield Group(slice(start, stop), length, slice(row, row + (stop - start) * length))
        first += count


def _gathered_group(chunks: Chunks, which: slice, device: torch.device) -> Group:
    bounds, length = chunks.bounds[which], chunks.chunk_len
    starts, lengths = torch.tensor(bounds).unbind(1)
    place = torch.arange(length)
    pads = place >= lengths[:, None]
    index = starts[:, None] + torch.minimum(place, lengths[:, None] - 1)
    gathered = Gathered(
        index=index.flatten().to(device),
        pads=pads.to(device),
        real=(~pads).flatten().nonzero().flatten().to(device),
        lengths=lengths.to(device),
    )
    return Group(which, length, slice(bounds[0][0], sum(bounds[-1])), gathered)
