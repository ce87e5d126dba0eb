"""Several datasets as one: documents in order, each dataset a source of its own.

For training on corpora that were built apart: what they share is the tokenizer, and that is
checked. Nothing is copied or written.
Price: a look-up of the dataset of each span that is read.
"""

from collections.abc import Callable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ringctx.data.documents import Dataset, open_dataset
from ringctx.data.manifest import hash_json
from ringctx.errors import DatasetError

__all__ = ["JoinedDataset", "open_datasets"]


class JoinedDataset:
    """Datasets one after another; `open_datasets` makes one."""

    def __init__(self, parts: Mapping[str, Dataset]) -> None:
        """Join datasets of one tokenizer.

        Args:
            parts: by the name of their source, in the order of their documents.

        Raises:
            DatasetError: if two of them do not have the same tokenizer.
        """
        self.source_names = tuple(parts)
        self._parts = tuple(parts.values())
        first = self._parts[0]
        for other in self._parts[1:]:
            if _ids(other) != _ids(first):
                raise DatasetError(
                    f"{other.path} ({other.tokenizer}, {other.vocab_size:,} ids) and {first.path} "
                    f"({first.tokenizer}, {first.vocab_size:,} ids) were made with different "
                    "tokenizers and cannot be one dataset; build them with the same one"
                )
        counts = [part.num_documents for part in self._parts]
        self._first_document = np.cumsum([0, *counts], dtype=np.int64)

    @property
    def num_documents(self) -> int:
        """Documents of all datasets."""
        return int(self._first_document[-1])

    @property
    def num_tokens(self) -> int:
        """Tokens of all datasets."""
        return sum(part.num_tokens for part in self._parts)

    @property
    def vocab_size(self) -> int:
        """Ids of the tokenizer that all share."""
        return self._parts[0].vocab_size

    @property
    def changed(self) -> bool:
        """Whether some file is not what its hash says."""
        return any(part.changed for part in self._parts)

    @property
    def has_loss_bits(self) -> bool:
        """Whether some tokens are no targets."""
        return any(part.has_loss_bits for part in self._parts)

    @cached_property
    def fingerprint(self) -> str:
        """Hex name of names, order and contents."""
        return hash_json(
            [[n, p.fingerprint] for n, p in zip(self.source_names, self._parts, strict=True)]
        )

    @cached_property
    def lengths(self) -> NDArray[np.int64]:
        """Tokens of each document."""
        return np.concatenate([part.lengths for part in self._parts])

    @cached_property
    def sources(self) -> NDArray[np.uint16]:
        """The dataset of each document, a number of `source_names`."""
        counts = np.diff(self._first_document)
        return np.repeat(np.arange(len(counts), dtype=np.uint16), counts)

    def document(self, index: int) -> NDArray[np.unsignedinteger[Any]]:
        """The tokens of one document, memory-mapped."""
        if not 0 <= index < self.num_documents:
            raise IndexError(f"document {index} of datasets of {self.num_documents} documents")
        part = int(np.searchsorted(self._first_document, index, side="right")) - 1
        return self._parts[part].document(index - int(self._first_document[part]))

    def read_spans(
        self, documents: NDArray[np.int64], starts: NDArray[np.int64], lengths: NDArray[np.int64]
    ) -> NDArray[np.unsignedinteger[Any]]:
        """The tokens of spans, one after another; as `Dataset.read_spans`."""
        dtype = self._parts[0].manifest.dtype
        return self._gather(documents, starts, lengths, dtype, lambda part: part.read_spans)

    def read_loss(
        self, documents: NDArray[np.int64], starts: NDArray[np.int64], lengths: NDArray[np.int64]
    ) -> NDArray[np.bool_]:
        """Of the same spans: whether each token is a target."""
        return self._gather(documents, starts, lengths, "bool", lambda part: part.read_loss)

    def _gather(
        self,
        documents: NDArray[np.int64],
        starts: NDArray[np.int64],
        lengths: NDArray[np.int64],
        dtype: str,
        reader: Callable[[Dataset], Callable[..., NDArray[Any]]],
    ) -> NDArray[Any]:
        part_of = np.searchsorted(self._first_document, documents, side="right") - 1
        entries = np.empty(int(lengths.sum()), dtype=dtype)
        for number in np.flatnonzero(np.bincount(part_of)).tolist():
            here = part_of == number
            local = documents[here] - self._first_document[number]
            read = reader(self._parts[number])(local, starts[here], lengths[here])
            entries[np.repeat(here, lengths)] = read
        return entries


def open_datasets(parts: Mapping[str, str | Path], *, allow_changed: bool = False) -> JoinedDataset:
    """Open dataset folders as one.

    Args:
        parts: folder by the name of its source; a folder's own sources are not told apart.
        allow_changed: as of `open_dataset`.

    Raises:
        DatasetError: naming the folder that is wrong, or two that do not go together.
    """
    return JoinedDataset(
        {name: open_dataset(path, allow_changed=allow_changed) for name, path in parts.items()}
    )


def _ids(dataset: Dataset) -> tuple[Any, ...]:
    """What must be the same for ids to mean the same."""
    manifest = dataset.manifest
    return manifest.tokenizer_hash, manifest.vocab_size, manifest.end_id, manifest.dtype
