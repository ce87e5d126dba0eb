"""Token files of Megatron-LM: raw ids in a `.bin`, lengths and documents in the `.idx` beside it.

The index holds, little-endian: magic, version, code of the token type, number of sequences and of
document borders; then int32 lengths, int64 byte pointers, int64 borders (numbers of sequences).
A document may be several sequences, which lie one after another: they are joined.
Price: the tokens are not read here; the index is, at memory speed.
Source: the format of Megatron-LM's IndexedDataset.
"""

import struct
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ringctx.data.token_files import TokenDtype, TokenFile, distinct_borders
from ringctx.errors import DatasetError

__all__ = ["open_megatron"]

_MAGIC = b"MMIDIDX\x00\x00"
_HEADER = struct.Struct("<9sQBQQ")
_VERSION = 1
_DTYPES = {
    1: "uint8",
    2: "int8",
    3: "int16",
    4: "int32",
    5: "int64",
    6: "float64",
    7: "float32",
    8: "uint16",
}
_READ_AS: dict[str, TokenDtype] = {"uint16": "uint16", "int32": "uint32"}
_BYTES_A_SEQUENCE, _BYTES_A_BORDER = 4 + 8, 8


def open_megatron(path: Path) -> TokenFile:
    """Read the index of a `.bin`.

    Args:
        path: the `.bin`; the `.idx` of the same name lies beside it.

    Raises:
        DatasetError: if the index is missing, damaged, of another kind, or not that of the `.bin`.
    """
    index = path.with_suffix(".idx")
    if not index.is_file():
        raise DatasetError(f"{index} is missing; it says where the documents of {path.name} end")
    raw = np.fromfile(index, dtype=np.uint8)
    dtype, num_sequences, num_borders = _read_header(index, raw)
    itemsize = np.dtype(dtype).itemsize
    at = _HEADER.size
    lengths, at = _take(raw, "<i4", num_sequences, at)
    pointers, at = _take(raw, "<i8", num_sequences, at)
    documents, at = _take(raw, "<i8", num_borders, at)
    places = _places(index, lengths, pointers, itemsize=itemsize)
    size, expected = path.stat().st_size, int(places[-1]) * itemsize
    if size != expected or not size:
        raise DatasetError(
            f"{path} holds {size:,} bytes, but {index.name} says {expected:,} ({places[-1]:,} "
            f"tokens of {dtype}); one of the two is cut or belongs to another file"
        )
    _check_documents(index, documents, num_sequences)
    warnings: tuple[str, ...] = ()
    if documents[-1] != num_sequences:
        warnings = (
            f"{index}: its last {num_sequences - documents[-1]:,} sequences belong to no document; "
            "they are kept as one",
        )
        documents = np.append(documents, num_sequences)
    borders, empty = distinct_borders(places[documents])
    return TokenFile(
        path=path,
        dtype=_READ_AS[dtype],
        borders=borders,
        empty=empty,
        signed=dtype == "int32",
        warnings=warnings,
    )


def _read_header(index: Path, raw: NDArray[np.uint8]) -> tuple[str, int, int]:
    """Token type, number of sequences and number of borders, as far as the file can hold them."""
    head = raw[: _HEADER.size].tobytes()
    if not head.startswith(_MAGIC):
        raise DatasetError(
            f"{index} starts with {head[: len(_MAGIC)]!r}, expected {_MAGIC!r}: it is no index of "
            "Megatron-LM"
        )
    if len(head) < _HEADER.size:
        raise DatasetError(
            f"{index} holds {len(raw)} bytes, expected a header of {_HEADER.size}: it is cut"
        )
    _, version, code, num_sequences, num_borders = _HEADER.unpack(head)
    if version != _VERSION:
        raise DatasetError(f"{index}: index version {version}, expected {_VERSION}")
    dtype = _DTYPES.get(code, f"of code {code}")
    if dtype not in _READ_AS:
        raise DatasetError(
            f"{index}: its tokens are {dtype}, but only uint16 and int32 (without negative ids) "
            "can be imported; write the data again with one of them"
        )
    expected = _HEADER.size + num_sequences * _BYTES_A_SEQUENCE + num_borders * _BYTES_A_BORDER
    if len(raw) == expected + num_sequences and num_sequences:
        raise DatasetError(
            f"{index} gives every sequence a mode (multimodal data); only text can be imported"
        )
    if len(raw) != expected:
        raise DatasetError(
            f"{index} holds {len(raw):,} bytes, expected {expected:,} for {num_sequences:,} "
            f"sequences and {num_borders:,} document borders: it is cut or damaged"
        )
    return dtype, num_sequences, num_borders


def _take(raw: NDArray[np.uint8], dtype: str, count: int, at: int) -> tuple[NDArray[Any], int]:
    """`count` numbers from byte `at` on, as int64, and the byte after them."""
    end = at + count * np.dtype(dtype).itemsize
    return raw[at:end].view(dtype).astype(np.int64), end


def _places(
    index: Path, lengths: NDArray[np.int64], pointers: NDArray[np.int64], *, itemsize: int
) -> NDArray[np.int64]:
    """Where sequences begin, in tokens, and the end of the last one: sums of the lengths."""
    if (negative := np.flatnonzero(lengths < 0)).size:
        raise DatasetError(
            f"{index}: sequence {negative[0]:,} has the length {lengths[negative[0]]}"
        )
    places = np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(lengths)])
    wrong = np.flatnonzero(pointers != places[:-1] * itemsize)
    if wrong.size:
        first = int(wrong[0])
        raise DatasetError(
            f"{index}: sequence {first:,} starts at byte {pointers[first]:,}, expected "
            f"{places[first] * itemsize:,}, the bytes of all sequences before it"
        )
    return places


def _check_documents(index: Path, documents: NDArray[np.int64], num_sequences: int) -> None:
    if not len(documents) or documents[0] != 0:
        found = f"{documents[0]:,}" if len(documents) else "nothing"
        raise DatasetError(f"{index}: its document borders start with {found}, expected 0")
    falling = np.flatnonzero(np.diff(documents) < 0)
    if falling.size:
        at = int(falling[0])
        raise DatasetError(
            f"{index}: document {at:,} runs from sequence {documents[at]:,} to "
            f"{documents[at + 1]:,}, expected borders that rise"
        )
    if documents[-1] > num_sequences:
        raise DatasetError(
            f"{index}: its documents end at sequence {documents[-1]:,}, but it holds "
            f"{num_sequences:,} sequences"
        )
