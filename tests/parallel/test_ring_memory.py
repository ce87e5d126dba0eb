"""Memory of ring attention: linear in the shard, and little above what the pass must hold."""

import threading
import weakref
from dataclasses import replace
from typing import Any, NamedTuple

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from ringctx.parallel import ring_attention, shard
from ringctx.parallel.comm import Group
from tests.parallel.ring_cases import Case
from tests.virtual_ranks import run_virtual


class _Buffers(NamedTuple):
    """What a schedule may hold at once, in shards of K/V: guests of each pass, and sums."""

    forward: float
    backward: float
    sums: float


# One attended and one on its way. Both ways on four cables: those of both neighbours, and half of
# the farthest from each side. Queries are half as much, and so are their results, one of which may
# not have been read yet. All three others at once; in backward half of each at a time.
BUFFERS = {
    "one_way": _Buffers(2, 2, 2),
    "two_way": _Buffers(3, 2, 2),
    "token_ring": _Buffers(2.5, 2, 2),
    "all_gather": _Buffers(3, 2, 3),
}


class _LiveBytes(TorchDispatchMode):
    """Bytes of the tensors that operations of this thread made and that are still alive."""

    def __init__(self, given: list[torch.Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.live = 0
        self.peak = 0
        # Views of what was there before are nothing new.
        self._known = {x.untyped_storage().data_ptr() for x in given}
        self._lock = threading.Lock()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for x in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(x, torch.Tensor):
                self._watch(x.untyped_storage())
        return result

    def _watch(self, storage: torch.UntypedStorage) -> None:
        address, size = storage.data_ptr(), storage.nbytes()
        with self._lock:
            if not size or address in self._known:
                return
            self._known.add(address)
            self.live += size
            self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._forget, address, size)

    def _forget(self, address: int, size: int) -> None:
        with self._lock:
            self._known.discard(address)
            self.live -= size


def _peaks(case: Case) -> list[tuple[int, int]]:
    """Most bytes that each rank made in forward and in backward, its inputs not counted."""

    def body(group: Group) -> tuple[int, int]:
        where = {"rank": group.rank(), "world_size": case.world_size, "layout": case.layout}
        *qkv, grad_out = (shard(x, **where) for x in case.whole_inputs())  # type: ignore[arg-type]
        inputs = [x.requires_grad_() for x in qkv]
        with _LiveBytes(inputs) as forward:
            out, lse = ring_attention(*inputs, group=group, return_lse=True, **case.settings)  # type: ignore[call-overload]
        with _LiveBytes([*inputs, out, lse, grad_out]) as backward:
            torch.autograd.grad(out, inputs, grad_out)
        return forward.peak, backward.peak

    return run_virtual(case.world_size, body)


def _full(schedule: str, **changes: Any) -> Case:
    plain = Case(
        world_size=4,
        schedule=schedule,
        topology="cables" if schedule == "two_way" else "switch",
        causal=False,
        tokens=512,
        heads=4,
        kv_heads=4,
        head_dim=32,
    )
    return replace(plain, **changes)


@pytest.mark.proves("ring attention: memory linear in the shard", on="CPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "mask",
    [{}, {"batch": 2}, {"causal": True}, {"causal": True, "window": 64}],
    ids=["full", "two rows", "causal", "window"],
)
@pytest.mark.parametrize("schedule", BUFFERS)
def test_peak_is_little_above_what_the_pass_must_hold(
    schedule: str, mask: dict[str, Any], dtype: torch.dtype
) -> None:
    case = _full(schedule, dtype=dtype, **mask)
    rows = case.batch * case.local_len * case.heads * case.head_dim
    shard_bytes, wide_bytes = rows * dtype.itemsize, rows * 4
    buffers = BUFFERS[schedule]
    if case.window:
        # Before each of the two blocks of a shard this many rows, and as many on the way.
        buffers = _Buffers(*[4 * (case.window - 1) / case.local_len] * 3)
    # The accumulator of out, what arrives, and what a kernel returns for one piece in both dtypes.
    held = wide_bytes + 2 * buffers.forward * shard_bytes + shard_bytes + wide_bytes
    # Three gradients, what arrives, sums on their way out and in, a kernel's three.
    held_backward = 3 * wide_bytes + 2 * buffers.backward * shard_bytes
    held_backward += 2 * 2 * buffers.sums * wide_bytes + 3 * shard_bytes
    # It sends halves of K and V, which are copied where the batch has several rows.
    if case.batch > 1 and schedule == "all_gather":
        held, held_backward = held + 2 * shard_bytes, held_backward + 2 * shard_bytes
    # Windows are cut into tiles that kernels take as a batch: copies of their five inputs in
    # backward and room to add results, as measured. Guests of a whole shard would still not fit.
    if case.window:
        held, held_backward = held + 2 * shard_bytes, held_backward + 7 * shard_bytes
    for forward, backward in _peaks(case):
        assert forward <= 1.05 * held, (forward / shard_bytes, held / shard_bytes)
        assert backward <= 1.05 * held_backward, (
            backward / shard_bytes,
            held_backward / shard_bytes,
        )


@pytest.mark.parametrize("schedule", BUFFERS)
def test_peak_halves_with_the_shard(schedule: str) -> None:
    one, two = (
        max(_peaks(Case(world_size=4, schedule=schedule, tokens=tokens, head_dim=32)))
        for tokens in (512, 256)
    )
    for whole, half in zip(one, two, strict=True):
        assert half <= 0.55 * whole
