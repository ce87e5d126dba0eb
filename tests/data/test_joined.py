"""Several folders as one: the documents of all, a source each."""

import pickle
from pathlib import Path

import numpy as np
import pytest

from ringctx.data.documents import Documents
from ringctx.data.joined import open_datasets
from ringctx.data.tokenizers import RankTokenizer
from ringctx.data.writer import DatasetWriter
from ringctx.errors import ConfigError, DatasetError
from tests.data.samples import write_documents

CODE = [[n, n + 1, n + 2, 256] for n in range(0, 30, 3)]
PROSE = [[100 + n, 256] for n in range(5)]


@pytest.fixture
def folders(tmp_path: Path) -> dict[str, Path]:
    loss = [None, [False, True], None, [True, False], None]
    return {
        "prose": write_documents(tmp_path / "p", PROSE, shard_bytes=6, loss=loss),
        "code": write_documents(
            tmp_path / "c",
            CODE,
            shard_bytes=20,
            sources=[i % 2 for i in range(len(CODE))],
            source_names=["python", "rust"],
        ),
    }


def everything(dataset: Documents) -> list[int]:
    """All tokens, by spans."""
    numbers = np.arange(len(dataset.lengths))
    spans = dataset.read_spans(numbers, np.zeros_like(numbers), dataset.lengths)
    return [int(token) for token in spans]


def test_documents_come_in_the_order_of_the_mapping_with_its_names(
    folders: dict[str, Path],
) -> None:
    joined = open_datasets(folders)
    assert joined.lengths.tolist() == [2] * 5 + [4] * 10
    assert everything(joined) == [token for document in PROSE + CODE for token in document]
    assert [joined.document(i).tolist() for i in range(15)] == PROSE + CODE
    assert joined.source_names == ("prose", "code")
    assert joined.sources.tolist() == [0] * 5 + [1] * 10 and joined.sources.dtype == np.uint16
    assert (joined.num_documents, joined.num_tokens) == (15, 50)
    assert (joined.vocab_size, joined.end_id, joined.tokenizer) == (257, 256, "bytes")


def test_spans_cross_the_folders(folders: dict[str, Path]) -> None:
    joined = open_datasets(folders)
    documents, starts = np.array([9, 1, 14, 0]), np.array([1, 0, 2, 0])
    assert joined.read(documents, starts, 2).tolist() == [
        [13, 14],
        [101, 256],
        [29, 256],
        [100, 256],
    ]


def test_one_folder_with_loss_bits_leaves_the_tokens_of_others_targets(
    folders: dict[str, Path],
) -> None:
    joined = open_datasets(folders)
    assert joined.has_loss_bits
    targets = joined.read_loss(np.array([7, 1, 3]), np.zeros(3, np.int64), np.array([4, 2, 2]))
    assert targets.tolist() == [True] * 4 + [False, True] + [True, False]
    assert not open_datasets({"code": folders["code"]}).has_loss_bits


def test_the_fingerprint_follows_names_order_and_contents(folders: dict[str, Path]) -> None:
    names = [
        folders,
        dict(reversed(folders.items())),
        {"prose": folders["prose"], "src": folders["code"]},
        {"prose": folders["code"], "code": folders["prose"]},
        {"prose": folders["prose"]},
    ]
    fingerprints = [open_datasets(mapping).fingerprint for mapping in names]
    assert len(set(fingerprints)) == len(names)
    assert open_datasets(folders).fingerprint == fingerprints[0]


def test_a_joined_dataset_pickles_as_its_paths(folders: dict[str, Path]) -> None:
    joined = open_datasets(folders)
    pickled = pickle.dumps(joined)
    assert len(pickled) < 1000
    assert everything(pickle.loads(pickled)) == everything(joined)


def test_a_changed_part_makes_a_changed_whole(folders: dict[str, Path]) -> None:
    assert not open_datasets(folders).changed
    tokens = folders["code"] / "shard-00000.bin"
    tokens.write_bytes(b"\1" + tokens.read_bytes()[1:])
    with pytest.raises(DatasetError, match="was changed after the build"):
        open_datasets(folders)
    assert open_datasets(folders, allow_changed=True).changed


def test_rejects_folders_of_different_tokenizers_naming_both(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    ranks = {bytes([byte]): byte for byte in range(256)}
    with DatasetWriter(tmp_path / "r", tokenizer=RankTokenizer("r.tiktoken", ranks)) as writer:
        writer.add(np.array([1, 256]), np.array([2]))
        writer.finish(built_from={})
    message = r"/p and .*/r cannot be joined: tokenizer_hash .*'bytes' and 'r\.tiktoken'"
    with pytest.raises(DatasetError, match=message):
        open_datasets({**folders, "r": tmp_path / "r"})


def test_rejects_no_folder_and_names_that_cannot_be(folders: dict[str, Path]) -> None:
    with pytest.raises(ConfigError, match="name at least one"):
        open_datasets({})
    with pytest.raises(ConfigError, match="source name 'a@b' may hold"):
        open_datasets({"a@b": folders["code"]})
