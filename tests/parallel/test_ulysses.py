"""Ulysses attention: exact in both passes, with no byte too many, and overlapped where asked to."""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ringctx.errors import LayoutError
from ringctx.parallel.comm import (
    Group,
    LocalGroup,
    Pending,
    SoloGroup,
    Transfer,
    group_rank,
    record_traffic,
)
from ringctx.parallel.head_exchange import key_heads, query_heads
from ringctx.parallel.layout import LAYOUTS
from ringctx.parallel.ulysses import ulysses_attention
from tests.parallel.context_cases import (
    ContextCase,
    RankResult,
    assert_matches_oracle,
    differentiate_on_rank,
)
from tests.ranks import run_ranks
from tests.virtual_ranks import run_virtual

MASKS: tuple[dict[str, Any], ...] = (
    {},
    {"causal": False},
    {"window": 5},
    {"window": 3, "sinks": 2, "documents": (7, 1, 9)},
    {"causal": False, "documents": (1, 10)},
)
# GQA, MQA, MHA; with 12 over 4 heads on 3 ranks, and 12 over 3 on 4, a rank has key/value heads
# that serve unequal numbers of its query heads.
HEADS = {
    1: ((3, 3),),
    2: ((4, 2), (6, 1)),
    3: ((12, 4), (3, 3)),
    4: ((8, 2), (12, 3)),
    8: ((8, 2),),
}
EXACT = [
    ContextCase(
        world_size=world_size,
        layout=layout,
        dtype=dtype,
        batch=2,
        tokens=5,
        heads=heads,
        kv_heads=kv_heads,
        **mask,
    )
    for world_size, pairs in HEADS.items()
    for (heads, kv_heads), layout, dtype, mask in itertools.product(
        pairs, LAYOUTS, (torch.float32, torch.float64), MASKS
    )
]
ROUNDED = [
    ContextCase(
        world_size=world_size,
        layout=layout,
        dtype=torch.bfloat16,
        batch=2,
        tokens=33,
        heads=8,
        kv_heads=kv_heads,
        head_dim=16,
        **mask,
    )
    for world_size, layout, kv_heads, mask in itertools.product(
        (1, 2, 4, 8), LAYOUTS, (1, 2, 8), MASKS
    )
]


def _attend(group: Group, case: ContextCase) -> RankResult:
    return differentiate_on_rank(
        case,
        group_rank(group),
        lambda q, k, v: ulysses_attention(q, k, v, group=group, layout=case.layout, **case.mask),
    )


@pytest.mark.proves("Ulysses attention, forward and backward", on="CPU")
@pytest.mark.parametrize("case", EXACT + ROUNDED, ids=str)
def test_equals_the_float64_oracle(case: ContextCase) -> None:
    results = run_virtual(case.world_size, lambda group: _attend(group, case))
    assert_matches_oracle(case, results)


OVER_GLOO = [
    ContextCase(world_size=2, layout="striped", window=4, sinks=1),
    ContextCase(world_size=3, heads=12, kv_heads=4, batch=2),
    ContextCase(world_size=4, layout="contiguous", documents=(5, 9), causal=False),
    ContextCase(world_size=4, dtype=torch.bfloat16, tokens=33, kv_heads=1, head_dim=16),
    # A megabyte a message: more than a socket holds.
    ContextCase(world_size=2, tokens=256, heads=4, kv_heads=4, head_dim=512),
    ContextCase(world_size=8, tokens=4),
]


def _attend_over_gloo(case: ContextCase) -> RankResult:
    assert dist.group.WORLD is not None
    return _attend(dist.group.WORLD, case)


@pytest.mark.proves("Ulysses attention, forward and backward", on="CPU/gloo")
@pytest.mark.parametrize("case", OVER_GLOO, ids=str)
def test_equals_the_float64_oracle_over_gloo(case: ContextCase) -> None:
    assert_matches_oracle(case, run_ranks(case.world_size, _attend_over_gloo, case))


