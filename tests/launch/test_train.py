"""The path a user takes: torchrun, real processes, a kill, a mistake in the config."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from ringctx.tracking import read_metrics
from tests.tiny import write_config, write_dataset

ROOT = Path(__file__).resolve().parent.parent.parent
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_dataset(tmp_path)
    write_config(tmp_path)
    return tmp_path


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}


def python(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=100,
    )


def losses(folder: Path, run: str = "run") -> list[float]:
    return [record["loss"] for record in read_metrics(folder / run)]


@pytest.mark.slow
@pytest.mark.proves("train under torchrun, kill -9, resume", on="CPU/gloo")
def test_a_killed_run_goes_on_from_its_checkpoint_and_ends_the_same(folder: Path) -> None:
    config = str(folder / "config.yaml")
    settings = ("parallel.tokens_per_rank=64", "checkpoint.every=4")
    command = (*TORCHRUN, "2", "-m", "ringctx.launch.train", config, *settings)
    whole = python(*command, f"train.run_dir={folder}/whole")
    assert whole.returncode == 0, whole.stderr
    process = subprocess.Popen(
        [sys.executable, *command],
        cwd=ROOT,
        env=environment(),
        start_new_session=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    latest = folder / "run" / "checkpoints" / "latest"
    deadline = time.monotonic() + 100
    while not latest.exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert latest.exists()
    resumed = python(*command)
    assert resumed.returncode == 0, resumed.stderr
    assert "resumed from" in resumed.stderr
    assert losses(folder) == losses(folder, "whole")


FAULT_ON_ONE_RANK = """
import os, sys
from ringctx.data import Loader
from ringctx.errors import DatasetError
from ringctx.launch.train import main

def broken(self, step, load=Loader._load):
    if step == 2 and os.environ["RANK"] == sys.argv[1]:
        raise DatasetError("token id 999 in document 7")
    return load(self, step)

Loader._load = broken
sys.exit(main(sys.argv[2:]))
"""


@pytest.mark.slow
@pytest.mark.parametrize("rank", ["0", "1"])
def test_an_error_on_one_rank_is_told_by_it_and_ends_the_others(folder: Path, rank: str) -> None:
    script = folder / "fault.py"
    script.write_text(FAULT_ON_ONE_RANK)
    begin = time.monotonic()
    result = python(*TORCHRUN, "2", str(script), rank, str(folder / "config.yaml"))
    assert f"ringctx: error: rank {rank}: token id 999 in document 7" in result.stderr
    assert "exitcode  : 2" in result.stderr
    assert time.monotonic() - begin < 90


def test_one_process_without_torchrun_trains(folder: Path) -> None:
    config = str(folder / "config.yaml")
    result = python("-m", "ringctx.launch.train", config, "train.stop_after=2")
    assert result.returncode == 0, result.stderr
    assert len(losses(folder)) == 2
    assert (folder / "run/logs/rank-0.log").exists()
    assert (folder / "run/config.yaml").read_text().count("vocab_size: 257") == 1


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("curriculum.max_lne=128", "unknown key 'curriculum.max_lne': did you mean 'max_len'?"),
        ("model.vocab_size=100", "model.vocab_size=100 is smaller than the 257 ids"),
        ("parallel.tokens_per_rank=32", "sequences of 128 tokens do not fit"),
        ("data.path=/nowhere", "/nowhere"),
        ("train.steps=1M", "train.steps=1,048,576 is more than the"),
        pytest.param(
            "train.device=cuda",
            "finds no CUDA device",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is one"),
        ),
    ],
)
def test_a_mistake_ends_with_one_message_and_leaves_nothing(
    folder: Path, override: str, message: str
) -> None:
    config = str(folder / "config.yaml")
    result = python("-m", "ringctx.launch.train", config, override)
    assert result.returncode == 2
    assert result.stderr.count("ringctx: error:") == 1
    assert message in result.stderr
    assert "Traceback" not in result.stderr
    assert not (folder / "run").exists()


@pytest.mark.slow
def test_a_mistake_under_torchrun_is_told_once(folder: Path) -> None:
    config = str(folder / "config.yaml")
    result = python(*TORCHRUN, "2", "-m", "ringctx.launch.train", config, "model.vocab_size=9")
    assert result.returncode == 1, "torchrun's own code for a failed rank"
    assert result.stderr.count("ringctx: error: model.vocab_size=9 is smaller") == 1
    assert "exitcode  : 2" in result.stderr
    assert not (folder / "run").exists()
