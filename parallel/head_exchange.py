"""Shards of tokens to shards of heads and back, as autograd functions that start and wait apart.

One idea: the two ends of a transfer are two nodes of the graph. `depart` starts it, `arrive` waits;
what runs between them hides it. Backward meets them in reverse: `arrive` starts the gradients' way
back, and `depart` waits for them, after the backward of all that came later. Between the two nodes
travels an empty ticket, so that nobody reads what has not arrived.

    depart(q) -> project k -> depart(k) -> project v -> depart(v) -> arrive -> attend
    wait(dq)  <- dk's projection <- wait(dk) <- dv's <- wait(dv) <- start dv, dk, dq <-

Price: one contiguous copy of what leaves and one of what arrives. Shapes: B batch, T local tokens,
P ranks, H heads (of one tensor), D head dim.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import gcd
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd import Variable
from torch.autograd.function import once_differentiable

from ringctx.errors import LayoutError
from ringctx.parallel import comm
from ringctx.parallel.layout import Run

__all__ = ["Departed", "HeadShare", "Route", "arrive", "depart", "key_heads", "query_heads"]


@dataclass(frozen=True, slots=True)
class HeadShare:
    """The heads [start, stop) that one rank attends with."""

    start: int
    stop: int
    repeats: tuple[int, ...]
    """How often each stands in memory, not on the wire: once, but for key/value heads that serve
    unequal numbers of the rank's query heads (never where one of P and Hkv divides the other)."""

    @property
    def heads(self) -> slice:
        """To index the head dimension with."""
        return slice(self.start, self.stop)


def query_heads(num_heads: int, *, world_size: int) -> tuple[HeadShare, ...]:
    """Which query heads each rank takes: equally many, in order.

    Raises:
        LayoutError: if they do not divide.
    """
    if num_heads % world_size:
        fits = ", ".join(str(n) for n in range(1, num_heads + 1) if num_heads % n == 0)
        raise LayoutError(
            f"{num_heads} query heads cannot be shared equally by {world_size} ranks; "
            f"with {num_heads} heads a ulysses degree of {fits} works, and context_attention makes "
            "a ring of the other ranks"
        )
    n = num_heads // world_size
    return tuple(HeadShare(i * n, (i + 1) * n, (1,) * n) for i in range(world_size))


