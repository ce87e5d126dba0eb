"""What cannot be imported is refused with the file, what is there, and what was expected."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import ringctx.data.token_files
from ringctx.data.documents import open_dataset
from ringctx.data.importers import import_dataset
from ringctx.errors import ConfigError, DatasetError
from tests.data.foreign_files import END, write_csv, write_megatron, write_olmo

DOCUMENTS = [[1, 2, END], [3, 4, 5, 6, END], [7, END]]
SEQUENCES = [[[1, 2], [3, END]], [[4, 5, END]], [[6], [7], [8, END]]]


def refused(*sources: Path, out: Path, message: str, **options: object) -> None:
    with pytest.raises((DatasetError, ConfigError), match=message):
        import_dataset(sources, out, tokenizer="bytes", **options)  # type: ignore[arg-type]
    assert not list(out.parent.glob(f"{out.name}*"))


def test_rejects_a_size_that_is_no_multiple_of_the_type(tmp_path: Path) -> None:
    file = write_olmo(tmp_path / "a.npy", DOCUMENTS)
    file.write_bytes(file.read_bytes()[:-1])
    message = r"a.npy holds 19 bytes, expected a multiple of 2 \(the size of a uint16\)"
    refused(file, out=tmp_path / "set", message=message)


def test_rejects_a_file_without_tokens(tmp_path: Path) -> None:
    (tmp_path / "a.npy").touch()
    refused(tmp_path / "a.npy", out=tmp_path / "set", message=r"a.npy holds 0 bytes, expected")
    file = write_megatron(tmp_path / "b.bin", [])
    refused(file, out=tmp_path / "set", message=r"b.bin holds 0 bytes, but b.idx says 0")


def test_rejects_an_olmo_file_without_any_end_id(tmp_path: Path) -> None:
    file = write_olmo(tmp_path / "a.npy", [[1, 2, 3]])
    message = r"a.npy: the end-of-document id 256 is nowhere in its 3 tokens.*--end-id.*\.csv\.gz"
    refused(file, out=tmp_path / "set", message=message)


def test_rejects_a_numpy_file_with_a_header(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.array([1, 2, END], dtype=np.uint16))
    refused(
        tmp_path / "a.npy", out=tmp_path / "set", message=r"a.npy is a numpy file with a header"
    )


def test_rejects_32_bits_read_as_16(tmp_path: Path) -> None:
    document = [*range(1, 200), *range(1, 200), END]
    file = write_olmo(tmp_path / "a.npy", [document], dtype="uint32")
    message = r"a.npy: every second uint16 .* is 0, so it holds uint32.*--dtype uint32"
    refused(file, out=tmp_path / "set", message=message)
    import_dataset([file], tmp_path / "set", tokenizer="bytes", dtype="uint32")
    assert open_dataset(tmp_path / "set").document(0).tolist() == document


@pytest.mark.parametrize("blocks", [2**20, 6])
@pytest.mark.parametrize("index", [True, False])
def test_an_id_beyond_the_vocabulary_is_named_with_its_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, blocks: int, index: bool
) -> None:
    monkeypatch.setattr(ringctx.data.token_files, "BLOCK_BYTES", blocks)
    good = write_olmo(tmp_path / "a.npy", DOCUMENTS)
    bad = write_olmo(tmp_path / "b.npy", [[1, END], [2, 3, 300, END], [4, END]], index=index)
    message = r"b.npy: token id 300 at document 1 of this file, offset 2, but vocab_size is 257"
    refused(good, bad, out=tmp_path / "set", message=message)


def test_a_negative_id_is_named_as_such(tmp_path: Path) -> None:
    file = write_megatron(tmp_path / "a.bin", [[[1, END]], [[5], [-3, END]]], dtype="int32")
    message = r"a.bin: token id -3 at document 1 of this file, offset 1, .*read as int32"
    refused(file, out=tmp_path / "set", message=message)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("0,3\n4,10\n", r"a.csv.gz:2: the document runs from 4 to 10, expected it to start at 3"),
        ("0,3\n2,10\n", r"a.csv.gz:2: the document runs from 2 to 10, expected it to start at 3"),
        ("0,3\n3,2\n", r"a.csv.gz:2: the document runs from 3 to 2"),
        ("0,3\n3,8\n", r"a.csv.gz: its documents end at token 8, but .*a.npy holds 10"),
        ("0,3\n3,11\n", r"a.csv.gz: its documents end at token 11, but .*a.npy holds 10"),
        ("start,end\n", r"a.csv.gz:1: expected 'start,end,...' of a document, got 'start,end'"),
        ("0\n", r"a.csv.gz:1: expected"),
    ],
)
def test_rejects_a_csv_that_does_not_cut_the_file(tmp_path: Path, text: str, message: str) -> None:
    file = write_olmo(tmp_path / "a.npy", DOCUMENTS)
    write_csv(file, text)
    refused(file, out=tmp_path / "set", message=message)


def test_rejects_a_csv_that_is_cut(tmp_path: Path) -> None:
    file = write_olmo(tmp_path / "a.npy", DOCUMENTS, index=True)
    index = tmp_path / "a.csv.gz"
    index.write_bytes(index.read_bytes()[:-10])
    refused(file, out=tmp_path / "set", message=r"a.csv.gz cannot be read: Compressed file ended")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"magic": b"TNTIDX\x00\x00\x00"}, r"a.idx starts with b'TNTIDX.*', expected b'MMIDIDX"),
        ({"version": 2}, r"a.idx: index version 2, expected 1"),
        ({"code": 5}, r"a.idx: its tokens are int64, but only uint16 and int32"),
        ({"code": 77}, r"a.idx: its tokens are of code 77, but only uint16 and int32"),
        ({"code": 4}, r"sequence 1 starts at byte 4, expected 8"),
        ({"pointers": [0, 4, 8, 14, 12, 18]}, r"sequence 4 starts at byte 12, expected 16"),
        ({"lengths": [2, 2, 3, 1, -1, 2]}, r"a.idx: sequence 4 has the length -1"),
        ({"lengths": [2, 2, 3, 1, 1, 9]}, r"a.bin holds 22 bytes, but a.idx says 36 \(18 tokens"),
        ({"borders": [1, 3, 6]}, r"a.idx: its document borders start with 1, expected 0"),
        ({"borders": []}, r"a.idx: its document borders start with nothing, expected 0"),
        ({"borders": [0, 3, 2, 6]}, r"a.idx: document 1 runs from sequence 3 to 2"),
        ({"borders": [0, 3, 7]}, r"a.idx: its documents end at sequence 7, but it holds 6"),
        ({"modes": b"\0" * 6}, r"a.idx gives every sequence a mode"),
        ({"modes": b"\0" * 5}, r"a.idx holds 143 bytes, expected 138 for 6 sequences and 4"),
    ],
)
def test_rejects_an_index_that_cannot_be(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    file = write_megatron(tmp_path / "a.bin", SEQUENCES, **changes)
    refused(file, out=tmp_path / "set", message=message)


@given(left=st.integers(0, 137))
def test_an_index_that_is_cut_anywhere_is_refused(
    tmp_path_factory: pytest.TempPathFactory, left: int
) -> None:
    folder = tmp_path_factory.mktemp("cut")
    index = write_megatron(folder / "a.bin", SEQUENCES).with_suffix(".idx")
    assert len(index.read_bytes()) == 138
    index.write_bytes(index.read_bytes()[:left])
    refused(folder / "a.bin", out=folder / "set", message=r"a.idx (starts|holds|: its doc|gives)")


def test_rejects_a_bin_that_is_not_what_the_index_says(tmp_path: Path) -> None:
    file = write_megatron(tmp_path / "a.bin", SEQUENCES)
    file.write_bytes(file.read_bytes()[:-2])
    message = r"a.bin holds 20 bytes, but a.idx says 22 \(11 tokens of uint16\)"
    refused(file, out=tmp_path / "set", message=message)


def test_rejects_a_bin_without_an_index(tmp_path: Path) -> None:
    file = write_megatron(tmp_path / "a.bin", SEQUENCES)
    file.with_suffix(".idx").unlink()
    refused(file, out=tmp_path / "set", message=r"a.idx is missing; it says where")


def test_rejects_files_of_two_types(tmp_path: Path) -> None:
    files = [
        write_megatron(tmp_path / "a.bin", SEQUENCES),
        write_megatron(tmp_path / "b.bin", SEQUENCES, dtype="int32"),
    ]
    message = r"b.bin holds uint32, but .*a.bin holds uint16"
    refused(*files, out=tmp_path / "set", message=message)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "one of --tokenizer and --vocab-size must say .*given: neither"),
        ({"tokenizer": "bytes", "vocab_size": 9}, "given: both 'bytes' and 9"),
        ({"vocab_size": 300}, "--end-id is needed beside --vocab-size"),
        ({"vocab_size": 300, "end_id": 300}, "--end-id 300 is no id of a vocabulary of 300"),
        ({"tokenizer": "bytes", "end_id": -1}, "--end-id -1 is no id"),
        ({"vocab_size": 0, "end_id": 0}, "--vocab-size 0 must lie between 1 and"),
        ({"tokenizer": "bytes", "dtype": "uint8"}, "--dtype 'uint8' is none of uint16, uint32"),
        ({"tokenizer": "bytes", "format": "arrow"}, "--format 'arrow' is none of olmo, megatron"),
        (
            {"vocab_size": 2**16 + 1, "end_id": 0, "dtype": "uint16"},
            r"a.npy is read as uint16, which cannot hold all ids of a vocabulary of 65,537",
        ),
    ],
)
def test_rejects_options_that_cannot_work(
    tmp_path: Path, options: dict[str, object], message: str
) -> None:
    file = write_olmo(tmp_path / "a.npy", DOCUMENTS)
    with pytest.raises(ConfigError, match=message):
        import_dataset([file], tmp_path / "set", **options)  # type: ignore[arg-type]
    assert not (tmp_path / "set").exists()


def test_rejects_a_dtype_for_megatron_which_names_its_own(tmp_path: Path) -> None:
    file = write_megatron(tmp_path / "a.bin", SEQUENCES)
    message = r"--dtype uint16 is for OLMo files only"
    refused(file, out=tmp_path / "set", message=message, dtype="uint16")


def sources_of(folder: Path, names: Sequence[str]) -> list[Path]:
    write_olmo(folder / "a.npy", DOCUMENTS)
    write_megatron(folder / "b.bin", SEQUENCES)
    write_olmo(folder / "c.tok", DOCUMENTS)
    (folder / "empty").mkdir()
    return [folder / name for name in names]


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ([], "no source"),
        (["a.npy", "b.bin"], r"hold both .npy \(OLMo\) and .bin \(Megatron\) files; choose"),
        ([""], "hold both"),
        (["a.npy", "./a.npy"], r"two sources reach .*a.npy; its documents would be repeated"),
        (["empty"], r"empty holds no .npy or .bin file"),
        (["nowhere"], r"nowhere does not exist, nor does nowhere.bin beside it"),
        (["c.tok"], r"c.tok is no .npy or .bin file; name its format with --format"),
    ],
)
def test_rejects_sources_that_cannot_be_imported(
    tmp_path: Path, names: list[str], message: str
) -> None:
    sources = sources_of(tmp_path, names)
    refused(*sources, out=tmp_path / "set", message=message)


def test_an_import_that_fails_leaves_nothing(tmp_path: Path) -> None:
    files = [write_olmo(tmp_path / f"{i}.npy", DOCUMENTS) for i in range(8)]
    write_olmo(files[3], [[1, 300, END]])
    refused(*files, out=tmp_path / "set", message=r"3.npy: token id 300")
    assert sorted(os.listdir(tmp_path)) == [file.name for file in files]
