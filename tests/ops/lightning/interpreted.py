"""Runs the Triton stages in Triton's interpreter; prints errors against float64 as JSON.

Started by test_triton_interpreter.py in a process of its own, with TRITON_INTERPRET=1. Every float
tensor that a kernel is given lies between guards of NaN: what is read beyond it shows in the
result, and what is written beyond it is an error here.
"""

import json
import time
from dataclasses import replace
from typing import TypeGuard

import torch
from torch import Tensor

from ringctx.ops.lightning.triton_kernels import INTERPRETED
from ringctx.ops.lightning.triton_launch import Launch, run
from ringctx.ops.lightning.triton_stages import TritonStages
from tests.ops.lightning.stage_errors import joined_errors, make_case, stage_errors
from tests.ops.lightning.stages_by_definition import StagesByDefinition, problem_of

_GUARD = 8192


def _guarded(x: Tensor) -> Tensor:
    room = torch.full((x.numel() + 2 * _GUARD,), torch.nan, dtype=x.dtype)
    inside = room[_GUARD : _GUARD + x.numel()].view(x.shape)
    return inside.copy_(x)


def run_guarded(launch: Launch) -> None:
    """Run a launch on copies between guards, and copy back what became of them."""
    # One copy of each, since a result may be written over the part of it that is read.
    given = {id(x): x for x in launch.arguments.values() if _is_floats(x)}
    copies = {key: _guarded(x) for key, x in given.items()}
    arguments = {name: copies.get(id(x), x) for name, x in launch.arguments.items()}
    run(replace(launch, arguments=arguments))
    for key, copy in copies.items():
        room = copy.new_empty(0).set_(copy.untyped_storage())
        guards = torch.cat([room[:_GUARD], room[_GUARD + copy.numel() :]])
        assert guards.isnan().all(), f"{launch.kernel} wrote beyond one of its tensors"
        given[key].copy_(copy)


def _is_floats(x: Tensor | float | None) -> TypeGuard[Tensor]:
    return isinstance(x, Tensor) and x.is_floating_point()


def far_errors(stages: TritonStages) -> dict[str, float]:
    """Of results that fp16 holds, from states and gradients that it does not."""
    case = make_case(lengths=[16], chunk_len=16, dims=(16, 16), dtype=torch.float16, fixed=True)
    problem = problem_of(case, fixed=True)
    oracle = StagesByDefinition(problem, 1)
    q, k, v = (x.half() for x in (case.q / 1e3, case.k, case.v))
    states = 1e6 * torch.randn(1, 1, 2, 16, 16)
    exact = oracle.outputs(q.double(), k.double(), v.double(), states.double())
    out = stages.outputs(q, k, v, states, problem, intra=None)
    return {"outputs": ((out - exact).abs().max() / exact.abs().max()).item()}


def main() -> None:
    """Run all cases."""
    assert INTERPRETED, "TRITON_INTERPRET=1 must be set before the kernels are imported"
    # Memory that was not written is NaN.
    torch.use_deterministic_algorithms(True)
    torch.set_num_threads(1)
    stages, results = TritonStages(launch=run_guarded), {}
    for name, (lengths, chunk_len, dims, batch, heads, fixed, strongest, dtype) in CASES.items():
        began = time.perf_counter()
        case = make_case(
            lengths=lengths,
            chunk_len=chunk_len,
            dims=dims,
            dtype=dtype,
            batch=batch,
            heads=heads,
            fixed=fixed,
            strongest=strongest,
        )
        results[name] = {
            "stages": stage_errors(stages, case, dtype=dtype, fixed=fixed),
            "joined": joined_errors(stages, case, dtype=dtype, fixed=fixed),
            "seconds": time.perf_counter() - began,
        }
    results["fp16, far states"] = {"stages": far_errors(stages)}
    print(json.dumps(results))


F32, F16 = torch.float32, torch.float16
# name: (lengths, chunk_len, (K, V), batch, heads, decay per head, strongest decay, dtype)
CASES: dict[str, tuple[list[int], int, tuple[int, int], int, int, bool, float, torch.dtype]] = {
    "tail, decay per head": ([131], 64, (16, 24), 2, 1, True, 0.3, F32),
    "decay per token": ([131], 64, (24, 16), 2, 1, False, 0.3, F32),
    "documents": ([7, 1, 40, 33], 16, (16, 32), 1, 2, False, 0.3, F32),
    "head dims 48 and 40": ([35, 32], 32, (48, 40), 1, 2, False, 0.3, F32),
    "head dims 192 and 8": ([37], 32, (192, 8), 1, 1, True, 0.3, F32),
    "one token": ([1], 16, (8, 200), 1, 1, False, 0.3, F32),
    "seven tokens": ([7], 128, (16, 16), 1, 1, True, 0.3, F32),
    "strong decay": ([70, 10], 64, (16, 16), 1, 2, True, 40.0, F32),
    "strong decay per token": ([70, 10], 64, (16, 16), 1, 1, False, 40.0, F32),
    "fp16": ([131], 64, (64, 64), 2, 1, False, 0.3, F16),
    "fp16, head dim 128": ([100], 64, (128, 128), 1, 1, True, 0.3, F16),
    "fp16, longest chunks": ([131], 128, (192, 80), 1, 1, False, 0.3, F16),
}


if __name__ == "__main__":
    main()
