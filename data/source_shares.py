"""The sources that a mix names: their documents, weights, and how often they may be repeated.

A source is a list of documents; here it is the dataset's lengths with all other documents at 0, so
that whatever cuts or packs documents works on a source as on the whole.
Price: 8 bytes a document for each source.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ringctx.config import split_mix_key
from ringctx.data.documents import Documents
from ringctx.errors import ConfigError

__all__ = ["SourceShare", "source_shares"]


@dataclass(frozen=True, eq=False, kw_only=True)
class SourceShare:
    """One entry of a mix."""

    key: str
    """`name`, or `name@LEN`; empty for all documents together."""
    piece_len: int | None
    """LEN: only whole pieces of this many tokens."""
    number: int
    """Names its random orders; equal for every use of the source."""
    weight: float
    """Share of the rows, among those that are there."""
    epochs: float
    """How often its documents may be used."""
    lengths: NDArray[np.int64]
    """Tokens of each document of the dataset, 0 for those of other sources."""


def source_shares(
    dataset: Documents,
    mix: Mapping[str, float] | None,
    *,
    max_epochs: Mapping[str, float] | None,
    setting: str,
) -> list[SourceShare]:
    """The sources of a mix, by name; one that holds everything where there is no mix.

    Args:
        dataset: the documents.
        mix: weight by `name` or `name@LEN`.
        max_epochs: by name; default 1.
        setting: what the mix is called in the configuration, for messages.

    Raises:
        ConfigError: if a name is not a source of the dataset, or has no documents.
    """
    if mix is None:
        return [
            SourceShare(
                key="",
                piece_len=None,
                number=0,
                weight=1.0,
                epochs=1.0,
                lengths=dataset.lengths,
            )
        ]
    if dataset.sources is None:
        raise ConfigError(
            f"{setting} names sources, but the dataset has none: build it with NAME=PATH inputs, "
            "or join datasets with data.sources"
        )
    return [
        _share(dataset, key, weight, max_epochs=max_epochs or {}, setting=setting)
        # However they are written down, the same mix is the same plan.
        for key, weight in sorted(mix.items())
    ]


def _share(
    dataset: Documents,
    key: str,
    weight: float,
    *,
    max_epochs: Mapping[str, float],
    setting: str,
) -> SourceShare:
    name, piece_len = split_mix_key(key)
    if name not in dataset.source_names:
        known = ", ".join(dataset.source_names)
        raise ConfigError(f"{setting}: the dataset has no source {name!r}; its sources are {known}")
    index = dataset.source_names.index(name)
    assert dataset.sources is not None
    lengths = np.where(dataset.sources == index, dataset.lengths, 0)
    if not lengths.any():
        raise ConfigError(f"{setting}: source {name!r} has no documents; leave it out")
    return SourceShare(
        key=key,
        piece_len=piece_len,
        number=index + 1,
        weight=weight,
        epochs=max_epochs.get(name, 1.0),
        lengths=lengths,
    )
