"""Pairs of pieces by their slices: against the oracle, tiles in one call, in place, never naive."""

import itertools
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from ringctx.ops import pair_attention
from ringctx.ops.block_attention import BlockMask, block_forward
from ringctx.ops.naive import naive_attention
from ringctx.ops.pair_attention import (
    PairSlice,
    attend_pair,
    attend_pair_,
    differentiate_pair_,
)
from ringctx.parallel.layout import LAYOUTS, Sharding
from ringctx.parallel.mask import Mask, pair_slices
from tests.kernel_calls import count_kernel_calls
from tests.tolerances import assert_lse_matches, assert_matches

SCALE = 0.3
HEADS = pytest.mark.parametrize("heads", [(3, 3), (4, 2), (5, 1)], ids=["MHA", "GQA", "MQA"])
BATCH = pytest.mark.parametrize("batch", [1, 2], ids=["B1", "B2"])
# Windows with tiles and a rest, of one token, sinks, documents equal and not, and all at once.
MASKS = {
    "causal": Mask(),
    "full": Mask(causal=False),
    "window 5": Mask(window=5),
    "window 1": Mask(window=1),
    "window 8, sinks 3": Mask(window=8, sinks=3),
    "equal documents": Mask(cu_seqlens=(0, 12, 24, 36, 48)),
    "documents, full": Mask(causal=False, cu_seqlens=(0, 1, 20, 33, 48)),
    "documents, window 4, sinks 2": Mask(window=4, sinks=2, cu_seqlens=(0, 1, 20, 33, 48)),
}
EVERY_MASK = pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
SEQ_LEN = 48


def _inputs(
    batch: int, heads: tuple[int, int], dtype: torch.dtype, seq_len: int = SEQ_LEN
) -> list[Tensor]:
    """q, k, v, grad_out."""
    counts = (heads[0], heads[1], heads[1], heads[0])
    return [torch.randn(batch, seq_len, count, 8).to(dtype) for count in counts]


def _oracle(mask: Mask, q: Tensor, k: Tensor, v: Tensor, grad_out: Tensor) -> list[Tensor]:
    inputs = [x.double().requires_grad_() for x in (q, k, v)]
    out, lse = naive_attention(
        *inputs,
        causal=mask.causal,
        window=mask.window,
        sinks=mask.sinks,
        cu_seqlens=mask.cu_seqlens,
        scale=SCALE,
    )
    return [out.detach(), lse.detach(), *torch.autograd.grad(out, inputs, grad_out.double())]


def _own_slices(mask: Mask, seq_len: int = SEQ_LEN) -> tuple[PairSlice, ...]:
    sharding = Sharding(seq_len, 1, "contiguous")
    return pair_slices(mask, sharding, q=sharding.shard(0), k=sharding.shard(0))


def _attend_and_differentiate(
    q: Tensor, k: Tensor, v: Tensor, grad_out: Tensor, *, slices: Sequence[PairSlice]
) -> list[Tensor]:
    out, lse = attend_pair(q, k, v, slices, scale=SCALE)
    grads = _zeros(q, k, v, dtype=lse.dtype)
    out = out.to(q.dtype)
    differentiate_pair_(*grads, grad_out, q, k, v, out=out, lse=lse, slices=slices, scale=SCALE)
    return [out, lse, *(grad.to(q.dtype) for grad in grads)]


