"""Ring attention on virtual ranks: everything the API promises besides the right numbers."""

import threading
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from ringctx.errors import LayoutError
from ringctx.ops.block_attention import block_backward, block_forward
from ringctx.parallel import ring_attention
from ringctx.parallel.comm import (
    Group,
    LocalGroup,
    Pending,
    SoloGroup,
    Transfer,
    record_traffic,
)
from ringctx.parallel.layout import LAYOUTS
from tests.kernel_calls import count_kernel_calls
from tests.parallel.ring_cases import (
    MASKS,
    SCHEDULES,
    Case,
    assert_matches_oracle,
    attend_on_rank,
)
from tests.virtual_ranks import run_virtual


def test_tiles_larger_than_any_kernel_s_match_the_oracle() -> None:
    case = Case(world_size=2, tokens=1100, heads=2, kv_heads=1)
    results = run_virtual(case.world_size, lambda group: attend_on_rank(group, case))
    assert_matches_oracle(case, results)


def test_one_rank_is_bit_equal_to_flash() -> None:
    *qkv, grad_out = Case(world_size=1, dtype=torch.bfloat16, tokens=20).whole_inputs()
    inputs, scale = [x.requires_grad_() for x in qkv], qkv[0].shape[3] ** -0.5
    out, lse = ring_attention(*inputs, group=SoloGroup(), return_lse=True)
    grads = torch.autograd.grad(out, inputs, grad_out)
    with torch.no_grad():
        flash_out, flash_lse = block_forward(*qkv, mask="causal", scale=scale)
        flash_grads = block_backward(
            grad_out, *qkv, out=flash_out, lse=flash_lse, mask="causal", scale=scale
        )
    assert torch.equal(out, flash_out)
    assert torch.equal(lse, flash_lse)
    assert all(torch.equal(x, y) for x, y in zip(grads, flash_grads, strict=True))


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_two_runs_are_bit_equal(schedule: str) -> None:
    case = Case(world_size=4, tokens=16, schedule=schedule, topology="cables", window=20)
    first, second = (run_virtual(4, lambda group: attend_on_rank(group, case)) for _ in range(2))
    for a, b in zip(first, second, strict=True):
        pairs = zip(vars(a).values(), vars(b).values(), strict=True)
        assert all(torch.equal(x, y) for x, y in pairs)


