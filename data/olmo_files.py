"""Token files of OLMo: `.npy` by name, but raw little-endian ids without a header.

Documents end with the end-of-document id; where a `.csv.gz` lies beside the file, its lines
`start,end,...` say it instead, one document a line.
Price: the tokens are not read here; the .csv.gz is parsed at about a million documents a second.
Source: the format that the Dolma toolkit writes and OLMo-core reads.
"""

import gzip
import zlib
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ringctx.data.token_files import TokenDtype, TokenFile, distinct_borders
from ringctx.errors import DatasetError

__all__ = ["open_olmo"]

_NUMPY_MAGIC = b"\x93NUMPY"
# Enough tokens that zeros in every second place are no chance.
_LOOKED_AT, _LEAST_LOOKED_AT = 4096, 1024


def open_olmo(path: Path, *, dtype: TokenDtype) -> TokenFile:
    """Look at a file of raw tokens and its index, if there is one.

    Args:
        path: the `.npy`.
        dtype: how ids are stored; the file does not say.

    Raises:
        DatasetError: if the file, or its index, cannot be what it should be.
    """
    size, itemsize = path.stat().st_size, np.dtype(dtype).itemsize
    if size % itemsize or not size:
        raise DatasetError(
            f"{path} holds {size:,} bytes, expected a multiple of {itemsize} (the size of a "
            f"{dtype}) above 0; it is cut, or needs another --dtype"
        )
    with path.open("rb") as file:
        head = file.read(_LOOKED_AT)
    if head.startswith(_NUMPY_MAGIC):
        raise DatasetError(
            f"{path} is a numpy file with a header, expected raw tokens; write it again with "
            f"numpy.load(FILE).astype('{dtype}').tofile(OTHER_FILE)"
        )
    if dtype == "uint16" and size % 4 == 0 and _looks_wide(head):
        raise DatasetError(
            f"{path}: every second {dtype} at its beginning is 0, so it holds uint32; "
            "import it with --dtype uint32"
        )
    index = path.with_name(path.name.removesuffix(".npy") + ".csv.gz")
    if not index.is_file():
        return TokenFile(path=path, dtype=dtype)
    borders, empty = distinct_borders(_read_index(index, path, num_tokens=size // itemsize))
    return TokenFile(path=path, dtype=dtype, borders=borders, empty=empty)


def _looks_wide(head: bytes) -> bool:
    if len(head) < _LEAST_LOOKED_AT:
        return False
    words = np.frombuffer(head, dtype="<u2")
    return bool(words[::2].any() and not words[1::2].any())


def _read_index(index: Path, path: Path, *, num_tokens: int) -> NDArray[np.int64]:
    """The borders of all documents: each must begin where the one before it ends."""
    borders = [0]
    try:
        with gzip.open(index, "rt") as lines:
            for number, line in enumerate(lines, start=1):
                start, end = _parse(line, f"{index}:{number}")
                if start != borders[-1] or end < start:
                    raise DatasetError(
                        f"{index}:{number}: the document runs from {start:,} to {end:,}, expected "
                        f"it to start at {borders[-1]:,}, where the one before it ends"
                    )
                borders.append(end)
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise DatasetError(f"{index} cannot be read: {error}") from error
    if borders[-1] != num_tokens:
        raise DatasetError(
            f"{index}: its documents end at token {borders[-1]:,}, but {path} holds "
            f"{num_tokens:,}; one of the two is cut, or needs another --dtype"
        )
    return np.array(borders, dtype=np.int64)


def _parse(line: str, place: str) -> tuple[int, int]:
    try:
        start, end = line.split(",", 2)[:2]
        return int(start), int(end)
    except ValueError as error:
        raise DatasetError(
            f"{place}: expected 'start,end,...' of a document, got {line[:40].rstrip()!r}"
        ) from error
