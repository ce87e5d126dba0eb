"""The Triton kernels of lightning attention, compiled ahead of time: what each takes, as JSON.

    python benchmarks/lightning_kernels.py [--arch 80 90] [--dim 64 128] [--dtype bfloat16]

Needs no GPU. Stages are called on tensors without memory, their launches are recorded and compiled
as they would be launched. Per launch: registers of a thread, bytes of stack (above 0: registers
spill), bytes of shared memory of a program, warps, and how many tensor core instructions there are
of each kind. What it cannot tell is time.
"""

import argparse
import json
import re
import subprocess
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from ringctx.ops.lightning.chunks import Fragment, cut
from ringctx.ops.lightning.stages import Decay, Problem
from ringctx.ops.lightning.triton_launch import Launch
from ringctx.ops.lightning.triton_stages import TritonStages

__all__ = ["Kernel", "compile_launch", "record_launches"]

_TYPES = {
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.float32: "*fp32",
    torch.float64: "*fp64",
    torch.int32: "*i32",
    torch.int64: "*i64",
}
_HEADS = 2
_MMA = {"wgmma": r"wgmma\.mma_async", "mma_sync": r"mma\.sync"}


@dataclass(frozen=True)
class Kernel:
    """What a compiled launch takes."""

    name: str
    registers: int
    stack_bytes: int
    shared_bytes: int
    warps: int
    wgmma: int
    mma_sync: int


def record_launches(
    *, k_dim: int, v_dim: int, chunk_len: int, dtype: torch.dtype, fixed: bool, whole: bool
) -> dict[str, Launch]:
    """The launches of a call, forward and backward, by name.

    Args:
        k_dim: head dim of q and k.
        v_dim: head dim of v.
        chunk_len: tokens of a chunk.
        dtype: of q, k and v.
        fixed: whether the decay is per head; else it is per token and has a gradient.
        whole: whether the work inside chunks is done with the rest, as on one rank.
    """
    seen: list[Launch] = []
    stages, problem = TritonStages(launch=seen.append), _problem(chunk_len, fixed=fixed)
    tokens = problem.chunks.num_rows
    q = _nowhere(1, tokens, _HEADS, k_dim, dtype=dtype)
    v = _nowhere(1, tokens, _HEADS, v_dim, dtype=dtype)
    named: dict[str, Launch] = {}

    def call(names: str, stage: Callable[[], Any]) -> Any:
        result = stage()
        named.update(zip(names.split(), seen, strict=True))
        seen.clear()
        return result

    states = call("states", lambda: stages.states(q, v, problem))
    call("state_grads", lambda: stages.state_grads(q, v, problem))
    into = states[:1]
    call("scan", lambda: stages.scan_(states, into, problem, backward=False))
    call("scan_back", lambda: stages.scan_(states, into, problem, backward=True))
    intra: Tensor | None = None
    parts: tuple[Tensor, Tensor, Tensor] | None = None
    if not whole:
        intra = call("intra", lambda: stages.intra(q, q, v, problem))
        names = "intra_grad_q intra_grad_k intra_grad_v"
        parts = call(names, lambda: stages.intra_grads(v, q, q, v, problem))
    call("outputs", lambda: stages.outputs(q, q, v, states, problem, intra=intra))
    call(
        "grad_q grad_k grad_v",
        lambda: stages.gradients(
            v,
            q,
            q,
            v,
            states=states,
            grad_states=states,
            problem=problem,
            intra=parts,
            of_decay=not fixed,
        ),
    )
    return named


def _problem(chunk_len: int, *, fixed: bool) -> Problem:
    chunks = cut((Fragment(0, 4 * chunk_len, entry=0, exit=0),), chunk_len=chunk_len)
    of_chunk = _nowhere(4, 1, _HEADS, dtype=torch.float64)
    if fixed:
        return Problem(chunks, Decay(_nowhere(_HEADS), None, of_chunk), scale=1.0)
    running = _nowhere(1, chunks.num_rows, _HEADS, dtype=torch.float64)
    return Problem(chunks, Decay(None, running, of_chunk), scale=1.0)


def _nowhere(*size: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(size, dtype=dtype, device="meta")


def compile_launch(name: str, launch: Launch, *, arch: int) -> Kernel:
    """Compile a launch for compute capability `arch` (80, 90)."""
    compiled = triton.compile(
        _source(launch), target=GPUTarget("cuda", arch, 32), options=launch.options
    )
    ptx = compiled.asm["ptx"]
    counts = {kind: len(re.findall(pattern, ptx)) for kind, pattern in _MMA.items()}
    usage = _resource_usage(compiled.asm["cubin"])
    shared = compiled.metadata.shared
    return Kernel(name, usage["REG"], usage["STACK"], shared, launch.num_warps, **counts)


def _source(launch: Launch) -> ASTSource:
    """The kernel, specialised as a launch would: all tensors begin at multiples of 16 bytes."""
    signature: dict[str, str] = {}
    constants: dict[str, Any] = dict(launch.constants)
    for argument in launch.kernel.arg_names:
        value = launch.arguments.get(argument)
        if isinstance(value, Tensor):
            signature[argument] = _TYPES[value.dtype]
        elif value is None:
            signature[argument] = "constexpr"
            constants.setdefault(argument, None)
        else:
            signature[argument] = "i32" if isinstance(value, int) else "fp32"
    pointers = [i for i, kind in enumerate(signature.values()) if kind.startswith("*")]
    attributes = {(i,): [["tt.divisibility", 16]] for i in pointers}
    return ASTSource(launch.kernel, signature, constants, attributes)


def _resource_usage(cubin: bytes) -> dict[str, int]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
        command = [str(tool), "-res-usage", file.name]
        text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return {key: int(number) for key, number in re.findall(r"(REG|STACK|SHARED):(\d+)", text)}


def main() -> None:
    """Compile and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--arch", type=int, nargs="+", default=[80, 90])
    parser.add_argument("--dim", type=int, nargs="+", default=[64, 128])
    parser.add_argument("--chunk-len", type=int, default=64)
    parser.add_argument("--dtype", default="bfloat16", choices=["float16", "bfloat16", "float32"])
    parser.add_argument("--decay", default="token", choices=["token", "head"])
    args = parser.parse_args()
    kernels = []
    for arch in args.arch:
        for dim in args.dim:
            for whole in (True, False):
                launches = record_launches(
                    k_dim=dim,
                    v_dim=dim,
                    chunk_len=args.chunk_len,
                    dtype=getattr(torch, args.dtype),
                    fixed=args.decay == "head",
                    whole=whole,
                )
                for name, launch in launches.items():
                    kernel = compile_launch(name, launch, arch=arch)
                    case = {"arch": f"sm_{arch}", "head_dim": dim, "intra": not whole}
                    kernels.append(case | asdict(kernel))
    result = {
        "triton": triton.__version__,
        "chunk_len": args.chunk_len,
        "dtype": args.dtype,
        "kernels": kernels,
    }
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
