"""Cases of attention by heads: what one rank does, and what all ranks together must return.

The oracle is torch's own attention in float64 on the mask written down pair by pair: independent
of everything under test.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from ringctx.config import Layout
from ringctx.parallel import positions, shard
from tests.tolerances import assert_matches

__all__ = ["ContextCase", "RankResult", "assert_matches_oracle", "differentiate_on_rank"]


@dataclass(frozen=True, kw_only=True)
class ContextCase:
    """One call; `local_len` is rounded up to an even number for zigzag."""

    world_size: int
    ulysses_degree: int = 1
    layout: Layout = "zigzag"
    causal: bool = True
    window: int | None = None
    sinks: int = 0
    # Lengths of all documents but the last; they are cut off at the end of the sequence.
    documents: tuple[int, ...] = ()
    dtype: torch.dtype = torch.float32
    batch: int = 1
    tokens: int = 6
    heads: int = 8
    kv_heads: int = 2
    head_dim: int = 8

    def __str__(self) -> str:
        mask = "causal" if self.causal else "full"
        mask += f"-w{self.window}s{self.sinks}" if self.window else ""
        mask += "-docs" if self.documents else ""
        dtype = str(self.dtype).removeprefix("torch.")
        shape = f"B{self.batch}-T{self.local_len}-H{self.heads}:{self.kv_heads}"
        ranks = f"P{self.world_size}" + (
            f"U{self.ulysses_degree}" if self.ulysses_degree > 1 else ""
        )
        return f"{ranks}-{self.layout}-{mask}-{dtype}-{shape}"

    @property
    def local_len(self) -> int:
        return self.tokens + self.tokens % 2 if self.layout == "zigzag" else self.tokens

    @property
    def seq_len(self) -> int:
        return self.local_len * self.world_size

    @property
    def cu_seqlens(self) -> Tensor | None:
        if not self.documents:
            return None
        ends = torch.tensor(self.documents).cumsum(0)
        inside = [int(end) for end in ends if end < self.seq_len]
        return torch.tensor([0, *inside, self.seq_len], dtype=torch.int32)

    @property
    def mask(self) -> dict[str, Any]:
        """The arguments of an attention call."""
        return {
            "causal": self.causal,
            "window": self.window,
            "sinks": self.sinks,
            "cu_seqlens": self.cu_seqlens,
        }

    def whole_inputs(self) -> list[Tensor]:
        """q, k, v and the gradient of out; the same wherever it is called."""
        generator = torch.Generator().manual_seed(self.seq_len)
        heads = (self.heads, self.kv_heads, self.kv_heads, self.heads)
        shapes = [(self.batch, self.seq_len, h, self.head_dim) for h in heads]
        return [torch.randn(shape, generator=generator).to(self.dtype) for shape in shapes]

    def local_inputs(self, rank: int) -> list[Tensor]:
        """This rank's shards of them."""
        place = {"rank": rank, "world_size": self.world_size, "layout": self.layout}
        return [shard(x, **place) for x in self.whole_inputs()]  # type: ignore[arg-type]

    def visible(self) -> Tensor:
        """Which query (row) sees which key, by the definition."""
        query = torch.arange(self.seq_len)[:, None]
        key = torch.arange(self.seq_len)[None, :]
        starts = torch.zeros(self.seq_len, dtype=torch.int64)
        if self.cu_seqlens is not None:
            for start in self.cu_seqlens[:-1].tolist():
                starts[start:] = start
        visible = starts[:, None] == starts[None, :]
        if self.causal:
            visible &= key <= query
        if self.window is not None:
            visible &= (key > query - self.window) | (key - starts[None, :] < self.sinks)
        return visible


@dataclass(frozen=True)
class RankResult:
    """One rank's shards."""

    out: Tensor
    grad_q: Tensor
    grad_k: Tensor
    grad_v: Tensor


def differentiate_on_rank(
    case: ContextCase, rank: int, attend: Callable[[Tensor, Tensor, Tensor], Tensor]
) -> RankResult:
    """Forward and backward of `attend(q, k, v)` on this rank's shards."""
    *inputs, grad_out = case.local_inputs(rank)
    for x in inputs:
        x.requires_grad_()
    out = attend(*inputs)
    assert out.dtype == case.dtype
    assert out.shape == inputs[0].shape
    grads = torch.autograd.grad(out, inputs, grad_out)
    return RankResult(out.detach(), *grads)


def assert_matches_oracle(case: ContextCase, results: Sequence[RankResult]) -> None:
    """Join the shards and compare output and every gradient with the float64 oracle."""
    oracle = _attend_whole(case, torch.float64)
    flash = _attend_whole(case, case.dtype)
    for name in ("out", "grad_q", "grad_k", "grad_v"):
        shards = [getattr(result, name) for result in results]
        joined = _join(case, shards)
        assert joined.dtype == case.dtype, name
        assert_matches(name, joined, getattr(oracle, name), flash=getattr(flash, name))


def _attend_whole(case: ContextCase, dtype: torch.dtype) -> RankResult:
    """One process, all tokens."""
    q, k, v, grad_out = (x.to(dtype).transpose(1, 2) for x in case.whole_inputs())
    inputs = [x.requires_grad_() for x in (q, k, v)]
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        out = scaled_dot_product_attention(q, k, v, attn_mask=case.visible(), enable_gqa=True)
        grads = torch.autograd.grad(out, inputs, grad_out)
    return RankResult(*(x.detach().transpose(1, 2) for x in (out, *grads)))


def _join(case: ContextCase, shards: Sequence[Tensor]) -> Tensor:
    """Put every rank's tokens where their positions say."""
    index = torch.cat(
        [
            positions(case.seq_len, rank=rank, world_size=case.world_size, layout=case.layout)
            for rank in range(case.world_size)
        ]
    )
    joined = torch.cat(list(shards), 1)
    return torch.empty_like(joined).index_copy_(1, index, joined)
