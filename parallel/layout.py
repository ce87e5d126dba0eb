"""Which tokens of a sequence each rank holds.

One idea: a layout is a pure map from (rank, world_size, seq_len) to positions; sharding, unsharding
and masks all follow from it. The sequence A B C D E F G H on 2 ranks:

    contiguous   rank 0: A B C D    rank 1: E F G H    causal work grows with the rank
    zigzag       rank 0: A B G H    rank 1: C D E F    every ring step is equal work
    striped      rank 0: A C E G    rank 1: B D F H    equal work too, to within one diagonal

Positions rise within a shard in all three, so a rank's own block pair is one causal square.
Source: zigzag: zhuzilin/ring-flash-attention#2; striped: Brandon et al. 2023 (arXiv 2311.09431).
"""

from dataclasses import dataclass
from typing import get_args

import torch
from torch import Tensor

from ringctx.config import Layout
from ringctx.errors import LayoutError
from ringctx.parallel import comm

__all__ = [
    "LAYOUTS",
    "Piece",
    "Run",
    "Sharding",
    "check_layout",
    "local_len",
    "positions",
    "shard",
    "unshard",
]

LAYOUTS: tuple[Layout, ...] = get_args(Layout)


@dataclass(frozen=True, slots=True)
class Run:
    """Local rows [start, start + length) that hold positions first, first + stride, ..."""

    start: int
    length: int
    first: int
    stride: int


@dataclass(frozen=True, slots=True)
class Piece:
    """Rows [start, stop) of the shard of rank `owner`."""

    owner: int
    start: int
    stop: int

    @property
    def length(self) -> int:
        """Rows in it."""
        return self.stop - self.start

    @property
    def rows(self) -> slice:
        """To index the owner's shard with."""
        return slice(self.start, self.stop)


@dataclass(frozen=True, slots=True)
class Sharding:
    """A sequence, and how its tokens are spread over `world_size` ranks."""

    seq_len: int
    world_size: int
    layout: str

    def __post_init__(self) -> None:
        """Raise LayoutError unless the sequence divides."""
        local_len(self.seq_len, world_size=self.world_size, layout=self.layout)

    @property
    def local_len(self) -> int:
        """Tokens of one shard."""
        return self.seq_len // self.world_size

    def runs(self, rank: int) -> tuple[Run, ...]:
        """The shard of `rank` as pieces of evenly spaced positions, in local order."""
        n = self.local_len
        if self.layout == "striped":
            return (Run(0, n, rank, self.world_size),)
        if self.layout == "contiguous" or self.world_size == 1:
            return (Run(0, n, rank * n, 1),)
        half = n // 2
        back = (2 * self.world_size - 1 - rank) * half
        return (Run(0, half, rank * half, 1), Run(half, half, back, 1))

    def shard(self, rank: int) -> Piece:
        """All that `rank` holds."""
        return Piece(rank, 0, self.local_len)


def check_layout(layout: str) -> None:
    """Raise LayoutError unless `layout` is one of `LAYOUTS`."""
    if layout not in LAYOUTS:
        raise LayoutError(f"layout={layout!r} is not known; choose one of {', '.join(LAYOUTS)}")


def local_len(seq_len: int, *, world_size: int, layout: str) -> int:
    """Tokens that each rank holds of a sequence of `seq_len` tokens.

    Raises:
        LayoutError: if the layout is unknown or the sequence does not divide.
    """
    check_layout(layout)
    if world_size < 1:
        raise LayoutError(f"world_size={world_size} must be at least 1")
    # On one rank every layout is the identity, so any length will do.
    two_blocks = layout == "zigzag" and world_size > 1
    divisor = 2 * world_size if two_blocks else world_size
    if seq_len < 1 or seq_len % divisor:
        raise LayoutError(_does_not_divide(seq_len, divisor=divisor, two_blocks=two_blocks))
    return seq_len // world_size


def _does_not_divide(seq_len: int, *, divisor: int, two_blocks: bool) -> str:
    if two_blocks:
        rule = f"2 * world_size = {divisor:,} (zigzag gives each rank two blocks)"
    else:
        rule = f"world_size = {divisor:,}"
    below = max(seq_len, 0) // divisor * divisor
    if below == 0:
        way_out = f"the shortest valid length is {divisor:,}"
    else:
        way_out = f"the nearest valid lengths are {below:,} and {below + divisor:,}"
    return f"seq_len={seq_len:,} is not divisible by {rule};\n{way_out}"


def positions(seq_len: int, *, rank: int, world_size: int, layout: str) -> Tensor:
    """Index within the sequence of each token that `rank` holds, rising.

    Args:
        seq_len: length of the whole sequence.
        rank: rank within the group that shares the sequence.
        world_size: size of that group.
        layout: one of `LAYOUTS`.

    Returns:
        int64 `[seq_len / world_size]`, on the CPU.

    Raises:
        LayoutError: if the layout is unknown, the length does not divide, or there is no such rank.
    """
    local_len(seq_len, world_size=world_size, layout=layout)
    if not 0 <= rank < world_size:
        raise LayoutError(f"rank={rank} is not in a group of world_size={world_size}")
    runs = Sharding(seq_len, world_size, layout).runs(rank)
    return torch.cat([run.first + run.stride * torch.arange(run.length) for run in runs])


def shard(x: Tensor, *, rank: int, world_size: int, layout: str, dim: int = 1) -> Tensor:
    """Cut a whole tensor down to the tokens that `rank` holds. Pure; differentiable.

    Args:
        x: the whole sequence along `dim`; any dtype, any other dimensions.
        rank: rank within the group that shares the sequence.
        world_size: size of that group.
        layout: one of `LAYOUTS`.
        dim: the token dimension.

    Returns:
        A new tensor, `dim` cut to `seq_len / world_size`.

    Raises:
        LayoutError: as `positions`.
    """
    index = positions(x.shape[dim], rank=rank, world_size=world_size, layout=layout)
    return x.index_select(dim, index.to(x.device))


def unshard(x: Tensor, *, group: comm.Group, layout: str, dim: int = 1) -> Tensor:
    """Rebuild the whole tensor from every rank's shard, on every rank. No gradient flows back.

    Each rank sends its shard to every other: for checks and small results, not for training steps.

    Args:
        x: this rank's shard; the same shape and dtype on every rank.
        group: the ranks that share the sequence, in layout order.
        layout: the layout that the shards are in.
        dim: the token dimension.

    Returns:
        The whole tensor, `dim` grown by the world size.

    Raises:
        LayoutError: as `positions`, or if there is no group.
    """
    world_size, rank = comm.group_size(group), comm.group_rank(group)
    seq_len = x.shape[dim] * world_size
    local_len(seq_len, world_size=world_size, layout=layout)
    x = x.detach().contiguous()
    shards = {peer: x if peer == rank else torch.empty_like(x) for peer in range(world_size)}
    peers = [peer for peer in shards if peer != rank]
    sends = [comm.Transfer(x, peer, tag=0) for peer in peers]
    recvs = [comm.Transfer(shards[peer], peer, tag=0) for peer in peers]
    comm.exchange(sends, recvs, group=group).wait()

    shape = list(x.shape)
    shape[dim] = seq_len
    whole = x.new_empty(shape)
    for peer, part in shards.items():
        index = positions(seq_len, rank=peer, world_size=world_size, layout=layout)
        whole.index_copy_(dim, index.to(x.device), part)
    return whole
