"""Ring attention cases: what one rank does, and what all ranks together must return."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ringctx.config import TopologyConfig, TopologyKind
from ringctx.ops.naive import naive_attention
from ringctx.parallel import positions, ring_attention, shard
from ringctx.parallel.comm import Group, SoloGroup, group_rank
from tests.tolerances import assert_lse_matches, assert_matches

__all__ = ["Case", "RankResult", "assert_matches_oracle", "attend_on_rank", "join"]


@dataclass(frozen=True, kw_only=True)
class Case:
    """One call of ring_attention; `tokens` a rank are rounded up to an even number for zigzag."""

    world_size: int
    layout: str = "zigzag"
    causal: bool = True
    window: int | None = None
    sinks: int = 0
    documents: int = 1
    schedule: str = "auto"
    topology: TopologyKind = "switch"
    dtype: torch.dtype = torch.float32
    batch: int = 1
    tokens: int = 6
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 8

    def __str__(self) -> str:
        mask = "causal" if self.causal else "full"
        mask += f"-w{self.window}" if self.window else ""
        mask += f"-s{self.sinks}" if self.sinks else ""
        mask += f"-{self.documents}docs" if self.documents > 1 else ""
        dtype = str(self.dtype).removeprefix("torch.")
        shape = f"B{self.batch}-T{self.local_len}-H{self.heads}:{self.kv_heads}"
        way = f"{self.schedule}-{self.topology}"
        return f"P{self.world_size}-{self.layout}-{mask}-{way}-{dtype}-{shape}"

    @property
    def local_len(self) -> int:
        """Tokens a rank."""
        return self.tokens + self.tokens % 2 if self.layout == "zigzag" else self.tokens

    @property
    def seq_len(self) -> int:
        """Tokens in all."""
        return self.local_len * self.world_size

    @property
    def cu_seqlens(self) -> Tensor | None:
        """Borders of documents of uneven lengths, one of them a single token."""
        if self.documents == 1:
            return None
        # Only of the whole length: one process sees the same documents.
        generator = torch.Generator().manual_seed(self.seq_len + self.documents)
        inside = 1 + torch.randperm(self.seq_len - 1, generator=generator)[: self.documents - 1]
        borders = [0, *inside.tolist(), self.seq_len]
        return torch.tensor(sorted({1, *borders}), dtype=torch.int32)

    @property
    def mask(self) -> dict[str, object]:
        """What is seen, as keyword arguments."""
        names = ("causal", "window", "sinks", "cu_seqlens")
        return {name: getattr(self, name) for name in names}

    @property
    def settings(self) -> dict[str, object]:
        """All of ring_attention's keyword arguments but the group."""
        node = 2 if self.topology == "two_level" else None
        topology = TopologyConfig(kind=self.topology, ranks_per_node=node)
        way = {"layout": self.layout, "schedule": self.schedule, "topology": topology}
        return self.mask | way

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
    out, lse = ring_attention(*inputs, group=group, return_lse=True, **case.settings)  # type: ignore[call-overload]
    assert out.dtype == case.dtype
    assert not lse.requires_grad
    grads = torch.autograd.grad(out, inputs, grad_out)
    return RankResult(out.detach(), lse, *grads)


def assert_matches_oracle(case: Case, results: list[RankResult]) -> None:
    """Join the shards and compare outputs and every gradient with the float64 oracle."""
    q, k, v, grad_out = case.whole_inputs()
    wide = [x.double().requires_grad_() for x in (q, k, v)]
    oracle_out, oracle_lse = naive_attention(*wide, **case.mask)  # type: ignore[arg-type]
    oracle_grads = torch.autograd.grad(oracle_out, wide, grad_out.double())
    oracle = RankResult(oracle_out.detach(), oracle_lse.detach(), *oracle_grads)

    # One process on the same inputs: for a mask that kernels know, flash itself.
    alone = replace(case, world_size=1, tokens=case.seq_len, schedule="auto", topology="switch")
    one_process = attend_on_rank(SoloGroup(), alone)
    for name in ("out", "grad_q", "grad_k", "grad_v"):
        joined = join(case, [getattr(result, name) for result in results], dim=1)
        assert_matches(name, joined, getattr(oracle, name), flash=getattr(one_process, name))
    joined = join(case, [result.lse for result in results], dim=2)
    assert_lse_matches(joined, oracle.lse, dtype=case.dtype)


def join(case: Case, shards: list[Tensor], *, dim: int) -> Tensor:
    """Put every rank's tokens where their positions say."""
    index = torch.cat(
        [
            positions(case.seq_len, rank=rank, world_size=case.world_size, layout=case.layout)
            for rank in range(case.world_size)
        ]
    )
    joined = torch.cat(shards, dim)
    return torch.empty_like(joined).index_copy_(dim, index, joined)
