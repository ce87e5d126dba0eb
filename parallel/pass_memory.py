"""What one pass of attention holds at a time, at its worst moment: counted from its route.

One idea: a buffer lives from one ring step to another, so what a rank holds besides its kernels'
own is a running sum over the route's table. In a ring step, a rank holds at most

    sums          out and lse, or three gradients, in wide precision; what it returns
    pieces        received ones from when their receive is posted until attended and passed on;
                  own ones where a part of the shard must be copied to be contiguous
    results       from when they are computed, or their receive is posted, until sent or added up
    one kernel    what it returns and what is copied for it, for the slices of one pair of pieces

A bound on the last is quick; the moments that could be the worst are then looked at exactly.
As on the CPU, where kernels need the inputs of a window's lower edge in reverse order.

Price: of the order of the hops in the route, and the slices of a few hundred pairs of pieces.
Shapes: B batch, H heads, Hkv key/value heads, D head dim.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain as joined

import numpy as np
import numpy.typing as npt

from ringctx.ops.pair_attention import PairSlice
from ringctx.parallel.layout import Piece, Sharding
from ringctx.parallel.mask import Mask, pair_slices
from ringctx.parallel.routes import Hops, Route
from ringctx.parallel.topology import Ints
from ringctx.parallel.traffic import Shape

__all__ = ["attended_hops", "peak_bytes"]

# Moments that are looked at exactly; the bound stands for the rest.
_MOST_EXACT = 128
# Rows that a merge widens at a time; see `ops/lse.py`.
_MERGE_TILE = 512
# Scalars.
_FEW_BYTES = 64


def attended_hops(route: Route) -> Ints:
    """The hops of `route.guests` after which the piece is attended."""
    flags = joined.from_iterable(chain.attends for chain in route.chains)
    return np.flatnonzero(np.fromiter(flags, dtype=bool, count=len(route.guests)))


def peak_bytes(
    route: Route, *, shape: Shape, sharding: Sharding, mask: Mask, backward: bool
) -> int:
    """Most that any rank holds at any time beside the tensors that it is given.

    Args:
        route: of the pass.
        shape: what a token weighs.
        sharding: the sequence and its layout.
        mask: who sees whom.
        backward: which of the two passes.

    Returns:
        Never less than what the pass allocates on the CPU, its results included.
    """
    pass_ = _Pass(route, shape, sharding, mask, backward)
    held, at_work = pass_.held(), pass_.merging()
    hops, owners = attended_hops(route), np.arange(sharding.world_size)
    pieces = [*(sharding.shard(rank) for rank in owners.tolist()), *(c.piece for c in route.chains)]
    which = np.concatenate([owners, sharding.world_size + route.guests.chain[hops]])
    ranks = np.concatenate([owners, route.guests.dst[hops]])
    steps = np.concatenate([np.zeros_like(owners), route.guests.arrives[hops]])
    cells = ranks * route.num_steps + steps
    lengths = np.array([piece.length for piece in pieces], dtype=np.int64)[which]
    bound = at_work.copy()
    np.maximum.at(bound, cells, pass_.most_at_work(lengths))
    by_cell = np.argsort(cells, kind="stable")
    first = np.searchsorted(cells[by_cell], np.arange(len(held) + 1))
    exact = 0
    worst = np.argsort(-(held + bound), kind="stable")
    for number, cell in enumerate(worst.tolist()):
        most = int(held[cell] + bound[cell])
        if most <= exact or number == _MOST_EXACT:
            exact = max(exact, most)
            break
        pairs = by_cell[first[cell] : first[cell + 1]].tolist()
        kernels = (pass_.at_work(pieces[which[i]], int(ranks[i])) for i in pairs)
        exact = max(exact, int(held[cell]) + max([int(at_work[cell]), *kernels]))
    return max(exact, pass_.at_the_end()) + _FEW_BYTES


@dataclass(frozen=True, slots=True, eq=False)
class _Slices:
    """Slices that a kernel runs, a row each, and what is copied for it, as 0 or 1."""

    q_rows: Ints
    k_rows: Ints
    q_copied: Ints
    k_copied: Ints
    # In reverse order.
    flipped: Ints
    # Several tiles: their lse is copied to be in order.
    tiled: Ints
    # Rows between the tiles.
    gapped: Ints

    @staticmethod
    def of(slices: Sequence[PairSlice], *, batch: int, q: Piece, k: Piece) -> "_Slices":
        table = []
        for part in slices:
            tiled = part.count > 1
            # Tiles of several batch rows are a view where they fill their piece.
            rows = part.count * (part.q_len + part.gap)
            q_copied, k_copied = (tiled and batch > 1 and rows != x.length for x in (q, k))
            sizes = part.count * part.q_len, part.count * part.k_len
            flags = q_copied, k_copied, part.kind == "anticausal", tiled, part.gap > 0
            table.append((*sizes, *flags))
        return _Slices(*np.array(table, dtype=np.int64).reshape(-1, 7).T)

    def rows(self, index: Ints) -> "_Slices":
        return _Slices(*(getattr(self, name)[index] for name in self.__slots__))


@dataclass(frozen=True, slots=True, eq=False)
class _Pass:
    route: Route
    shape: Shape
    sharding: Sharding
    mask: Mask
    backward: bool

    # Bytes of one row: of Q or out, and of K or V, as given; of out and of lse as summed up.

    @property
    def _q(self) -> int:
        return self.shape.batch * self.shape.heads * self.shape.head_dim * self.shape.dtype.itemsize

    @property
    def _k(self) -> int:
        return self._q // self.shape.heads * self.shape.kv_heads

    @property
    def _wide(self) -> int:
        return self._lse * self.shape.head_dim

    @property
    def _lse(self) -> int:
        return self.shape.batch * self.shape.heads * self.shape.accumulator_dtype.itemsize

    @property
    def _narrow(self) -> bool:
        """Whether results are rounded from what they are summed up in."""
        return self._q < self._wide

    @property
    def _result(self) -> int:
        return self.shape.result_bytes(
            self.route.travels, self.route.returns, backward=self.backward
        )

    def _sums(self) -> int:
        """What stays from the first ring step to the last."""
        per_row = self._wide + self._lse
        if self.backward:
            per_row = self._wide + 2 * self._wide // self.shape.heads * self.shape.kv_heads
            # delta
            per_row += self._lse if self.route.travels == "q" else 0
        return per_row * self.sharding.local_len

    def _only_kernels(self) -> bool:
        """Whether nothing is summed up: one rank, and in backward one slice."""
        if self.sharding.world_size > 1:
            return False
        own = self.sharding.shard(0)
        return not self.backward or len(pair_slices(self.mask, self.sharding, q=own, k=own)) == 1

    def at_the_end(self) -> int:
        """The sums, and what they are rounded to."""
        if not self._narrow or self._only_kernels():
            # What a kernel returned is what goes out, or `at_work` counts it.
            return 0
        per_row = self._q + 2 * self._k if self.backward else self._q
        return self._sums() + per_row * self.sharding.local_len

    def held(self) -> Ints:
        """`[ranks * steps]`, what each rank holds while it computes, its kernels' own apart."""
        ranks, steps = self.sharding.world_size, self.route.num_steps
        change = np.zeros(ranks * (steps + 1), dtype=np.int64)
        for rank, first, last, weight in (*self._held_pieces(), *self._held_results()):
            row = rank * (steps + 1)
            # In float64: exact up to 2^53.
            change += np.bincount(row + first, weight, len(change)).astype(np.int64)
            change -= np.bincount(row + last + 1, weight, len(change)).astype(np.int64)
        held: Ints = change.reshape(ranks, steps + 1).cumsum(axis=1)[:, :-1]
        return held.ravel() + (0 if self._only_kernels() else self._sums())

    def _rows(self, hops: Hops) -> Ints:
        lengths = [chain.piece.length for chain in self.route.chains]
        return np.array(lengths, dtype=np.int64)[hops.chain]

    def _held_pieces(self) -> list[tuple[Ints, Ints, Ints, Ints]]:
        """(rank, first ring step, last, bytes)."""
        hops = self.route.guests
        weight = self.shape.guest_bytes(self.route.travels, backward=self.backward)
        pieces = [chain.piece for chain in self.route.chains]
        numbers: dict[Piece, int] = {}
        same = np.array([numbers.setdefault(x, len(numbers)) for x in pieces], dtype=np.int64)
        owners = np.array([piece.owner for piece in numbers], dtype=np.int64)
        rows = np.array([piece.length for piece in numbers], dtype=np.int64)
        copied = np.array([self._copied(piece) for piece in numbers], dtype=np.int64)
        # Both ends of each hop: the receiver from when its receive is posted until it attends; the
        # sender until the piece is there, and so from one hop to the next; the owner's copy too.
        ends = np.concatenate([hops.dst, hops.src])
        last = np.concatenate([hops.arrives, hops.arrives - 1])
        key = np.tile(same[hops.chain], 2) * self.sharding.world_size + ends
        found, index = np.unique(key, return_inverse=True)
        first = np.full(len(found), self.route.num_steps)
        until = np.zeros(len(found), dtype=np.int64)
        np.minimum.at(first, index, np.tile(hops.departs, 2))
        np.maximum.at(until, index, last)
        piece, rank = np.divmod(found, self.sharding.world_size)
        per_row = np.where(owners[piece] == rank, copied[piece], weight)
        return [(rank, first, until, rows[piece] * per_row)]

    def _copied(self, piece: Piece) -> int:
        """Bytes of each row of an own piece that must be copied to be sent."""
        if piece.length == self.sharding.local_len:
            return 0
        shape, weight = self.shape, 0
        if shape.batch > 1:
            weight = shape.guest_bytes(self.route.travels, backward=self.backward)
        if self.backward and self.route.travels == "q":
            # lse and delta are [B, H, T].
            per_head = 2 * self._lse
            weight -= per_head if shape.batch > 1 else 0
            weight += per_head if shape.batch * shape.heads > 1 else 0
        return weight

    def _held_results(self) -> list[tuple[Ints, Ints, Ints, Ints]]:
        """(rank, first ring step, last, bytes)."""
        hops = self.route.results
        if not len(hops):
            return []
        weight = self._rows(hops) * self._result
        sent_from = hops.departs
        if self.route.returns == "carried":
            # A rank that only passes a sum on sends the memory that it was received in.
            ranks, steps = self.sharding.world_size, self.route.num_steps
            guests, used = self.route.guests, attended_hops(self.route)
            own = (guests.chain[used] * ranks + guests.dst[used]) * steps + guests.arrives[used]
            made = np.isin((hops.chain * ranks + hops.src) * steps + hops.departs, own)
            sent_from = hops.departs + ~made
        # Posted before the compute of the step at which they depart; waited for after compute.
        return [
            (hops.src, sent_from, hops.arrives, weight),
            (hops.dst, hops.departs, hops.arrives, weight),
        ]

    def merging(self) -> Ints:
        """`[ranks * steps]`, what it takes to add results to the sums."""
        hops, steps = self.route.results, self.route.num_steps
        most = np.zeros(self.sharding.world_size * steps, dtype=np.int64)
        if not self.backward and len(hops):
            np.maximum.at(most, hops.dst * steps + hops.arrives, self._merge(self._rows(hops)))
        return most

    def _merge(self, rows: Ints) -> Ints:
        tile = self._wide if self._narrow else 0
        flags = self.shape.batch * self.shape.heads
        merged: Ints = rows * (2 * self._lse + flags) + np.minimum(rows, _MERGE_TILE) * tile
        return merged

    def most_at_work(self, lengths: Ints) -> Ints:
        """A bound on `at_work` for pieces of these lengths."""
        one, rows = np.ones_like(lengths), np.full_like(lengths, self.sharding.local_len)
        by_query = self.route.travels == "q"
        q_rows, k_rows = (lengths, rows) if by_query else (rows, lengths)
        several = self.mask.window is not None or self.mask.cu_seqlens is not None
        # Elsewhere only striped shards need more than one slice.
        several |= self.sharding.layout == "striped"
        flipped = self.mask.window is not None
        many, tiled = one * several, one * (several and self.shape.batch > 1)
        slices = _Slices(q_rows, k_rows, tiled, tiled, one * flipped, many, one * 0)
        work = self._kernels(slices, many * self._left(slices) * (1 if self.backward else 2))
        if self.backward:
            made = q_rows * by_query
            most: Ints = np.maximum(made * self._stand_in(), made * self._q + work)
            return most
        # The own shard comes first, into memory that counts as held.
        own: Ints = np.maximum(work, q_rows * self._q)
        own += by_query * q_rows * (self._wide + self._lse - self._result)
        return own

    def at_work(self, piece: Piece, rank: int) -> int:
        """What it takes to attend a piece, results apart."""
        here, own = self.sharding.shard(rank), piece.owner == rank
        q, k = (piece, here) if self.route.travels == "q" else (here, piece)
        parts = pair_slices(self.mask, self.sharding, q=q, k=k)
        found = _Slices.of(parts, batch=self.shape.batch, q=q, k=k)
        if self.backward:
            work = self._most(found)
            if self.route.travels == "kv":
                return work
            if own:
                # delta
                return max(work, q.length * (self._wide * (1 + 2 * self._narrow) + self._lse))
            return max(q.length * self._stand_in(), q.length * self._q + work)
        if not own and self.route.travels == "kv":
            return self._most(found)
        fresh = self._fresh(found, q.length, wide=self._is_wide(own))
        sums = self._wide + self._lse if own else self._result
        if own and self.sharding.world_size == 1:
            sums = 0
        return max(0, fresh - q.length * sums)

    def _is_wide(self, own: bool) -> bool:
        """Whether a fresh result is kept as it is summed up."""
        return self.sharding.world_size > 1 if own else self.route.returns == "carried"

    def _fresh(self, found: _Slices, rows: int, *, wide: bool) -> int:
        """What a fresh (out, lse) takes, from the first kernel to what it is kept as."""
        summed = rows * (self._wide + self._lse)
        both = summed + rows * self._q * self._narrow
        covering = np.flatnonzero(found.q_rows == rows)[:1]
        if not len(covering):
            return max(0 if wide else both, summed + self._most(found))
        one = found.rows(covering)
        alone = self._most(one, merged=False) + rows * self._lse * int(one.tiled[0])
        rest = found.rows(np.delete(np.arange(len(found.q_rows)), covering))
        if not len(rest.q_rows):
            return max(alone, both if wide else 0)
        return max(alone, both, summed + self._most(rest))

    def _stand_in(self) -> int:
        """Bytes of a row to make an out whose product with grad_out is delta."""
        flags = self.shape.batch * self.shape.heads
        return (3 + self._narrow) * self._wide + 3 * self._lse + flags

    def _most(self, slices: _Slices, *, merged: bool = True) -> int:
        if not len(slices.q_rows):
            return 0
        left = self._left(slices)
        if self.backward:
            before = np.concatenate([[0], left[:-1]])
        else:
            # The last one with gaps stays, and the last one without.
            before = _last(left, slices.gapped == 0) + _last(left, slices.gapped == 1)
        return int(self._kernels(slices, before, merged=merged).max())

    def _left(self, slices: _Slices) -> Ints:
        """What a slice leaves until the next one is done."""
        if self.backward:
            shares: Ints = slices.q_rows * self._q + 2 * slices.k_rows * self._k
            return shares
        result: Ints = slices.q_rows * (self._q + (1 + slices.tiled) * self._lse)
        return result

    def _kernels(self, now: _Slices, before: Ints, *, merged: bool = True) -> Ints:
        """What each slice takes while what those before left is still there."""
        lse = now.q_rows * self._lse
        on_q, on_k = now.q_rows * self._q, 2 * now.k_rows * self._k
        q_copies, k_copies = now.q_copied + now.flipped, now.k_copied + now.flipped
        if self.backward:
            # grad_out, q and out; the lse of tiles is copied even where they are a view.
            copies = 3 * q_copies * on_q + k_copies * on_k
            copies += (now.tiled * (self.shape.batch > 1) + now.flipped) * lse
            backward: Ints = before + copies + (1 + now.flipped) * (on_q + on_k)
            return backward
        copies = q_copies * on_q + k_copies * on_k
        running: Ints = before + copies + (1 + now.flipped) * on_q + 2 * lse
        if not merged:
            return running
        joined_lse = now.tiled * (1 - now.gapped) * lse
        merging = before + on_q + lse + joined_lse + self._merge(now.q_rows)
        forward: Ints = np.maximum(running, merging)
        return forward


def _last(sizes: Ints, among: npt.NDArray[np.bool_]) -> Ints:
    """For each row, the size of the last row before it that is among these; 0 if there is none."""
    last = np.maximum.accumulate(np.where(among, np.arange(len(sizes)), -1))
    last = np.concatenate([[-1], last[:-1]])
    found: Ints = np.where(last >= 0, sizes[last], 0)
    return found
