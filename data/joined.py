"""Several dataset folders as one: a source each, for mixing by name.

Documents come in the order of the mapping. The folders are mapped, not copied; all must have been
encoded by one tokenizer, or their ids would not mean the same.
"""

from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ringctx.data.documents import Dataset, open_dataset
from ringctx.data.manifest import hash_json, source_name_problem
from ringctx.data.mapped import MappedDocuments
from ringctx.errors import ConfigError, DatasetError

__all__ = ["JoinedDataset", "open_datasets"]


class JoinedDataset(MappedDocuments):
    """Documents of several folders; `open_datasets` makes one. Pickles as its paths."""

    def __init__(self, parts: Mapping[str, Dataset]) -> None:
        """Join datasets of one tokenizer.

        Args:
            parts: dataset by name; the name replaces the sources that a dataset has itself.

        Raises:
            ConfigError: if there is none, or a name is wrong.
            DatasetError: if their tokenizers differ, naming both folders.
        """
        if not parts:
            raise ConfigError("no dataset to join: name at least one")
        if problem := source_name_problem(list(parts)):
            raise ConfigError(problem)
        self.parts = dict(parts)
        datasets = list(parts.values())
        for other in datasets[1:]:
            _check_agree(datasets[0], other)
        super().__init__(
            tokens=[shard for part in datasets for shard in part.shard_tokens],
            offsets=[shard for part in datasets for shard in part.shard_offsets],
            loss=[shard for part in datasets for shard in part.shard_loss],
        )

    @property
    def source_names(self) -> tuple[str, ...]:
        """The names of the mapping."""
        return tuple(self.parts)

    @cached_property
    def sources(self) -> NDArray[np.uint16]:
        """Source of each document, uint16 `[num_documents]`, an index into `source_names`."""
        counts = [part.num_documents for part in self.parts.values()]
        return np.repeat(np.arange(len(counts), dtype=np.uint16), counts)

    @cached_property
    def fingerprint(self) -> str:
        """Hex name of names, order and contents."""
        return hash_json([[name, part.fingerprint] for name, part in self.parts.items()])

    @property
    def vocab_size(self) -> int:
        """Ids of the full tokenizer, the end-of-document id included."""
        return self._any.vocab_size

    @property
    def end_id(self) -> int:
        """The id that ends every document."""
        return self._any.end_id

    @property
    def tokenizer(self) -> str:
        """Name of the tokenizer, as given to the build of the first dataset."""
        return self._any.tokenizer

    @property
    def changed(self) -> bool:
        """Whether files of some dataset differ from what was built, and this was allowed."""
        return any(part.changed for part in self.parts.values())

    @property
    def _any(self) -> Dataset:
        return next(iter(self.parts.values()))

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle the parts, which pickle as their paths."""
        return JoinedDataset, (self.parts,)

    def __repr__(self) -> str:
        """Names and size."""
        return (
            f"JoinedDataset({', '.join(self.parts)}, num_documents={self.num_documents}, "
            f"num_tokens={self.num_tokens}, tokenizer={self.tokenizer!r})"
        )


def open_datasets(
    folders: Mapping[str, str | Path], *, allow_changed: bool = False
) -> JoinedDataset:
    """Open several dataset folders as one.

    Args:
        folders: dataset folder by name of source, in the order that documents take.
        allow_changed: as for `open_dataset`.

    Raises:
        ConfigError: if there is none, or a name is wrong.
        DatasetError: if a folder cannot be opened, or if two were encoded by other tokenizers.
    """
    return JoinedDataset(
        {
            name: open_dataset(folder, allow_changed=allow_changed)
            for name, folder in folders.items()
        }
    )


def _check_agree(one: Dataset, other: Dataset) -> None:
    for field in ("tokenizer_hash", "vocab_size", "end_id"):
        first, second = getattr(one.manifest, field), getattr(other.manifest, field)
        if first != second:
            raise DatasetError(
                f"{one.path} and {other.path} cannot be joined: {field} is {first} in the one and "
                f"{second} in the other (tokenizers {one.tokenizer!r} and {other.tokenizer!r}); "
                "build them with one tokenizer"
            )
