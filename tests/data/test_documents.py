"""What was written is what is read, and what was changed is not opened."""

import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import ringctx.data.documents
from ringctx.data.check import check_dataset
from ringctx.data.documents import Dataset, open_dataset
from ringctx.data.manifest import hash_json
from ringctx.errors import DatasetError
from tests.data.samples import write_documents

DOCUMENTS = [
    [*np.random.default_rng(n).integers(0, 256, size=n).tolist(), 256] for n in range(1, 60)
]


@pytest.fixture
def dataset(tmp_path: Path) -> Dataset:
    # 400 bytes a shard: several documents in the first ones, then one each.
    return open_dataset(write_documents(tmp_path / "data", DOCUMENTS, shard_bytes=400))


def test_documents_read_back_are_those_written(dataset: Dataset) -> None:
    assert len(dataset.manifest.shards) > 5
    assert dataset.num_documents == len(DOCUMENTS)
    assert dataset.num_tokens == sum(map(len, DOCUMENTS))
    assert dataset.lengths.tolist() == list(map(len, DOCUMENTS))
    for index, document in enumerate(DOCUMENTS):
        assert dataset.document(index).tolist() == document
    assert (dataset.vocab_size, dataset.end_id, dataset.tokenizer) == (257, 256, "bytes")


@given(data=st.data(), length=st.integers(1, 20))
def test_spans_are_those_of_the_documents_across_shards(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject, length: int
) -> None:
    path = tmp_path_factory.getbasetemp() / "spans"
    if not path.exists():
        write_documents(path, DOCUMENTS, shard_bytes=400)
    long_enough = st.integers(length, len(DOCUMENTS) - 1)
    documents = data.draw(st.lists(long_enough, max_size=10))
    starts = [data.draw(st.integers(0, len(DOCUMENTS[d]) - length)) for d in documents]
    spans = open_dataset(path).read(
        np.array(documents, dtype=np.int64), np.array(starts, dtype=np.int64), length
    )
    assert spans.shape == (len(documents), length)
    expected = [DOCUMENTS[d][s : s + length] for d, s in zip(documents, starts, strict=True)]
    assert spans.tolist() == expected


@pytest.mark.parametrize("kind", ["short", "long", "one length"])
@given(data=st.data())
def test_spans_of_any_lengths_follow_one_another(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject, kind: str
) -> None:
    path = tmp_path_factory.getbasetemp() / "any-spans"
    documents = [[*range(200), *document] for document in DOCUMENTS]
    if not path.exists():
        write_documents(path, documents, shard_bytes=2000)
    chosen = data.draw(st.lists(st.integers(0, len(documents) - 1), max_size=10))
    low, high = {"short": (0, 20), "long": (128, 202), "one length": (17, 17)}[kind]
    lengths = [data.draw(st.integers(low, high)) for _ in chosen]
    starts = [
        data.draw(st.integers(0, len(documents[d]) - n))
        for d, n in zip(chosen, lengths, strict=True)
    ]
    dataset = open_dataset(path)
    tokens = dataset.read_spans(
        np.array(chosen, np.int64), np.array(starts, np.int64), np.array(lengths, np.int64)
    )
    places = zip(chosen, starts, lengths, strict=True)
    assert tokens.tolist() == [t for d, s, n in places for t in documents[d][s : s + n]]
    assert tokens.dtype == np.uint16


def loss_of(document: int) -> list[bool] | None:
    """Made-up loss bits: none for the first documents and for every fourth."""
    if document < 20 or document % 4 == 0:
        return None
    return [(document * at) % 3 > 0 for at in range(len(DOCUMENTS[document]))]


