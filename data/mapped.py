"""Documents as slices of memory-mapped arrays: the one place that turns spans into bytes.

One array of tokens a shard, one offset a document. Spans of one length are gathered through
sliding windows, long spans are copied one by one, short ones of many lengths through one index.
Price: 8 bytes of memory a document for the lengths. On one core, uint16 tokens that are in memory:
spans of 256 at 800 M tokens a second (of mixed lengths around 256: 350 M), of 16 at 140 M (mixed:
70 M), long ones at 2 to 5 G; loss bits at 140 M.
"""

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["MappedDocuments"]

# From this mean length on a copy a span is faster than an index a token.
_COPY_LEN = 128

Tokens = NDArray[np.unsignedinteger[Any]]
Index = NDArray[np.int64]


class MappedDocuments:
    """Documents of several shards, read by span."""

    def __init__(
        self,
        tokens: Sequence[Tokens],
        offsets: Sequence[Index],
        loss: Sequence[NDArray[np.uint8] | None],
    ) -> None:
        """Take arrays; nothing is copied.

        Args:
            tokens: of each shard, `[tokens]`.
            offsets: of each shard, int64 `[documents + 1]`, from 0 to its number of tokens.
            loss: of each shard, one bit a token (the lowest bit of a byte first): is it a target?
                None where all are.
        """
        self.shard_tokens, self.shard_offsets = list(tokens), list(offsets)
        self.shard_loss = list(loss)
        counts = [0, *(len(shard) - 1 for shard in offsets)]
        self._first_document = np.cumsum(counts, dtype=np.int64)
        self._dtype = np.result_type(*tokens)

    @property
    def num_documents(self) -> int:
        """Documents in the dataset."""
        return int(self._first_document[-1])

    @property
    def num_tokens(self) -> int:
        """Tokens in the dataset, one end-of-document id a document included."""
        return sum(len(shard) for shard in self.shard_tokens)

    @cached_property
    def lengths(self) -> Index:
        """Tokens of each document, int64 `[num_documents]`."""
        return np.concatenate([np.diff(offsets) for offsets in self.shard_offsets])

    @property
    def has_loss_bits(self) -> bool:
        """Whether some token may not be a target."""
        return any(bits is not None for bits in self.shard_loss)

    def document(self, index: int) -> Tokens:
        """The tokens of one document, memory-mapped, its end-of-document id last."""
        if not 0 <= index < self.num_documents:
            raise IndexError(f"document {index} of a dataset of {self.num_documents} documents")
        shard = int(np.searchsorted(self._first_document, index, side="right")) - 1
        local = index - self._first_document[shard]
        first, last = self.shard_offsets[shard][local : local + 2]
        return self.shard_tokens[shard][first:last]

    def read(self, documents: Index, starts: Index, length: int) -> Tokens:
        """Gather spans of one length.

        Args:
            documents: int64 `[n]`.
            starts: int64 `[n]`, offsets inside the documents; start + length must not pass the
                document's end.
            length: tokens of each span.

        Returns:
            A copy, `[n, length]`, in the type on disk.
        """
        shard_of, first = self._places(documents, starts)
        spans: Tokens = np.empty((len(first), length), dtype=self._dtype)
        for shard in np.flatnonzero(np.bincount(shard_of)):
            windows = np.lib.stride_tricks.sliding_window_view(self.shard_tokens[shard], length)
            here = shard_of == shard
            # Without a mask where one shard holds all: one pass over the tokens less.
            if here.all():
                return windows[first].astype(self._dtype, copy=False)
            spans[here] = windows[first[here]]
        return spans

    def read_spans(self, documents: Index, starts: Index, lengths: Index) -> Tokens:
        """Gather spans of any lengths, one after another.

        Args:
            documents: int64 `[n]`.
            starts: int64 `[n]`, offsets inside the documents.
            lengths: int64 `[n]`, tokens of each span; none may pass its document's end.

        Returns:
            A copy, `[sum of lengths]`, in the type on disk.
        """
        if len(lengths) and (lengths == lengths[0]).all():
            return self.read(documents, starts, int(lengths[0])).reshape(-1)
        shard_of, first = self._places(documents, starts)
        if lengths.sum() >= _COPY_LEN * len(lengths):
            return self._copy_spans(shard_of, first, lengths)
        spans: Tokens = np.empty(int(lengths.sum()), dtype=self._dtype)
        for shard, at, index in _by_shard(shard_of, first, lengths):
            spans[at] = self.shard_tokens[shard].take(index)
        return spans

    def read_loss(self, documents: Index, starts: Index, lengths: Index) -> NDArray[np.bool_]:
        """Which tokens of these spans are targets.

        Args:
            documents: int64 `[n]`.
            starts: int64 `[n]`, offsets inside the documents.
            lengths: int64 `[n]`, tokens of each span; none may pass its document's end.

        Returns:
            `[sum of lengths]`, the spans one after another.
        """
        targets = np.ones(int(lengths.sum()), dtype=np.bool_)
        shard_of, first = self._places(documents, starts)
        for shard, at, index in _by_shard(shard_of, first, lengths):
            bits = self.shard_loss[shard]
            if bits is not None:
                bit = (index & 7).astype(np.uint8)
                targets[at] = bits.take(index >> 3) >> bit & 1
        return targets

    def _places(self, documents: Index, starts: Index) -> tuple[Index, Index]:
        """Shard of each span, and its first token there."""
        shard_of = np.searchsorted(self._first_document, documents, side="right") - 1
        first = starts.copy()
        for shard in np.flatnonzero(np.bincount(shard_of)):
            here = shard_of == shard
            first[here] += self.shard_offsets[shard][documents[here] - self._first_document[shard]]
        return shard_of, first

    def _copy_spans(self, shard_of: Index, first: Index, lengths: Index) -> Tokens:
        spans: Tokens = np.empty(int(lengths.sum()), dtype=self._dtype)
        at = 0
        places = zip(shard_of.tolist(), first.tolist(), lengths.tolist(), strict=True)
        for shard, start, length in places:
            spans[at : at + length] = self.shard_tokens[shard][start : start + length]
            at += length
        return spans


def _by_shard(
    shard_of: Index, first: Index, lengths: Index
) -> "list[tuple[int, slice | NDArray[np.bool_], Index]]":
    """For each shard in use: where its spans' tokens go, and their places in the shard."""
    found: list[tuple[int, slice | NDArray[np.bool_], Index]] = []
    for shard in np.flatnonzero(np.bincount(shard_of)):
        here = shard_of == shard
        if here.all():
            found.append((int(shard), slice(None), _token_index(first, lengths)))
        else:
            index = _token_index(first[here], lengths[here])
            found.append((int(shard), np.repeat(here, lengths), index))
    return found


def _token_index(first: Index, lengths: Index) -> Index:
    """The place of every token of spans: `first[0], first[0] + 1, ...`, then the next span."""
    ends = np.cumsum(lengths)
    index = np.repeat(first - (ends - lengths), lengths)
    index += np.arange(len(index))
    return index
