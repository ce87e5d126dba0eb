"""Runs one pass of attention along a route: who attends what when, and where results go.

One idea: attention over all keys is the merge of attention over each piece, so it does not matter
which side travels, by which way, or in which order: a pass is a route (`routes.py`) and three
functions, what to do with the own shard, with a visitor, and with results that came home.

    post receives, start sends of this ring step -> attend what has arrived -> merge -> wait
    results follow one step behind: added up along a chain, or sent straight home

Price: `traffic.py`. Holds the pieces that arrive in this ring step and those that leave with it.
Shapes: B batch, T local tokens, H heads, Hkv key/value heads, D head dim.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from ringctx.ops import pair_attention
from ringctx.ops.lse import merge_
from ringctx.ops.pair_attention import PairSlice
from ringctx.parallel import comm
from ringctx.parallel.layout import Piece, Sharding
from ringctx.parallel.mask import Mask, pair_slices
from ringctx.parallel.routes import Hop, Route

__all__ = ["PairKernels", "Place", "backward", "forward"]

Tensors = tuple[Tensor, ...]


class PairKernels(Protocol):
    """What attends one pair of pieces; see `ops/pair_attention.py`."""

    def attend_pair(
        self, q: Tensor, k: Tensor, v: Tensor, slices: Sequence[PairSlice], *, scale: float
    ) -> tuple[Tensor, Tensor]:
        """Fresh (out, lse)."""

    def attend_pair_(
        self,
        out: Tensor,
        lse: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        slices: Sequence[PairSlice],
        *,
        scale: float,
    ) -> None:
        """Merge into (out, lse)."""

    def differentiate_pair_(
        self,
        grad_q: Tensor,
        grad_k: Tensor,
        grad_v: Tensor,
        grad_out: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        out: Tensor,
        lse: Tensor,
        slices: Sequence[PairSlice],
        scale: float,
    ) -> None:
        """Add this pair's share to the gradients."""


@dataclass(frozen=True, slots=True)
class Place:
    """One rank's place in a call of attention."""

    group: comm.Group
    sharding: Sharding
    mask: Mask
    scale: float
    kernels: PairKernels = pair_attention

    @property
    def rank(self) -> int:
        """This rank within the group."""
        return comm.group_rank(self.group)

    @property
    def own(self) -> Piece:
        """The whole local shard."""
        return self.sharding.shard(self.rank)

    def slices(self, *, q: Piece, k: Piece) -> tuple[PairSlice, ...]:
        """The visible part of two pieces."""
        return pair_slices(self.mask, self.sharding, q=q, k=k)

    def wide(self, dtype: torch.dtype) -> torch.dtype:
        """The dtype of accumulators: at least fp32; on one rank there is nothing to add up."""
        alone = self.sharding.world_size == 1
        return dtype if alone else torch.promote_types(dtype, torch.float32)


def forward(
    q: Tensor, k: Tensor, v: Tensor, *, place: Place, route: Route
) -> tuple[Tensor, Tensor]:
    """`(out, lse)` of the local queries: `[B, T, H, D]` as q, and `[B, H, T]` in at least fp32.

    Args:
        q: `[B, T, H, D]`, contiguous, like k and v.
        k: `[B, T, Hkv, D]`.
        v: `[B, T, Hkv, D]`.
        place: this rank's.
        route: of this pass, the same on all ranks.
    """
    kernels, own, scale = place.kernels, place.own, place.scale
    out, lse = q.new_empty(0), q.new_empty(0)

    # A sum that is carried along keeps its precision; one part alone is as its kernel left it.
    part_dtype = q.dtype if route.returns == "direct" else place.wide(q.dtype)

    def attend_own() -> None:
        nonlocal out, lse
        out, lse = kernels.attend_pair(q, k, v, place.slices(q=own, k=own), scale=scale)
        if place.sharding.world_size > 1:
            out = out.to(place.wide(q.dtype))

    def attend_keys(piece: Piece, guest: Tensors) -> None:
        keys, values = guest
        slices = place.slices(q=own, k=piece)
        kernels.attend_pair_(out, lse, q, keys, values, slices, scale=scale)

    def attend_queries(piece: Piece, guest: Tensors) -> Tensors:
        (queries,) = guest
        slices = place.slices(q=piece, k=own)
        part_out, part_lse = kernels.attend_pair(queries, k, v, slices, scale=scale)
        return part_out.to(part_dtype).contiguous(), part_lse.contiguous()

    def empty(piece: Piece) -> Tensors:
        return _rows_like(q, piece, part_dtype), _rows_like(lse, piece)

    def receive(piece: Piece, result: Tensors) -> None:
        merge_(out[:, piece.rows], lse[:, :, piece.rows], *result)

    def join(into: Tensors, result: Tensors) -> None:
        merge_(*into, *result)

    if route.travels == "kv":
        _run(place, route, _Visits((k, v), attend_own, attend_keys))
    else:
        _run(place, route, _Visits((q,), attend_own, attend_queries, empty, receive, join))
    return out.to(q.dtype), lse


def backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    out: Tensor,
    lse: Tensor,
    place: Place,
    route: Route,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the local q, k and v, shaped and typed as they are.

    Args:
        grad_out: `[B, T, H, D]`, contiguous, like all others.
        q: as in `forward`.
        k: as in `forward`.
        v: as in `forward`.
        out: what `forward` returned.
        lse: what `forward` returned.
        place: this rank's.
        route: of this pass, the same on all ranks.
    """
    differentiate, own, scale = place.kernels.differentiate_pair_, place.own, place.scale
    wide = torch.promote_types(q.dtype, torch.float32)
    grad_q, grad_k, grad_v = (torch.zeros_like(x, dtype=wide) for x in (q, k, v))

    def attend_own() -> None:
        slices = place.slices(q=own, k=own)
        grads, inputs = (grad_q, grad_k, grad_v), (grad_out, q, k, v)
        differentiate(*grads, *inputs, out=out, lse=lse, slices=slices, scale=scale)

    def attend_keys(piece: Piece, guest: Tensors) -> Tensors:
        shares = tuple(torch.zeros_like(x, dtype=wide) for x in guest)
        slices = place.slices(q=own, k=piece)
        inputs = (grad_out, q, *guest)
        differentiate(grad_q, *shares, *inputs, out=out, lse=lse, slices=slices, scale=scale)
        return shares

    def attend_queries(piece: Piece, guest: Tensors) -> Tensors:
        queries, grads, piece_lse, delta = guest
        share = torch.zeros_like(queries, dtype=wide)
        stand_in = _with_delta(grads, delta)
        differentiate(
            share,
            grad_k,
            grad_v,
            *(grads, queries, k, v),
            out=stand_in,
            lse=piece_lse,
            slices=place.slices(q=piece, k=own),
            scale=scale,
        )
        return (share,)

    def receive(piece: Piece, result: Tensors) -> None:
        sums = (grad_k, grad_v) if route.travels == "kv" else (grad_q,)
        for total, share in zip(sums, result, strict=True):
            total[:, piece.rows] += share

    def empty(piece: Piece) -> Tensors:
        owners = (k, v) if route.travels == "kv" else (q,)
        return tuple(_rows_like(x, piece, wide) for x in owners)

    if route.travels == "kv":
        _run(place, route, _Visits((k, v), attend_own, attend_keys, empty, receive, _add))
    else:
        guests = (q, grad_out, lse, _delta(grad_out, out))
        _run(place, route, _Visits(guests, attend_own, attend_queries, empty, receive, _add))
    return grad_q.to(q.dtype), grad_k.to(k.dtype), grad_v.to(v.dtype)


def _add(into: Tensors, result: Tensors) -> None:
    for total, share in zip(into, result, strict=True):
        total += share


def _delta(grad_out: Tensor, out: Tensor) -> Tensor:
    """What the normalisation of each row's softmax takes back, `[B, H, T]`, in at least fp32."""
    wide = torch.promote_types(out.dtype, torch.float32)
    delta: Tensor = torch.linalg.vecdot(grad_out.to(wide), out.to(wide))
    return delta.transpose(1, 2).contiguous()


def _with_delta(grad_out: Tensor, delta: Tensor) -> Tensor:
    """Some out whose product with grad_out is delta: all that a backward uses out for."""
    wide = grad_out.to(delta.dtype)
    norm = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
    factor = delta.transpose(1, 2).unsqueeze(-1) / norm
    # A row whose gradient is 0 takes no part: 0 / 0.
    along = torch.where(norm > 0, wide / norm * factor, 0.0)
    return along.to(grad_out.dtype)


@dataclass(frozen=True)
class _Visits:
    """What a pass sends out, and what it does with its own shard, visitors, and their results."""

    # [B, T, ...] or [B, H, T]: cut by tokens.
    guests: Tensors
    attend_own: Callable[[], None]
    attend: Callable[[Piece, Tensors], Tensors | None]
    # For results that go home: memory to receive them in, what the owner does with them, and how
    # two that meet on the way become one (the first is overwritten).
    empty: Callable[[Piece], Tensors] | None = None
    receive: Callable[[Piece, Tensors], None] | None = None
    join: Callable[[Tensors, Tensors], None] | None = None


def _run(place: Place, route: Route, visits: _Visits) -> None:
    """Every ring step of this rank."""
    program = route.program(place.rank)
    pieces = _Pieces(place, route, visits.guests)
    results = _Results(place, route, visits)
    for step, todo in enumerate(program):
        pieces.arrive(step)
        for due, hops in todo.results:
            results.expect(due, hops)
        for due, hops in todo.guests:
            pieces.start(due, hops)
        if step == 0:
            visits.attend_own()
        for index in todo.attends:
            chain = route.chains[index]
            result = visits.attend(chain.piece, pieces.held[chain.piece])
            if result is not None:
                results.add(index, result)
        pieces.drop(step)
        results.arrive(step)
        for due, hops in todo.results:
            results.start(due, hops)


