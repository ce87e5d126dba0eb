"""Virtual ranks: threads in one process that run the real schedules over an in-memory exchange.

Thousands of cases in the time that real processes need for dozens. Autograd on the CPU runs
backward in the calling thread, so every virtual rank has its own forward and backward.
"""

import queue
import threading
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

from torch import Tensor

from ringctx.parallel.comm import LocalGroup, Pending, Transfer

__all__ = ["Mail", "VirtualGroup", "run_virtual"]

_TIMEOUT_S = 30.0

T = TypeVar("T")


class _Aborted(RuntimeError):
    """Another virtual rank failed first."""


@dataclass
class Mail:
    """Every message on its way, by (source, destination, tag)."""

    boxes: defaultdict[tuple[int, int, int], "queue.SimpleQueue[Tensor | None]"] = field(
        default_factory=lambda: defaultdict(queue.SimpleQueue)
    )
    lock: threading.Lock = field(default_factory=threading.Lock)
    failed: bool = False

    def box(self, source: int, destination: int, tag: int) -> "queue.SimpleQueue[Tensor | None]":
        with self.lock:
            box = self.boxes[source, destination, tag]
            if self.failed:
                box.put(None)
            return box

    def abort(self) -> None:
        with self.lock:
            self.failed = True
            for box in self.boxes.values():
                box.put(None)


@dataclass
class _Receive:
    box: "queue.SimpleQueue[Tensor | None]"
    into: Tensor

    def wait(self) -> None:
        message = self.box.get(timeout=_TIMEOUT_S)
        if message is None:
            raise _Aborted
        assert message.shape == self.into.shape, (message.shape, self.into.shape)
        assert message.dtype == self.into.dtype, (message.dtype, self.into.dtype)
        self.into.copy_(message)


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
        for send in sends:
            self.mail.box(self._rank, send.peer, send.tag).put(send.tensor.detach().clone())
        return [
            _Receive(self.mail.box(recv.peer, self._rank, recv.tag), recv.tensor) for recv in recvs
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
