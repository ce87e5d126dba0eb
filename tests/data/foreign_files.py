"""Token files as OLMo and Megatron-LM write them, by the description of their formats."""

import gzip
import itertools
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

END = 256

CODES = {"uint8": 1, "int32": 4, "int64": 5, "uint16": 8}


def write_olmo(
    path: Path, documents: Sequence[Sequence[int]], *, dtype: str = "uint16", index: bool = False
) -> Path:
    """Documents one after another; `index`: their starts and ends in a .csv.gz beside the file."""
    np.array([token for document in documents for token in document], dtype=dtype).tofile(path)
    if index:
        ends = [0, *itertools.accumulate(map(len, documents))]
        rows = [
            f"{a},{b},id-{i},text.jsonl,{i}\n" for i, (a, b) in enumerate(itertools.pairwise(ends))
        ]
        write_csv(path, "".join(rows))
    return path


def write_csv(path: Path, text: str) -> None:
    """The .csv.gz beside an OLMo file."""
    with gzip.open(path.with_suffix(".csv.gz"), "wt") as file:
        file.write(text)


def write_megatron(
    path: Path,
    documents: Sequence[Sequence[Sequence[int]]],
    *,
    dtype: str = "uint16",
    **changes: Any,
) -> Path:
    """A .bin of documents, each of several sequences, and its .idx with some fields changed."""
    sequences = [sequence for document in documents for sequence in document]
    tokens = np.array([token for sequence in sequences for token in sequence], dtype=dtype)
    tokens.tofile(path)
    lengths = list(map(len, sequences))
    pointers = [n * tokens.itemsize for n in [0, *itertools.accumulate(lengths)]][:-1]
    borders = [0, *itertools.accumulate(map(len, documents))]
    fields: dict[str, Any] = {
        "magic": b"MMIDIDX\x00\x00",
        "version": 1,
        "code": CODES[dtype],
        "lengths": lengths,
        "pointers": pointers,
        "borders": borders,
        "modes": b"",
    } | changes
    index = struct.pack("<9sQB", fields["magic"], fields["version"], fields["code"])
    index += struct.pack("<QQ", len(fields["lengths"]), len(fields["borders"]))
    index += struct.pack(f"<{len(fields['lengths'])}i", *fields["lengths"])
    index += struct.pack(f"<{len(fields['pointers'])}q", *fields["pointers"])
    index += struct.pack(f"<{len(fields['borders'])}q", *fields["borders"])
    path.with_suffix(".idx").write_bytes(index + fields["modes"])
    return path