@pytest.mark.proves("ring attention: no mask runs on the naive reference", on="CPU")
@pytest.mark.parametrize("mask", MASKS, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_no_mask_runs_on_the_naive_reference(
    layout: str, mask: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = count_kernel_calls(monkeypatch)
    for schedule in SCHEDULES:
        case = Case(world_size=3, layout=layout, schedule=schedule, tokens=8, **mask)
        run_virtual(3, lambda group, case=case: attend_on_rank(group, case))  # type: ignore[misc]
    assert {kernel for kernel, _ in calls} == {"cpu_flash"}, calls


def test_scale_replaces_the_default() -> None:
    def out(group: Group, factor: float, scale: float | None) -> Tensor:
        q, k, v, _ = Case(world_size=1, dtype=torch.float64).whole_inputs()
        return ring_attention(q * factor, k, v, group=group, scale=scale)

    default = run_virtual(2, lambda group: out(group, 2.0, None))
    explicit = run_virtual(2, lambda group: out(group, 1.0, 2.0 * 8**-0.5))
    for a, b in zip(default, explicit, strict=True):
        torch.testing.assert_close(a, b)


def test_takes_any_strides_and_a_gradient_without_any() -> None:
    def body(group: Group) -> list[Tensor]:
        # Views of one projection, as models make them; sum() sends back an expanded scalar.
        fused = torch.randn(2, 6, 8, 8, generator=torch.Generator().manual_seed(group.rank()))
        results = []
        for copies in (False, True):
            leaf = fused.clone().requires_grad_()
            q, k, v = leaf[:, :, :4], leaf[:, :, 4:6], leaf[:, :, 6:]
            q = q.transpose(1, 3).contiguous().transpose(1, 3)
            inputs = [x.contiguous() for x in (q, k, v)] if copies else [q, k, v]
            ring_attention(*inputs, group=group).sum().backward()
            assert leaf.grad is not None
            results.append(leaf.grad)
        return results

    for views, copies in run_virtual(3, body):
        assert torch.equal(views, copies)


@pytest.mark.parametrize("needed", ["q", "k", "v", "kv"])
def test_gradients_of_some_inputs_equal_those_of_all(needed: str) -> None:
    case = Case(world_size=2)

    def body(group: Group, needed: str) -> dict[str, Tensor]:
        *qkv, grad_out = (x[:, :6].clone() for x in case.whole_inputs())
        inputs = dict(zip("qkv", qkv, strict=True))
        for name in needed:
            inputs[name].requires_grad_()
        out = ring_attention(*inputs.values(), group=group)
        out.backward(grad_out)
        assert all((x.grad is not None) == (name in needed) for name, x in inputs.items())
        return {name: x.grad for name, x in inputs.items() if x.grad is not None}

    partial = run_virtual(2, lambda group: body(group, needed))
    whole = run_virtual(2, lambda group: body(group, "qkv"))
    for some, everything in zip(partial, whole, strict=True):
        assert all(torch.equal(some[name], everything[name]) for name in needed)


class _LargestTensor(TorchDispatchMode):
    """Sees every operation of its thread."""

    numel: int = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for x in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(x, Tensor):
                self.numel = max(self.numel, x.numel())
        return result


@pytest.mark.parametrize("layout", LAYOUTS)
def test_never_holds_a_matrix_of_scores_or_mask(layout: str) -> None:
    case = Case(world_size=2, layout=layout, tokens=1024, heads=1, kv_heads=1)

    def body(group: Group) -> int:
        *inputs, grad_out = (x[:, :1024].clone().requires_grad_() for x in case.whole_inputs())
        largest = _LargestTensor()  # type: ignore[no-untyped-call]
        with largest:
            out = ring_attention(*inputs, group=group, layout=layout)
            torch.autograd.grad(out, inputs, grad_out)
        return int(largest.numel)

    assert max(run_virtual(2, body)) <= case.local_len * case.head_dim


@pytest.mark.proves("ring attention: bytes moved equal the formulas", on="CPU")
@pytest.mark.parametrize("world_size", [1, 2, 3, 8])
@pytest.mark.parametrize(
    ("dtype", "element", "accumulator"),
    [(torch.bfloat16, 2, 4), (torch.float32, 4, 4), (torch.float64, 8, 8)],
    ids=["bf16", "fp32", "fp64"],
)
def test_bytes_of_the_one_way_ring_equal_the_formula(
    world_size: int, dtype: torch.dtype, element: int, accumulator: int
) -> None:
    case = Case(world_size=world_size, dtype=dtype, batch=2, heads=4, kv_heads=2)
    kv_elements = 2 * case.batch * case.local_len * case.kv_heads * case.head_dim
    hops = world_size - 1

    def body(group: Group) -> None:
        inputs = [x[:, : case.local_len].clone().requires_grad_() for x in case.whole_inputs()[:3]]
        with record_traffic() as ledger:
            out = ring_attention(*inputs, group=group, causal=False, schedule="one_way")
        forward_bytes = hops * kv_elements * element
        assert ledger.moved_bytes == forward_bytes
        # Outside the block: what ran forward in it still counts.
        out.sum().backward()
        total = forward_bytes + hops * kv_elements * (element + accumulator)
        assert ledger.moved_bytes == total
        if hops:
            rank = group.rank()
            assert ledger.sent == {(rank + 1) % world_size: total}
            assert ledger.received == {(rank - 1) % world_size: total}

    run_virtual(world_size, body)


def test_backward_in_another_thread_counts_into_its_forward_s_ledger() -> None:
    def body(group: Group) -> int:
        inputs = [x[:, :6].clone().requires_grad_() for x in Case(world_size=2).whole_inputs()[:3]]
        with record_traffic() as ledger:
            out = ring_attention(*inputs, group=group, causal=False, schedule="one_way")
            forward_bytes = ledger.moved_bytes
            backward = threading.Thread(target=out.sum().backward)
            backward.start()
            backward.join()
        assert ledger.moved_bytes == 3 * forward_bytes
        return forward_bytes

    assert all(run_virtual(2, body))


class _NobodyThere(LocalGroup):
    """The first of two ranks; it must not come to a transfer."""

    def rank(self) -> int:
        return 0

    def size(self) -> int:
        return 2

    def start(self, sends: Sequence[Transfer], recvs: Sequence[Transfer]) -> Sequence[Pending]:
        raise AssertionError("a transfer started")


def _qkv(**changes: Any) -> dict[str, Any]:
    return {name: torch.zeros(1, 4, 4, 8) for name in "qkv"} | changes


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (_qkv(group=None), "group=None names no ranks"),
        (
            _qkv(q=torch.zeros(1, 4, 3, 8), k=torch.zeros(1, 4, 2, 8), v=torch.zeros(1, 4, 2, 8)),
            "3 query heads are not divisible by 2 key/value heads",
        ),
        (_qkv(v=torch.zeros(1, 4, 4, 16)), "k and v must have one shape"),
        (_qkv(q=torch.zeros(2, 4, 4, 8)), "must share batch and head dim"),
        (_qkv(q=torch.zeros(4, 4, 8)), r"must be \[B, T, H, D\]"),
        (_qkv(q=torch.zeros(1, 2, 4, 8)), "q holds 2 local tokens and k, v 4"),
        (_qkv(q=torch.zeros(1, 0, 4, 8)), "not empty"),
        (_qkv(k=torch.zeros(1, 4, 4, 8).bfloat16()), "share one floating dtype"),
        (_qkv(**{name: torch.zeros(1, 4, 4, 8).int() for name in "qkv"}), "floating dtype"),
        (_qkv(q=torch.zeros(1, 4, 4, 8, device="meta")), "on devices meta, cpu, cpu"),
        (_qkv(layout="spiral"), "layout='spiral' is not known; choose one of contiguous, zigzag"),
        (_qkv(schedule="both"), "schedule='both' is not known; choose one of auto, one_way"),
        (_qkv(topology="cables"), r"topology='cables' must be a ringctx.config.TopologyConfig"),
        (_qkv(causal=None), "causal=None must be True or False"),
        (_qkv(scale=float("nan")), "scale=nan must be a finite number"),
        (_qkv(scale="x"), "scale='x' must be a finite number"),
        (_qkv(window=0), "window=0"),
        (_qkv(sinks=2), "sinks=2"),
        (_qkv(window=2, causal=False), "window=2"),
        (_qkv(cu_seqlens=torch.tensor([0, 5, 5, 8]).int()), "cu_seqlens"),
        (_qkv(cu_seqlens=torch.tensor([0, 5]).int()), "cu_seqlens"),
        (
            _qkv(**{name: torch.zeros(1, 3, 4, 8) for name in "qkv"}),
            r"(?s)seq_len=6 is not divisible by 2 \* world_size = 4 .*nearest valid .* are 4 and 8",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_rejects_what_cannot_work_before_any_transfer(
    call: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # With it the ranks would tell one another.
    monkeypatch.delenv("RINGCTX_CHECK")
    with pytest.raises(LayoutError, match=message):
        ring_attention(**({"group": _NobodyThere()} | call))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"window": 5}, r"(?s)not make the same call:\nwindow: ranks 0, 2 have 4; rank 1 has 5"),
        ({"schedule": "all_gather"}, "schedule: ranks 0, 2 have two_way; rank 1 has all_gather"),
        ({"heads": 8}, r"q: ranks 0, 2 have float32 \[1, 4, 4, 8\]; rank 1 has float32 \[1, 4, 8"),
        ({"tokens": 6}, r"q: ranks 0, 2 have float32 \[1, 4, 4, 8\]; rank 1 has float32 \[1, 6"),
        ({"window": 0}, r"(?s)rank 1: window=0.*window: ranks 0, 2 have 4; rank 1 has 0"),
    ],
    ids=str,
)
def test_ranks_that_call_with_different_arguments_all_hear_which(
    changed: dict[str, Any], message: str
) -> None:
    def body(group: Group) -> str:
        case = Case(world_size=3, window=4, schedule="two_way", tokens=4)
        if group.rank() == 1:
            case = replace(case, **changed)
        with pytest.raises(LayoutError, match=message) as raised:
            attend_on_rank(group, case)
        return str(raised.value)

    assert len(set(run_virtual(3, body))) == 1


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_backward_inside_autocast_gives_the_same_gradients(schedule: str) -> None:
    case = Case(world_size=3, schedule=schedule, tokens=8)

    def body(group: Group) -> tuple[list[Tensor], list[Tensor]]:
        start = group.rank() * case.local_len
        rows = slice(start, start + case.local_len)
        *qkv, grad_out = (x[:, rows].clone() for x in case.whole_inputs())
        inputs = [x.requires_grad_() for x in qkv]
        out = ring_attention(*inputs, group=group, layout="contiguous", schedule=schedule)
        outside = torch.autograd.grad(out, inputs, grad_out, retain_graph=True)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            # It is on in this thread.
            assert (grad_out[0, 0] @ grad_out[0, 0].T).dtype == torch.bfloat16
            inside = torch.autograd.grad(out, inputs, grad_out)
        return list(outside), list(inside)

    for outside, inside in run_virtual(3, body):
        for a, b in zip(outside, inside, strict=True):
            assert torch.equal(a, b)


def test_gradient_of_lse_is_refused() -> None:
    q, k, v = (x.requires_grad_() for x in Case(world_size=1).whole_inputs()[:3])
    _, lse = ring_attention(q, k, v, group=SoloGroup(), return_lse=True)
    with pytest.raises(RuntimeError, match="does not require grad"):
        lse.sum().backward()
