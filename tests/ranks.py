"""Real ranks for tests: gloo processes, started once per session and reused.

`run_ranks(4, fn, *args)` calls `fn(*args)` on four ranks that share a fresh default process group
and returns the four results. `fn` is a function at the top of a test module. What goes wrong on a
rank reaches the test: its traceback, its exit code or, when it hangs, where it stands.

Price: a few seconds for the first call, which starts a fork server with torch loaded, then 0.1 s a
call. A failure throws the pool away: ranks that are left may wait for the one that failed.
"""

import faulthandler
import itertools
import os
import pickle
import shutil
import signal
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing import connection as mp_connection
from multiprocessing import get_context
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist

__all__ = ["RankError", "close_pool", "make_torch_strict", "run_ranks"]

T = TypeVar("T")
_TIMEOUT_S = 60.0
# torch._dynamo: the first optimizer or ring_attention of a process imports it, in seconds.
_PRELOAD = ["torch", "torch._dynamo", "torch.distributed", "numpy", "pytest", "ringctx.parallel"]


class RankError(AssertionError):
    """A rank failed, died or did not finish."""


def run_ranks(
    world_size: int, fn: Callable[..., T], *args: object, timeout_s: float = _TIMEOUT_S
) -> list[T]:
    """Call `fn(*args)` on `world_size` gloo ranks, one torch thread each.

    Args:
        world_size: number of ranks; `torch.distributed.group.WORLD` on each has this size.
        fn: a function at the top of a module, found by its name in the rank's process.
        args: picklable; the same for every rank.
        timeout_s: after this long the ranks are killed.

    Returns:
        The results, in rank order.

    Raises:
        RankError: with the first failing rank's traceback.
    """
    return _POOL.run(world_size, fn, args, timeout_s)


def close_pool() -> None:
    """Stop the rank processes; the next call starts new ones."""
    _POOL.close()


def make_torch_strict() -> None:
    """One thread, deterministic, and memory that nobody wrote to is NaN."""
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True  # type: ignore[attr-defined]


@dataclass(frozen=True)
class _Job:
    rank: int
    world_size: int
    store: str
    timeout_s: float
    # Pickled on its own: a function that cannot be found is reported like any other error.
    call: bytes


@dataclass(frozen=True)
class _Report:
    value: Any = None
    error: str | None = None


@dataclass(frozen=True, eq=False)
class _Worker:
    process: ForkServerProcess
    connection: Connection
    stacks: Path


class _Pool:
    def __init__(self) -> None:
        self._workers: list[_Worker] = []
        self._folder: Path | None = None
        self._calls = itertools.count()

    def run(
        self, world_size: int, fn: Callable[..., T], args: tuple[object, ...], timeout_s: float
    ) -> list[T]:
        call = pickle.dumps((fn, args))
        workers = self._ready(world_size)
        store = str(workers[0].stacks.parent / f"store-{next(self._calls)}")
        try:
            for rank, worker in enumerate(workers):
                job = _Job(rank, world_size, store, timeout_s, call)
                worker.connection.send_bytes(pickle.dumps(job))
            return self._collect(workers, time.monotonic() + timeout_s, timeout_s)
        except BaseException:
            self.close()
            raise

    def _ready(self, world_size: int) -> list[_Worker]:
        if not all(worker.process.is_alive() for worker in self._workers):
            self.close()
        if self._folder is None:
            self._folder = Path(tempfile.mkdtemp(prefix="ringctx-ranks-"))
        while len(self._workers) < world_size:
            self._workers.append(_start_worker(self._folder / f"stacks-{len(self._workers)}"))
        return self._workers[:world_size]

    def _collect(self, workers: list[_Worker], deadline_s: float, timeout_s: float) -> list[Any]:
        values: dict[int, Any] = {}
        waiting = {worker.connection: rank for rank, worker in enumerate(workers)}
        while waiting:
            ready = mp_connection.wait(list(waiting), max(0.0, deadline_s - time.monotonic()))
            if not ready:
                stacks = _stacks({rank: workers[rank] for rank in waiting.values()})
                raise RankError(f"not finished after {timeout_s:g} s\n{stacks}")
            for connection in ready:
                assert isinstance(connection, Connection)
                rank = waiting.pop(connection)
                values[rank] = _received(connection, rank, workers)
        return [values[rank] for rank in range(len(workers))]

    def close(self) -> None:
        for worker in self._workers:
            worker.connection.close()
            worker.process.kill()
        for worker in self._workers:
            worker.process.join()
        self._workers = []
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)
            self._folder = None


_POOL = _Pool()


def _start_worker(stacks: Path) -> _Worker:
    context = get_context("forkserver")
    context.set_forkserver_preload(_PRELOAD)
    ours, theirs = context.Pipe()
    process = context.Process(target=_serve, args=(theirs, str(stacks)), daemon=True)
    process.start()
    theirs.close()
    return _Worker(process, ours, stacks)


def _received(connection: Connection, rank: int, workers: list[_Worker]) -> object:
    where = f"rank {rank} of {len(workers)}"
    try:
        report: _Report = pickle.loads(connection.recv_bytes())
    except EOFError:
        workers[rank].process.join()
        raise RankError(f"{where} died, exit code {workers[rank].process.exitcode}") from None
    if report.error is not None:
        raise RankError(f"on {where}:\n{report.error}")
    return report.value


def _stacks(workers: dict[int, _Worker]) -> str:
    """Ask ranks that hang where they stand."""
    for worker in workers.values():
        if worker.process.pid is not None:
            os.kill(worker.process.pid, signal.SIGUSR1)
    time.sleep(0.5)
    return "\n".join(
        f"rank {rank} stands here:\n{worker.stacks.read_text()}" for rank, worker in workers.items()
    )


def _serve(connection: Connection, stacks: str) -> None:
    """Run in a rank's process: one job after the other, until the other end closes."""
    make_torch_strict()
    with open(stacks, "w") as file:
        faulthandler.register(signal.SIGUSR1, file=file)
        while True:
            try:
                job: _Job = pickle.loads(connection.recv_bytes())
            except EOFError:
                return
            report = _run(job)
            # First the report: what happens while gloo shuts down is no failure of the test.
            connection.send_bytes(pickle.dumps(report))
            if dist.is_initialized():
                if report.error is None:
                    dist.barrier()
                dist.destroy_process_group()


def _run(job: _Job) -> _Report:
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    torch.manual_seed(0)
    try:
        fn, args = pickle.loads(job.call)
        dist.init_process_group(
            "gloo",
            init_method=f"file://{job.store}",
            rank=job.rank,
            world_size=job.world_size,
            timeout=timedelta(seconds=job.timeout_s),
        )
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            return _Report(value=fn(*args))
    except BaseException:
        return _Report(error=traceback.format_exc())
