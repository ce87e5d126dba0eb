"""The demo runs from nothing to its pictures, in small."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent


@pytest.mark.slow
@pytest.mark.proves("make demo, in small", on="CPU/gloo")
def test_the_demo_trains_resumes_verifies_and_draws(tmp_path: Path) -> None:
    small = (
        "model.dim=32",
        "model.num_layers=1",
        "model.mlp_dim=32",
        "curriculum.max_len=2k",
        "curriculum.tokens_per_step=2k",
        "parallel.tokens_per_rank=1k",
        "train.steps=6",
        "checkpoint.every=2",
    )
    result = subprocess.run(
        [sys.executable, str(ROOT / "examples" / "demo.py"), *small],
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=115,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert "resumed from" in result.stderr
    assert "equal to one process: largest difference" in result.stdout
    assert "unigram entropy of the data" in result.stdout
    assert (tmp_path / "runs/demo/report/loss.png").exists()
