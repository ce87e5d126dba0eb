"""Sequences that do not divide: padded to the next length that does.

The padding stands at the end, behind every real token. With a causal mask (windows and sinks too)
no real token sees what comes after it, so outputs and gradients of real tokens stay as they are. A
mask that is not causal lets them see it: there `pad_cu_seqlens` makes the padding a document of its
own, which nobody else sees; with documents it is needed in any case. The outputs of the padding
mean nothing: cut them off with `unpad`, or leave them out of the loss (labels: value=-100).
Price: at most 2 * world_size - 1 tokens in all.
"""

import torch
from torch import Tensor

from ringctx.errors import LayoutError
from ringctx.parallel.layout import local_len

__all__ = ["pad_cu_seqlens", "pad_to_layout", "padded_len", "unpad"]


def padded_len(seq_len: int, *, world_size: int, layout: str) -> int:
    """The shortest length from `seq_len` up that the layout can spread.

    Raises:
        LayoutError: if the layout is unknown, or there is no rank or no token.
    """
    if seq_len < 1:
        raise LayoutError(f"seq_len={seq_len} leaves nothing to pad; it must be at least 1")
    # Zigzag cuts two blocks for each rank, but on one rank every length will do.
    blocks = world_size * (2 if layout == "zigzag" and world_size > 1 else 1)
    length = -(-seq_len // max(blocks, 1)) * blocks
    local_len(length, world_size=world_size, layout=layout)
    return length


def pad_to_layout(
    x: Tensor, *, world_size: int, layout: str, dim: int = 1, value: float = 0
) -> tuple[Tensor, int]:
    """Lengthen a whole tensor, before it is sharded, to what the layout can spread.

    Args:
        x: the whole sequence along `dim`; any dtype, any other dimensions.
        world_size: ranks that share the sequence.
        layout: one of `layout.LAYOUTS`.
        dim: the token dimension.
        value: what the padding holds.

    Returns:
        `(padded, seq_len)`: a tensor with `padded_len(seq_len)` tokens, or x itself if it divides,
        and the length that it had. Gradients flow to x.

    Raises:
        LayoutError: as `padded_len`.
    """
    seq_len = x.shape[dim]
    missing = padded_len(seq_len, world_size=world_size, layout=layout) - seq_len
    if not missing:
        return x, seq_len
    shape = list(x.shape)
    shape[dim] = missing
    return torch.cat([x, x.new_full(shape, value)], dim), seq_len


def unpad(x: Tensor, *, seq_len: int, dim: int = 1) -> Tensor:
    """Cut a whole tensor back to its real tokens, as a view.

    Args:
        x: what became of a padded tensor, unsharded.
        seq_len: as `pad_to_layout` returned it.
        dim: the token dimension.

    Raises:
        LayoutError: if x is shorter than that.
    """
    if not 0 < seq_len <= x.shape[dim]:
        raise LayoutError(f"seq_len={seq_len:,} does not lie within the {x.shape[dim]:,} tokens")
    return x.narrow(dim, 0, seq_len)


def pad_cu_seqlens(
    cu_seqlens: Tensor | None, *, seq_len: int, world_size: int, layout: str
) -> Tensor:
    """Where documents begin and end once the sequence is padded: the padding is one more.

    Args:
        cu_seqlens: int32 `[documents + 1]`, over the real tokens; None is one document.
        seq_len: real tokens.
        world_size: ranks that share the sequence.
        layout: one of `layout.LAYOUTS`.

    Returns:
        int32, for the padded sequence.

    Raises:
        LayoutError: as `padded_len`, or if cu_seqlens ends elsewhere.
    """
    length = padded_len(seq_len, world_size=world_size, layout=layout)
    if cu_seqlens is None:
        cu_seqlens = torch.tensor([0, seq_len], dtype=torch.int32)
    if cu_seqlens.ndim != 1 or not len(cu_seqlens) or int(cu_seqlens[-1]) != seq_len:
        raise LayoutError(
            f"cu_seqlens={cu_seqlens.tolist()} must end at seq_len={seq_len:,}, before the padding"
        )
    return (
        cu_seqlens
        if length == seq_len
        else torch.cat([cu_seqlens, cu_seqlens.new_tensor([length])])
    )
