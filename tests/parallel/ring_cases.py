"""Ring attention cases: what one rank does, and what all ranks together must return."""

from dataclasses import dataclass
from typing import Any, get_args

import torch
from torch import Tensor
from torch.nn import functional

from ringctx.config import Schedule, TopologyConfig, TopologyKind
from ringctx.ops.naive import naive_attention
from ringctx.parallel import positions, ring_attention, shard
from ringctx.parallel.comm import Group, group_rank
from ringctx.parallel.layout import Sharding
from ringctx.parallel.mask import Mask
from ringctx.parallel.ring_attention import PassPlan, RingAttention
from ringctx.parallel.ring_pass import Place
from ringctx.parallel.topology import wire_up
from ringctx.parallel.traffic import Shape
from tests.parallel.route_cases import seen
from tests.tolerances import assert_lse_matches, assert_matches

__all__ = [
    "MASKS",
    "SCHEDULES",
    "TOPOLOGIES",
    "Case",
    "RankResult",
    "assert_matches_oracle",
    "attend_on_rank",
    "join",
]

SCHEDULES = [schedule for schedule in get_args(Schedule) if schedule != "auto"]
TOPOLOGIES: tuple[TopologyKind, ...] = get_args(TopologyKind)
MASKS: tuple[dict[str, Any], ...] = (
    {"causal": True},
    {"causal": False},
    {"window": 4},
    {"window": 3, "sinks": 2},
    {"documents": 4},
    {"documents": 4, "causal": False},
    {"documents": 3, "window": 3},
    {"documents": 3, "window": 4, "sinks": 1},
)


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
    # Ranks of a node of two_level.
    node: int = 2
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
        way += f"{self.node}" if self.topology == "two_level" else ""
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
        way = {"layout": self.layout, "schedule": self.schedule, "topology": self.wires}
        return self.mask | way

    @property
    def wires(self) -> TopologyConfig:
        """The topology, with its nodes."""
        node = self.node if self.topology == "two_level" else None
        return TopologyConfig(kind=self.topology, ranks_per_node=node)

    def plan_in(self, group: Group, *, ranks: tuple[int, ...], run_size: int) -> PassPlan:
        """What the call plans where `group` is these ranks of a run of `run_size`."""
        sharding = Sharding(self.seq_len, self.world_size, self.layout)
        mask = Mask.checked(seq_len=self.seq_len, **self.mask)  # type: ignore[arg-type]
        return PassPlan(
            Place(group=group, sharding=sharding, mask=mask, scale=self.head_dim**-0.5),
            Shape(
                batch=self.batch,
                heads=self.heads,
                kv_heads=self.kv_heads,
                head_dim=self.head_dim,
                dtype=self.dtype,
            ),
            wire_up(self.wires, ranks=ranks, world_size=run_size),
            self.schedule,
        )

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


def attend_on_rank(group: Group, case: Case, plan: PassPlan | None = None) -> RankResult:
    """Forward and backward on one rank of any kind of group; a plan replaces the call's own."""
    rank, world_size = group_rank(group), case.world_size
    *inputs, grad_out = (
        shard(x, rank=rank, world_size=world_size, layout=case.layout) for x in case.whole_inputs()
    )
    for x in inputs:
        x.requires_grad_()
    if plan is None:
        out, lse = ring_attention(*inputs, group=group, return_lse=True, **case.settings)  # type: ignore[call-overload]
    else:
        out, lse = RingAttention.apply(*inputs, plan)  # type: ignore[no-untyped-call]
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

    # Only bf16 is measured by what flash does.
    flash = _torch_flash(case) if case.dtype == torch.bfloat16 else vars(oracle)
    for name in ("out", "grad_q", "grad_k", "grad_v"):
        joined = join(case, [getattr(result, name) for result in results], dim=1)
        assert_matches(name, joined, getattr(oracle, name), flash=flash[name])
    joined = join(case, [result.lse for result in results], dim=2)
    assert_lse_matches(joined, oracle.lse, dtype=case.dtype)


def _torch_flash(case: Case) -> dict[str, Tensor]:
    """One process and torch's own kernel, which reads any mask as a matrix: none of our code."""
    *qkv, grad_out = (x.transpose(1, 2).contiguous() for x in case.whole_inputs())
    q, k, v = inputs = [x.requires_grad_() for x in qkv]
    cu_seqlens = None if case.cu_seqlens is None else tuple(case.cu_seqlens.tolist())
    mask = Mask(case.causal, case.window, case.sinks, cu_seqlens)
    visible = seen(Sharding(case.seq_len, 1, "contiguous"), mask)[0, :, 0]
    out = functional.scaled_dot_product_attention(
        q, k, v, attn_mask=torch.from_numpy(visible), enable_gqa=True
    )
    whole = (out.detach(), *torch.autograd.grad(out, inputs, grad_out))
    names = ("out", "grad_q", "grad_k", "grad_v")
    return {name: x.transpose(1, 2) for name, x in zip(names, whole, strict=True)}


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
