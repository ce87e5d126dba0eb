"""Lightning attention over ranks: the cases, what one rank does, and what all must return."""

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from ringctx.ops.naive_lightning import naive_recurrent
from ringctx.parallel import shard
from ringctx.parallel.comm import Group, group_rank
from ringctx.parallel.context_lightning import context_lightning
from ringctx.parallel.layout import positions
from tests.tolerances import assert_matches, assert_rounded_once, assert_sum_matches

__all__ = [
    "DOCUMENTS",
    "LightningCase",
    "LightningResult",
    "assert_matches_oracle",
    "bounds_of",
    "differentiate_on_rank",
    "joined",
]

# Edges are those of zigzag's parts; every other one is also a contiguous rank's.
DOCUMENTS = (
    "one",
    "at_every_edge",
    "at_rank_edges",
    "at_one_edge",
    "after_edges",
    "before_edges",
    "around_edges",
    "inside_every_part",
    "inside_every_other_part",
    "of_one_token",
    "of_seven",
    "of_a_part_and_one",
    "first_token_alone",
    "last_token_alone",
    "all_but_both_ends",
    "halves",
    "empty_ones",
    "empty_at_edges",
    "random_0",
    "random_1",
    "random_2",
    "random_3",
)


def bounds_of(documents: str, *, seq_len: int, world_size: int) -> list[int]:
    """Where documents begin, and the end of the last."""
    num_parts = 2 * world_size
    part = max(1, seq_len // num_parts)
    edges = list(range(part, seq_len, part))
    n, half = seq_len, part // 2
    middles = [edge + half for edge in (0, *edges)]
    table: dict[str, list[int]] = {
        "one": [],
        "at_every_edge": edges,
        "at_rank_edges": edges[1::2],
        "at_one_edge": edges[len(edges) // 2 :][:1],
        "after_edges": [edge + 1 for edge in edges],
        "before_edges": [edge - 1 for edge in edges],
        "around_edges": [edge + i for edge in edges for i in (-1, 0, 1)],
        "inside_every_part": middles,
        "inside_every_other_part": middles[::2],
        "of_one_token": list(range(1, n)),
        "of_seven": list(range(7, n, 7)),
        "of_a_part_and_one": list(range(part + 1, n, part + 1)),
        "first_token_alone": [1],
        "last_token_alone": [n - 1],
        "all_but_both_ends": [1, n - 1],
        "halves": [n // 2],
        "empty_ones": [0, 0, 3, 3, n - 2, n - 2, n - 2, n],
        "empty_at_edges": [*edges, *edges, n, n],
    }
    if documents.startswith("random"):
        generator = torch.Generator().manual_seed(int(documents[-1]) + seq_len)
        count = (2, 3, world_size + 1, 3 * world_size)[int(documents[-1])]
        inside = torch.randint(1, n, (min(count, n - 1),), generator=generator).tolist()
    else:
        inside = table[documents]
    return sorted([0, *(x for x in inside if 0 <= x <= n), n])


@dataclass(frozen=True, kw_only=True)
class LightningCase:
    """One call of context_lightning."""

    world_size: int
    layout: str = "zigzag"
    exchange: str = "all_gather"
    documents: str = "one"
    # Of local tokens, an even number.
    tokens: int = 12
    data_decay: bool = False
    dtype: torch.dtype = torch.float64
    batch: int = 2
    heads: int = 3
    key_dim: int = 5
    value_dim: int = 4
    chunk_len: int | None = 16
    scale: float | None = None

    def __str__(self) -> str:
        decay = "data" if self.data_decay else "fixed"
        dtype = str(self.dtype).removeprefix("torch.")
        shape = f"B{self.batch}-T{self.tokens}-H{self.heads}-{self.key_dim}x{self.value_dim}"
        kind = f"{self.layout}-{self.exchange}-{self.documents}-{decay}"
        return f"P{self.world_size}-{kind}-{dtype}-{shape}-C{self.chunk_len}"

    @property
    def seq_len(self) -> int:
        """Tokens in all."""
        return self.tokens * self.world_size

    @property
    def cu_seqlens(self) -> Tensor | None:
        """Borders of the documents."""
        if self.documents == "one":
            return None
        bounds = bounds_of(self.documents, seq_len=self.seq_len, world_size=self.world_size)
        return torch.tensor(bounds, dtype=torch.int32)

    def whole_inputs(self) -> dict[str, Tensor]:
        """q, k, v, log_decay and the gradient of out; the same wherever it is called."""
        generator = torch.Generator().manual_seed(self.seq_len + self.heads)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator).to(self.dtype)

        rows = (self.batch, self.seq_len, self.heads)
        inputs = {
            "q": normal(*rows, self.key_dim),
            "k": normal(*rows, self.key_dim),
            "v": normal(*rows, self.value_dim),
        }
        if self.data_decay:
            decay = -0.3 * normal(*rows).square()
            # Some tokens forget nothing, and some everything.
            decay = torch.where(normal(*rows) > 1.0, 0.0, decay)
            decay = torch.where(normal(*rows) > 2.0, -50.0, decay)
        else:
            decay = -torch.tensor([0.0, 0.02, 0.3, 1.5, 40.0])[: self.heads].to(self.dtype)
        return inputs | {"log_decay": decay, "grad_out": normal(*rows, self.value_dim)}

    def local(self, name: str, x: Tensor, rank: int) -> Tensor:
        """What a rank is given of a whole input."""
        if name == "log_decay" and not self.data_decay:
            return x.clone()
        return shard(x, rank=rank, world_size=self.world_size, layout=self.layout)

    @property
    def settings(self) -> dict[str, object]:
        """All of context_lightning's keyword arguments but decay and group."""
        names = ("layout", "exchange", "cu_seqlens", "chunk_len", "scale")
        return {name: getattr(self, name) for name in names}


@dataclass(frozen=True)
class LightningResult:
    """Output and gradients: of one rank, or whole."""

    out: Tensor
    q: Tensor
    k: Tensor
    v: Tensor
    log_decay: Tensor


def differentiate_on_rank(group: Group, case: LightningCase) -> LightningResult:
    """Forward and backward on one rank of any kind of group."""
    rank = group_rank(group)
    local = {name: case.local(name, x, rank) for name, x in case.whole_inputs().items()}
    grad_out = local.pop("grad_out")
    for x in local.values():
        x.requires_grad_()
    out = context_lightning(**local, group=group, **case.settings)  # type: ignore[arg-type]
    assert out.dtype == case.dtype
    grads = torch.autograd.grad(out, list(local.values()), grad_out)
    assert all(g.dtype == x.dtype for g, x in zip(grads, local.values(), strict=True))
    return LightningResult(out.detach(), *grads)


def joined(case: LightningCase, results: list[LightningResult]) -> LightningResult:
    """Put every rank's tokens where their positions say, and add up what ranks share."""
    index = torch.cat(
        [
            positions(case.seq_len, rank=rank, world_size=case.world_size, layout=case.layout)
            for rank in range(case.world_size)
        ]
    )

    def join(name: str) -> Tensor:
        shards = [getattr(result, name) for result in results]
        if name == "log_decay" and not case.data_decay:
            return torch.stack(shards).sum(0)
        rows = torch.cat(shards, 1)
        return torch.empty_like(rows).index_copy_(1, index, rows)

    return LightningResult(*(join(name) for name in ("out", "q", "k", "v", "log_decay")))


def assert_matches_oracle(case: LightningCase, results: list[LightningResult]) -> None:
    """Compare the output and every gradient with the recurrence in float64."""
    ours, oracle = joined(case, results), _oracle(case)
    for name in vars(oracle):
        actual, expected = getattr(ours, name), getattr(oracle, name)
        if case.dtype.itemsize == 2:
            assert_rounded_once(name, actual, expected)
        elif name == "log_decay" and not expected.any():
            # Documents of one token: a difference of equal sums.
            terms = (oracle.q * case.whole_inputs()["q"]).sum(-1)
            assert_sum_matches(name, actual, expected, terms=terms)
        else:
            assert_matches(name, actual, expected, flash=expected)


def _oracle(case: LightningCase) -> LightningResult:
    bounds = None if case.cu_seqlens is None else tuple(sorted(set(case.cu_seqlens.tolist())))
    # By what it depends on: layouts and exchanges share one.
    whole = LightningCase(
        world_size=1,
        tokens=case.seq_len,
        data_decay=case.data_decay,
        dtype=case.dtype,
        batch=case.batch,
        heads=case.heads,
        key_dim=case.key_dim,
        value_dim=case.value_dim,
        scale=case.scale,
    )
    return _recurrence(whole, bounds)


@lru_cache(maxsize=512)
def _recurrence(case: LightningCase, bounds: tuple[int, ...] | None) -> LightningResult:
    inputs = {name: x.double() for name, x in case.whole_inputs().items()}
    grad_out = inputs.pop("grad_out")
    for x in inputs.values():
        x.requires_grad_()
    out, _ = naive_recurrent(**inputs, cu_seqlens=bounds, scale=case.scale)
    return LightningResult(out.detach(), *torch.autograd.grad(out, list(inputs.values()), grad_out))
