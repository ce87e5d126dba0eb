"""The one wrapper over torch.distributed: start transfers, wait for them, count their bytes.

One idea: `exchange` posts everything that a rank sends and receives at one time, and never blocks;
the received tensors come out of `wait()`, so they are not read too early. Price: one Python object
per exchange. What each backend needs:

    gloo   explicit tags (it matches by peer and tag); every receive posted before any send, or the
           two directions of a link take turns; contiguous tensors; no send to oneself
    NCCL   the whole exchange in one batch (a receive posted alone before its send can deadlock);
           tags are ignored, so both ends list the transfers between them in the same order

`batch_isend_irecv` with receives first, and transfers ordered by tag, is right for both: one group
launch on NCCL, a loop in the given order on gloo. What will only be sent later is announced by
`expect`: on gloo at once, as the word to the sender must not queue behind a large send on the same
connection; on NCCL with its exchange.
"""

import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from ringctx.errors import LayoutError

__all__ = [
    "Exchange",
    "Expected",
    "Group",
    "Ledger",
    "LocalGroup",
    "Pending",
    "SoloGroup",
    "Transfer",
    "connect",
    "current_ledger",
    "exchange",
    "expect",
    "group_rank",
    "group_size",
    "message_device",
    "record_into",
    "record_traffic",
]


@dataclass(frozen=True, slots=True, eq=False)
class Transfer:
    """A contiguous tensor to or from `peer`, a rank within the group; tags pair the two ends."""

    tensor: Tensor
    peer: int
    tag: int


class Pending(Protocol):
    """One transfer under way."""

    def wait(self) -> object:
        """Block the caller (on CUDA: the current stream) until the transfer is done."""


class LocalGroup(Protocol):
    """Ranks that share a sequence without a process group between them."""

    def rank(self) -> int:
        """This rank within the group."""

    def size(self) -> int:
        """How many ranks there are."""

    def start(self, sends: Sequence[Transfer], recvs: Sequence[Transfer]) -> Sequence[Pending]:
        """Start the transfers without blocking."""


class SoloGroup:
    """One rank that holds the whole sequence: the same program without a process group."""

    def rank(self) -> int:
        """Return 0."""
        return 0

    def size(self) -> int:
        """Return 1."""
        return 1

    def start(self, sends: Sequence[Transfer], recvs: Sequence[Transfer]) -> Sequence[Pending]:
        """Nothing can be sent: there is nobody else."""
        assert not sends and not recvs, (sends, recvs)
        return ()


Group = dist.ProcessGroup | LocalGroup


def group_rank(group: Group) -> int:
    """This rank within `group`.

    Raises:
        LayoutError: if there is no group, or this rank is not in it.
    """
    return _checked(group).rank()


def group_size(group: Group) -> int:
    """How many ranks `group` has.

    Raises:
        LayoutError: if there is no group, or this rank is not in it.
    """
    return _checked(group).size()


def message_device(group: Group) -> torch.device:
    """Where a message of a few bytes has to be for this group to carry it."""
    if isinstance(group, dist.ProcessGroup) and "cpu:" not in dist.get_backend_config(group):
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


def _checked(group: Group | None) -> Group:
    if group is None:
        raise LayoutError(
            "group=None names no ranks; pass the process group that shares the sequence "
            "(torch.distributed.group.WORLD for all ranks), or ringctx.parallel.comm.SoloGroup()"
        )
    # torch.distributed.new_group returns something else on the ranks that are not in the new group.
    if not isinstance(group, dist.ProcessGroup) and not hasattr(group, "start"):
        raise LayoutError(
            f"group={group!r} is not a process group that this rank is in; "
            "call only on the ranks that share the sequence"
        )
    return group