@given(data=st.data())
def test_loss_bits_are_those_written_across_shards(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    path = tmp_path_factory.getbasetemp() / "loss"
    bits = [loss_of(i) for i in range(len(DOCUMENTS))]
    if not path.exists():
        write_documents(path, DOCUMENTS, shard_bytes=400, loss=bits)
    chosen = data.draw(st.lists(st.integers(0, len(DOCUMENTS) - 1), max_size=10))
    starts = [data.draw(st.integers(0, len(DOCUMENTS[d]))) for d in chosen]
    lengths = [
        data.draw(st.integers(0, len(DOCUMENTS[d]) - s))
        for d, s in zip(chosen, starts, strict=True)
    ]
    dataset = open_dataset(path)
    assert dataset.has_loss_bits
    targets = dataset.read_loss(
        np.array(chosen, np.int64), np.array(starts, np.int64), np.array(lengths, np.int64)
    )
    whole = [b if b is not None else [True] * len(DOCUMENTS[i]) for i, b in enumerate(bits)]
    places = zip(chosen, starts, lengths, strict=True)
    assert targets.dtype == np.bool_
    assert targets.tolist() == [t for d, s, n in places for t in whole[d][s : s + n]]


def test_only_shards_with_a_token_that_is_no_target_have_a_loss_file(tmp_path: Path) -> None:
    loss: list[list[bool] | None] = [[True] * len(document) for document in DOCUMENTS]
    loss[40] = [False] * len(DOCUMENTS[40])
    dataset = open_dataset(write_documents(tmp_path / "a", DOCUMENTS, shard_bytes=400, loss=loss))
    assert len(list(dataset.path.glob("*.loss.bin"))) == 1 < len(dataset.manifest.shards)
    assert dataset.has_loss_bits
    del loss[40]
    rest = DOCUMENTS[:40] + DOCUMENTS[41:]
    all_targets = open_dataset(write_documents(tmp_path / "b", rest, shard_bytes=400, loss=loss))
    assert not all_targets.has_loss_bits


def test_documents_keep_the_names_of_their_sources(tmp_path: Path) -> None:
    sources = [i % 3 for i in range(len(DOCUMENTS))]
    path = write_documents(
        tmp_path / "a", DOCUMENTS, shard_bytes=400, sources=sources, source_names=["x", "y", "z"]
    )
    dataset = open_dataset(path)
    assert dataset.source_names == ("x", "y", "z")
    assert dataset.sources is not None and dataset.sources.dtype == np.uint16
    assert dataset.sources.tolist() == sources


def test_sources_and_loss_bits_are_content(tmp_path: Path) -> None:
    def fingerprint(name: str, **extra: Any) -> str:
        return open_dataset(
            write_documents(tmp_path / name, [[1, 256], [2, 256]], shard_bytes=400, **extra)
        ).fingerprint

    fingerprints = [
        fingerprint("plain"),
        fingerprint("xy", sources=[0, 1], source_names=["x", "y"]),
        fingerprint("yx", sources=[0, 1], source_names=["y", "x"]),
        fingerprint("other", sources=[0, 0], source_names=["x", "y"]),
        fingerprint("loss", loss=[None, [False, True]]),
        fingerprint("other-loss", loss=[None, [True, False]]),
    ]
    assert len(set(fingerprints)) == len(fingerprints)
    assert fingerprints[0] == fingerprint("all-targets", loss=[None, [True, True]])


def test_a_dataset_without_sources_and_loss_bits_is_what_it_was_before_there_were_any(
    tmp_path: Path,
) -> None:
    documents = [[1, 2, 3, 256], [4, 256], [5, 6, 256]]
    dataset = open_dataset(write_documents(tmp_path / "a", documents, shard_bytes=10))
    assert (dataset.source_names, dataset.sources, dataset.has_loss_bits) == ((), None, False)
    assert dataset.fingerprint == "5e0ec78ab286110fab2707a71bde5967"
    raw = json.loads((dataset.path / "dataset.json").read_text())
    assert "sources" not in raw and not {"sources_hash", "loss_hash"} & set(raw["shards"][0])


def test_a_token_file_may_be_a_link(dataset: Dataset, tmp_path: Path) -> None:
    file = dataset.path / "shard-00000.bin"
    file.rename(tmp_path / "elsewhere.npy")
    file.symlink_to(tmp_path / "elsewhere.npy")
    assert open_dataset(dataset.path).document(3).tolist() == DOCUMENTS[3]


def test_changed_content_is_used_when_that_is_allowed_and_is_remembered(
    dataset: Dataset, caplog: pytest.LogCaptureFixture
) -> None:
    flip_byte(dataset.path / "shard-00000.bin", 0)
    with pytest.raises(DatasetError, match="was changed after the build"):
        open_dataset(dataset.path)
    changed = open_dataset(dataset.path, allow_changed=True)
    assert changed.changed and pickle.loads(pickle.dumps(changed)).changed
    assert "shard-00000.bin was changed after the build" in caplog.text
    assert changed.document(0)[0] == DOCUMENTS[0][0] ^ 1
    assert not dataset.changed


@pytest.mark.parametrize("damage", ["size", "offsets", "missing"])
def test_content_that_cannot_be_is_refused_even_when_changes_are_allowed(
    dataset: Dataset, damage: str
) -> None:
    if damage == "size":
        path = dataset.path / "shard-00000.bin"
        path.write_bytes(path.read_bytes()[:-2])
    elif damage == "offsets":
        offsets = np.load(dataset.path / "shard-00000.off.npy")
        offsets[1:3] = offsets[2:0:-1]
        np.save(dataset.path / "shard-00000.off.npy", offsets)
    else:
        (dataset.path / "shard-00000.bin").unlink()
    with pytest.raises(
        DatasetError, match=r"shard-00000\.(bin holds|bin is missing|off.*no tokens)"
    ):
        open_dataset(dataset.path, allow_changed=True)


def test_documents_are_memory_mapped(dataset: Dataset) -> None:
    base: object = dataset.document(0)
    while isinstance(base, np.ndarray) and not isinstance(base, np.memmap):
        base = base.base
    assert isinstance(base, np.memmap)


@pytest.mark.parametrize("index", [-1, len(DOCUMENTS)])
def test_rejects_a_document_that_is_not_there(dataset: Dataset, index: int) -> None:
    with pytest.raises(IndexError, match=f"document {index} of a dataset of {len(DOCUMENTS)}"):
        dataset.document(index)


def test_a_dataset_pickles_as_little_more_than_its_path(dataset: Dataset) -> None:
    pickled = pickle.dumps(dataset)
    assert len(pickled) < 500
    assert pickle.loads(pickled).document(7).tolist() == DOCUMENTS[7]


def test_the_fingerprint_follows_content_and_not_place(tmp_path: Path) -> None:
    one, two = (
        open_dataset(write_documents(tmp_path / name, DOCUMENTS, shard_bytes=400)).fingerprint
        for name in ("one", "two")
    )
    changed = [*DOCUMENTS[:-1], [1, 2, 256]]
    three = open_dataset(write_documents(tmp_path / "three", changed, shard_bytes=400))
    assert one == two != three.fingerprint


def flip_byte(path: Path, at: int) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("name", ["shard-00000.bin", "shard-00001.off.npy"])
@pytest.mark.parametrize("at", [0, 100, -1])
def test_a_flipped_byte_is_found_and_its_file_named(dataset: Dataset, name: str, at: int) -> None:
    flip_byte(dataset.path / name, at)
    with pytest.raises(DatasetError, match=rf"{name} was changed after the build: hash \w+, the"):
        open_dataset(dataset.path)
    assert [name in problem for problem in check_dataset(dataset.path)] == [True]


@pytest.mark.parametrize("name", ["shard-00002.bin", "shard-00000.off.npy", "dataset.json"])
def test_a_truncated_file_is_found_and_named(dataset: Dataset, name: str) -> None:
    path = dataset.path / name
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(DatasetError, match=name):
        open_dataset(dataset.path)
    assert len(check_dataset(dataset.path)) == 1


def test_sizes_that_differ_are_both_told(dataset: Dataset) -> None:
    path = dataset.path / "shard-00000.bin"
    size = path.stat().st_size
    path.write_bytes(path.read_bytes() + b"\0\0\0")
    with pytest.raises(DatasetError, match=f"holds {size + 3} bytes, but the manifest says {size}"):
        open_dataset(dataset.path)


def test_a_missing_shard_is_named(dataset: Dataset) -> None:
    (dataset.path / "shard-00001.bin").unlink()
    with pytest.raises(DatasetError, match=r"shard-00001\.bin is missing; build"):
        open_dataset(dataset.path)


def edit_manifest(path: Path, *, checksum: bool, **changes: object) -> None:
    raw = json.loads((path / "dataset.json").read_text()) | changes
    if checksum:
        del raw["checksum"]
        raw["checksum"] = hash_json(raw)
    (path / "dataset.json").write_text(json.dumps(raw))


def test_an_edited_manifest_is_found(dataset: Dataset) -> None:
    edit_manifest(dataset.path, checksum=False, vocab_size=300)
    with pytest.raises(DatasetError, match=r"dataset\.json was changed after the build"):
        open_dataset(dataset.path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"version": 2}, "version 2, but this ringctx reads version 1"),
        ({"dtype": "float16"}, "dtype 'float16' is none of uint16, uint32"),
        ({"unheard_of": 1}, "unheard_of"),
        ({"shards": [{"tokens": 1}]}, "not a dataset manifest"),
    ],
)
def test_a_manifest_of_another_kind_is_refused(
    dataset: Dataset, changes: dict[str, object], message: str
) -> None:
    edit_manifest(dataset.path, checksum=True, **changes)
    with pytest.raises(DatasetError, match=message):
        open_dataset(dataset.path)


