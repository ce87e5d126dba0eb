"""Attention of a piece of queries with a piece of keys under any mask that compiles into slices.

One idea: a mask is never built. What it lets through of a pair of pieces is a list of disjoint
slices, each of a kind that the block kernels mask themselves; a row's results over its slices are
merged. Equal squares along a diagonal (the tiles of a window, documents of one length) are one
slice of `count` tiles and one batched kernel call:

    full            causal          anticausal      causal, count=3
    # # # #         # . . .         # # # #         # . . . . .
    # # # #         # # . .         . # # #         # # . . . .
    # # # #         # # # .         . . # #         . . # . . .
                    # # # #         . . . #         . . # # . .   and so on

Price: one pass over the rows of a slice in fp32 to merge it; with more than one batch row, a copy
of what a slice of several tiles reads.
Shapes: B batch, T query tokens, S key tokens, H heads, Hkv key/value heads, D head dim.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ringctx.ops.block_attention import BlockMask, block_backward, block_forward
from ringctx.ops.lse import merge_

__all__ = [
    "PairSlice",
    "attend_pair",
    "attend_pair_",
    "differentiate_pair",
    "differentiate_pair_",
]

# Batch of one CUDA launch: tiles are a dimension of its grid.
_MOST_TILES = 65_535


@dataclass(frozen=True, slots=True)
class PairSlice:
    """`count` equal tiles, one after the other down a diagonal; in rows of the two pieces.

    Tile i is queries [q_start + i * (q_len + gap), + q_len) against keys
    [k_start + i * (k_len + gap), + k_len). Several tiles are always squares.
    """

    q_start: int
    q_len: int
    k_start: int
    k_len: int
    # causal: query i of a tile sees its keys 0 .. i; anticausal: keys i and later.
    kind: BlockMask
    count: int = 1
    # Rows, and as many keys, between one tile and the next.
    gap: int = 0

    @property
    def q(self) -> slice:
        """The query rows from the first tile to the last, to index with."""
        return slice(self.q_start, self.q_start + _spanned(self.q_len, self))

    @property
    def k(self) -> slice:
        """The key rows from the first tile to the last, to index with."""
        return slice(self.k_start, self.k_start + _spanned(self.k_len, self))

    @property
    def pairs(self) -> int:
        """Visible (query, key) pairs."""
        if self.kind == "full":
            return self.count * self.q_len * self.k_len
        return self.count * (self.q_len * (self.q_len + 1) // 2)


def _spanned(length: int, part: PairSlice) -> int:
    """Rows from the first tile of this length to the last."""
    return part.count * length + (part.count - 1) * part.gap


def _launches(slices: Sequence[PairSlice], *, batch: int) -> Iterator[PairSlice]:
    """The same slices, none with more tiles than a kernel takes as its batch."""
    most = max(1, _MOST_TILES // batch)
    for part in slices:
        for first in range(0, part.count, most):
            rows = first * (part.q_len + part.gap)
            yield (
                part
                if part.count <= most
                else replace(
                    part,
                    q_start=part.q_start + rows,
                    k_start=part.k_start + rows,
                    count=min(most, part.count - first),
                )
            )


def attend_pair(
    q: Tensor, k: Tensor, v: Tensor, slices: Sequence[PairSlice], *, scale: float
) -> tuple[Tensor, Tensor]:
    """Attend a pair of pieces.

    Args:
        q: `[B, T, H, D]`; may be a view of some rows, like k and v.
        k: `[B, S, Hkv, D]`.
        v: `[B, S, Hkv, D]`.
        slices: disjoint, in rows of q and k; there may be none.
        scale: factor on the scores.

    Returns:
        `(out, lse)`: `[B, T, H, D]`, and `[B, H, T]`, natural log, both in fp32 (fp64 for fp64);
        out 0 and lse -inf for a query that sees no key. If one slice is all there is and it covers
        every row, they are the kernel's own result, out in the dtype of q.
    """
    rest = list(_launches(slices, batch=q.shape[0]))
    covering = [part for part in rest if _covers(part, q.shape[1])]
    if covering:
        rest.remove(covering[0])
        out, lse = _joined(*_forward(q, k, v, covering[0], scale=scale), batch=q.shape[0])
        if not rest:
            return out, lse
        out = out.to(lse.dtype)
    else:
        wide = torch.promote_types(q.dtype, torch.float32)
        out = torch.zeros_like(q, dtype=wide, memory_format=torch.contiguous_format)
        lse = out.new_full((q.shape[0], q.shape[2], q.shape[1]), -torch.inf)
    attend_pair_(out, lse, q, k, v, rest, scale=scale)
    return out, lse


def attend_pair_(
    out: Tensor,
    lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    slices: Sequence[PairSlice],
    *,
    scale: float,
) -> None:
    """Attend a pair of pieces and merge the result into what the queries saw so far.

    Args:
        out: `[B, T, H, D]`, fp32 or fp64; may be a view of some rows. Overwritten.
        lse: `[B, H, T]`, same dtype. Overwritten.
        q: as in `attend_pair`.
        k: as in `attend_pair`; keys that the queries have not seen yet.
        v: as in `attend_pair`.
        slices: as in `attend_pair`.
        scale: as in `attend_pair`.
    """
    for part in _launches(slices, batch=q.shape[0]):
        tile_out, tile_lse = _forward(q, k, v, part, scale=scale)
        if part.gap == 0:
            result = _joined(tile_out, tile_lse, batch=q.shape[0])
            rows = part.count * part.q_len
            place = out.narrow(1, part.q_start, rows), lse.narrow(2, part.q_start, rows)
            merge_(*place, *result)
            continue
        # Between the tiles lie rows that this slice must not touch.
        places = _row_tiles(out, part.q_start, part.q_len, part), _lse_tiles(lse, part)
        results = (x.unflatten(0, (q.shape[0], -1)) for x in (tile_out, tile_lse))
        for batch_row in zip(*(x.unbind() for x in (*places, *results)), strict=True):
            merge_(*batch_row)


def differentiate_pair(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    out: Tensor,
    lse: Tensor,
    slices: Sequence[PairSlice],
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """A pair's share of the gradients; arguments as for `differentiate_pair_`.

    Returns:
        Gradients of q, k and v, in fp32 (fp64 for fp64). If one slice is all there is and it covers
        every query and key, they are the kernel's own result, in the dtype of q.
    """
    inputs = (grad_out, q, k, v)
    if len(slices) == 1 and slices[0].count == 1:
        part = slices[0]
        if (part.q_len, part.k_len) == (q.shape[1], k.shape[1]):
            return block_backward(*inputs, out=out, lse=lse, mask=part.kind, scale=scale)
    wide = torch.promote_types(q.dtype, torch.float32)
    grad_q, grad_k, grad_v = (torch.zeros_like(x, dtype=wide) for x in (q, k, v))
    differentiate_pair_(
        grad_q, grad_k, grad_v, *inputs, out=out, lse=lse, slices=slices, scale=scale
    )
    return grad_q, grad_k, grad_v


def differentiate_pair_(
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
    """Add a pair's share of the gradients, given the queries' result over all their keys.

    Args:
        grad_q: `[B, T, H, D]`, fp32 or fp64; may be a view of some rows. Added to.
        grad_k: `[B, S, Hkv, D]`, likewise.
        grad_v: `[B, S, Hkv, D]`, likewise.
        grad_out: gradient of `out`, `[B, T, H, D]`.
        q: as in `attend_pair`.
        k: as in `attend_pair`.
        v: as in `attend_pair`.
        out: final output of the queries, `[B, T, H, D]`.
        lse: final lse of the queries, `[B, H, T]`.
        slices: as in `attend_pair`.
        scale: as in `attend_pair`.
    """
    for part in _launches(slices, batch=q.shape[0]):
        queries = (_batched(x, part.q_start, part.q_len, part) for x in (grad_out, q))
        keys = (_batched(x, part.k_start, part.k_len, part) for x in (k, v))
        shares = block_backward(
            *queries,
            *keys,
            out=_batched(out, part.q_start, part.q_len, part),
            lse=_lse_tiles(lse, part).flatten(0, 1),
            mask=part.kind,
            scale=scale,
        )
        places = (
            (grad_q, part.q_start, part.q_len),
            (grad_k, part.k_start, part.k_len),
            (grad_v, part.k_start, part.k_len),
        )
        for (grad, start, length), share in zip(places, shares, strict=True):
            tiles = _row_tiles(grad, start, length, part)
            tiles += share.unflatten(0, (q.shape[0], part.count))


def _covers(part: PairSlice, rows: int) -> bool:
    """Whether every query row lies in some tile."""
    return part.count * part.q_len == rows


def _forward(
    q: Tensor, k: Tensor, v: Tensor, part: PairSlice, *, scale: float
) -> tuple[Tensor, Tensor]:
    """All tiles at once: `[B * count, q_len, H, D]` and `[B * count, H, q_len]`."""
    queries = _batched(q, part.q_start, part.q_len, part)
    keys, values = (_batched(x, part.k_start, part.k_len, part) for x in (k, v))
    return block_forward(queries, keys, values, mask=part.kind, scale=scale)


def _row_tiles(x: Tensor, start: int, length: int, part: PairSlice) -> Tensor:
    # [B, T, H, D] -> [B, count, length, H, D], a view
    rows = x.narrow(1, start, _spanned(length, part))
    return rows.unfold(1, length, length + part.gap).movedim(-1, 2)


def _lse_tiles(lse: Tensor, part: PairSlice) -> Tensor:
    # [B, H, T] -> [B, count, H, q_len], a view
    rows = lse.narrow(2, part.q_start, _spanned(part.q_len, part))
    return rows.unfold(2, part.q_len, part.q_len + part.gap).transpose(1, 2)


def _batched(x: Tensor, start: int, length: int, part: PairSlice) -> Tensor:
    # [B, T, H, D] -> [B * count, length, H, D]; a view for one batch row, or for one tile
    return _row_tiles(x, start, length, part).flatten(0, 1)


def _joined(tile_out: Tensor, tile_lse: Tensor, *, batch: int) -> tuple[Tensor, Tensor]:
    """Tiles without gaps as rows: `[B, T, H, D]` and `[B, H, T]`."""
    out = tile_out.unflatten(0, (batch, -1)).flatten(1, 2)
    lse = tile_lse.unflatten(0, (batch, -1)).transpose(1, 2).flatten(2, 3)
    return out, lse
