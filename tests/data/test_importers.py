"""Imported documents are those of the files, which stay where they are; bad files are named."""

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import ringctx.data.token_files
from ringctx.data.check import check_dataset
from ringctx.data.documents import open_dataset
from ringctx.data.importers import ImportReport, import_dataset
from ringctx.data.ingest import build_dataset
from ringctx.errors import ConfigError, DatasetError
from tests.data.foreign_files import END, write_megatron, write_olmo

DOCUMENTS = [[1, 2, END], [3, 4, 5, 6, END], [7, END]]
SEQUENCES = [[[1, 2], [3, END]], [[4, 5, END]], [[6], [7], [8, END]]]

# Forks one import for every system call that it can be killed at, before that call is made.
KILLED_IMPORTS = """
import os, pathlib, signal, sys
from ringctx.data.importers import import_dataset

def kill_at(point):
    left = [point]
    def counted(call):
        def wrapper(*args, **kwargs):
            left[0] -= 1
            if left[0] < 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return call(*args, **kwargs)
        return wrapper
    for name in ("fsync", "rename", "mkdir", "open", "symlink"):
        setattr(os, name, counted(getattr(os, name)))

root = pathlib.Path(sys.argv[1])
for point in range(100):
    child = os.fork()
    if child == 0:
        kill_at(point)
        import_dataset([root / "files"], root / f"import-{point}", tokenizer="bytes")
        os._exit(0)
    _, status = os.waitpid(child, 0)
    if os.WIFEXITED(status):
        sys.exit(os.waitstatus_to_exitcode(status))
"""


def read(path: Path) -> list[list[int]]:
    dataset = open_dataset(path)
    assert check_dataset(path) == []
    return [dataset.document(i).tolist() for i in range(dataset.num_documents)]


def joined(sequences: Sequence[Sequence[int]]) -> list[int]:
    return [token for sequence in sequences for token in sequence]


def bytes_import(*sources: Path, out: Path, **options: object) -> ImportReport:
    return import_dataset(sources, out, tokenizer="bytes", **options)  # type: ignore[arg-type]


document = st.lists(st.integers(0, END - 1), max_size=12).map(lambda ids: [*ids, END])


@given(files=st.lists(st.lists(document, min_size=1, max_size=8), min_size=1, max_size=4))
def test_olmo_documents_are_those_between_end_ids(
    tmp_path_factory: pytest.TempPathFactory, files: list[list[list[int]]]
) -> None:
    folder = tmp_path_factory.mktemp("olmo")
    paths = [write_olmo(folder / f"{i}.npy", documents) for i, documents in enumerate(files)]
    bytes_import(*paths, out=folder / "set")
    assert read(folder / "set") == [document for documents in files for document in documents]


@given(
    files=st.lists(
        st.lists(
            st.lists(st.lists(st.integers(0, END), min_size=1, max_size=6), min_size=1, max_size=4),
            min_size=1,
            max_size=6,
        ),
        min_size=1,
        max_size=3,
    ),
    dtype=st.sampled_from(["uint16", "int32"]),
)
def test_megatron_documents_are_their_sequences_joined(
    tmp_path_factory: pytest.TempPathFactory, files: list[list[list[list[int]]]], dtype: str
) -> None:
    folder = tmp_path_factory.mktemp("megatron")
    for i, documents in enumerate(files):
        write_megatron(folder / f"{i}.bin", documents, dtype=dtype)
    bytes_import(folder, out=folder / "set")
    assert read(folder / "set") == [joined(doc) for documents in files for doc in documents]


def test_tokens_are_linked_and_not_copied(tmp_path: Path) -> None:
    files = [write_olmo(tmp_path / "a.npy", DOCUMENTS), write_olmo(tmp_path / "b.npy", DOCUMENTS)]
    bytes_import(*files, out=tmp_path / "set")
    links = [tmp_path / "set" / f"shard-0000{i}.bin" for i in range(2)]
    assert [link.readlink() for link in links] == files
    assert all(file.readlink().is_absolute() for file in links)
    written = [file for file in (tmp_path / "set").iterdir() if not file.is_symlink()]
    assert sorted(file.name for file in written) == [
        "dataset.json",
        "shard-00000.off.npy",
        "shard-00001.off.npy",
    ]