def _zeros(q: Tensor, k: Tensor, v: Tensor, *, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    return (
        torch.zeros_like(q, dtype=dtype),
        torch.zeros_like(k, dtype=dtype),
        torch.zeros_like(v, dtype=dtype),
    )


@pytest.mark.proves("masks: attention of pairs by slices, forward and backward", on="CPU")
@EVERY_MASK
@HEADS
@BATCH
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
def test_slices_of_every_mask_match_the_oracle(
    mask: Mask, heads: tuple[int, int], batch: int, dtype: torch.dtype
) -> None:
    inputs = _inputs(batch, heads, dtype)
    actual = _attend_and_differentiate(*inputs, slices=_own_slices(mask))
    names = ("out", "lse", "grad_q", "grad_k", "grad_v")
    for name, ours, expected in zip(names, actual, _oracle(mask, *inputs), strict=True):
        assert ours.dtype == dtype
        assert_matches(name, ours, expected, flash=ours)


@pytest.mark.proves("masks: attention of pairs by slices, forward and backward", on="CPU")
# A query that sees itself alone has no gradient, and rounding nothing to be compared with.
@pytest.mark.parametrize("mask", [mask for mask in MASKS.values() if mask.window != 1], ids=str)
@BATCH
def test_bf16_is_as_good_as_one_flash_call_of_the_same_rows(mask: Mask, batch: int) -> None:
    q, k, v, grad_out = _inputs(batch, (4, 2), torch.bfloat16)
    out, lse, *grads = _attend_and_differentiate(q, k, v, grad_out, slices=_own_slices(mask))
    oracle, oracle_lse, *oracle_grads = _oracle(mask, q, k, v, grad_out)
    assert_lse_matches(lse, oracle_lse, dtype=torch.bfloat16)
    flashes = _masked_flash(q, k, v, grad_out, mask)
    names = ("out", "grad_q", "grad_k", "grad_v")
    for name, ours, expected, flash in zip(
        names, (out, *grads), (oracle, *oracle_grads), flashes, strict=True
    ):
        assert ours.dtype == torch.bfloat16
        assert_matches(name, ours, expected, flash=flash)


def _masked_flash(
    q: Tensor, k: Tensor, v: Tensor, grad_out: Tensor, mask: Mask
) -> tuple[Tensor, ...]:
    """One process's flash kernel on the whole pair, under a dense mask as only tests hold one."""
    rows = torch.arange(q.shape[1])
    visible = torch.zeros(q.shape[1], q.shape[1], dtype=torch.bool)
    for first, end in itertools.pairwise(mask.cu_seqlens or (0, q.shape[1])):
        near = torch.ones_like(visible)
        if mask.window is not None:
            near = (rows[None] > rows[:, None] - mask.window) | (rows[None] < first + mask.sinks)
        visible[first:end, first:end] = near[first:end, first:end]
    visible = visible.tril() if mask.causal else visible
    bias = torch.zeros(visible.shape, dtype=q.dtype).masked_fill(~visible, -torch.inf)
    heads = [x.transpose(1, 2) for x in (q, k, v)]
    flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    out, lse = flash(*heads, 0.0, False, attn_mask=bias, scale=SCALE)
    backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
    grads = backward(
        grad_out.transpose(1, 2), *heads, out, lse, 0.0, False, attn_mask=bias, scale=SCALE
    )
    return tuple(x.transpose(1, 2) for x in (out, *grads))


@pytest.mark.proves("masks: attention of pairs by slices, forward and backward", on="CPU")
@EVERY_MASK
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_pairs_of_shards_add_up_to_the_whole_in_any_order(
    mask: Mask, layout: str, world_size: int
) -> None:
    inputs = _inputs(2, (4, 2), torch.float64)
    sharding = Sharding(SEQ_LEN, world_size, layout)
    index = [_positions(sharding, rank) for rank in range(world_size)]
    results = []
    for rank in range(world_size):
        q, _, _, grad_out = (x[:, index[rank]] for x in inputs)
        out = torch.zeros_like(q)
        lse = out.new_full((2, 4, sharding.local_len), -torch.inf)
        for owner in torch.randperm(world_size).tolist():
            k, v = (x[:, index[owner]] for x in inputs[1:3])
            slices = pair_slices(mask, sharding, q=sharding.shard(rank), k=sharding.shard(owner))
            attend_pair_(out, lse, q, k, v, slices, scale=SCALE)
        results.append((out, lse, q, grad_out))
    grads = [torch.zeros_like(x) for x in inputs[:3]]
    for rank, owner in itertools.product(range(world_size), repeat=2):
        out, lse, q, grad_out = results[rank]
        k, v = (x[:, index[owner]] for x in inputs[1:3])
        parts = _zeros(q, k, v, dtype=q.dtype)
        slices = pair_slices(mask, sharding, q=sharding.shard(rank), k=sharding.shard(owner))
        differentiate_pair_(*parts, grad_out, q, k, v, out=out, lse=lse, slices=slices, scale=SCALE)
        for grad, part, at in zip(grads, parts, (rank, owner, owner), strict=True):
            grad[:, index[at]] += part
    out, lse = torch.empty_like(inputs[0]), inputs[0].new_empty(2, 4, SEQ_LEN)
    for rank, (part_out, part_lse, *_) in enumerate(results):
        out[:, index[rank]], lse[:, :, index[rank]] = part_out, part_lse
    names = ("out", "lse", "grad_q", "grad_k", "grad_v")
    for name, ours, expected in zip(names, (out, lse, *grads), _oracle(mask, *inputs), strict=True):
        assert_matches(name, ours, expected, flash=ours)


def _positions(sharding: Sharding, rank: int) -> Tensor:
    runs = sharding.runs(rank)
    return torch.cat([run.first + run.stride * torch.arange(run.length) for run in runs])


@BATCH
@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("gap", [0, 2])
@pytest.mark.parametrize("kind", ["causal", "anticausal", "full"])
def test_tiles_equal_slices_of_one_tile_each_in_fewer_calls(
    kind: BlockMask, gap: int, count: int, batch: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    q, k, v, grad_out = _inputs(batch, (4, 2), torch.float64)
    tiles = PairSlice(3, 5, 7, 5, kind, count, gap)
    single = [PairSlice(3 + i * (5 + gap), 5, 7 + i * (5 + gap), 5, kind) for i in range(count)]
    assert tiles.pairs == sum(part.pairs for part in single)
    assert (tiles.q.stop, tiles.k.stop) == (single[-1].q.stop, single[-1].k.stop)
    expected = _attend_and_differentiate(q, k, v, grad_out, slices=single)
    calls = count_kernel_calls(monkeypatch)
    actual = _attend_and_differentiate(q, k, v, grad_out, slices=[tiles])
    assert calls == {("cpu_flash", "forward"): 1, ("cpu_flash", "backward"): 1}
    for ours, theirs in zip(actual, expected, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_tiles_of_one_batch_row_are_read_in_place(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v, _ = _inputs(1, (4, 2), torch.float32)
    read: list[int] = []

    def spy(*tensors: Tensor, **settings: Any) -> tuple[Tensor, Tensor]:
        read.extend(x.untyped_storage().data_ptr() for x in tensors)
        return block_forward(*tensors, **settings)

    monkeypatch.setattr(pair_attention, "block_forward", spy)
    attend_pair(q, k, v, [PairSlice(0, 11, 0, 11, "causal", 4, gap=1)], scale=SCALE)
    assert read == [x.untyped_storage().data_ptr() for x in (q, k, v)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
def test_one_slice_that_covers_all_rows_is_the_kernel_s_own_result(dtype: torch.dtype) -> None:
    q, k, v, _ = _inputs(2, (4, 2), dtype)
    for mask in (Mask(), Mask(causal=False)):
        out, lse = attend_pair(q, k, v, _own_slices(mask), scale=SCALE)
        kind: BlockMask = "causal" if mask.causal else "full"
        expected, expected_lse = block_forward(q, k, v, mask=kind, scale=SCALE)
        assert out.dtype == dtype
        assert torch.equal(out, expected) and torch.equal(lse, expected_lse)


def test_rows_that_see_nothing_are_zero_and_minus_infinity_and_stay_so() -> None:
    q, k, v, grad_out = _inputs(2, (4, 2), torch.bfloat16)
    for slices in ([], [PairSlice(5, 4, 0, 7, "full")]):
        out, lse, grad_q, grad_k, grad_v = _attend_and_differentiate(
            q, k, v, grad_out, slices=slices
        )
        blind = torch.ones(SEQ_LEN, dtype=torch.bool)
        unseen = blind.clone()
        for part in slices:
            blind[part.q] = False
            unseen[part.k] = False
        assert lse.dtype == torch.float32
        assert (out[:, blind] == 0).all() and (lse[:, :, blind] == -torch.inf).all()
        assert (grad_q[:, blind] == 0).all()
        assert (grad_k[:, unseen] == 0).all() and (grad_v[:, unseen] == 0).all()
        assert lse[:, :, ~blind].isfinite().all()
    out, _ = attend_pair(q, k, v, [PairSlice(5, 4, 0, 7, "full")], scale=SCALE)
    assert out.dtype == torch.float32


def test_merges_and_adds_into_views_and_touches_no_other_row() -> None:
    q, k, v, grad_out = _inputs(2, (4, 2), torch.float32)
    slices = [PairSlice(2, 3, 1, 3, "anticausal", 3, gap=2)]
    touched = torch.zeros(SEQ_LEN, dtype=torch.bool)
    for start in (2, 7, 12):
        touched[start : start + 3] = True
    whole = torch.zeros(2, 2 * SEQ_LEN, 4, 8)
    out = whole[:, SEQ_LEN:]
    lse = torch.full((2, 4, 2 * SEQ_LEN), -torch.inf)[:, :, :SEQ_LEN]
    attend_pair_(out, lse, q, k, v, slices, scale=SCALE)
    assert (whole[:, :SEQ_LEN] == 0).all()
    assert ((out != 0).any(-1).any(-1) == touched).all()
    assert (lse.isfinite().all(1) == touched).all()
    grads = torch.ones_like(q), torch.ones_like(k), torch.ones_like(v)
    differentiate_pair_(*grads, grad_out, q, k, v, out=out, lse=lse, slices=slices, scale=SCALE)
    keys = touched.roll(-1)
    for grad, rows in zip(grads, (touched, keys, keys), strict=True):
        assert ((grad != 1).any(-1).any(-1) == rows).all()


@EVERY_MASK
@pytest.mark.parametrize(
    "dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str
)
def test_no_mask_runs_on_the_naive_kernel(
    mask: Mask, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = count_kernel_calls(monkeypatch)
    for layout, world_size in itertools.product(LAYOUTS, (1, 2)):
        sharding = Sharding(SEQ_LEN, world_size, layout)
        inputs = _inputs(1, (4, 2), dtype, sharding.local_len)
        for owner in range(world_size):
            slices = pair_slices(mask, sharding, q=sharding.shard(0), k=sharding.shard(owner))
            _attend_and_differentiate(*inputs, slices=slices)
    assert {kernel for kernel, _ in calls} == {"cpu_flash"}


@pytest.mark.proves(
    "masks: attention of pairs by slices, forward and backward", on="FakeTensor (CUDA shapes)"
)
@EVERY_MASK
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_cuda_kernels_take_the_tiles_of_every_mask(
    mask: Mask, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    def check_shapes(out: Tensor, lse: Tensor, block_out: Tensor, block_lse: Tensor) -> None:
        assert (out.shape, lse.shape) == (block_out.shape, block_lse.shape)

    # Indexing by rows needs a real device, as does filling a fake tensor with NaN.
    monkeypatch.setattr(pair_attention, "merge_", check_shapes)
    torch.use_deterministic_algorithms(False)
    with FakeTensorMode():
        shapes = [(2, SEQ_LEN, heads, 64) for heads in (4, 2, 2, 4)]
        inputs = [torch.empty(shape, device="cuda", dtype=dtype) for shape in shapes]
        q, k, v, _ = inputs
        out, lse, *grads = _attend_and_differentiate(*inputs, slices=_own_slices(mask))
        assert (out.shape, out.device.type) == (q.shape, "cuda")
        assert (lse.shape, lse.dtype) == ((2, 4, SEQ_LEN), torch.float32)
        assert [(x.shape, x.dtype) for x in grads] == [(x.shape, dtype) for x in (q, k, v)]


@pytest.mark.gpu
@pytest.mark.proves("masks: attention of pairs by slices, forward and backward", on="GPU")
@EVERY_MASK
@BATCH
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
def test_cuda_slices_match_the_oracle(mask: Mask, batch: int, dtype: torch.dtype) -> None:
    inputs = _inputs(batch, (4, 2), dtype)
    actual = _attend_and_differentiate(*(x.cuda() for x in inputs), slices=_own_slices(mask))
    tolerance = 2e-2 if dtype == torch.bfloat16 else 1e-4
    for ours, expected in zip(actual, _oracle(mask, *inputs), strict=True):
        assert (ours.cpu() - expected).abs().max() <= tolerance * expected.abs().max()


def test_more_tiles_than_a_launch_takes_are_several_launches(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    q, k, v = (torch.randn(2, 21, 2, 4, dtype=torch.float64) for _ in range(3))
    slices = [PairSlice(0, 3, 0, 3, "causal", count=7)]
    whole = attend_pair(q, k, v, slices, scale=0.5)
    calls = count_kernel_calls(monkeypatch)
    monkeypatch.setattr(pair_attention, "_MOST_TILES", 6)
    parts = attend_pair(q, k, v, slices, scale=0.5)
    assert calls["cpu_flash", "forward"] == 3
    for part, all_at_once in zip(parts, whole, strict=True):
        torch.testing.assert_close(part, all_at_once)