@dataclass(eq=False)
class Ledger:
    """What a rank moved, and how long it stood waiting for it. Peers are global ranks."""

    sent: Counter[int] = field(default_factory=Counter)
    received: Counter[int] = field(default_factory=Counter)
    _blocked_s: float = 0.0
    _cuda_waits: list[tuple[torch.cuda.Event, torch.cuda.Event]] = field(default_factory=list)

    @property
    def moved_bytes(self) -> int:
        """Bytes that this rank sent."""
        return self.sent.total()

    def exposed_s(self) -> float:
        """Seconds spent waiting for transfers. On CUDA it synchronises: read it after the step."""
        for start, end in self._cuda_waits:
            end.synchronize()
            self._blocked_s += start.elapsed_time(end) / 1e3
        self._cuda_waits.clear()
        return self._blocked_s

    @contextmanager
    def _waiting(self, *, on_cuda: bool) -> Iterator[None]:
        if on_cuda:
            start, end = _timing_event(), _timing_event()
            start.record()
            yield
            end.record()
            self._cuda_waits.append((start, end))
        else:
            start_s = time.perf_counter()
            yield
            self._blocked_s += time.perf_counter() - start_s


def _timing_event() -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=True)


_LEDGER: ContextVar[Ledger | None] = ContextVar("ringctx_ledger", default=None)


@contextmanager
def record_traffic() -> Iterator[Ledger]:
    """Count what moves inside the block, and in the backward of what ran forward in it.

    Of nested blocks the innermost counts.
    """
    ledger = Ledger()
    with record_into(ledger):
        yield ledger


@contextmanager
def record_into(ledger: Ledger | None) -> Iterator[None]:
    """Go on counting into `ledger`, as backward does in its own thread; None counts nothing."""
    token = _LEDGER.set(ledger)
    try:
        yield
    finally:
        _LEDGER.reset(token)


def current_ledger() -> Ledger | None:
    """The ledger of the innermost `record_traffic` block, or None outside."""
    return _LEDGER.get()


class Exchange:
    """Transfers under way. Keeps their tensors alive until it has been waited for."""

    def __init__(
        self,
        pending: Sequence[Pending],
        *,
        sends: Sequence[Transfer],
        recvs: Sequence[Transfer],
        ledger: Ledger | None,
    ) -> None:
        """Use `exchange`."""
        self._pending = pending
        self._sends = sends
        self._received = tuple(recv.tensor for recv in recvs)
        self._on_cuda = any(transfer.tensor.is_cuda for transfer in (*sends, *recvs))
        self._ledger = ledger
        self._watcher: Future[None] | None = None

    def done(self) -> bool:
        """Whether `wait` would return at once. On CUDA, where waiting blocks nobody, False.

        The first call starts a thread that waits: gloo tells of no transfer before it is waited
        for.
        """
        if not self._pending:
            return True
        if self._on_cuda:
            return False
        if self._watcher is None:
            self._watcher = _in_thread(self._wait_for_each)
        return self._watcher.done()

    def wait(self) -> tuple[Tensor, ...]:
        """Wait for all sends and receives; afterwards the sent tensors may be written to.

        Returns:
            The received tensors, in the order in which `exchange` was given them.
        """
        if self._pending and self._ledger is not None:
            with self._ledger._waiting(on_cuda=self._on_cuda):
                self._wait()
        else:
            self._wait()
        return self._received

    def _wait(self) -> None:
        if self._watcher is None:
            self._wait_for_each()
        else:
            self._watcher.result()
        self._pending, self._sends = (), ()

    def _wait_for_each(self) -> None:
        for pending in self._pending:
            pending.wait()


def _in_thread(work: Callable[[], None]) -> "Future[None]":
    """Run `work` in a thread of its own, which does not keep the program from ending."""
    result: Future[None] = Future()

    def run() -> None:
        try:
            work()
        except BaseException as error:
            result.set_exception(error)
        else:
            result.set_result(None)

    threading.Thread(target=run, name="ringctx-exchange", daemon=True).start()
    return result


