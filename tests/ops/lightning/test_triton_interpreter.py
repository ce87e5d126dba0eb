"""The Triton kernels against float64, in Triton's interpreter: on the CPU, in a process of its own.

It gets bf16 wrong, so that fp32 and fp16 stand for it.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]

# Relative to the largest entry. fp16: a few roundings to 11 bits of operands and results.
FP32, FP16 = 2e-6, 2e-3

# {case: {"stages" or "joined": {what: error}}}
Results = dict[str, dict[str, dict[str, float]]]

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]


@pytest.fixture(scope="module")
def results() -> Results:
    command = [sys.executable, "-W", "error", "-m", "tests.ops.lightning.interpreted"]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT)}
    run = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=280
    )
    assert run.returncode == 0, run.stderr[-4000:]
    found: Results = json.loads(run.stdout)
    return found


def _assert_small(results: Results, kind: str) -> None:
    checked = 0
    for case, errors in results.items():
        allowed = FP16 if case.startswith("fp16") else FP32
        for what, error in errors.get(kind, {}).items():
            # In this direction NaN fails.
            assert error <= allowed, f"{case}, {what}: {error:.3g}, allowed {allowed:.3g}"
            checked += 1
    assert checked > 50


@pytest.mark.proves(
    "lightning attention: Triton kernels, forward and backward", on="Triton interpreter"
)
def test_each_stage_matches_its_definition_in_float64(results: Results) -> None:
    _assert_small(results, "stages")


@pytest.mark.proves(
    "lightning attention: Triton kernels, forward and backward", on="Triton interpreter"
)
def test_all_stages_joined_match_autograd_without_chunks_in_float64(results: Results) -> None:
    _assert_small(results, "joined")
