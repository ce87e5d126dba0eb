"""A dataset on disk, opened: documents as slices of memory-mapped token files.

Raw little-endian tokens and one offset a document, nothing per sequence: sequences follow from the
lengths. Opening checks the files against their manifest; reading touches only the bytes asked for.
Price: 8 bytes of memory a document for the lengths; spans of one length are gathered at memory
speed (hundreds of millions of tokens a second on one core).
Source of the payload: the raw `.bin` of OLMo-core and Megatron-LM.
"""

import logging
import re
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from ringctx.data.check import shard_problems
from ringctx.data.manifest import (
    Manifest,
    loss_name,
    offsets_name,
    read_manifest,
    sources_name,
    tokens_name,
)
from ringctx.errors import DatasetError

__all__ = ["Dataset", "Documents", "open_dataset"]

FULL_CHECK_BYTES = 256 * 2**20

# Runs of at least so many entries on average are copied one by one; shorter ones in one look-up.
_LONG_RUN = 100
_LOG = logging.getLogger(__name__)

_UNFINISHED = re.compile(r"\.tmp-\d+$")


class Documents(Protocol):
    """What a plan and a loader need of a collection of documents."""

    @property
    def fingerprint(self) -> str:
        """Hex name of the content."""

    @property
    def vocab_size(self) -> int:
        """Every token id is below this."""

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Tokens of each document, the end-of-document id included."""

    @property
    def source_names(self) -> tuple[str, ...]:
        """Names of the sources; empty: none are told apart."""

    @property
    def sources(self) -> NDArray[np.uint16] | None:
        """The source of each document, a number of `source_names`; None: none are told apart."""

    @property
    def has_loss_bits(self) -> bool:
        """Whether some tokens are no targets."""

    def read_spans(
        self, documents: NDArray[np.int64], starts: NDArray[np.int64], lengths: NDArray[np.int64]
    ) -> NDArray[np.unsignedinteger[Any]]:
        """The tokens of spans, one after another; each span lies inside its document."""

    def read_loss(
        self, documents: NDArray[np.int64], starts: NDArray[np.int64], lengths: NDArray[np.int64]
    ) -> NDArray[np.bool_]:
        """Of the same spans: whether each token is a target."""


class Dataset:
    """Documents of a dataset folder; `open_dataset` makes one. Pickles as its path."""

    def __init__(self, path: Path, manifest: Manifest, *, changed: bool = False) -> None:
        """Map the files of a folder that has been checked; `changed`: some hash differed."""
        self.path = path
        self.changed = changed
        self.manifest = manifest
        self._tokens = [self._map(shard) for shard in range(len(manifest.shards))]
        self._offsets = [
            np.load(path / offsets_name(shard), mmap_mode="r").view(np.ndarray)
            for shard in range(len(manifest.shards))
        ]
        self._loss = [self._map_loss(shard) for shard in range(len(manifest.shards))]
        counts = [0, *(shard.documents for shard in manifest.shards)]
        self._first_document = np.cumsum(counts, dtype=np.int64)

    @property
    def num_documents(self) -> int:
        """Documents in the dataset."""
        return self.manifest.num_documents

    @property
    def num_tokens(self) -> int:
        """Tokens in the dataset, one end-of-document id a document included."""
        return self.manifest.num_tokens

    @property
    def vocab_size(self) -> int:
        """Ids of the full tokenizer, the end-of-document id included."""
        return self.manifest.vocab_size

    @property
    def end_id(self) -> int:
        """The id that ends every document."""
        return self.manifest.end_id

    @property
    def tokenizer(self) -> str:
        """Name of the tokenizer, as given to the build."""
        return self.manifest.tokenizer

    @cached_property
    def fingerprint(self) -> str:
        """Hex name of the content."""
        return self.manifest.fingerprint

    @property
    def source_names(self) -> tuple[str, ...]:
        """Names of the sources; empty: none are told apart."""
        return self.manifest.sources

    @property
    def has_loss_bits(self) -> bool:
        """Whether some tokens are no targets."""
        return any(bits is not None for bits in self._loss)

    @cached_property
    def sources(self) -> NDArray[np.uint16] | None:
        """The source of each document, a number of `source_names`; None: none are told apart."""
        if not self.source_names:
            return None
        shards = range(len(self.manifest.shards))
        return np.concatenate([np.load(self.path / sources_name(shard)) for shard in shards])

    @cached_property
    def lengths(self) -> NDArray[np.int64]:
        """Tokens of each document, int64 `[num_documents]`."""
        return np.concatenate([np.diff(offsets) for offsets in self._offsets])

    def document(self, index: int) -> NDArray[np.unsignedinteger[Any]]:
        """The tokens of one document, memory-mapped, its end-of-document id last."""
        if not 0 <= index < self.num_documents:
            raise IndexError(f"document {index} of a dataset of {self.num_documents} documents")
        shard = int(np.searchsorted(self._first_document, index, side="right")) - 1
        local = index - self._first_document[shard]
        first, last = self._offsets[shard][local : local + 2]
        return self._tokens[shard][first:last]

    def read_spans(
        self, documents: NDArray[np.int64], starts: NDArray[np.int64], lengths: NDArray[np.int64]
    ) -> NDArray[np.unsignedinteger[Any]]:
        """Gather spans.

        Args:
            documents: int64 `[n]`.
            starts: int64 `[n]`, offsets inside the documents; start + length must not pass the
                document's end.
            lengths: int64 `[n]`, tokens of each span.

        Returns:
            A copy, `[sum of lengths]`, in the type on disk.
        """
        return self._gather(
            documents,
            starts,
            lengths,
            dtype=self.manifest.dtype,
            take=lambda shard, firsts, counts: gather(self._tokens[shard], firsts, counts),
        )

    def read_loss(
        self, documents: NDArray[np.int64], starts: NDArray[np.int64], lengths: NDArray[np.int64]
    ) -> NDArray[np.bool_]:
        """Whether each token of some spans is a target; arguments as of `read_spans`."""
        return self._gather(
            documents,
            starts,
            lengths,
            dtype="bool",
            take=lambda shard, firsts, counts: _bits(self._loss[shard], firsts, counts),
        )

    def _gather(
        self,
        documents: NDArray[np.int64],
        starts: NDArray[np.int64],
        lengths: NDArray[np.int64],
        *,
        dtype: str,
        take: Callable[[int, NDArray[np.int64], NDArray[np.int64]], NDArray[Any]],
    ) -> NDArray[Any]:
        """Entries of shards, span after span; `take(shard, firsts, counts)` reads one shard's."""
        shard_of = np.searchsorted(self._first_document, documents, side="right") - 1
        firsts = starts.copy()
        shards = np.flatnonzero(np.bincount(shard_of))
        for shard in shards:
            here = shard_of == shard
            local = documents[here] - self._first_document[shard]
            firsts[here] += self._offsets[shard][local]
        if len(shards) == 1:
            return take(int(shards[0]), firsts, lengths)
        entries = np.empty(int(lengths.sum()), dtype=dtype)
        for shard in shards:
            here = shard_of == shard
            entries[np.repeat(here, lengths)] = take(int(shard), firsts[here], lengths[here])
        return entries

    def _map(self, shard: int) -> NDArray[np.unsignedinteger[Any]]:
        path = self.path / tokens_name(shard)
        return np.memmap(path, dtype=self.manifest.dtype, mode="r").view(np.ndarray)

    def _map_loss(self, shard: int) -> NDArray[np.uint8] | None:
        """The loss bits of a shard; None: all its tokens are targets."""
        if self.manifest.shards[shard].loss_hash is None:
            return None
        path = self.path / loss_name(shard)
        return np.memmap(path, dtype=np.uint8, mode="r").view(np.ndarray)

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle the path alone; the files are mapped again on the other side."""
        return _reopen, (self.path, self.fingerprint)

    def __repr__(self) -> str:
        """Path and size."""
        return (
            f"Dataset({str(self.path)!r}, num_documents={self.num_documents}, "
            f"num_tokens={self.num_tokens}, tokenizer={self.tokenizer!r})"
        )


def open_dataset(path: str | Path, *, allow_changed: bool = False) -> Dataset:
    """Open a dataset folder after checking its files against the manifest.

    Sizes and offsets are always checked; content hashes in full up to 256 MiB of tokens, beyond
    that in sampled blocks (`ringctx data check` verifies everything).

    Args:
        path: the folder.
        allow_changed: go on with a warning where tokens are not what their hash says.

    Raises:
        DatasetError: naming the file, what was expected, what is there, and the remedy.
    """
    folder = Path(path)
    if _UNFINISHED.search(folder.name):
        raise DatasetError(f"{folder} is left from a build that was stopped: delete it")
    manifest = read_manifest(folder)
    full, changed = manifest.num_bytes <= FULL_CHECK_BYTES, False
    for shard in range(len(manifest.shards)):
        for problem in shard_problems(folder, manifest, shard, full=full):
            if not (allow_changed and problem.is_change):
                raise DatasetError(
                    f"{problem.text}; build the dataset again, or see 'ringctx data check "
                    f"{folder}' for everything that is wrong with it"
                )
            _LOG.warning("data.allow_changed: %s", problem.text)
            changed = True
    return Dataset(folder, manifest, changed=changed)


def gather(
    entries: NDArray[Any], firsts: NDArray[np.int64], counts: NDArray[np.int64]
) -> NDArray[Any]:
    """Runs of an array one after another: counts[i] entries from firsts[i] on."""
    if len(counts) * _LONG_RUN <= int(counts.sum()):
        runs = zip(firsts.tolist(), (firsts + counts).tolist(), strict=True)
        return np.concatenate([entries[first:end] for first, end in runs])
    ends = np.cumsum(counts)
    return entries[
        np.arange(ends[-1] if len(ends) else 0) + np.repeat(firsts - ends + counts, counts)
    ]


def _bits(
    packed: NDArray[np.uint8] | None, firsts: NDArray[np.int64], counts: NDArray[np.int64]
) -> NDArray[np.bool_]:
    """Runs of bits one after another."""
    if packed is None:
        return np.ones(int(counts.sum()), np.bool_)
    first_bytes = firsts >> 3
    byte_counts = np.where(counts > 0, ((firsts + counts + 7) >> 3) - first_bytes, 0)
    bits = np.unpackbits(gather(packed, first_bytes, byte_counts), bitorder="little")
    # Where each run begins among the bits of whole bytes.
    begins = 8 * (np.cumsum(byte_counts) - byte_counts) + (firsts & 7)
    return gather(bits, begins, counts).view(np.bool_)


def _reopen(path: Path, fingerprint: str) -> Dataset:
    manifest = read_manifest(path)
    if manifest.fingerprint != fingerprint:
        raise DatasetError(f"{path} was replaced by another dataset while it was in use")
    return Dataset(path, manifest)
