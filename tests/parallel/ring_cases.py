"""Ring attention cases: what one rank does, and what all ranks together must return."""

from dataclasses import dataclass

import torch
from torch import Tensor

from ringctx.ops.block_attention import block_backward, block_forward
from ringctx.ops.naive import naive_attention
from ringctx.parallel import positions, ring_attention, shard
from ringctx.parallel.comm import Group, group_rank
from tests.tolerances import assert_lse_matches, assert_matches

__all__ = ["Case", "RankResult", "assert_matches_oracle", "attend_on_rank"]


@dataclass(frozen=True, kw_only=True)
class Case:
    """One call of ring_attention; `local_len` is rounded up to an even number for zigzag."""

    world_size: int
    layout: str = "zigzag"
    causal: bool = True
    dtype: torch.dtype = torch.float32
    batch: int = 1
    tokens: int = 6
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 8

    def __str__(self) -> str:
        mask = "causal" if self.causal else "full"
        dtype = str(self.dtype).removeprefix("torch.")
        shape = f"B{self.batch}-T{self.local_len}-H{self.heads}:{self.kv_heads}"
        return f"P{self.world_size}-{self.layout}-{mask}-{dtype}-{shape}"

    @property
    def local_len(self) -> int:
        return self.tokens + self.tokens % 2 if self.layout == "zigzag" else self.tokens

    @property
    def seq_len(self) -> int:
        return self.local_len * self.world_size

    def whole_inputs(self) -> list[Tensor]:
        """q, k, v and the gradient of out; the same wherever it is called."""
        generator = torch.Generator().manual_seed(self.seq_len)
        heads = (self.heads, self.kv_heads, self.kv_heads, self.heads)
        shapes = [(self.batch, self.seq_len, h, self.head_dim) for h in heads]
        return [torch.randn(shape, generator=generator).to(self.dtype) for shape in shapes]


@dataclass(frozen=True)
class RankResult:
    """One rank's shards."""

    out: Tensor
    lse: Tensor
    grad_q: Tensor
    grad_k: Tensor
    grad_v: Tensor


def attend_on_rank(group: Group, case: Case) -> RankResult:
    """Forward and backward on one rank of any kind of group."""
    rank, world_size = group_rank(group), case.world_size
    *inputs, grad_out = (
        shard(x, rank=rank, world_size=world_size, layout=case.layout) for x in case.whole_inputs()
    )
    for x in inputs:
        x.requires_grad_()
    out, lse = ring_attention(
        *inputs, group=group, layout=case.layout, causal=case.causal, return_lse=True
    )
    assert out.dtype == case.dtype
    assert not lse.requires_grad
    grads = torch.autograd.grad(out, inputs, grad_out)
    return RankResult(out.detach(), lse, *grads)


def assert_matches_oracle(case: Case, results: list[RankResult]) -> None:
    """Join the shards and compare outputs and every gradient with the float64 oracle."""
    q, k, v, grad_out = case.whole_inputs()
    wide = [x.double().requires_grad_() for x in (q, k, v)]
    oracle_out, oracle_lse = naive_attention(*wide, causal=case.causal)
    oracle_grads = torch.autograd.grad(oracle_out, wide, grad_out.double())

    scale = case.head_dim**-0.5
    flash_out, flash_lse = block_forward(q, k, v, causal=case.causal, scale=scale)
    flash_grads = block_backward(
        grad_out, q, k, v, out=flash_out, lse=flash_lse, causal=case.causal, scale=scale
    )
    names = ("out", "grad_q", "grad_k", "grad_v")
    oracles = (oracle_out.detach(), *oracle_grads)
    flashes = (flash_out, *flash_grads)
    for name, oracle, flash in zip(names, oracles, flashes, strict=True):
        joined = _join(case, [getattr(result, name) for result in results], dim=1)
        assert_matches(name, joined, oracle, flash=flash)
    joined = _join(case, [result.lse for result in results], dim=2)
    assert_lse_matches(joined, oracle_lse.detach(), dtype=case.dtype)


def _join(case: Case, shards: list[Tensor], *, dim: int) -> Tensor:
    """Put every rank's tokens where their positions say."""
    index = torch.cat(
        [
            positions(case.seq_len, rank=rank, world_size=case.world_size, layout=case.layout)
            for rank in range(case.world_size)
        ]
    )
    joined = torch.cat(shards, dim)
    return torch.empty_like(joined).index_copy_(dim, index, joined)
