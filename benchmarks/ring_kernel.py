"""Ring attention against torch's own ring and against one process, forward + backward, as JSON.

    python benchmarks/ring_kernel.py [--tokens 4096 16384] [--rounds 4]

The variants run in turn, every other round in reverse order, and each round gives one ratio per
pair, so that a drift of the machine falls on both sides:

    ours              ring_attention, one_way, zigzag: 2 ranks x 1 thread
    torch_alltoall    torch's private ring driver (it underlies context_parallel) around the same
    torch_allgather   CPU flash kernel, zigzag, both of its ways to move K/V: 2 ranks x 1 thread
    single            scaled_dot_product_attention on the whole sequence: 1 process x 2 threads
"""

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor.experimental._context_parallel import _attention as torch_ring
from torch.multiprocessing.spawn import spawn
from torch.nn import functional

from ringctx.parallel import ring_attention, shard

RANKS = 2
HEADS, HEAD_DIM = 8, 64
LAYOUT = "zigzag"

# Forward + backward; returns out, dq, dk, dv as [B, T, H, D].
Variant = Callable[[], tuple[Tensor, ...]]


def main() -> None:
    """Start the ranks; print rank 0's result."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, nargs="+", default=[4096, 16384])
    parser.add_argument("--rounds", type=int, default=4, help="of the longest sequence")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        job = (f"file://{folder}/store", args.tokens, args.rounds, f"{folder}/result.json")
        spawn(_rank_main, job, nprocs=RANKS)
        print(json.dumps(json.loads(Path(job[-1]).read_text()), indent=2))


def _rank_main(rank: int, store: str, tokens: list[int], rounds: int, result: str) -> None:
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=RANKS)
    # Shorter sequences are noisier and cheaper: more rounds.
    runs = [_compare(seq_len, rounds * max(tokens) // seq_len) for seq_len in tokens]
    if rank == 0:
        config = {
            "ranks": RANKS,
            "threads_per_rank": 1,
            "threads_single": RANKS,
            "heads": HEADS,
            "kv_heads": HEADS,
            "head_dim": HEAD_DIM,
            "dtype": "float32",
            "causal": True,
            "passes": "forward + backward",
            "torch": torch.__version__,
            "cpu_count": os.cpu_count(),
        }
        Path(result).write_text(json.dumps({"config": config, "runs": runs}))
    dist.barrier()
    dist.destroy_process_group()


def _compare(seq_len: int, rounds: int) -> dict[str, Any]:
    variants = _variants(seq_len)
    expected = variants["single"]()
    errors = {name: _error(name, run(), expected) for name, run in variants.items()}
    times_s: dict[str, list[float]] = {name: [] for name in variants}
    for i in range(rounds):
        order = list(variants) if i % 2 == 0 else list(reversed(variants))
        for name in order:
            times_s[name].append(_timed(name, variants[name]))
    return {
        "tokens": seq_len,
        "rounds": rounds,
        "max_error_against_single": errors,
        "seconds": {name: _spread(values) for name, values in times_s.items()},
        "ratios": {
            f"ours / {name}": _spread(
                [ours / other for ours, other in zip(times_s["ours"], values, strict=True)]
            )
            for name, values in times_s.items()
            if name != "ours"
        },
    }


def _variants(seq_len: int) -> dict[str, Variant]:
    generator = torch.Generator().manual_seed(0)
    shape = (1, seq_len, HEADS, HEAD_DIM)
    whole = [torch.randn(shape, generator=generator) for _ in range(4)]
    local = [shard(x, rank=dist.get_rank(), world_size=RANKS, layout=LAYOUT) for x in whole]
    return {
        "ours": lambda: _ours(*local),
        "torch_alltoall": lambda: _torch(torch_ring._RotateMethod.ALL_TO_ALL, local),
        "torch_allgather": lambda: _torch(torch_ring._RotateMethod.ALL_GATHER, local),
        "single": lambda: _single(*whole),
    }


def _world() -> dist.ProcessGroup:
    assert dist.group.WORLD is not None
    return dist.group.WORLD


def _ours(q: Tensor, k: Tensor, v: Tensor, grad_out: Tensor) -> tuple[Tensor, ...]:
    inputs = [x.detach().requires_grad_() for x in (q, k, v)]
    out = ring_attention(*inputs, group=_world(), layout=LAYOUT)
    return out.detach(), *torch.autograd.grad(out, inputs, grad_out)


def _single(q: Tensor, k: Tensor, v: Tensor, grad_out: Tensor) -> tuple[Tensor, ...]:
    """On rank 0; the others wait."""
    if dist.get_rank() != 0:
        return ()
    inputs = [x.detach().requires_grad_() for x in (q, k, v)]
    query, key, value = (x.transpose(1, 2) for x in inputs)
    out = functional.scaled_dot_product_attention(query, key, value, is_causal=True).transpose(1, 2)
    return out.detach(), *torch.autograd.grad(out, inputs, grad_out)


def _torch(method: torch_ring._RotateMethod, local: list[Tensor]) -> tuple[Tensor, ...]:
    torch_ring._cp_options.rotate_method = method
    q, k, v, grad_out = (x.transpose(1, 2) for x in local)
    aten = torch.ops.aten
    out, lse = torch_ring._templated_ring_attention(
        _world(),
        2,
        aten._scaled_dot_product_flash_attention_for_cpu,
        q,
        k,
        v,
        is_causal=True,
        dropout_p=0.0,
    )
    grads = torch_ring._templated_ring_attention_backward(
        _world(),
        2,
        aten._scaled_dot_product_flash_attention_for_cpu_backward,
        grad_out,
        "grad_out",
        q,
        k,
        v,
        out,
        lse,
        is_causal=True,
        dropout_p=0.0,
    )
    return tuple(x.transpose(1, 2) for x in (out, *grads))


def _timed(name: str, run: Variant) -> float:
    """Seconds until the last rank is done."""
    torch.set_num_threads(RANKS if name == "single" else 1)
    dist.barrier()
    start_s = time.perf_counter()
    run()
    dist.barrier()
    return time.perf_counter() - start_s


def _error(name: str, results: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> float:
    """The largest error on rank 0, relative to each tensor's largest entry."""
    if name == "single" or dist.get_rank() != 0:
        return 0.0
    wanted = [shard(x, rank=0, world_size=RANKS, layout=LAYOUT) for x in expected]
    pairs = zip(results, wanted, strict=True)
    return max(((x - y).abs().max() / y.abs().max()).item() for x, y in pairs)


def _spread(values: list[float]) -> dict[str, float]:
    spread = {"median": statistics.median(values), "min": min(values), "max": max(values)}
    return {name: round(value, 4) for name, value in spread.items()}


if __name__ == "__main__":
    main()
