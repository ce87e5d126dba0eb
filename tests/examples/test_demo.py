"""The demo runs from nothing to its pictures, in small."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from ringctx.tracking import read_metrics

ROOT = Path(__file__).resolve().parent.parent.parent


@pytest.mark.slow
@pytest.mark.timeout(240)
@pytest.mark.proves("make demo, in small", on="CPU/gloo")
def test_the_demo_trains_resumes_verifies_and_draws(tmp_path: Path) -> None:
    small = (
        "model.dim=48",
        "model.mlp_dim=96",
        "curriculum.max_len=2k",
        "curriculum.tokens_per_step=2k",
        "parallel.tokens_per_rank=1k",
        "train.steps=80",
    )
    result = subprocess.run(
        [sys.executable, str(ROOT / "examples" / "demo.py"), *small],
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=230,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert "resumed from" in result.stderr
    assert "equal to one process: largest difference" in result.stdout
    losses = re.search(r"-> ([\d.]+) nats .* unigram entropy of the data: ([\d.]+)", result.stdout)
    assert losses is not None and float(losses[1]) < 0.9 * float(losses[2])
    longest = re.search(r"the longest has ([\d,]+) tokens", result.stdout)
    assert longest is not None and int(longest[1].replace(",", "")) >= 65_536
    assert {record["cp_degree"] for record in read_metrics(tmp_path / "runs/demo")} == {1, 2}
    assert (tmp_path / "runs/demo/report/loss.png").exists()
