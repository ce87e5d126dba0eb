"""A build that is killed, or whose disk is full, leaves nothing that looks like a dataset."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import ringctx.data.writer
from ringctx.data.documents import open_dataset
from ringctx.data.ingest import build_dataset
from ringctx.errors import DatasetError

ROOT = Path(__file__).resolve().parents[2]


def wait_for(path: Path, pattern: str) -> Path:
    """The first non-empty file that matches."""
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        for file in path.glob(pattern):
            if file.stat().st_size:
                return file
        time.sleep(0.01)
    raise AssertionError(f"nothing matches {pattern}")


def processes_in(folder: Path) -> list[int]:
    """Processes whose working directory this is."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if (process / "cwd").resolve() == folder:
                found.append(int(process.name))
        except OSError:
            continue
    return found


@pytest.mark.skipif(sys.platform != "linux", reason="looks for processes in /proc")
@pytest.mark.parametrize("workers", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_build_killed_while_it_writes_leaves_no_dataset_and_no_process(
    tmp_path: Path, workers: int
) -> None:
    (tmp_path / "in").mkdir()
    for i in range(60):
        (tmp_path / "in" / f"{i}.txt").write_text(f"text {i}\n" * 200_000)
    command = ["data", "build", "in", "--out", "out", "--workers", str(workers)]
    build = subprocess.Popen(
        [sys.executable, "-m", "ringctx.launch.cli", *command],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stderr=subprocess.DEVNULL,
    )
    try:
        shard = wait_for(tmp_path, "out.tmp-*/shard-00000.bin")
    finally:
        build.kill()
        status = build.wait()
    assert status == -signal.SIGKILL, "the build must not have finished"
    assert not (tmp_path / "out").exists()
    with pytest.raises(DatasetError, match="left from a build that was stopped: delete it"):
        open_dataset(shard.parent)
    deadline = time.monotonic() + 30
    while processes_in(tmp_path) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert processes_in(tmp_path) == []


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is always full")
@pytest.mark.parametrize("file", ["tokens_name", "offsets_name", "sources_name", "MANIFEST_NAME"])
@pytest.mark.parametrize("size", [100, 1_000_000])
def test_a_full_disk_stops_a_build_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file: str, size: int
) -> None:
    (tmp_path / "in").mkdir()
    for i in range(3):
        (tmp_path / "in" / f"{i}.txt").write_text("x" * size)
    full = tmp_path / "full.npy"
    full.symlink_to("/dev/full")
    name = str(full) if file.isupper() else lambda shard: str(full)
    monkeypatch.setattr(ringctx.data.writer, file, name)
    message = r"building .*out failed: .*No space left on device"
    with pytest.raises(DatasetError, match=message):
        build_dataset([f"x={tmp_path / 'in'}"], tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["full.npy", "in"]
