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

    def __init__(
        self,
        lengths: Sequence[int],
        *,
        fingerprint: str = "made-up",
        sources: Sequence[int] | None = None,
        source_names: tuple[str, ...] = (),
        loss: Sequence[NDArray[np.bool_]] | None = None,
    ) -> None:
        self.lengths = np.array(lengths, dtype=np.int64)
        self.fingerprint = fingerprint
        self.vocab_size = len(lengths) * STRIDE
        self.sources = None if sources is None else np.array(sources, dtype=np.uint16)
        self.source_names = source_names
        self.has_loss_bits = loss is not None
        self._loss = loss
        self.tokens_read = 0

    def read_spans(
        self, documents: NDArray[np.int64], starts: NDArray[np.int64], lengths: NDArray[np.int64]
    ) -> NDArray[np.uint32]:
        assert (starts >= 0).all() and (starts + lengths <= self.lengths[documents]).all()
        self.tokens_read += int(lengths.sum())
        within = np.arange(int(lengths.sum())) - np.repeat(np.cumsum(lengths) - lengths, lengths)
        return (np.repeat(documents * STRIDE + starts, lengths) + within).astype(np.uint32)

    def read_loss(
        self, documents: NDArray[np.int64], starts: NDArray[np.int64], lengths: NDArray[np.int64]
    ) -> NDArray[np.bool_]:
        assert self._loss is not None
        spans = zip(documents.tolist(), starts.tolist(), lengths.tolist(), strict=True)
        parts = [self._loss[document][start : start + n] for document, start, n in spans]
        return np.concatenate([np.empty(0, np.bool_), *parts])


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
