"""Where chunks begin and end, and which states they pass on: pure tables of ints.

One idea: the tokens of a call are cut into fragments (documents, or what a rank holds of them), and
fragments into chunks of at most `chunk_len` tokens. A state runs through the chunks of a fragment;
it comes in at the first and leaves at the last, through numbered slots that the caller reads and
writes. Chunks never cross a border, so the kernels know nothing of documents:

    fragments   | 0 ............ 130 | 130 .. 137 |
    chunks      | 64 | 64 | 2        | 7          |

Price: the last chunk of a fragment is computed at full length, padded with zeros.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import pairwise

from ringctx.errors import LayoutError

__all__ = [
    "CHUNK_LENS",
    "Chunks",
    "Fragment",
    "check_chunk_len",
    "cut",
    "cut_documents",
    "suited_chunk_len",
]

# Powers of two from the smallest side of a GPU's matrix unit up. Longer ones are slower.
CHUNK_LENS = (16, 32, 64, 128)
_LARGEST_BY_DEFAULT = 64


@dataclass(frozen=True, slots=True)
class Fragment:
    """Rows [start, stop) of every batch row: one run of tokens of one document."""

    start: int
    stop: int
    # Slot of the state that comes in; None: it starts from zero.
    entry: int | None = None
    # Slot that the leaving state goes to; None: nobody asks for it.
    exit: int | None = None


@dataclass(frozen=True)
class Chunks:
    """The chunks of all fragments, in order. They cover rows 0 .. `num_rows` without gaps."""

    chunk_len: int
    fragments: tuple[Fragment, ...]

    @cached_property
    def bounds(self) -> tuple[tuple[int, int], ...]:
        """(start, length) of every chunk."""
        return tuple(
            (start, min(self.chunk_len, fragment.stop - start))
            for fragment in self.fragments
            for start in range(fragment.start, fragment.stop, self.chunk_len)
        )

    @cached_property
    def first(self) -> tuple[int, ...]:
        """Index of the first chunk of every fragment, and at the end the number of chunks."""
        firsts = [0]
        for fragment in self.fragments:
            firsts.append(firsts[-1] + -(-(fragment.stop - fragment.start) // self.chunk_len))
        return tuple(firsts)

    @cached_property
    def opening(self) -> dict[int, Fragment]:
        """Fragments by the number of their first chunk."""
        return dict(zip(self.first, self.fragments, strict=False))

    @cached_property
    def closing(self) -> dict[int, Fragment]:
        """Fragments by the number of their last chunk."""
        return {stop - 1: f for stop, f in zip(self.first[1:], self.fragments, strict=True)}

    @property
    def num_rows(self) -> int:
        """Tokens of a batch row."""
        return self.fragments[-1].stop if self.fragments else 0

    @property
    def num_entries(self) -> int:
        """Slots of incoming states."""
        return sum(fragment.entry is not None for fragment in self.fragments)

    @property
    def num_exits(self) -> int:
        """Slots of leaving states."""
        return sum(fragment.exit is not None for fragment in self.fragments)


@lru_cache(maxsize=64)
def cut(fragments: tuple[Fragment, ...], *, chunk_len: int) -> Chunks:
    """The chunks of fragments that follow one another.

    Args:
        fragments: none empty; slots numbered 0, 1, ... in this order.
        chunk_len: one of `CHUNK_LENS`.
    """
    stop = 0
    for fragment in fragments:
        assert fragment.start == stop < fragment.stop, fragment
        stop = fragment.stop
    for slots in ([f.entry for f in fragments], [f.exit for f in fragments]):
        used = [slot for slot in slots if slot is not None]
        assert used == list(range(len(used))), slots
    return Chunks(chunk_len, fragments)


def cut_documents(
    bounds: Sequence[int], *, chunk_len: int | None, with_entries: bool, with_exits: bool
) -> Chunks:
    """The chunks of whole documents.

    Args:
        bounds: where documents begin, and the end of the last; rising.
        chunk_len: None for the cheapest.
        with_entries: whether a state comes into every document.
        with_exits: whether its state is asked for.
    """
    fragments = tuple(
        Fragment(start, stop, i if with_entries else None, i if with_exits else None)
        for i, (start, stop) in enumerate(pairwise(bounds))
    )
    return cut(fragments, chunk_len=chunk_len or suited_chunk_len(fragments))


def suited_chunk_len(fragments: Sequence[Fragment]) -> int:
    """The chunk length with the least work, padding counted: shorter where fragments are short.

    The work of a chunk of C tokens with head dim D is about C (C + D) products of D numbers; D is
    taken as 64.
    """

    def work(chunk_len: int) -> int:
        chunks = sum(-(-(f.stop - f.start) // chunk_len) for f in fragments)
        return chunks * chunk_len * (chunk_len + 64)

    allowed = [length for length in CHUNK_LENS if length <= _LARGEST_BY_DEFAULT]
    # Long chunks mean fewer states: they win unless padding costs a quarter more.
    cheapest = min(work(length) for length in allowed)
    return max(length for length in allowed if 4 * work(length) <= 5 * cheapest or length == 16)


def check_chunk_len(chunk_len: int | None) -> None:
    """Raise LayoutError unless it is None or one of `CHUNK_LENS`."""
    if chunk_len is not None and chunk_len not in CHUNK_LENS:
        raise LayoutError(
            f"chunk_len={chunk_len} must be one of {', '.join(map(str, CHUNK_LENS))}, or None for "
            "the one that suits the documents"
        )
