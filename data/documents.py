"""A dataset on disk, opened: documents as slices of memory-mapped token files.

Raw little-endian tokens and one offset a document, nothing per sequence: sequences follow from the
lengths. Opening checks the files against their manifest; reading touches only the bytes asked for.
Price: 8 bytes of memory a document for the lengths; spans of one length are gathered at memory
speed (hundreds of millions of tokens a second on one core).
Source of the payload: the raw `.bin` of OLMo-core and Megatron-LM.
"""

import re
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from ringctx.data.check import shard_problems
from ringctx.data.manifest import Manifest, offsets_name, read_manifest, tokens_name
from ringctx.errors import DatasetError

__all__ = ["Dataset", "Documents", "open_dataset"]

FULL_CHECK_BYTES = 256 * 2**20

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

    def read(
        self, documents: NDArray[np.int64], starts: NDArray[np.int64], length: int
    ) -> NDArray[np.unsignedinteger[Any]]:
        """Spans of one length, `[n, length]`; each must lie inside its document."""


class Dataset:
    """Documents of a dataset folder; `open_dataset` makes one. Pickles as its path."""

    def __init__(self, path: Path, manifest: Manifest) -> None:
        """Map the files of a folder that has been checked."""
        self.path = path
        self.manifest = manifest
        self._tokens = [self._map(shard) for shard in range(len(manifest.shards))]
        self._offsets = [
            np.load(path / offsets_name(shard), mmap_mode="r").view(np.ndarray)
            for shard in range(len(manifest.shards))
        ]
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

    def read(
        self, documents: NDArray[np.int64], starts: NDArray[np.int64], length: int
    ) -> NDArray[np.unsignedinteger[Any]]:
        """Gather spans of one length.

        Args:
            documents: int64 `[n]`.
            starts: int64 `[n]`, offsets inside the documents; start + length must not pass the
                document's end.
            length: tokens of each span.

        Returns:
            A copy, `[n, length]`, in the type on disk.
        """
        shard_of = np.searchsorted(self._first_document, documents, side="right") - 1
        shards = np.flatnonzero(np.bincount(shard_of))
        if len(shards) == 1:
            return self._read_shard(int(shards[0]), documents, starts, length)
        spans = np.empty((len(documents), length), dtype=self.manifest.dtype)
        for shard in shards:
            here = shard_of == shard
            spans[here] = self._read_shard(int(shard), documents[here], starts[here], length)
        return spans

    def _read_shard(
        self, shard: int, documents: NDArray[np.int64], starts: NDArray[np.int64], length: int
    ) -> NDArray[np.unsignedinteger[Any]]:
        first = self._offsets[shard][documents - self._first_document[shard]] + starts
        windows = np.lib.stride_tricks.sliding_window_view(self._tokens[shard], length)
        spans: NDArray[np.unsignedinteger[Any]] = windows[first]
        return spans

    def _map(self, shard: int) -> NDArray[np.unsignedinteger[Any]]:
        path = self.path / tokens_name(shard)
        return np.memmap(path, dtype=self.manifest.dtype, mode="r").view(np.ndarray)

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle the path alone; the files are mapped again on the other side."""
        return _reopen, (self.path, self.fingerprint)

    def __repr__(self) -> str:
        """Path and size."""
        return (
            f"Dataset({str(self.path)!r}, num_documents={self.num_documents}, "
            f"num_tokens={self.num_tokens}, tokenizer={self.tokenizer!r})"
        )


def open_dataset(path: str | Path) -> Dataset:
    """Open a dataset folder after checking its files against the manifest.

    Sizes and offsets are always checked; content hashes in full up to 256 MiB of tokens, beyond
    that in sampled blocks (`ringctx data check` verifies everything).

    Raises:
        DatasetError: naming the file, what was expected, what is there, and the remedy.
    """
    folder = Path(path)
    if _UNFINISHED.search(folder.name):
        raise DatasetError(f"{folder} is left from a build that was stopped: delete it")
    manifest = read_manifest(folder)
    full = manifest.num_bytes <= FULL_CHECK_BYTES
    for shard in range(len(manifest.shards)):
        for problem in shard_problems(folder, manifest, shard, full=full):
            raise DatasetError(
                f"{problem}; build the dataset again, or see 'ringctx data check {folder}' for "
                "everything that is wrong with it"
            )
    return Dataset(folder, manifest)


def _reopen(path: Path, fingerprint: str) -> Dataset:
    manifest = read_manifest(path)
    if manifest.fingerprint != fingerprint:
        raise DatasetError(f"{path} was replaced by another dataset while it was in use")
    return Dataset(path, manifest)
