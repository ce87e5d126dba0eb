"""Lengths of a dataset: documents, buckets, and the paper's two averages.

Source: Pouransari et al. 2024 (arXiv 2405.13226), equations 1 and 2.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from ringctx.data.decompose import decompose
from ringctx.data.documents import Documents
from ringctx.errors import ConfigError

__all__ = ["DatasetStats", "dataset_stats", "mean_context_len", "mean_sequence_len"]


@dataclass(frozen=True, kw_only=True)
class DatasetStats:
    """A dataset in numbers, cut into sequences."""

    documents: int
    tokens: int
    longest: int
    """Tokens of the longest document."""
    kept_tokens: int
    """Tokens in some sequence."""
    dropped_tokens: int
    """Tokens of remainders below the shortest sequence."""
    buckets: dict[int, int]
    """Pieces by length, ascending."""
    mean_sequence_len: float
    mean_context_len: float


def mean_sequence_len(pieces: Mapping[int, int]) -> float:
    """Tokens of an average sequence (equation 1), from the number of pieces by length."""
    return sum(length * n for length, n in pieces.items()) / max(sum(pieces.values()), 1)


def mean_context_len(pieces: Mapping[int, int]) -> float:
    """Tokens before an average token in its sequence (equation 2), from pieces by length."""
    before = sum(n * length * (length - 1) / 2 for length, n in pieces.items())
    return before / max(sum(length * n for length, n in pieces.items()), 1)


def dataset_stats(
    dataset: Documents, *, min_len: int = 256, max_len: int | None = None
) -> DatasetStats:
    """Cut a dataset into sequences and count them.

    Args:
        dataset: gives the documents' lengths.
        min_len: shortest sequence, a power of two.
        max_len: longest sequence, a power of two; None: the longest that a document reaches.

    Raises:
        ConfigError: if the lengths are not powers of two in order.
    """
    lengths = dataset.lengths
    longest = int(lengths.max(initial=1))
    if max_len is None:
        max_len = max(min_len, 1 << (longest.bit_length() - 1))
    if min_len < 2 or min_len & (min_len - 1) or max_len & (max_len - 1) or max_len < min_len:
        raise ConfigError(
            f"min_len={min_len:,} and max_len={max_len:,} must be powers of two with "
            "2 <= min_len <= max_len"
        )
    parts = decompose(lengths, min_len=min_len, max_len=max_len)
    pieces = {bucket.length: len(bucket) for bucket in parts.buckets}
    return DatasetStats(
        documents=len(lengths),
        tokens=int(lengths.sum()),
        longest=longest,
        kept_tokens=parts.kept_tokens,
        dropped_tokens=parts.dropped_tokens,
        buckets=pieces,
        mean_sequence_len=mean_sequence_len(pieces),
        mean_context_len=mean_context_len(pieces),
    )
