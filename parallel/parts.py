"""The parts of a sequence in chain order, and which of them need one another's states.

One idea: any run of tokens maps the state that comes in affinely, S_out = a S_in + b, so what ranks
tell each other is one b per part, and documents only cut the chain. A part is a run of positions
that one rank holds; 16 tokens on 2 ranks, documents of 6 and 10:

    contiguous   part     0 (rank 0)      | 1 (rank 1)
                 tokens   A A A A A A B B | B B B B B B B B      1 goes on with what 0 leaves
    zigzag       part     0 (0)   | 1 (1)   | 2 (1)   | 3 (0)
                 tokens   A A A A | A A B B | B B B B | B B B B  a border inside part 1: nothing
                                                                 of 0 reaches 2 and 3

Only the first fragment of a part can go on with a state, and only the last can leave one: one state
a part, however many documents. Backward is the mirror: gradients run from the last part to the
first. Price: pure ints, some microseconds a document; cached.
"""

from bisect import bisect_left, bisect_right
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import pairwise

import numpy as np
from torch import Tensor

from ringctx.errors import LayoutError
from ringctx.ops.documents import check_cu_seqlens
from ringctx.ops.lightning.chunks import Fragment
from ringctx.parallel.layout import Sharding

__all__ = ["Chain", "Part", "chain_of", "check_recurrent_layout"]


@dataclass(frozen=True, slots=True)
class Part:
    """Positions [start, stop), a run that `rank` holds."""

    rank: int
    # Its place among the parts of the rank, in local order.
    slot: int
    start: int
    stop: int
    # First local row.
    row: int
    # Whether a document begins exactly at its first token.
    starts_doc: bool
    # Whether a document begins strictly inside it: no state passes through.
    has_inner: bool


# Compared by identity: `chain_of` gives one object for one cut of a sequence.
@dataclass(frozen=True, eq=False)
class Chain:
    """A sharded sequence as parts in the order of positions, and the documents in it."""

    sharding: Sharding
    # Where documents begin, and the end of the last; rising, none empty.
    bounds: tuple[int, ...]

    @cached_property
    def parts(self) -> tuple[Part, ...]:
        """All parts, in the order of positions."""
        found = []
        for rank in range(self.sharding.world_size):
            for slot, run in enumerate(self.sharding.runs(rank)):
                assert run.stride == 1, run
                stop = run.first + run.length
                inside = self._borders(run.first, stop)
                found.append(
                    Part(
                        rank=rank,
                        slot=slot,
                        start=run.first,
                        stop=stop,
                        row=run.start,
                        starts_doc=self.bounds[bisect_left(self.bounds, run.first)] == run.first,
                        has_inner=len(inside) > 0,
                    )
                )
        return tuple(sorted(found, key=lambda part: part.start))

    @cached_property
    def _of_rank(self) -> tuple[tuple[int, ...], ...]:
        owned: list[list[int]] = [[] for _ in range(self.sharding.world_size)]
        for index, part in enumerate(self.parts):
            owned[part.rank].append(index)
        return tuple(map(tuple, owned))

    @property
    def part_len(self) -> int:
        """Tokens of a part; all are equal."""
        return self.parts[0].stop - self.parts[0].start

    def parts_of(self, rank: int) -> tuple[int, ...]:
        """The parts of one rank, in the order of positions, which is that of its slots."""
        return self._of_rank[rank]

    def fragments_of(self, rank: int) -> tuple[Fragment, ...]:
        """What a rank holds of each document, in local rows; a slot at both ends of each part."""
        fragments = []
        for index in self.parts_of(rank):
            part = self.parts[index]
            rows = [
                part.row + position - part.start
                for position in (part.start, *self._borders(part.start, part.stop), part.stop)
            ]
            last = len(rows) - 2
            for i, (start, stop) in enumerate(pairwise(rows)):
                entry, leaving = part.slot if i == 0 else None, part.slot if i == last else None
                fragments.append(Fragment(start, stop, entry, leaving))
        return tuple(fragments)

    def _borders(self, start: int, stop: int) -> tuple[int, ...]:
        """Where documents begin strictly inside [start, stop)."""
        return self.bounds[bisect_right(self.bounds, start) : bisect_left(self.bounds, stop)]

    def order(self, *, backward: bool) -> range:
        """The parts in the order in which a state (backward: its gradient) passes them."""
        count = len(self.parts)
        return range(count - 1, -1, -1) if backward else range(count)

    def receives(self, part: int, *, backward: bool) -> bool:
        """Whether the part goes on with what its predecessor in the order leaves."""
        if backward:
            return part + 1 < len(self.parts) and not self.parts[part + 1].starts_doc
        return not self.parts[part].starts_doc

    def passes(self, part: int, *, backward: bool) -> bool:
        """Whether what leaves the part depends on what came in."""
        return self.receives(part, backward=backward) and not self.parts[part].has_inner

    def sources(self, part: int, *, backward: bool) -> range:
        """The parts whose own states make up what comes into this one, in the order of passing."""
        if not self.receives(part, backward=backward):
            return range(0)
        step = -1 if backward else 1
        first = part - step
        while self.passes(first, backward=backward):
            first -= step
        return range(first, part, step)

    def readers(self, part: int, *, backward: bool) -> tuple[int, ...]:
        """The other ranks that need the part's own state, rising."""
        step = -1 if backward else 1
        ranks, reader = set(), part + step
        while 0 <= reader < len(self.parts) and self.receives(reader, backward=backward):
            ranks.add(self.parts[reader].rank)
            if not self.passes(reader, backward=backward):
                break
            reader += step
        return tuple(sorted(ranks - {self.parts[part].rank}))


