"""Other libraries' context-parallel attention on CPU, each as one function like ours.

One idea: every peer is `attend(q, k, v) -> out` on `[B, T, H, D]` shards of the layout it wants,
and differentiable, so that one loop times them all. What is driven, and how:

    torch_alltoall    torch's private ring (it underlies context_parallel), which has no CPU entry
    torch_allgather   point, around the CPU flash kernel; both of its ways to move K/V
    yunchang          its SeqAllToAll4D around scaled_dot_product_attention
    deepspeed         its DistributedAttention around scaled_dot_product_attention

None of them takes a window here, and the last two want heads that divide by the ranks.
Run as a script (by install.sh) it imports everything once, on one rank.
"""

import os
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor.experimental._context_parallel import _attention as torch_ring
from torch.nn import functional

__all__ = ["PEERS", "Attend", "layout_of", "load"]

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
PEERS = ("torch_alltoall", "torch_allgather", "yunchang", "deepspeed")


def layout_of(name: str, *, causal: bool) -> str:
    """How the peer wants the sequence spread; torch balances causal work, by zigzag."""
    return "zigzag" if causal and name.startswith("torch_") else "contiguous"


def load(names: Sequence[str], *, group: dist.ProcessGroup, causal: bool) -> dict[str, Attend]:
    """The peers of `names`, which need a process group that has started."""
    makers = {"yunchang": _yunchang, "deepspeed": _deepspeed}
    return {
        name: makers[name](group, causal) if name in makers else _torch(name, group, causal)
        for name in names
    }


def _sdpa(causal: bool) -> Attend:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        # [B, S, H, D] -> [B, H, S, D] and back
        query, key, value = (x.transpose(1, 2) for x in (q, k, v))
        grouped = query.shape[1] != key.shape[1]
        out = functional.scaled_dot_product_attention(
            query, key, value, is_causal=causal, enable_gqa=grouped
        )
        return out.transpose(1, 2).contiguous()

    return attend


def _yunchang(group: dist.ProcessGroup, causal: bool) -> Attend:
    from yunchang.comm.all_to_all import SeqAllToAll4D  # type: ignore[import-not-found]

    local = _sdpa(causal)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        whole = [SeqAllToAll4D.apply(group, x, 2, 1) for x in (q, k, v)]
        out: Tensor = SeqAllToAll4D.apply(group, local(*whole), 1, 2)
        return out

    return attend


def _deepspeed(group: dist.ProcessGroup, causal: bool) -> Attend:
    os.environ["DS_ACCELERATOR"] = "cpu"
    extensions = Path(__file__).resolve().parent / ".venv" / "extensions"
    os.environ.setdefault("TORCH_EXTENSIONS_DIR", str(extensions))
    import deepspeed.comm  # type: ignore[import-not-found]
    from deepspeed.sequence.layer import (  # type: ignore[import-not-found]
        DistributedAttention,
    )

    if not deepspeed.comm.is_initialized():
        deepspeed.comm.init_distributed("gloo", auto_mpi_discovery=False, verbose=False)
    module = DistributedAttention(_sdpa(causal), group, 2, 1)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out: Tensor = module(q, k, v, 0)
        return out

    return attend


def _torch(name: str, group: dist.ProcessGroup, causal: bool) -> Attend:
    ways = torch_ring._RotateMethod
    way = ways.ALL_TO_ALL if name == "torch_alltoall" else ways.ALL_GATHER

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out: Tensor = _TorchRing.apply(q, k, v, group, causal, way)  # type: ignore[no-untyped-call]
        return out

    return attend


class _TorchRing(torch.autograd.Function):
    """torch's ring forward and backward; its options are global, so each call sets them."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        group: dist.ProcessGroup,
        causal: bool,
        way: torch_ring._RotateMethod,
    ) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        ctx.group, ctx.causal, ctx.way = group, causal, way
        _set_options(causal, way)
        out, lse = torch_ring._templated_ring_attention(
            group,
            2,
            torch.ops.aten._scaled_dot_product_flash_attention_for_cpu,
            q,
            k,
            v,
            is_causal=causal,
            dropout_p=0.0,
        )
        ctx.save_for_backward(q, k, v, out, lse)
        return out.transpose(1, 2)

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse = ctx.saved_tensors
        _set_options(ctx.causal, ctx.way)
        grads = torch_ring._templated_ring_attention_backward(
            ctx.group,
            2,
            torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward,
            grad_out.transpose(1, 2),
            "grad_out",
            q,
            k,
            v,
            out,
            lse,
            is_causal=ctx.causal,
            dropout_p=0.0,
        )
        return *(x.transpose(1, 2) for x in grads), None, None, None


def _set_options(causal: bool, way: torch_ring._RotateMethod) -> None:
    torch_ring._cp_options.rotate_method = way
    torch_ring._cp_options.enable_load_balance = causal


def _main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        store = f"file://{folder}/store"
        dist.init_process_group("gloo", init_method=store, rank=0, world_size=1)
        assert dist.group.WORLD is not None
        load(PEERS, group=dist.group.WORLD, causal=True)
        dist.destroy_process_group()


if __name__ == "__main__":
    _main()