@pytest.mark.parametrize("content", ["", "[1]", '{"version"'])
def test_a_manifest_that_is_no_json_object_is_refused(dataset: Dataset, content: str) -> None:
    (dataset.path / "dataset.json").write_text(content)
    with pytest.raises(DatasetError, match=r"dataset\.json is not"):
        open_dataset(dataset.path)


def test_what_is_no_dataset_is_told_how_to_become_one(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match=r"does not exist: make it with 'ringctx data build'"):
        open_dataset(tmp_path / "nowhere")
    with pytest.raises(DatasetError, match=r"holds no dataset\.json"):
        open_dataset(tmp_path)


def test_large_datasets_are_opened_by_samples_and_checked_in_full(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokens = np.arange(3_000_000) % 256
    path = write_documents(tmp_path / "large", [tokens.tolist()], shard_bytes=2**30)
    monkeypatch.setattr(ringctx.data.documents, "FULL_CHECK_BYTES", 1000)
    # Of these 6 MB, blocks of 65,536 bytes are sampled every 93,750.
    between_samples = 12 * 93_750 - 1000
    flip_byte(path / "shard-00000.bin", between_samples)
    assert open_dataset(path).num_tokens == len(tokens)
    assert len(check_dataset(path)) == 1
    flip_byte(path / "shard-00000.bin", 2**20 - 1)
    with pytest.raises(DatasetError, match="was changed after the build"):
        open_dataset(path)