def test_an_import_in_another_folder_still_finds_its_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_olmo(tmp_path / "a.npy", DOCUMENTS)
    monkeypatch.chdir(tmp_path)
    import_dataset(["a.npy"], "set", tokenizer="bytes")
    monkeypatch.chdir("/")
    assert read(tmp_path / "set") == DOCUMENTS


def test_documents_are_found_across_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = write_olmo(tmp_path / "a.npy", DOCUMENTS)
    # Three tokens a block: documents begin and end inside blocks and at their edges.
    monkeypatch.setattr(ringctx.data.token_files, "BLOCK_BYTES", 6)
    bytes_import(file, out=tmp_path / "set")
    assert read(tmp_path / "set") == DOCUMENTS


def test_a_csv_beside_the_file_says_where_documents_end(tmp_path: Path) -> None:
    documents = [[1, END, 2], [3, 4], [END]]
    file = write_olmo(tmp_path / "a.npy", documents, index=True)
    report = bytes_import(file, out=tmp_path / "set")
    assert read(tmp_path / "set") == documents
    assert (report.unended, report.one_token) == (2, 1)


def test_ids_of_32_bits_are_read_as_such(tmp_path: Path) -> None:
    documents = [[70_000, 1, 99_999], [2, 99_999]]
    file = write_olmo(tmp_path / "a.npy", documents, dtype="uint32")
    import_dataset([file], tmp_path / "set", vocab_size=100_000, end_id=99_999)
    assert read(tmp_path / "set") == documents
    assert open_dataset(tmp_path / "set").manifest.dtype == "uint32"


def test_a_vocabulary_by_size_is_told_apart_from_a_tokenizer(tmp_path: Path) -> None:
    file = write_olmo(tmp_path / "a.npy", [[1, 9], [2, 3, 9]])
    import_dataset([file], tmp_path / "set", vocab_size=300, end_id=9)
    dataset = open_dataset(tmp_path / "set")
    assert (dataset.vocab_size, dataset.end_id, dataset.tokenizer) == (300, 9, "unknown")
    assert dataset.lengths.tolist() == [2, 3]


def test_an_import_has_the_content_of_a_build(tmp_path: Path) -> None:
    (tmp_path / "texts").mkdir()
    for name in ("a", "b"):
        (tmp_path / "texts" / f"{name}.txt").write_text(f"text of {name}")
    build_dataset([tmp_path / "texts"], tmp_path / "built")
    file = tmp_path / "tokens.npy"
    file.write_bytes((tmp_path / "built" / "shard-00000.bin").read_bytes())
    bytes_import(file, out=tmp_path / "imported")
    built, imported = open_dataset(tmp_path / "built"), open_dataset(tmp_path / "imported")
    assert imported.fingerprint == built.fingerprint


def test_megatron_files_are_named_by_bin_idx_or_what_is_before(tmp_path: Path) -> None:
    file = write_megatron(tmp_path / "data.v2_text_document.bin", SEQUENCES)
    for i, name in enumerate([file, file.with_suffix(".idx"), file.with_suffix("")]):
        bytes_import(name, out=tmp_path / f"set-{i}")
        assert read(tmp_path / f"set-{i}") == [joined(document) for document in SEQUENCES]


def test_folders_are_searched_in_sorted_order(tmp_path: Path) -> None:
    for name in ("b", "a/c", "a/b"):
        (tmp_path / "files" / name).parent.mkdir(parents=True, exist_ok=True)
        write_olmo(tmp_path / "files" / f"{name}.npy", [[ord(name[-1]), len(name), END]])
    bytes_import(tmp_path / "files", out=tmp_path / "set")
    assert read(tmp_path / "set") == [[98, 3, END], [99, 3, END], [98, 1, END]]


def test_a_given_format_makes_the_name_free(tmp_path: Path) -> None:
    file = write_olmo(tmp_path / "tokens.u16", DOCUMENTS)
    bytes_import(file, out=tmp_path / "set", format="olmo")
    assert read(tmp_path / "set") == DOCUMENTS