def key_heads(num_heads: int, kv_heads: int, *, world_size: int) -> tuple[HeadShare, ...]:
    """Which key/value heads each rank needs for its query heads: no more than those.

    Raises:
        LayoutError: as `query_heads`.
    """
    group = num_heads // kv_heads
    shares = []
    for queries in query_heads(num_heads, world_size=world_size):
        start, stop = queries.start // group, (queries.stop - 1) // group + 1
        # How many of the rank's query heads look at each.
        served = [
            min(queries.stop, (head + 1) * group) - max(queries.start, head * group)
            for head in range(start, stop)
        ]
        shares.append(HeadShare(start, stop, tuple(n // gcd(*served) for n in served)))
    return tuple(shares)


@dataclass(frozen=True)
class Route:
    """Where the parts of one tensor go; the same on all ranks, but for `group.rank()`."""

    group: comm.Group
    shares: tuple[HeadShare, ...]
    """Each rank's heads."""
    runs: tuple[tuple[Run, ...], ...]
    """Where each rank's tokens stand among those of all."""
    num_heads: int
    """Of the tensor by tokens."""
    tag: int

    def to_heads(self, x: Tensor) -> Callable[[], Tensor]:
        """Start the way from all heads to all tokens; call the result to wait."""
        # [B, T, H, D] -> [B, P * T, heads of this rank, D]
        rank, (batch, tokens, _, dim) = self.group.rank(), x.shape
        mine = self.shares[rank]
        # Ranks that share a key/value head are sent one copy of it.
        leaving = {share: x[:, :, share.heads].contiguous() for share in set(self.shares)}
        shape = (batch, tokens, mine.stop - mine.start, dim)
        arriving = {peer: x.new_empty(shape) for peer in self._peers()}
        started = self._exchange({peer: leaving[self.shares[peer]] for peer in arriving}, arriving)

        def wait() -> Tensor:
            started.wait()
            whole = x.new_empty(batch, len(self.runs) * tokens, *shape[2:])
            for peer, part in (arriving | {rank: leaving[mine]}).items():
                for run in self.runs[peer]:
                    whole[:, _places(run)] = part[:, run.start : run.start + run.length]
            return _repeated(whole, mine.repeats)

        return wait

    def to_tokens(self, whole: Tensor) -> Callable[[], Tensor]:
        """Start the way back; heads that several ranks had are added up."""
        # [B, P * T, heads of this rank, D] -> [B, T, H, D]
        rank, (batch, tokens, _, dim) = self.group.rank(), whole.shape
        tokens //= len(self.runs)
        summed = _summed(whole, self.shares[rank].repeats)
        leaving = {
            peer: torch.cat([summed[:, _places(run)] for run in runs], 1).contiguous()
            for peer, runs in enumerate(self.runs)
        }
        arriving = {
            peer: whole.new_empty(batch, tokens, self._width(peer), dim) for peer in self._peers()
        }
        started = self._exchange({peer: leaving[peer] for peer in arriving}, arriving)

        def wait() -> Tensor:
            started.wait()
            shape = (batch, tokens, self.num_heads, dim)
            parts = arriving | {rank: leaving[rank]}
            if sum(part.shape[2] for part in parts.values()) == self.num_heads:
                return torch.cat([parts[peer] for peer in sorted(parts)], 2)
            wide = torch.promote_types(whole.dtype, torch.float32)
            total = whole.new_zeros(shape, dtype=wide)
            for peer in sorted(parts):
                total[:, :, self.shares[peer].heads] += parts[peer]
            return total.to(whole.dtype)

        return wait

    def _width(self, rank: int) -> int:
        return self.shares[rank].stop - self.shares[rank].start

    def _peers(self) -> list[int]:
        rank = self.group.rank()
        return [peer for peer in range(len(self.runs)) if peer != rank]

    def _exchange(self, leaving: dict[int, Tensor], arriving: dict[int, Tensor]) -> comm.Exchange:
        sends = [comm.Transfer(x, peer, self.tag) for peer, x in leaving.items()]
        recvs = [comm.Transfer(x, peer, self.tag) for peer, x in arriving.items()]
        return comm.exchange(sends, recvs, group=self.group)


def _places(run: Run) -> slice:
    return slice(run.first, run.first + (run.length - 1) * run.stride + 1, run.stride)


def _repeated(x: Tensor, repeats: tuple[int, ...]) -> Tensor:
    """Repeat head i `repeats[i]` times."""
    if all(n == 1 for n in repeats):
        return x
    parts = [head.expand(-1, -1, n, -1) for head, n in zip(x.split(1, 2), repeats, strict=True)]
    return torch.cat(parts, 2)


def _summed(x: Tensor, repeats: tuple[int, ...]) -> Tensor:
    """Add up what `_repeated` made of each head, in fp32 at least."""
    if all(n == 1 for n in repeats):
        return x
    wide = torch.promote_types(x.dtype, torch.float32)
    parts = [part.sum(2, keepdim=True, dtype=wide) for part in x.split(list(repeats), 2)]
    return torch.cat(parts, 2).to(x.dtype)


class _Crossing:
    """One tensor on its way there, and later its gradient on its way back."""

    def __init__(self, route: Route, to: Literal["heads", "tokens"]) -> None:
        self.route, self.to_heads = route, to == "heads"
        self._wait: Callable[[], Tensor] | None = None

    def start(self, x: Tensor, *, back: bool) -> None:
        """Start one way or the other."""
        assert self._wait is None, "the last transfer was not waited for"
        to_heads = self.to_heads != back
        self._wait = self.route.to_heads(x) if to_heads else self.route.to_tokens(x)

    @property
    def is_under_way(self) -> bool:
        """Whether something is still to be waited for or taken."""
        return self._wait is not None

    def settle(self) -> None:
        """Wait now, and keep what arrived for `wait`."""
        arrived = self.wait()
        self._wait = lambda: arrived

    def wait(self) -> Tensor:
        """Return what arrived."""
        assert self._wait is not None, "nothing is under way"
        wait, self._wait = self._wait, None
        return wait()


@dataclass(frozen=True, eq=False)
class Departed:
    """A transfer under way; give it to `arrive`."""

    ticket: Tensor
    crossing: _Crossing


def depart(x: Tensor, route: Route, *, to: Literal["heads", "tokens"]) -> Departed:
    """Start moving `x` along `route`; never blocks."""
    crossing = _Crossing(route, to)
    ticket = _Depart.apply(x, crossing)  # type: ignore[no-untyped-call]
    return Departed(ticket, crossing)


def arrive(departed: Sequence[Departed]) -> tuple[Tensor, ...]:
    """Wait for all of them; return the tensors, in the same order."""
    crossings = [each.crossing for each in departed]
    arrived = _Arrive.apply(crossings, *(each.ticket for each in departed))  # type: ignore[no-untyped-call]
    return tuple(arrived)


def _abandon(crossings: Sequence[_Crossing]) -> None:
    """Wait for what nobody took, so that its buffers may go."""
    for crossing in reversed(crossings):
        if crossing.is_under_way:
            crossing.wait()


class _Depart(torch.autograd.Function):
    """Forward starts, backward waits."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, crossing: _Crossing) -> Tensor:
        ctx.crossing = crossing
        crossing.start(x, back=False)
        return x.new_empty(0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, _: Tensor) -> tuple[Tensor, None]:
        return ctx.crossing.wait(), None


class _Arrive(torch.autograd.Function):
    """Forward waits, backward starts.

    One node for all tensors, so that every rank moves every gradient, whichever it needs itself.
    """

    @staticmethod
    def forward(ctx: Any, crossings: Sequence[_Crossing], *tickets: Tensor) -> tuple[Tensor, ...]:
        ctx.crossings, ctx.ledger = crossings, comm.current_ledger()
        return tuple(crossing.wait() for crossing in crossings)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        # Autograd may run this in a thread of its own, where no ledger is set.
        with comm.record_into(ctx.ledger):
            # Autograd goes on with what departed last.
            for crossing, grad in reversed(list(zip(ctx.crossings, grads, strict=True))):
                crossing.start(grad, back=True)
        if not all(ctx.needs_input_grad[1:]):
            # Every rank waits in one order, whatever it needs.
            for crossing in reversed(ctx.crossings):
                crossing.settle()
        # Where a gradient is not asked for, nobody else waits for it.
        Variable._execution_engine.queue_callback(lambda: _abandon(ctx.crossings))
        return None, *(grad.new_empty(0) for grad in grads)
