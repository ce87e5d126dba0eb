"""The commands that a person types."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from ringctx.launch.cli import main
from ringctx.launch.torchrun import local_ranks
from ringctx.tracking import read_metrics
from tests.tiny import write_config, write_dataset

ROOT = Path(__file__).resolve().parent.parent.parent


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_dataset(tmp_path)
    write_config(tmp_path)
    return tmp_path


def ringctx(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "ringctx.launch.cli", *arguments],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=100,
    )


@pytest.mark.slow
@pytest.mark.proves("ringctx train, verify and plot from the command line", on="CPU/gloo")
def test_train_verify_and_plot_follow_one_another(folder: Path) -> None:
    config = str(folder / "config.yaml")
    settings = ("parallel.tokens_per_rank=64", "train.steps=6")
    trained = ringctx("train", "--nproc", "2", config, *settings)
    assert trained.returncode == 0, trained.stderr
    assert "step 6/6" in trained.stderr
    assert "GFLOP/s a rank  exposed" in trained.stderr, "a run ends with a table by length"
    assert len(read_metrics(folder / "run")) == 6

    before = sorted(path for path in folder.rglob("*"))
    verified = ringctx("verify", "--nproc", "2", config, *settings, "train.steps=20")
    assert verified.returncode == 0, verified.stdout + verified.stderr
    assert "equal to one process: largest difference" in verified.stdout
    assert "len       128  cp  2" in verified.stdout
    assert sorted(path for path in folder.rglob("*")) == before, "verify writes nothing"

    assert main(["plot", str(folder / "run")]) == 0
    written = sorted(path.name for path in (folder / "run/report").iterdir())
    assert written == ["by_length.json", "lengths.png", "loss.png", "throughput.png"]


def test_a_mistake_is_found_before_any_rank_is_started(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = str(folder / "config.yaml")
    assert main(["train", "--nproc", "2", config, "model.vocab_size=9"]) == 2
    assert "ringctx: error: model.vocab_size=9 is smaller" in capsys.readouterr().err


def test_config_show_prints_what_is_left_open_filled_in(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["config", "show", str(folder / "config.yaml"), "optim.lr=0.5"]) == 0
    shown = capsys.readouterr().out
    assert "head_dim: 8" in shown
    assert "lr: 0.5" in shown


def test_plot_says_what_is_missing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plot", str(tmp_path)]) == 2
    assert "has no metrics.jsonl" in capsys.readouterr().err
    (tmp_path / "metrics.jsonl").write_text('{"step": 0, "tok')
    assert main(["plot", str(tmp_path)]) == 2
    assert "no complete line yet" in capsys.readouterr().err


def test_nproc_is_a_number_or_auto(capsys: pytest.CaptureFixture[str]) -> None:
    assert local_ranks("3") == 3
    assert local_ranks("auto") >= 1
    assert main(["train", "--nproc", "some", "config.yaml"]) == 2
    assert "--nproc=some must be 'auto' or a number" in capsys.readouterr().err