def test_a_last_document_without_end_is_kept_and_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = write_olmo(tmp_path / "a.npy", [*DOCUMENTS, [8, 9]])
    report = bytes_import(file, out=tmp_path / "set")
    assert read(tmp_path / "set")[-1] == [8, 9]
    assert report.unended == 1
    expected = r"a.npy: its last 2 tokens do not end with the end-of-document id 256; they are kept"
    assert expected in caplog.text
    assert len(report.warnings) == 1


def test_sequences_after_the_last_document_are_kept_and_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = write_megatron(tmp_path / "a.bin", SEQUENCES, borders=[0, 2, 3])
    bytes_import(file, out=tmp_path / "set")
    assert read(tmp_path / "set")[-1] == [6, 7, 8, END]
    assert "a.idx: its last 3 sequences belong to no document; they are kept as one" in caplog.text


def test_empty_documents_are_left_out_and_counted(tmp_path: Path) -> None:
    olmo = write_olmo(tmp_path / "a.npy", [[], [1, END], [], [2, END], []], index=True)
    report = bytes_import(olmo, out=tmp_path / "olmo")
    assert (report.empty, report.documents, read(tmp_path / "olmo")) == (3, 2, [[1, END], [2, END]])
    megatron = write_megatron(tmp_path / "b.bin", [[], [[1], [], [END]], [[]], [[2, END]]])
    report = bytes_import(megatron, out=tmp_path / "megatron")
    assert (report.empty, report.documents) == (2, 2)
    assert read(tmp_path / "megatron") == [[1, END], [2, END]]
    assert open_dataset(tmp_path / "megatron").manifest.built_from["skipped"] == {"empty": 2}


def test_documents_of_one_token_stay_and_are_counted(tmp_path: Path) -> None:
    file = write_olmo(tmp_path / "a.npy", [[END], [1, END], [END]])
    report = bytes_import(file, out=tmp_path / "set")
    assert (report.documents, report.one_token) == (3, 2)
    assert read(tmp_path / "set") == [[END], [1, END], [END]]


def test_what_exists_is_never_overwritten(tmp_path: Path) -> None:
    file = write_olmo(tmp_path / "a.npy", DOCUMENTS)
    (tmp_path / "set").mkdir()
    with pytest.raises(ConfigError, match="exists already"):
        bytes_import(file, out=tmp_path / "set")
    assert list((tmp_path / "set").iterdir()) == []


@pytest.fixture
def imported(tmp_path: Path) -> Path:
    bytes_import(write_olmo(tmp_path / "a.npy", DOCUMENTS), out=tmp_path / "set")
    return tmp_path / "set"


def test_a_file_that_has_gone_is_named_by_its_own_place(imported: Path, tmp_path: Path) -> None:
    (tmp_path / "a.npy").unlink()
    with pytest.raises(DatasetError, match=rf"^{tmp_path}/a.npy is missing, which .*shard-00000"):
        open_dataset(imported)
    assert len(check_dataset(imported)) == 1


@pytest.mark.parametrize("size", [20, 18])
def test_a_file_that_was_changed_is_named_by_its_own_place(
    imported: Path, tmp_path: Path, size: int
) -> None:
    file = tmp_path / "a.npy"
    file.write_bytes(b"\1" + file.read_bytes()[1:size])
    file.write_bytes(b"\2" + file.read_bytes()[1:size])
    with pytest.raises(DatasetError, match=rf"a link to {file}\) (was changed|holds 18 bytes)"):
        open_dataset(imported)
    assert len(check_dataset(imported)) == 1


def test_a_killed_import_leaves_nothing_that_opens(tmp_path: Path) -> None:
    (tmp_path / "files").mkdir()
    for i in range(2):
        write_olmo(tmp_path / "files" / f"{i}.npy", DOCUMENTS)
    root = Path(__file__).resolve().parents[2]
    subprocess.run(
        [sys.executable, "-c", KILLED_IMPORTS, str(tmp_path)], cwd=root, check=True, timeout=60
    )
    found = [path for path in tmp_path.iterdir() if path.name != "files"]
    assert len(found) > 8
    whole = []
    for folder in found:
        try:
            whole.append(read(folder))
        except DatasetError:
            assert ".tmp-" in folder.name, f"{folder.name} looks like a dataset"
    # Killed after the rename, or not at all: the dataset is there, and complete.
    assert 1 <= len(whole) <= 4
    assert all(documents == [*DOCUMENTS, *DOCUMENTS] for documents in whole)
