"""The memory of one forward and backward, in a process of its own; `lightning.py` starts it.

    python benchmarks/lightning_memory.py ours --tokens 16384

One idea: the most that the process held (VmHWM of Linux, set back after a small call that loads all
libraries) minus what it held before the inputs were made. Malloc is as it comes.
"""

import argparse
import ctypes
import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from lightning_variants import VARIANTS, Sizes, make_inputs, variant

__all__ = ["add_size_arguments", "main", "measure", "sizes_of"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the bytes, as JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("variant", choices=VARIANTS)
    parser.add_argument("--tokens", type=int, required=True)
    add_size_arguments(parser)
    args = parser.parse_args(arguments)
    torch.set_num_threads(args.threads)
    print(json.dumps(measure(args.variant, sizes_of(args, tokens=args.tokens))))
    return 0


def add_size_arguments(parser: argparse.ArgumentParser) -> None:
    """Those of every call but its tokens."""
    parser.add_argument("--heads", type=int, default=8, help="(%(default)s)")
    parser.add_argument("--head-dim", type=int, default=64, help="(%(default)s)")
    parser.add_argument("--chunk-len", type=int, default=64, help="(%(default)s)")
    parser.add_argument("--threads", type=int, default=2, help="(%(default)s)")


def sizes_of(args: argparse.Namespace, *, tokens: int) -> Sizes:
    """What the arguments say."""
    return Sizes(tokens=tokens, heads=args.heads, head_dim=args.head_dim, chunk_len=args.chunk_len)


def measure(name: str, sizes: Sizes) -> dict[str, Any]:
    """Bytes at the peak of one call, and what they are compared with.

    Args:
        name: of the variant.
        sizes: of the call.

    Returns:
        `peak_bytes`, and the `denominators`: inputs are q, k, v and the output's gradient; outputs
        are the output and three gradients; states are one for every chunk and head.
    """
    small = replace(sizes, tokens=2 * sizes.chunk_len)
    run = variant(name, make_inputs(small), small)
    assert run is not None, f"{name} is not installed"
    run()
    before = _reset_peak()
    run = variant(name, make_inputs(sizes), sizes)
    assert run is not None
    results = run()
    peak = _status_bytes("VmHWM") - before
    assert results is not None
    of_tensors = 4 * 4 * sizes.tokens * sizes.heads * sizes.head_dim
    denominators = {
        "inputs_bytes": of_tensors,
        "outputs_bytes": of_tensors,
        "states_bytes": sizes.state_bytes,
    }
    without_states = 2 * of_tensors
    return {
        "peak_bytes": peak,
        "denominators": denominators,
        "of_inputs_outputs_states": round(peak / sum(denominators.values()), 3),
        "of_inputs_outputs": round(peak / without_states, 3),
    }


def _reset_peak() -> int:
    """Forget the peak so far; returns what is held now."""
    # What the small call freed must not serve the large one unseen.
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    return _status_bytes("VmRSS")


def _status_bytes(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    (line,) = [line for line in lines if line.startswith(f"{field}:")]
    return 1024 * int(line.split()[1])


if __name__ == "__main__":
    sys.exit(main())