class _Traveller:
    """Exchanges under way, by the ring step at which they are waited for."""

    def __init__(self, place: Place, *, lane: int) -> None:
        self._place = place
        self._lane = lane
        self._expected: dict[int, tuple[comm.Expected, list[int], int]] = {}
        self._due: dict[int, list[tuple[comm.Exchange, list[int], int]]] = {}

    def expect(self, due: int, recvs: list[tuple[Hop, Tensors]]) -> None:
        """Make ready for the next exchange that is due at this ring step."""
        expected = comm.expect(
            [x for hop, tensors in recvs for x in self._transfers(hop, hop.src, tensors)],
            group=self._place.group,
        )
        each = len(recvs[0][1]) if recvs else 0
        self._expected[due] = (expected, [hop.chain for hop, _ in recvs], each)

    def begin(self, due: int, sends: list[tuple[Hop, Tensors]]) -> None:
        """Start the exchange whose receives are expected."""
        expected, chains, each = self._expected.pop(due)
        exchange = comm.exchange(
            [x for hop, tensors in sends for x in self._transfers(hop, hop.dst, tensors)],
            expected,
            group=self._place.group,
        )
        self._due.setdefault(due, []).append((exchange, chains, each))

    def _transfers(self, hop: Hop, peer: int, tensors: Tensors) -> list[comm.Transfer]:
        # Up to four tensors a piece, on two lanes.
        first = (2 * hop.chain + self._lane) * 4
        return [comm.Transfer(x, peer, first + i) for i, x in enumerate(tensors)]

    def finish(self, step: int) -> list[tuple[int, Tensors]]:
        """(chain, what arrived), for all that is due."""
        arrived: list[tuple[int, Tensors]] = []
        for exchange, chains, each in self._due.pop(step, ()):
            flat = exchange.wait()
            arrived += [(chain, flat[i * each : (i + 1) * each]) for i, chain in enumerate(chains)]
        return arrived


class _Pieces:
    """The pieces at hand: own ones that leave, and visitors until they have been passed on."""

    def __init__(self, place: Place, route: Route, own: Tensors) -> None:
        self._chains, self._own, self._rank = route.chains, own, place.rank
        self._way = _Traveller(place, lane=0)
        self.held: dict[Piece, Tensors] = {}
        self._last_use: dict[Piece, int] = {}
        for hop in route.guests.touching(place.rank):
            step = hop.arrives if hop.dst == place.rank else hop.departs
            piece = route.chains[hop.chain].piece
            self._last_use[piece] = max(step, self._last_use.get(piece, 0))

    def arrive(self, step: int) -> None:
        for index, tensors in self._way.finish(step):
            self.held[self._chains[index].piece] = tensors

    def start(self, due: int, hops: Sequence[Hop]) -> None:
        self._way.expect(due, [(x, self._buffers(x)) for x in hops if x.dst == self._rank])
        self._way.begin(due, [(x, self._leaving(x)) for x in hops if x.src == self._rank])

    def _leaving(self, hop: Hop) -> Tensors:
        piece = self._chains[hop.chain].piece
        if piece not in self.held:
            assert piece.owner == self._rank, (piece, self._rank)
            self.held[piece] = tuple(_rows(x, piece).contiguous() for x in self._own)
        return self.held[piece]

    def _buffers(self, hop: Hop) -> Tensors:
        piece = self._chains[hop.chain].piece
        return tuple(_rows_like(x, piece) for x in self._own)

    def drop(self, step: int) -> None:
        """What has been attended and sent on."""
        self.held = {p: tensors for p, tensors in self.held.items() if self._last_use[p] > step}


class _Results:
    """Sums on their way home."""

    def __init__(self, place: Place, route: Route, visits: _Visits) -> None:
        self._chains, self._rank, self._visits = route.chains, place.rank, visits
        self._way = _Traveller(place, lane=1)
        self._held: dict[int, Tensors] = {}

    def add(self, index: int, result: Tensors) -> None:
        self._held[index] = result

    def arrive(self, step: int) -> None:
        for index, arrived in self._way.finish(step):
            chain = self._chains[index]
            if chain.piece.owner == self._rank:
                assert self._visits.receive is not None
                self._visits.receive(chain.piece, arrived)
            elif index in self._held:
                assert self._visits.join is not None
                self._visits.join(self._held[index], arrived)
            else:
                self._held[index] = arrived

    def expect(self, due: int, hops: Sequence[Hop]) -> None:
        """What peers will send at the end of this ring step."""
        self._way.expect(due, [(x, self._empty(x)) for x in hops if x.dst == self._rank])

    def start(self, due: int, hops: Sequence[Hop]) -> None:
        self._way.begin(due, [(x, self._held.pop(x.chain)) for x in hops if x.src == self._rank])

    def _empty(self, hop: Hop) -> Tensors:
        assert self._visits.empty is not None
        return self._visits.empty(self._chains[hop.chain].piece)


def _rows(x: Tensor, piece: Piece) -> Tensor:
    return x[:, piece.rows] if x.ndim == 4 else x[:, :, piece.rows]


def _rows_like(x: Tensor, piece: Piece, dtype: torch.dtype | None = None) -> Tensor:
    shape = list(x.shape)
    shape[1 if x.ndim == 4 else 2] = piece.length
    return x.new_empty(shape, dtype=dtype)
