"""Raw token files of other libraries: where their documents end, and whether their ids can be.

Tokens are read where they lie. One pass over memory-mapped blocks takes the content hash, the
largest id and, where no index says better, the ends of documents, which are all places of one id.
Price: the hash, about 1 GB/s a core (the search for end ids alone is many times faster), and
8 bytes of memory a document.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from ringctx.data.manifest import new_hash
from ringctx.errors import DatasetError

__all__ = ["ScannedFile", "TokenDtype", "TokenFile", "distinct_borders", "find_ends", "scan_file"]

TokenDtype = Literal["uint16", "uint32"]

# Small enough that what the hash has read is still in the processor's cache for the rest.
BLOCK_BYTES = 2**21


@dataclass(frozen=True, kw_only=True, eq=False)
class TokenFile:
    """A file of nothing but little-endian ids, and what its index says of it."""

    path: Path
    dtype: TokenDtype
    borders: NDArray[np.int64] | None = None
    """From 0 to the number of tokens, rising: where documents begin and end. None: no index; every
    document ends with the end-of-document id."""
    empty: int = 0
    """Documents without tokens, which `borders` leaves out."""
    signed: bool = False
    """The ids were written as signed numbers: the upper half of the type is negative ids."""
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True, eq=False)
class ScannedFile:
    """A token file after the pass over its tokens."""

    path: Path
    borders: NDArray[np.int64]
    tokens_hash: str
    empty: int
    one_token: int
    """Documents of one token: they stay, since tokens are not moved, and have no target."""
    unended: int
    """Documents whose last token is not the end-of-document id."""
    warnings: tuple[str, ...]


def scan_file(
    file: TokenFile, *, vocab_size: int, end_id: int, on_bytes: Callable[[int], None]
) -> ScannedFile:
    """Read all tokens of a file once.

    Args:
        file: what is known of it; it holds at least one token.
        vocab_size: every id must be below.
        end_id: the end-of-document id, below vocab_size.
        on_bytes: called with the size of every block that was read.

    Raises:
        DatasetError: if an id is beyond the vocabulary, or if the file has no index and no end id.
    """
    tokens = np.memmap(file.path, dtype=file.dtype, mode="r").view(np.ndarray)
    digest, ends = new_hash(), [np.zeros(1, dtype=np.int64)]
    block_len = BLOCK_BYTES // tokens.itemsize
    for start in range(0, len(tokens), block_len):
        block = tokens[start : start + block_len]
        digest.update(block.data)
        if file.borders is None:
            ends.append(find_ends(block, end_id) + start)
        if int(block.max()) >= vocab_size:
            so_far = np.concatenate(ends) if file.borders is None else file.borders
            at = start + int(np.argmax(block >= vocab_size))
            raise DatasetError(_unknown_id(file, tokens[at], at, so_far, vocab_size))
        on_bytes(block.nbytes)
    borders, warnings = file.borders, file.warnings
    if borders is None:
        borders, warning = _close_last(file.path, np.concatenate(ends), len(tokens), end_id)
        warnings += warning
    return ScannedFile(
        path=file.path,
        borders=borders,
        tokens_hash=digest.hexdigest(),
        empty=file.empty,
        one_token=int(np.count_nonzero(np.diff(borders) == 1)),
        unended=int(np.count_nonzero(tokens[borders[1:] - 1] != end_id)),
        warnings=warnings,
    )


def find_ends(tokens: NDArray[Any], end_id: int) -> NDArray[np.int64]:
    """The places right after every end-of-document id, int64, ascending."""
    return np.flatnonzero(tokens == tokens.dtype.type(end_id)) + 1


def distinct_borders(borders: NDArray[np.int64]) -> tuple[NDArray[np.int64], int]:
    """Leave out documents without tokens, which have no place in a dataset's offsets.

    Args:
        borders: int64 `[documents + 1]`, not falling.

    Returns:
        The rising borders, and the number of documents left out.
    """
    held = np.diff(borders) > 0
    return np.concatenate([borders[:1], borders[1:][held]]), int(np.count_nonzero(~held))


def _close_last(
    path: Path, borders: NDArray[np.int64], num_tokens: int, end_id: int
) -> tuple[NDArray[np.int64], tuple[str, ...]]:
    """Keep what follows the last end id as a document."""
    if len(borders) == 1:
        raise DatasetError(
            f"{path}: the end-of-document id {end_id} is nowhere in its {num_tokens:,} tokens; "
            "name the id that ends documents with --end-id, or put the .csv.gz with their starts "
            "and ends beside it"
        )
    left = num_tokens - int(borders[-1])
    if not left:
        return borders, ()
    warning = (
        f"{path}: its last {left:,} tokens do not end with the end-of-document id {end_id}; "
        "they are kept as a document"
    )
    return np.append(borders, num_tokens), (warning,)


def _unknown_id(
    file: TokenFile, token: Any, at: int, borders: NDArray[np.int64], vocab_size: int
) -> str:
    document = int(np.searchsorted(borders, at, side="right")) - 1
    shown = int(token.astype(np.int32)) if file.signed else int(token)
    return (
        f"{file.path}: token id {shown} at document {document:,} of this file, offset "
        f"{at - int(borders[document]):,}, but vocab_size is {vocab_size:,} (read as "
        f"{'int32' if file.signed else file.dtype}); name the tokenizer or --vocab-size that the "
        "file was made with, and its --dtype if it is an OLMo file"
    )
