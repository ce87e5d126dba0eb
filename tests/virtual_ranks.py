"""Virtual ranks: threads in one process that run the real schedules over an in-memory exchange.

Thousands of cases in the time that real processes need for dozens. Autograd on the CPU runs
backward in the calling thread, so every virtual rank has its own forward and backward.

The exchange is as unkind as `comm` allows: a buffer is NaN from the moment it is posted, and what
is sent is read only when the receiver waits. Whoever touches a buffer in flight computes garbage.
"""

import queue
import threading
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal, TypeVar

import torch
from torch import Tensor

from ringctx.parallel.comm import LocalGroup, Pending, Transfer

__all__ = ["Mail", "VirtualGroup", "run_virtual"]

_TIMEOUT_S = 30.0

T = TypeVar("T")
# Says only that something was read: the receiver's buffer is its own.
_READ = torch.empty(0)
# None: another rank failed, nothing will come.
Box = queue.SimpleQueue[Tensor | None]
# What (data, or word that it was read), from, to, tag.
Address = tuple[Literal["data", "read"], int, int, int]


class _Aborted(RuntimeError):
    """Another virtual rank failed first."""


@dataclass
class Mail:
    """Every message on its way between the ranks of one group."""

    boxes: defaultdict[Address, Box] = field(default_factory=lambda: defaultdict(queue.SimpleQueue))
    lock: threading.Lock = field(default_factory=threading.Lock)
    failed: bool = False

    def put(self, address: Address, tensor: Tensor) -> None:
        with self.lock:
            self.boxes[address].put(tensor)

    def get(self, address: Address) -> Tensor:
        with self.lock:
            box = self.boxes[address]
            if self.failed:
                box.put(None)
        tensor = box.get(timeout=_TIMEOUT_S)
        if tensor is None:
            raise _Aborted
        return tensor

    def abort(self) -> None:
        with self.lock:
            self.failed = True
            for box in self.boxes.values():
                box.put(None)


@dataclass
class _Receive:
    mail: Mail
    source: int
    rank: int
    transfer: Transfer

    def wait(self) -> None:
        route, into = (self.source, self.rank, self.transfer.tag), self.transfer.tensor
        sent = self.mail.get(("data", *route))
        assert sent.shape == into.shape, (sent.shape, into.shape)
        assert sent.dtype == into.dtype, (sent.dtype, into.dtype)
        into.copy_(sent)
        # The sender's buffer is the sender's alone once it hears that it was read.
        del sent
        self.mail.put(("read", *route), _READ)


@dataclass
class _Send:
    mail: Mail
    rank: int
    transfer: Transfer

    def wait(self) -> None:
        self.mail.get(("read", self.rank, self.transfer.peer, self.transfer.tag))


@dataclass
class VirtualGroup:
    """One virtual rank's view of the group."""

    _rank: int
    _size: int
    mail: Mail

    def rank(self) -> int:
        return self._rank

    def size(self) -> int:
        return self._size

    def start(self, sends: Sequence[Transfer], recvs: Sequence[Transfer]) -> Sequence[Pending]:
        for recv in recvs:
            recv.tensor.fill_(torch.nan)
        for send in sends:
            self.mail.put(("data", self._rank, send.peer, send.tag), send.tensor.detach())
        return [
            *(_Receive(self.mail, recv.peer, self._rank, recv) for recv in recvs),
            *(_Send(self.mail, self._rank, send) for send in sends),
        ]


def run_virtual(world_size: int, body: Callable[[LocalGroup], T]) -> list[T]:
    """Run `body(group)` on every virtual rank; return the results in rank order, or raise."""
    mail = Mail()
    results: dict[int, T] = {}
    errors: dict[int, BaseException] = {}

    def run(rank: int) -> None:
        try:
            results[rank] = body(VirtualGroup(rank, world_size, mail))
        except BaseException as error:
            errors[rank] = error
            mail.abort()

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(world_size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for rank, error in sorted(errors.items()):
        if not isinstance(error, _Aborted):
            error.add_note(f"on virtual rank {rank} of {world_size}")
            raise error
    return [results[rank] for rank in range(world_size)]