def check_recurrent_layout(layout: str, *, world_size: int) -> None:
    """Raise LayoutError where a rank would not hold runs of neighbouring tokens."""
    if layout == "striped" and world_size > 1:
        raise LayoutError(
            "layout='striped' deals neighbouring tokens to different ranks, and a recurrent state "
            "passes from token to token: each would be a transfer. Use layout='zigzag', which "
            "softmax layers balance with too, or 'contiguous'"
        )


def chain_of(sharding: Sharding, cu_seqlens: Tensor | None) -> Chain:
    """The chain of a sharded sequence.

    Args:
        sharding: contiguous or zigzag; any layout on one rank.
        cu_seqlens: int32 `[documents + 1]` on the CPU, over the whole sequence; empty documents are
            left out. None for one document.

    Returns:
        For the same settings the same object.

    Raises:
        LayoutError: if the layout is striped, or cu_seqlens does not rise from 0 to the length.
    """
    check_recurrent_layout(sharding.layout, world_size=sharding.world_size)
    if cu_seqlens is None:
        return _chain(sharding, None)
    check_cu_seqlens(cu_seqlens)
    return _chain(sharding, cu_seqlens.numpy().tobytes())


# A run of lightning layers asks for the same few chains, step by step for new ones.
@lru_cache(maxsize=64)
def _chain(sharding: Sharding, int32_bounds: bytes | None) -> Chain:
    if int32_bounds is None:
        return Chain(sharding, (0, sharding.seq_len))
    given = tuple(np.frombuffer(int32_bounds, dtype=np.int32).tolist())
    if not given or given[0] != 0 or given[-1] != sharding.seq_len:
        found = f"goes from {given[0]:,} to {given[-1]:,}" if given else "is empty"
        raise LayoutError(
            f"cu_seqlens {found}; it must go from 0 to seq_len={sharding.seq_len:,}, the tokens of "
            "all ranks together, padding as a document of its own"
        )
    for i, (start, stop) in enumerate(pairwise(given)):
        if stop < start:
            raise LayoutError(
                f"cu_seqlens[{i + 1}]={stop:,} is below cu_seqlens[{i}]={start:,}; documents "
                "follow one another, so it must not fall: torch.cumsum of their lengths, after a 0"
            )
    return Chain(sharding, tuple(sorted(set(given))))
