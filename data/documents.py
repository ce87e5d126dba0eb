"""A dataset on disk, opened: documents as slices of memory-mapped token files.

Raw little-endian tokens and one offset a document, nothing per sequence: sequences follow from the
lengths. Opening checks the files against their manifest; reading touches only the bytes asked for.
Source of the payload: the raw `.bin` of OLMo-core and Megatron-LM.
"""

import logging
import re
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
from ringctx.data.mapped import MappedDocuments
from ringctx.errors import DatasetError

__all__ = ["Dataset", "Documents", "open_dataset"]

FULL_CHECK_BYTES = 256 * 2**20

_UNFINISHED = re.compile(r"\.tmp-\d+$")

logger = logging.getLogger(__name__)


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
        """Names of the sources that documents come from; empty where none are named."""

    @property
    def sources(self) -> NDArray[np.uint16] | None:
        """Source of each document, an index into `source_names`; None where none are named."""

    @property
    def has_loss_bits(self) -> bool:
        """Whether some token may not be a target; if not, `read_loss` need not be asked."""

    def read_spans(
        self, documents: NDArray[np.int64], starts: NDArray[np.int64], lengths: NDArray[np.int64]
    ) -> NDArray[np.unsignedinteger[Any]]:
        """Spans of any lengths, one after another; each must lie inside its document."""

    def read_loss(
        self, documents: NDArray[np.int64], starts: NDArray[np.int64], lengths: NDArray[np.int64]
    ) -> NDArray[np.bool_]:
        """For the tokens of `read_spans`: may this token be a target?"""


class Dataset(MappedDocuments):
    """Documents of a dataset folder; `open_dataset` makes one. Pickles as its path."""

    def __init__(self, path: Path, manifest: Manifest, *, changed: bool = False) -> None:
        """Map the files of a folder that has been checked."""
        self.path = path
        self.manifest = manifest
        self.changed = changed
        """Whether the files differ from what was built, and this was allowed."""
        shards = range(len(manifest.shards))
        super().__init__(
            tokens=[_map(path / tokens_name(shard), manifest.dtype) for shard in shards],
            offsets=[_load(path / offsets_name(shard)) for shard in shards],
            loss=[
                _map(path / loss_name(shard), "uint8") if info.loss_hash else None
                for shard, info in enumerate(manifest.shards)
            ],
        )

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
        """Names of the sources that documents come from; empty where none were named."""
        return self.manifest.sources

    @cached_property
    def sources(self) -> NDArray[np.uint16] | None:
        """Source of each document, uint16 `[num_documents]`, an index into `source_names`."""
        if not self.source_names:
            return None
        shards = range(len(self.manifest.shards))
        return np.concatenate([_load(self.path / sources_name(shard)) for shard in shards])

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle the path alone; the files are mapped again on the other side."""
        return _reopen, (self.path, self.fingerprint, self.changed)

    def __repr__(self) -> str:
        """Path and size."""
        return (
            f"Dataset({str(self.path)!r}, num_documents={self.num_documents}, "
            f"num_tokens={self.num_tokens}, tokenizer={self.tokenizer!r})"
        )


def open_dataset(path: str | Path, *, allow_changed: bool = False) -> Dataset:
    """Open a dataset folder after checking its files against the manifest.

    Sizes, offsets, sources and loss bits are always checked; token hashes in full up to 256 MiB of
    tokens, beyond that in sampled blocks (`ringctx data check` verifies everything).

    Args:
        path: the folder.
        allow_changed: log content that differs from its hash instead of refusing it; the dataset
            has `changed` set then. Sizes, offsets and ids that cannot be stay errors.

    Raises:
        DatasetError: naming the file, what was expected, what is there, and the remedy.
    """
    folder = Path(path)
    if _UNFINISHED.search(folder.name):
        raise DatasetError(f"{folder} is left from a build that was stopped: delete it")
    manifest = read_manifest(folder)
    full = manifest.num_bytes <= FULL_CHECK_BYTES
    changed = False
    for shard in range(len(manifest.shards)):
        for problem in shard_problems(folder, manifest, shard, full=full):
            if not (allow_changed and problem.changed):
                raise DatasetError(
                    f"{problem.text}; build the dataset again, or see 'ringctx data check "
                    f"{folder}' for everything that is wrong with it"
                )
            logger.warning("%s; used all the same, as allow_changed says", problem.text)
            changed = True
    return Dataset(folder, manifest, changed=changed)


def _reopen(path: Path, fingerprint: str, changed: bool) -> Dataset:
    manifest = read_manifest(path)
    if manifest.fingerprint != fingerprint:
        raise DatasetError(f"{path} was replaced by another dataset while it was in use")
    return Dataset(path, manifest, changed=changed)


def _map(path: Path, dtype: str) -> NDArray[Any]:
    return np.memmap(path, dtype=dtype, mode="r").view(np.ndarray)


def _load(path: Path) -> NDArray[Any]:
    array: NDArray[Any] = np.load(path, mmap_mode="r")
    return array.view(np.ndarray)
