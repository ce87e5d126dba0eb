"""A dataset is whole or not there, whenever its build is killed."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ringctx.data.documents import open_dataset
from ringctx.data.tokenizers import ByteTokenizer
from ringctx.data.writer import DatasetWriter
from ringctx.errors import ConfigError, DatasetError
from tests.data.samples import write_documents

DOCUMENTS = [[1, 2, 256], [3, 4, 5, 256], [6, 256]]

# Forks one build for every system call that it can be killed at, before that call is made.
KILLED_BUILDS = """
import os, pathlib, signal, sys
from tests.data.samples import write_documents

def kill_at(point):
    left = [point]
    def counted(call):
        def wrapper(*args, **kwargs):
            left[0] -= 1
            if left[0] < 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return call(*args, **kwargs)
        return wrapper
    for name in ("fsync", "rename", "mkdir", "open"):
        setattr(os, name, counted(getattr(os, name)))

for point in range(100):
    out = pathlib.Path(sys.argv[1]) / f"build-{point}"
    child = os.fork()
    if child == 0:
        kill_at(point)
        write_documents(out, [[1, 2, 256], [3, 4, 5, 256], [6, 256]], shard_bytes=8)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    if os.WIFEXITED(status):
        sys.exit(os.waitstatus_to_exitcode(status))
"""


def test_a_killed_build_leaves_nothing_that_opens(tmp_path: Path) -> None:
    root = Path(__file__).resolve().parents[2]
    subprocess.run(
        [sys.executable, "-c", KILLED_BUILDS, str(tmp_path)], cwd=root, check=True, timeout=60
    )
    points = sum(1 for path in tmp_path.iterdir())
    assert points > 8
    whole = []
    for folder in tmp_path.iterdir():
        try:
            whole.append(open_dataset(folder))
        except DatasetError:
            assert ".tmp-" in folder.name, f"{folder.name} looks like a dataset"
    # Killed after the rename, or not at all: the dataset is there, and complete.
    assert 1 <= len(whole) <= 4
    for dataset in whole:
        documents = [dataset.document(i).tolist() for i in range(dataset.num_documents)]
        assert documents == DOCUMENTS


def test_a_finished_folder_under_its_temporary_name_is_refused(tmp_path: Path) -> None:
    path = write_documents(tmp_path / "data", DOCUMENTS, shard_bytes=8)
    path.rename(tmp_path / "data.tmp-123")
    with pytest.raises(DatasetError, match=r"left from a build that was stopped: delete it"):
        open_dataset(tmp_path / "data.tmp-123")


def test_an_error_while_writing_leaves_nothing(tmp_path: Path) -> None:
    with (
        pytest.raises(KeyboardInterrupt),
        DatasetWriter(tmp_path / "data", tokenizer=ByteTokenizer()) as writer,
    ):
        writer.add(np.array([1, 256]), np.array([2]))
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind", ["folder", "file", "dangling link"])
def test_what_exists_is_never_overwritten(tmp_path: Path, kind: str) -> None:
    out = tmp_path / "data"
    if kind == "folder":
        out.mkdir()
    elif kind == "file":
        out.write_text("precious")
    else:
        out.symlink_to(tmp_path / "nowhere")
    with pytest.raises(ConfigError, match="exists already, and a build never overwrites"):
        write_documents(out, DOCUMENTS, shard_bytes=8)
    assert list(tmp_path.iterdir()) == [out]


def test_what_comes_to_exist_during_the_build_is_not_overwritten(tmp_path: Path) -> None:
    out = tmp_path / "data"
    with (
        pytest.raises(ConfigError, match="exists already"),
        DatasetWriter(out, tokenizer=ByteTokenizer()) as writer,
    ):
        writer.add(np.array([1, 256]), np.array([2]))
        out.mkdir()
        writer.finish(built_from={})
    assert list(out.iterdir()) == []


def test_a_dataset_without_documents_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="no document is left"):
        write_documents(tmp_path / "data", [], shard_bytes=8)
    assert list(tmp_path.iterdir()) == []


def test_parents_of_the_dataset_are_made(tmp_path: Path) -> None:
    path = write_documents(tmp_path / "a" / "b" / "data", DOCUMENTS, shard_bytes=8)
    assert open_dataset(path).num_documents == 3


def test_remains_of_another_build_are_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "data.tmp-1").mkdir()
    write_documents(tmp_path / "data", DOCUMENTS, shard_bytes=8)
    assert "data.tmp-1 is left from another build" in caplog.text


def test_remains_under_the_same_process_number_are_not_mixed_in(tmp_path: Path) -> None:
    (tmp_path / f"data.tmp-{os.getpid()}").mkdir()
    with pytest.raises(ConfigError, match="left from another build: delete it"):
        write_documents(tmp_path / "data", DOCUMENTS, shard_bytes=8)


def test_shards_start_after_the_document_that_reaches_their_size(tmp_path: Path) -> None:
    path = write_documents(tmp_path / "data", DOCUMENTS, shard_bytes=8)
    assert [shard.documents for shard in open_dataset(path).manifest.shards] == [2, 1]


# Every example writes two datasets, and waits for the disk.
@settings(max_examples=30)
@given(data=st.data())
def test_loss_bits_do_not_depend_on_how_documents_are_added(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    lengths = data.draw(st.lists(st.integers(1, 40), min_size=1, max_size=12))
    bits = np.array(data.draw(st.lists(st.booleans(), min_size=sum(lengths), max_size=999)))
    bits = bits[: sum(lengths)]
    cut = data.draw(st.integers(0, len(lengths)))
    folder = tmp_path_factory.mktemp("bits")
    for name, groups in {"once": [lengths], "twice": [lengths[:cut], lengths[cut:]]}.items():
        with DatasetWriter(folder / name, tokenizer=ByteTokenizer()) as writer:
            at = 0
            for group in groups:
                part = bits[at : at + sum(group)]
                # All targets is the same as not to say.
                loss = None if part.all() else part
                writer.add(np.ones(sum(group)), np.array(group, dtype=np.int64), loss=loss)
                at += sum(group)
            writer.finish(built_from={})
    once, twice = (open_dataset(folder / name) for name in ("once", "twice"))
    assert once.fingerprint == twice.fingerprint
    every = np.arange(len(lengths)), np.zeros(len(lengths), np.int64), np.array(lengths)
    assert once.read_loss(*every).tolist() == bits.tolist()


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["a", "b@64k"], "source name 'b@64k' may hold letters, digits"),
        ([""], "source name '' may hold"),
        (["a", "a"], "source names a, a are not all different"),
        ([f"s{i}" for i in range(65_537)], "65,537 sources are more than 65,536"),
    ],
)
def test_rejects_names_of_sources_that_cannot_be(
    tmp_path: Path, names: list[str], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        DatasetWriter(tmp_path / "data", tokenizer=ByteTokenizer(), sources=names)