def connect(group: Group, device: torch.device) -> None:
    """Before the first transfers of a group on CUDA: NCCL wants all of its ranks in its first call.

    Every rank of the group calls it. Once per group it costs a collective of one number.
    """
    if isinstance(group, dist.ProcessGroup) and device.type == "cuda":
        _connect(group, device)


@lru_cache(maxsize=64)
def _connect(group: dist.ProcessGroup, device: torch.device) -> None:
    dist.all_reduce(torch.zeros(1, device=device), group=group)


@dataclass(frozen=True, slots=True, eq=False)
class Expected:
    """Receives of an exchange to come, posted already where that is of use."""

    recvs: Sequence[Transfer]
    posted: Sequence[Pending] | None


def expect(recvs: Sequence[Transfer], *, group: Group) -> Expected:
    """Make ready to receive what peers will send in a later exchange, which takes the result."""
    _check_transfers(recvs, group)
    if not isinstance(group, dist.ProcessGroup) or any(x.tensor.is_cuda for x in recvs):
        return Expected(recvs, None)
    return Expected(recvs, _start((), recvs, group))


def exchange(
    sends: Sequence[Transfer], recvs: Sequence[Transfer] | Expected, *, group: Group
) -> Exchange:
    """Start sending and receiving; never blocks.

    Every rank names the transfers of one exchange; a transfer without its other end waits until the
    group's timeout. Sent tensors must not change, received ones not be read, before `wait()`.

    Args:
        sends: contiguous tensors that leave; at most one per (peer, tag).
        recvs: contiguous tensors to be overwritten, shape and dtype as sent; one per (peer, tag).
            Or what `expect` returned for them.
        group: where the peers' ranks count.

    Returns:
        The handle; `wait()` gives the received tensors.
    """
    expected = recvs if isinstance(recvs, Expected) else Expected(recvs, None)
    for transfers in (sends, expected.recvs):
        _check_transfers(transfers, group)
    ledger = current_ledger()
    if ledger is not None:
        for counter, transfers in ((ledger.sent, sends), (ledger.received, expected.recvs)):
            for transfer in transfers:
                counter[_global_rank(group, transfer.peer)] += transfer.tensor.nbytes
    unposted = expected.recvs if expected.posted is None else ()
    if isinstance(group, dist.ProcessGroup):
        pending = _start(sends, unposted, group)
    else:
        pending = group.start(sends, unposted)
    pending = [*(expected.posted or ()), *pending]
    return Exchange(pending, sends=sends, recvs=expected.recvs, ledger=ledger)


def _check_transfers(transfers: Sequence[Transfer], group: Group) -> None:
    rank, world_size = group_rank(group), group_size(group)
    for transfer in transfers:
        assert transfer.tensor.is_contiguous(), (transfer.tensor.shape, transfer.tensor.stride())
        assert 0 <= transfer.peer < world_size, (transfer.peer, world_size)
        assert transfer.peer != rank, f"rank {rank} sends to itself"
    ends = [(transfer.peer, transfer.tag) for transfer in transfers]
    assert len(set(ends)) == len(ends), f"two transfers share (peer, tag): {ends}"


def _global_rank(group: Group, peer: int) -> int:
    return dist.get_global_rank(group, peer) if isinstance(group, dist.ProcessGroup) else peer


def _start(
    sends: Sequence[Transfer], recvs: Sequence[Transfer], group: dist.ProcessGroup
) -> Sequence[Pending]:
    def operation(kind: Callable[..., object], transfer: Transfer) -> dist.P2POp:
        peer = _global_rank(group, transfer.peer)
        return dist.P2POp(kind, transfer.tensor, peer, group, transfer.tag)

    operations = [operation(dist.irecv, recv) for recv in sorted(recvs, key=_by_tag)]
    operations += [operation(dist.isend, send) for send in sorted(sends, key=_by_tag)]
    return dist.batch_isend_irecv(operations) if operations else ()


def _by_tag(transfer: Transfer) -> int:
    return transfer.tag
