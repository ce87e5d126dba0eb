"""The examples for other people's models: every loss and gradient as on one process."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent


@pytest.mark.slow
@pytest.mark.timeout(240)
@pytest.mark.parametrize(
    ("script", "tables"),
    [("own_module.py", 1), ("own_lightning.py", 1), ("hugging_face.py", 2)],
)
def test_the_example_trains_as_one_process_does(script: str, tables: int, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    result = subprocess.run(
        [*command, "--nproc-per-node", "2", str(ROOT / "examples" / script)],
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=230,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    found = re.findall(r"of a loss or of a first gradient: (\S+) of its size", result.stdout)
    assert len(found) == tables, result.stdout
    assert all(float(difference) < 1e-5 for difference in found), found
    sent = re.findall(r"^ +[\d,]+ +([\d,]+) +([\d,]+)$", result.stdout, re.MULTILINE)
    assert len(sent) == (3 if script == "own_lightning.py" else 0)
    assert len({of_lightning for of_lightning, _ in sent}) <= 1, "a state has one size"
    losses = [float(x) for x in re.findall(r"^ +\d+ +([\d.]+) ", result.stdout, re.MULTILINE)]
    steps = len(losses) // tables
    for table in range(tables):
        assert losses[(table + 1) * steps - 1] < 0.95 * losses[table * steps], losses
