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
        source_names: Sequence[str] = (),
        loss: NDArray[np.bool_] | None = None,
    ) -> None:
        """`sources`: of each document; `loss`: of all tokens, the documents one after another."""
        self.lengths = np.array(lengths, dtype=np.int64)
        self.fingerprint = fingerprint
        self.vocab_size = len(lengths) * STRIDE
        self.source_names = tuple(source_names)
        self.sources = None if sources is None else np.array(sources, dtype=np.uint16)
        assert (self.sources is None) == (not source_names)
        assert loss is None or len(loss) == self.lengths.sum()
        self.loss = loss
        self.tokens_read = 0

    @property
    def has_loss_bits(self) -> bool:
        return self.loss is not None

    def read_spans(
        self, documents: NDArray[np.int64], starts: NDArray[np.int64], lengths: NDArray[np.int64]
    ) -> NDArray[np.uint32]:
        assert (starts >= 0).all() and (starts + lengths <= self.lengths[documents]).all()
        self.tokens_read += int(lengths.sum())
        return spans(documents * STRIDE + starts, lengths).astype(np.uint32)

    def read_loss(
        self, documents: NDArray[np.int64], starts: NDArray[np.int64], lengths: NDArray[np.int64]
    ) -> NDArray[np.bool_]:
        assert self.loss is not None, "only asked where there are loss bits"
        assert (starts >= 0).all() and (starts + lengths <= self.lengths[documents]).all()
        first = np.concatenate([[0], np.cumsum(self.lengths)])[documents] + starts
        return self.loss[spans(first, lengths)]


def spans(first: NDArray[np.int64], lengths: NDArray[np.int64]) -> NDArray[np.int64]:
    """`first[0], first[0] + 1, ...`: the numbers of spans, one after another."""
    numbers = [np.arange(a, a + n) for a, n in zip(first, lengths, strict=True)]
    return np.concatenate(numbers, dtype=np.int64) if numbers else np.empty(0, dtype=np.int64)


def write_documents(
    path: Path,
    documents: Sequence[Sequence[int]],
    *,
    shard_bytes: int,
    sources: Sequence[int] | None = None,
    source_names: Sequence[str] = (),
    loss: Sequence[Sequence[bool] | None] | None = None,
) -> Path:
    """A dataset of these ids, in the `bytes` vocabulary; sources and loss are by document."""
    with DatasetWriter(
        path, tokenizer=ByteTokenizer(), shard_bytes=shard_bytes, sources=source_names
    ) as writer:
        for i, document in enumerate(documents):
            bits = None if loss is None else loss[i]
            writer.add(
                np.array(document),
                np.array([len(document)]),
                sources=None if sources is None else np.array([sources[i]], dtype=np.uint16),
                loss=None if bits is None else np.array(bits),
            )
        writer.finish(built_from={})
    return path


def write_ranks(path: Path, *, merges: Sequence[bytes] = (b"th", b"the", b" the", b"in")) -> Path:
    """A rank file of all bytes and a few merges."""
    tokens = [bytes([byte]) for byte in range(256)] + list(merges)
    lines = [f"{base64.b64encode(t).decode()} {rank}" for rank, t in enumerate(tokens)]
    path.write_text("\n".join(lines) + "\n")
    return path