def test_scale_replaces_the_default() -> None:
    case = ContextCase(world_size=2, dtype=torch.float64)

    def out(group: Group, factor: float, scale: float | None) -> Tensor:
        q, k, v, _ = case.local_inputs(group_rank(group))
        return ulysses_attention(q * factor, k, v, group=group, scale=scale)

    default = run_virtual(2, lambda group: out(group, 2.0, None))
    explicit = run_virtual(2, lambda group: out(group, 1.0, 2.0 * 8**-0.5))
    for a, b in zip(default, explicit, strict=True):
        torch.testing.assert_close(a, b)


def test_two_runs_are_bit_equal() -> None:
    case = ContextCase(world_size=4, kv_heads=1)
    first, second = (run_virtual(4, lambda group: _attend(group, case)) for _ in range(2))
    for a, b in zip(first, second, strict=True):
        pairs = zip(vars(a).values(), vars(b).values(), strict=True)
        assert all(torch.equal(x, y) for x, y in pairs)


@pytest.mark.proves("Ulysses attention: bytes moved equal the formulas", on="CPU")
@pytest.mark.parametrize(
    ("world_size", "heads", "kv_heads"),
    [(1, 4, 2), (2, 4, 4), (3, 6, 6), (3, 12, 4), (4, 8, 2), (4, 8, 1), (8, 16, 8)],
)
@pytest.mark.parametrize(("dtype", "element"), [(torch.bfloat16, 2), (torch.float64, 8)])
def test_bytes_equal_the_formula(
    world_size: int, heads: int, kv_heads: int, dtype: torch.dtype, element: int
) -> None:
    case = ContextCase(
        world_size=world_size, dtype=dtype, batch=2, heads=heads, kv_heads=kv_heads, tokens=4
    )
    per_head = case.batch * case.local_len * case.head_dim * element
    # The key/value heads that a rank's query heads look at, counted one by one.
    needed = [
        {head * kv_heads // heads for head in range(heads) if head * world_size // heads == rank}
        for rank in range(world_size)
    ]

    def body(group: LocalGroup) -> None:
        rank = group.rank()
        *inputs, grad_out = case.local_inputs(rank)
        for x in inputs:
            x.requires_grad_()
        others = [len(needed[peer]) for peer in range(world_size) if peer != rank]
        queries = (world_size - 1) * heads // world_size
        with record_traffic() as ledger:
            out = ulysses_attention(*inputs, group=group)
        forward = per_head * (2 * queries + 2 * sum(others))
        assert ledger.moved_bytes == forward
        if kv_heads % world_size == 0:
            shares = sum(x.nbytes for x in (*inputs, out)) * (world_size - 1)
            assert forward * world_size == shares
        # Outside the block: what ran forward in it still counts.
        out.backward(grad_out)
        back = per_head * (2 * queries + 2 * (world_size - 1) * len(needed[rank]))
        assert ledger.moved_bytes == forward + back
        assert set(ledger.sent) == set(range(world_size)) - {rank}

    run_virtual(world_size, body)


@given(
    world_size=st.integers(1, 12),
    per_rank=st.integers(1, 12),
    data=st.data(),
)
def test_every_query_head_finds_its_key_head_and_no_rank_has_others(
    world_size: int, per_rank: int, data: st.DataObject
) -> None:
    heads = world_size * per_rank
    kv_heads = data.draw(st.sampled_from([n for n in range(1, heads + 1) if heads % n == 0]))
    queries = query_heads(heads, world_size=world_size)
    keys = key_heads(heads, kv_heads, world_size=world_size)
    assert [head for share in queries for head in range(share.start, share.stop)] == [*range(heads)]
    for share, held in zip(queries, keys, strict=True):
        wanted = [head * kv_heads // heads for head in range(share.start, share.stop)]
        local = [
            head
            for head, repeats in zip(range(held.start, held.stop), held.repeats, strict=True)
            for _ in range(repeats)
        ]
        assert set(local) == set(wanted)
        # As attention pairs them: local query head i looks at local key head i // group.
        group, rest = divmod(len(wanted), len(local))
        assert rest == 0
        assert [local[i // group] for i in range(len(wanted))] == wanted
        if kv_heads % world_size == 0 or world_size % kv_heads == 0:
            assert set(held.repeats) == {1}


@dataclass
class _Noted(Pending):
    """A transfer that notes when it is waited for."""

    pending: Pending
    note: Callable[[], None]

    def wait(self) -> None:
        self.note()
        self.pending.wait()


@dataclass
class _NotingGroup(LocalGroup):
    """Notes the tags of what starts, and of what is waited for."""

    group: LocalGroup
    notes: list[str]

    def rank(self) -> int:
        return self.group.rank()

    def size(self) -> int:
        return self.group.size()

    def start(self, sends: Sequence[Transfer], recvs: Sequence[Transfer]) -> Sequence[Pending]:
        (tag,) = {transfer.tag for transfer in (*sends, *recvs)}
        name = ["q", "k", "v", "out"][tag]
        self.notes.append(f"start {name}")
        first, *rest = self.group.start(sends, recvs)
        return [_Noted(first, lambda: self.notes.append(f"wait {name}")), *rest]


class _Project(torch.autograd.Function):
    """The identity, noted in both passes."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, name: str, notes: list[str]) -> Tensor:
        ctx.name, ctx.notes = name, notes
        notes.append(f"project {name}")
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        ctx.notes.append(f"differentiate {ctx.name}")
        return grad, None, None


def test_transfers_run_while_the_next_projection_does_in_both_passes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("RINGCTX_CHECK", "0")
    case = ContextCase(world_size=2)

    def body(group: LocalGroup) -> tuple[list[str], RankResult]:
        notes: list[str] = []

        def attend(*qkv: Tensor) -> Tensor:
            def lazily(name: str, x: Tensor) -> Callable[[], Tensor]:
                return lambda: _Project.apply(x, name, notes)  # type: ignore[no-untyped-call]

            q, k, v = (lazily(name, x) for name, x in zip("qkv", qkv, strict=True))
            return ulysses_attention(q, k, v, group=_NotingGroup(group, notes))

        result = differentiate_on_rank(case, group.rank(), attend)
        return notes, result

    noted, results = zip(*run_virtual(2, body), strict=True)
    assert_matches_oracle(case, results)
    forward = ["project q", "start q", "project k", "start k", "project v", "start v"]
    forward += ["wait q", "wait k", "wait v", "start out", "wait out"]
    backward = ["start out", "wait out", "start v", "start k", "start q"]
    for name in "vkq":
        backward += [f"wait {name}", f"differentiate {name}"]
    for notes in noted:
        assert notes == forward + backward


def test_functions_give_the_same_bits_as_tensors() -> None:
    case = ContextCase(world_size=4, documents=(5,), window=6)

    def lazily(group: Group) -> RankResult:
        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            inputs = (lambda: q, lambda: k, lambda: v)
            return ulysses_attention(*inputs, group=group, **case.mask)

        return differentiate_on_rank(case, group_rank(group), attend)

    eager = run_virtual(4, lambda group: _attend(group, case))
    for a, b in zip(eager, run_virtual(4, lazily), strict=True):
        assert all(
            torch.equal(x, y) for x, y in zip(vars(a).values(), vars(b).values(), strict=True)
        )


def test_ranks_may_need_different_gradients() -> None:
    case = ContextCase(world_size=3, heads=6, kv_heads=2)

    def body(group: Group, needed: Sequence[str]) -> dict[str, Tensor]:
        rank = group_rank(group)
        *qkv, grad_out = case.local_inputs(rank)
        inputs = dict(zip("qkv", qkv, strict=True))
        for name in needed[rank]:
            inputs[name].requires_grad_()
        ulysses_attention(*inputs.values(), group=group).backward(grad_out)
        assert all((x.grad is not None) == (name in needed[rank]) for name, x in inputs.items())
        return {name: x.grad for name, x in inputs.items() if x.grad is not None}

    some = run_virtual(3, lambda group: body(group, ("q", "vk", "k")))
    everything = run_virtual(3, lambda group: body(group, ("qkv",) * 3))
    for partial, whole in zip(some, everything, strict=True):
        assert partial
        assert all(torch.equal(partial[name], whole[name]) for name in partial)


def test_a_graph_can_be_differentiated_twice_and_asked_for_one_input() -> None:
    case = ContextCase(world_size=2)

    def body(group: Group) -> None:
        *inputs, grad_out = case.local_inputs(group_rank(group))
        for x in inputs:
            x.requires_grad_()
        out = ulysses_attention(*inputs, group=group)
        whole = torch.autograd.grad(out, inputs, grad_out, retain_graph=True)
        (grad_k,) = torch.autograd.grad(out, inputs[1], grad_out, retain_graph=True)
        again = torch.autograd.grad(out, inputs, grad_out)
        assert torch.equal(grad_k, whole[1])
        assert all(torch.equal(a, b) for a, b in zip(whole, again, strict=True))

    run_virtual(2, body)


def test_recomputation_gives_the_same_gradients() -> None:
    case = ContextCase(world_size=2)

    def body(group: Group) -> RankResult:
        def attend(*inputs: Tensor) -> Tensor:
            def block(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
                return ulysses_attention(q, k, v, group=group)

            out = checkpoint(block, *inputs, use_reentrant=False)
            assert isinstance(out, Tensor)
            return out

        return differentiate_on_rank(case, group_rank(group), attend)

    assert_matches_oracle(case, run_virtual(2, body))


def test_takes_any_strides_and_runs_without_gradients() -> None:
    case = ContextCase(world_size=3, heads=6, kv_heads=6)

    def body(group: Group) -> None:
        q, k, v, _ = case.local_inputs(group_rank(group))
        turned = [x.transpose(1, 3).contiguous().transpose(1, 3) for x in (q, k, v)]
        assert not any(x.is_contiguous() for x in turned)
        with torch.no_grad():
            dense = ulysses_attention(q, k, v, group=group)
            strided = ulysses_attention(*turned, group=group)
        assert not dense.requires_grad
        assert torch.equal(dense, strided)

    run_virtual(3, body)


class _NobodyThere(LocalGroup):
    """The first of three ranks; it must not come to a transfer."""

    def rank(self) -> int:
        return 0

    def size(self) -> int:
        return 3

    def start(self, sends: Sequence[Transfer], recvs: Sequence[Transfer]) -> Sequence[Pending]:
        raise AssertionError("a transfer started")


def _qkv(**changes: Any) -> dict[str, Any]:
    return {name: torch.zeros(1, 4, 6, 8) for name in "qkv"} | changes


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (_qkv(group=None), "group=None names no ranks"),
        (
            {name: torch.zeros(1, 4, 8, 8) for name in "qkv"},
            "8 query heads cannot be shared equally by 3 ranks; .* degree of 1, 2, 4, 8 works",
        ),
        (_qkv(q=torch.zeros(1, 2, 6, 8)), "q holds 2 local tokens and k, v 4"),
        (_qkv(v=torch.zeros(1, 4, 6, 16)), "k and v must have one shape"),
        (_qkv(layout="spiral"), "layout='spiral' is not known"),
        (
            {name: torch.zeros(1, 3, 6, 8) for name in "qkv"},
            r"seq_len=9 is not divisible by 2 \* world_size = 6",
        ),
        (_qkv(window=0), "window=0"),
        (_qkv(sinks=2), "sinks=2"),
        (_qkv(cu_seqlens=torch.tensor([0, 11], dtype=torch.int32)), "cu_seqlens"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_rejects_what_cannot_work_before_any_transfer(
    call: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RINGCTX_CHECK", "0")
    with pytest.raises(LayoutError, match=message):
        ulysses_attention(**({"group": _NobodyThere()} | call))


def test_one_rank_takes_any_heads_and_length() -> None:
    case = ContextCase(world_size=1, tokens=7, heads=5, kv_heads=1, layout="striped")
    assert_matches_oracle(case, [_attend(SoloGroup(), case)])
    zigzag = replace(case, layout="zigzag")
    assert_matches_oracle(zigzag, [_attend(SoloGroup(), zigzag)])
