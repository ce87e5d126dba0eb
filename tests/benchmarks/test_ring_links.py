"""What ring_links.py makes of its measurements, its emulated kernels, and one run of it all."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from emulated_kernels import EmulatedKernels
from netlab_wires import missing
from ring_links import summary

from ringctx.ops import pair_attention
from ringctx.ops.pair_attention import PairSlice
from ringctx.parallel import ring_attention
from ringctx.parallel.comm import SoloGroup

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


def test_a_run_takes_as_long_as_its_slowest_rank_and_ratios_are_paired() -> None:
    def rank(slow_s: list[float], fast_s: list[float]) -> dict[str, dict[str, object]]:
        def variant(times_s: list[float], sent: dict[str, int]) -> dict[str, object]:
            times = dict.fromkeys(("forward_s", "total_s", "exposed_s"), times_s)
            return {**times, "sent": sent, "wire": {"to1": 7}, "max_error": 0.5}

        return {"slow": variant(slow_s, {"1": 100}), "fast": variant(fast_s, {})}

    ranks = [rank([4.0, 8.0, 2.0], [1.0, 2.0, 1.0]), rank([3.0, 9.0, 6.0], [2.0, 1.0, 1.0])]
    result = summary(ranks)
    assert result["slow"]["total_s"] == {"median": 6.0, "min": 4.0, "max": 9.0}
    # 4 / 2, 9 / 2, 6 / 1: not the ratio of the medians, 6 / 2.
    assert result["fast"]["speedup_total"] == {"median": 4.5, "min": 2.0, "max": 6.0}
    assert result["slow"]["sent_bytes"] == {"0->1": 100, "1->1": 100}
    assert result["slow"]["max_error"] == 0.5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "slices",
    [(PairSlice(0, 6, 0, 6, "causal"),), (PairSlice(0, 3, 0, 6, "full"),), ()],
    ids=["one causal", "upper half", "nothing"],
)
def test_emulated_kernels_return_what_real_ones_shape(
    slices: tuple[PairSlice, ...], dtype: torch.dtype
) -> None:
    q, k, v = (torch.randn(2, 6, n, 8).to(dtype) for n in (4, 2, 2))
    emulated = EmulatedKernels(1e12).attend_pair(q, k, v, slices, scale=1.0)
    real = pair_attention.attend_pair(q, k, v, slices, scale=1.0)
    for ours, theirs in zip(emulated, real, strict=True):
        assert (ours.shape, ours.dtype) == (theirs.shape, theirs.dtype)


def test_emulated_kernels_take_four_flop_a_pair_head_and_dim() -> None:
    q = torch.zeros(1, 100, 8, 64)
    part = PairSlice(0, 100, 0, 100, "full")
    assert EmulatedKernels(1e9).seconds(q, [part]) == pytest.approx(4 * 100 * 100 * 8 * 64 / 1e9)


def test_ring_attention_runs_on_emulated_kernels_and_then_on_real_ones_again() -> None:
    q = torch.randn(1, 64, 2, 16, requires_grad=True)
    pairs = 64 * 65 / 2
    # Forward 20 ms, backward 50 ms.
    kernels = EmulatedKernels(4 * pairs * 2 * 16 / 0.02)
    start_s = time.perf_counter()
    with kernels.installed():
        out = ring_attention(q, q, q, group=SoloGroup())
        (grad,) = torch.autograd.grad(out, q, torch.ones_like(out))
    assert time.perf_counter() - start_s >= 0.07
    assert not out.any()
    assert not grad.any()
    assert ring_attention(q, q, q, group=SoloGroup()).any()


@pytest.mark.slow
def test_ring_links_counts_the_bytes_of_a_real_run() -> None:
    reason = missing()
    if reason is not None:
        pytest.skip(f"no network can be built here: {reason}")
    command = [sys.executable, str(BENCHMARKS / "ring_links.py"), "--kind", "switch"]
    command += ["--hosts", "3", "--link-mbit", "100", "--seq-len", "384", "--full"]
    command += ["--layout", "contiguous", "--schedules", "one_way,two_way", "--rounds", "2"]
    command += ["--passes", "both"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["config"]["ranks"] == 3
    # K and V go on twice forward and twice backward; their gradients twice, from the second rank on
    # to the owner.
    block = 2 * 128 * 8 * 64 * 4
    one_way = result["variants"]["one_way"]
    assert one_way["sent_bytes"]["0->1"] == (2 + 2 + 2) * block
    assert one_way["busiest_wire_bytes"] > 6 * block
    assert one_way["max_error"] < 1e-5
    assert result["variants"]["two_way"]["max_error"] < 1e-5
