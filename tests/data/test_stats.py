"""The numbers of `ringctx data stats`."""

import pytest

from ringctx.data.stats import dataset_stats, mean_context_len, mean_sequence_len
from ringctx.errors import ConfigError
from tests.data.samples import MadeUpDocuments

# Tokens in D_6, ..., D_13, in units of 2^30, and the paper's averages (Table 1).
MIXTURES = {
    "natural": ([3, 6, 10, 17, 21, 17, 13, 9], 482, 1018),
    "equal": ([12] * 8, 257, 1020),
    "at least 256": ([0, 0, 16, 16, 16, 16, 16, 16], 780, 1344),
}


@pytest.mark.parametrize("name", MIXTURES)
def test_averages_of_the_papers_mixtures_are_those_of_its_table_1(name: str) -> None:
    tokens, sequence, context = MIXTURES[name]
    pieces = {2**k: n * 2**30 // 2**k for k, n in enumerate(tokens, start=6)}
    assert abs(mean_sequence_len(pieces) - sequence) <= 0.5
    assert abs(mean_context_len(pieces) - context) <= 0.5


def test_kept_and_dropped_tokens_are_all_tokens() -> None:
    stats = dataset_stats(MadeUpDocuments([5, 1000, 70_000]), min_len=256)
    assert stats.kept_tokens + stats.dropped_tokens == stats.tokens == 71_005
    assert stats.buckets == {256: 2, 512: 1, 4096: 1, 65536: 1}


def test_the_default_longest_sequence_is_one_that_a_document_reaches() -> None:
    assert max(dataset_stats(MadeUpDocuments([65_535]), min_len=256).buckets) == 32_768
    assert max(dataset_stats(MadeUpDocuments([65_536]), min_len=256).buckets) == 65_536


def test_a_dataset_of_short_documents_has_no_sequences() -> None:
    stats = dataset_stats(MadeUpDocuments([5, 6]), min_len=256)
    assert (stats.buckets, stats.kept_tokens, stats.mean_sequence_len) == ({}, 0, 0)


@pytest.mark.parametrize(("small", "large"), [(100, 256), (256, 300), (512, 256), (1, 2)])
def test_rejects_lengths_that_are_no_powers_of_two_in_order(small: int, large: int) -> None:
    with pytest.raises(ConfigError, match="powers of two"):
        dataset_stats(MadeUpDocuments([1000]), min_len=small, max_len=large)
