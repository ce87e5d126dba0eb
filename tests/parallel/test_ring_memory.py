"""Memory of ring attention: linear in the shard, and little above what the pass must hold."""

import threading
import weakref
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from ringctx.parallel import ring_attention, shard
from ringctx.parallel.comm import Group
from tests.parallel.ring_cases import Case
from tests.virtual_ranks import run_virtual

# What a schedule may hold at once, in shards of K/V that arrive: two in each direction.
BUFFERS = {"one_way": 2, "two_way": 4, "token_ring": 2}


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


@pytest.mark.proves("ring attention: memory linear in the shard", on="CPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("schedule", BUFFERS)
def test_peak_is_little_above_what_the_pass_must_hold(schedule: str, dtype: torch.dtype) -> None:
    case = Case(
        world_size=4,
        schedule=schedule,
        topology="cables" if schedule == "two_way" else "switch",
        causal=False,
        dtype=dtype,
        tokens=512,
        heads=4,
        kv_heads=4,
        head_dim=32,
    )
    rows = case.local_len * case.heads * case.head_dim
    shard_bytes, wide_bytes = rows * dtype.itemsize, rows * 4
    buffers = BUFFERS[schedule]
    # out and its accumulator, what arrives, and what a kernel returns for one piece.
    held = shard_bytes + wide_bytes + buffers * 2 * shard_bytes + wide_bytes
    # Three gradients in both dtypes, what arrives, sums on their way out and in, a kernel's three.
    held_backward = 3 * (shard_bytes + wide_bytes) + buffers * 2 * shard_bytes
    held_backward += buffers * 2 * wide_bytes + 3 * shard_bytes
    for forward, backward in _peaks(case):
        assert forward <= 1.3 * held, (forward / shard_bytes, held / shard_bytes)
        assert backward <= 1.3 * held_backward, (
            backward / shard_bytes,
            held_backward / shard_bytes,
        )


@pytest.mark.parametrize("schedule", [*BUFFERS, "all_gather"])
def test_peak_halves_with_the_shard(schedule: str) -> None:
    one, two = (
        max(_peaks(Case(world_size=4, schedule=schedule, tokens=tokens, head_dim=32)))
        for tokens in (512, 256)
    )
    for whole, half in zip(one, two, strict=True):
        assert half <= 0.55 * whole
