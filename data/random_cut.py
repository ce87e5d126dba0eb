"""Pieces of random lengths from long documents: the option `spread` of the decomposition.

As long as a document has two longest pieces left, its next piece is max_len long with
probability 1/Z, half as long with 2/Z, and so on down to min_len: every length gets equally many
tokens, and most pieces are short. The i-th draw of a document hangs on the seed, the document and
i alone, so all documents are drawn at once, in blocks that bound memory.
Price: about 0.15 us a piece; 24 bytes a piece.
Source: the rule of the code released with Pouransari et al. 2024 (arXiv 2405.13226), whose pieces
take one token more than their length; here every token is in exactly one piece.
"""

import itertools
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ringctx.data.randomness import hash_numbers

__all__ = ["RandomCuts", "cut_at_random"]

_BLOCK = 2**21


@dataclass(frozen=True, eq=False)
class RandomCuts:
    """The random pieces of all documents; those of one document lie end to end from its start."""

    documents: NDArray[np.int64]
    """`[pieces]`."""
    starts: NDArray[np.int64]
    """`[pieces]`."""
    lengths: NDArray[np.int64]
    """`[pieces]`."""


def cut_at_random(
    lengths: NDArray[np.int64], *, min_len: int, max_len: int, seed: int
) -> RandomCuts:
    """Cut random pieces from documents until each has less than two longest pieces left.

    Args:
        lengths: int64 `[documents]`.
        min_len: shortest piece, a power of two.
        max_len: longest piece, a power of two, at most 2^31 shortest ones.
        seed: names the draws.
    """
    sizes = max_len >> np.arange((max_len // min_len).bit_length())
    documents = np.flatnonzero(lengths >= 2 * max_len)
    # A piece is drawn wherever at most this much of the document lies before it.
    room = lengths[documents] - 2 * max_len
    blocks = np.cumsum(_expected_draws(room, sizes)) // _BLOCK
    borders = np.flatnonzero(np.diff(blocks, prepend=-1, append=-1))
    parts = [np.empty((3, 0), np.int64)]
    for first, last in itertools.pairwise(borders.tolist()):
        parts += _cut_block(documents[first:last], room[first:last], sizes, seed)
    return RandomCuts(*np.concatenate(parts, axis=1))


def _cut_block(
    documents: NDArray[np.int64], room: NDArray[np.int64], sizes: NDArray[np.int64], seed: int
) -> list[NDArray[np.int64]]:
    """Documents, starts and lengths of the random pieces of some documents."""
    cut, drawn = np.zeros_like(documents), np.zeros_like(documents)
    parts = []
    waiting = np.arange(len(documents))
    while len(waiting):
        draws = _expected_draws((room - cut)[waiting], sizes)
        at = np.repeat(waiting, draws)
        first = np.repeat(np.cumsum(draws) - draws, draws)
        number = drawn[at] + np.arange(len(at)) - first
        size = sizes[_draw(len(sizes), seed, documents[at], number)]
        before = np.cumsum(size) - size
        before += cut[at] - before[first]
        taken = before <= room[at]
        at, size = at[taken], size[taken]
        parts.append(np.stack([documents[at], before[taken], size]))
        drawn += np.bincount(at, minlength=len(documents))
        np.add.at(cut, at, size)
        waiting = waiting[(cut <= room)[waiting]]
    return parts


def _expected_draws(room: NDArray[np.int64], sizes: NDArray[np.int64]) -> NDArray[np.int64]:
    """Pieces that fill this much room, and some more, so that few documents need a second look."""
    mean = len(sizes) * int(sizes[0]) / (2 ** len(sizes) - 1)
    return np.asarray(1.1 * room / mean + 8, np.int64)


def _draw(
    n: int, seed: int, documents: NDArray[np.int64], numbers: NDArray[np.int64]
) -> NDArray[np.int64]:
    """Draws from 0 to n - 1, each twice as likely as the one before."""
    bits = hash_numbers(seed, documents, numbers) >> np.uint64(32)
    uniform = (bits * np.uint64(2**n - 1)) >> np.uint64(32)
    return np.frexp((uniform + np.uint64(1)).astype(np.float64))[1].astype(np.int64) - 1
