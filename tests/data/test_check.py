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
    if name.endswith(".src.npy"):
        shard["sources_hash"] = hash_file(file)
    elif name.endswith(".loss.bin"):
        shard["loss_hash"] = hash_file(file)
    elif name.endswith(".npy"):
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


def test_a_changed_file_is_told_and_so_is_the_place_of_a_token_that_cannot_be(path: Path) -> None:
    np.array([1, 2, 3, 256, 4, 300], dtype="<u2").tofile(path / "shard-00000.bin")
    changed, token = check_dataset(path)
    assert "was changed after the build" in changed
    assert "token id 300 at document 1 of this shard, offset 1" in token


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


@pytest.fixture
def full(tmp_path: Path) -> Path:
    """A dataset that has everything: sources and loss bits."""
    return write_documents(
        tmp_path / "full",
        DOCUMENTS,
        shard_bytes=10,
        sources=[0, 1, 1],
        source_names=["x", "y"],
        loss=[None, [True, False], [False, True, True]],
    )


def test_a_sound_dataset_with_sources_and_loss_bits_has_no_problems(full: Path) -> None:
    assert sorted(path.name for path in full.glob("shard-00001*")) == [
        "shard-00001.bin",
        "shard-00001.loss.bin",
        "shard-00001.off.npy",
        "shard-00001.src.npy",
    ]
    assert check_dataset(full) == []


@pytest.mark.parametrize("name", ["shard-00000.src.npy", "shard-00001.loss.bin"])
def test_sources_and_loss_bits_that_are_missing_or_changed_are_found(full: Path, name: str) -> None:
    content = bytearray((full / name).read_bytes())
    content[-1] ^= 1
    (full / name).write_bytes(content)
    (problem,) = check_dataset(full)
    assert f"{name} was changed after the build" in problem
    (full / name).unlink()
    (problem,) = check_dataset(full)
    assert f"{name} is missing" in problem


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (np.array([0, 2], dtype=np.uint16), "document 1 of this shard has source 2, but the manif"),
        (np.array([0], dtype=np.uint16), "holds uint16 [1], expected uint16 [2]"),
        (np.array([0, 1], dtype=np.int64), "holds int64 [2], expected uint16 [2]"),
    ],
)
def test_sources_that_cannot_be_are_found(full: Path, content: np.ndarray, message: str) -> None:
    rewrite(full, "shard-00000.src.npy", content)
    (problem,) = check_dataset(full)
    assert message in problem


def test_a_loss_file_of_another_size_is_found(full: Path) -> None:
    rewrite(full, "shard-00001.loss.bin", np.zeros(2, dtype=np.uint8))
    (problem,) = check_dataset(full)
    assert "shard-00001.loss.bin holds 2 bytes, but the manifest says 1 for one bit of 3" in problem


@pytest.mark.parametrize(
    "sources", [[], ["x"], ["x", "x"], ["x", ""], ["x", 3], ["a@b", "y"], None]
)
def test_a_manifest_whose_sources_cannot_be_is_refused(full: Path, sources: object) -> None:
    raw = json.loads((full / "dataset.json").read_text())
    del raw["checksum"]
    raw["sources"] = sources
    if sources == ["x"]:
        del raw["shards"][0]["sources_hash"]
    raw["checksum"] = hash_json(raw)
    (full / "dataset.json").write_text(json.dumps(raw))
    (problem,) = check_dataset(full)
    assert "is not a dataset manifest" in problem
