"""The comparison with OLMo's buckets counts every piece once, and under the right reason."""

from pathlib import Path

import numpy as np
import pytest
from olmo_buckets import OlmoPieces, compare, our_pieces

from ringctx.data import open_dataset
from tests.data.samples import write_documents

# Three files, with documents of 7 and 4, of 13, and of 2 tokens, in pieces of 2 to 4:
# file, start, length, ends its document.
LENGTHS = [7, 4, 13, 2]
PIECES = [
    (0, 0, 4, 0),
    (0, 4, 2, 0),
    (0, 7, 4, 1),
    (1, 0, 4, 0),
    (1, 4, 4, 0),
    (1, 8, 4, 0),
    (2, 0, 2, 1),
]


@pytest.fixture
def ours(tmp_path: Path) -> np.ndarray:
    documents = [[1] * (length - 1) + [256] for length in LENGTHS]
    dataset = open_dataset(write_documents(tmp_path / "set", documents, shard_bytes=20))
    assert [shard.tokens for shard in dataset.manifest.shards] == [11, 13, 2]
    return our_pieces(dataset, min_len=2, max_len=4)


def theirs(
    pieces: np.ndarray, *, in_no_bucket: tuple[int, ...] = (), without: tuple[int, ...] = ()
) -> OlmoPieces:
    kept = np.delete(pieces[:, :3], list(without), axis=0)
    bucket_len = kept[:, 2].copy()
    bucket_len[list(in_no_bucket)] = 0
    return OlmoPieces(instances=kept, bucket_len=bucket_len, targets={2: 1, 4: 3})


END = np.array([11, 13, 2])


def test_pieces_lie_where_their_documents_do(ours: np.ndarray) -> None:
    assert sorted(map(tuple, ours.tolist())) == PIECES


def test_equal_sides_are_equal(ours: np.ndarray) -> None:
    result = compare(ours, theirs(ours), num_tokens=26, unended=END)
    assert result["pieces"] == {"ours": 7, "theirs": 7, "equal": 7}
    assert result["unexplained"] == {"only_ours": 0, "only_theirs": 0}
    assert result["dropped_tokens"] == {"ours": 2, "theirs": 2}
    # Of 24 tokens in pieces, two end a document; OLMo predicts all but the first of a piece.
    assert result["targets"]["ours"] == 22
    assert result["targets"]["theirs"] == 5 * 3 + 2 * 1


def test_a_piece_of_a_last_document_without_end_is_explained_by_that(ours: np.ndarray) -> None:
    last = int(np.flatnonzero(ours[:, 0] == 2)[0])
    unended = np.array([11, 13, 0])
    result = compare(ours, theirs(ours, without=(last,)), num_tokens=26, unended=unended)
    assert result["only_ours"]["last_document_without_end_marker"]["tokens"] == 2
    assert result["unexplained"]["only_ours"] == 0
    assert result["dropped_tokens"] == {"ours": 2, "theirs": 4}


def test_a_piece_that_is_in_no_bucket_of_theirs_is_explained_by_that(ours: np.ndarray) -> None:
    long = tuple(np.flatnonzero(ours[:, 2] == 4).tolist())
    result = compare(ours, theirs(ours, in_no_bucket=long), num_tokens=26, unended=END)
    assert result["only_ours"]["cut_by_both_but_in_none_of_their_buckets"] == {
        "pieces": 5,
        "tokens": 20,
        "by_length": {"4": 5},
    }
    assert result["unexplained"] == {"only_ours": 0, "only_theirs": 0}


def test_whatever_no_rule_explains_is_counted_as_such(ours: np.ndarray) -> None:
    result = compare(ours, theirs(ours, without=(0,)), num_tokens=26, unended=END)
    assert result["unexplained"] == {"only_ours": 1, "only_theirs": 0}
    moved = ours.copy()
    moved[0, 1] += 1
    result = compare(ours, theirs(moved), num_tokens=26, unended=END)
    assert result["unexplained"] == {"only_ours": 1, "only_theirs": 1}
