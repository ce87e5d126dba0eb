"""Documents made up for tests: in memory with telling token ids, and small ones on disk."""

import base64
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ringctx.data.tokenizers import ByteTokenizer
from ringctx.data.writer import DatasetWriter

STRIDE = 2**20
"""Token `at` of document d has id `d * STRIDE + at`."""


class MadeUpDocuments:
    """Documents without files; counts the tokens that are read."""

    def __init__(self, lengths: Sequence[int], *, fingerprint: str = "made-up") -> None:
        self.lengths = np.array(lengths, dtype=np.int64)
        self.fingerprint = fingerprint
        self.vocab_size = len(lengths) * STRIDE
        self.tokens_read = 0

    def read(
        self, documents: NDArray[np.int64], starts: NDArray[np.int64], length: int
    ) -> NDArray[np.uint32]:
        assert (starts >= 0).all() and (starts + length <= self.lengths[documents]).all()
        self.tokens_read += len(documents) * length
        first = documents * STRIDE + starts
        return (first[:, None] + np.arange(length)).astype(np.uint32)


def write_documents(path: Path, documents: Sequence[Sequence[int]], *, shard_bytes: int) -> Path:
    """A dataset of these ids, in the `bytes` vocabulary."""
    with DatasetWriter(path, tokenizer=ByteTokenizer(), shard_bytes=shard_bytes) as writer:
        for document in documents:
            writer.add(np.array(document), np.array([len(document)]))
        writer.finish(built_from={})
    return path


def write_ranks(path: Path, *, merges: Sequence[bytes] = (b"th", b"the", b" the", b"in")) -> Path:
    """A rank file of all bytes and a few merges."""
    tokens = [bytes([byte]) for byte in range(256)] + list(merges)
    lines = [f"{base64.b64encode(t).decode()} {rank}" for rank, t in enumerate(tokens)]
    path.write_text("\n".join(lines) + "\n")
    return path
