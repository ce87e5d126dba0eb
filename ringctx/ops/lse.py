"""Join softmax results over disjoint keys.

One idea: (out, lse) of two key sets give the (out, lse) of their union exactly, in any order, so
attention can be computed block by block. Price: one pass over `out` per block, in fp32.
Rows that saw no key (lse = -inf) are masked explicitly: the popular sigmoid form gives NaN there.
Shapes: B batch, T query tokens, H heads, D head dim.
"""

import torch
from torch import Tensor

from ringctx.errors import LayoutError

__all__ = ["merge", "merge_"]

# Query rows merged at a time, by device: bounds the copy of a bf16 block in the accumulator's
# dtype, and on CUDA the launches.
_TILES = {"cpu": 512, "cuda": 16384}


def merge(out: Tensor, lse: Tensor, block_out: Tensor, block_lse: Tensor) -> tuple[Tensor, Tensor]:
    """Join two softmax results over disjoint keys, as if computed at once.

    Args:
        out: `[B, T, H, D]`, fp32 or fp64; 0 where no key was seen.
        lse: `[B, H, T]`, same dtype, natural log; -inf where no key was seen.
        block_out: as `out`, any floating dtype.
        block_lse: as `lse`.

    Returns:
        The joined `(out, lse)`, same shapes and dtype as `out` and `lse`.

    Raises:
        LayoutError: if the shapes disagree.
    """
    out, lse = out.clone(), lse.clone()
    merge_(out, lse, block_out, block_lse)
    return out, lse


def merge_(out: Tensor, lse: Tensor, block_out: Tensor, block_lse: Tensor) -> None:
    """`merge` that overwrites `out` and `lse`, which may be views of some rows of larger ones."""
    batch, tokens, heads, _ = out.shape
    lse_shape = (batch, heads, tokens)
    if not (out.shape == block_out.shape and lse.shape == block_lse.shape == lse_shape):
        shapes = [tuple(x.shape) for x in (out, lse, block_out, block_lse)]
        raise LayoutError(f"out, lse, block_out, block_lse have shapes {shapes} that do not match")
    joined = torch.logaddexp(lse, block_lse)
    # The block's share of each row's softmax; where both saw nothing, -inf - -inf is no number.
    share = (block_lse - joined).exp_().masked_fill_(block_lse == -torch.inf, 0.0)
    lse.copy_(joined)
    share = share.transpose(1, 2).unsqueeze(-1)
    tile = _TILES.get(out.device.type, _TILES["cpu"])
    for start in range(0, tokens, tile):
        rows = slice(start, start + tile)
        out[:, rows].lerp_(block_out[:, rows].to(out.dtype), share[:, rows])
