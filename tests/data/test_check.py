"""`check` reads everything and lists all that is wrong."""

import json
from pathlib import Path

import numpy as np
import pytest

from ringctx.data.check import check_dataset
from ringctx.data.manifest import hash_file, hash_json, hash_sample
from tests.data.samples import write_documents

DOCUMENTS = [[1, 2, 3, 256], [4, 256], [5, 6, 256]]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return write_documents(tmp_path / "data", DOCUMENTS, shard_bytes=10)


def rewrite(path: Path, name: str, content: np.ndarray) -> None:
    """Replace a file, and make the manifest agree with it as a careless importer would."""
    file = path / name
    if name.endswith(".npy"):
        np.save(file, content)
    else:
        content.tofile(file)
    manifest = json.loads((path / "dataset.json").read_text())
    del manifest["checksum"]
    shard = manifest["shards"][int(name[6:11])]
    if name.endswith(".npy"):
        shard["offsets_hash"] = hash_file(file)
    else:
        shard["tokens_hash"], shard["tokens_sample"] = hash_file(file), hash_sample(file)
    manifest["checksum"] = hash_json(manifest)
    (path / "dataset.json").write_text(json.dumps(manifest))


def test_a_sound_dataset_has_no_problems(path: Path) -> None:
    assert check_dataset(path) == []


def test_all_problems_are_listed_not_only_the_first(path: Path) -> None:
    (path / "shard-00000.bin").unlink()
    (path / "shard-00001.off.npy").write_bytes(b"rubbish")
    problems = check_dataset(path)
    assert [problem.split(".")[0][-11:] for problem in problems] == ["shard-00000", "shard-00001"]


def test_what_is_no_dataset_is_one_problem(tmp_path: Path) -> None:
    (problem,) = check_dataset(tmp_path)
    assert "holds no dataset.json" in problem


def test_a_token_outside_the_vocabulary_is_found_with_its_place(path: Path) -> None:
    rewrite(path, "shard-00000.bin", np.array([1, 2, 3, 256, 4, 300], dtype="<u2"))
    (problem,) = check_dataset(path)
    assert "token id 300 at document 1 of this shard, offset 1, but vocab_size is 257" in problem


@pytest.mark.parametrize(
    ("offsets", "message"),
    [
        ([0, 4, 5], "runs from 0 to 5, expected 0 to 6"),
        ([1, 4, 6], "runs from 1 to 6"),
        ([0, 6, 6], "document 1 of this shard has no tokens"),
        ([0, 9, 6], "document 1 of this shard has no tokens"),
        ([0, 6], r"holds int64 [2], expected int64 [3]"),
    ],
)
def test_offsets_that_cannot_be_are_found(path: Path, offsets: list[int], message: str) -> None:
    rewrite(path, "shard-00000.off.npy", np.array(offsets))
    (problem,) = check_dataset(path)
    assert message in problem
