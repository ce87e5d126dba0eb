"""Attention kernels that take time and no CPU: a device beside the processor, emulated by sleep.

One idea: with more ranks than cores, real kernels of different ranks slow one another down, and a
comparison of schedules measures that. These sleep for as long as `flops` would need for the visible
pairs, and return zeros. What is sent, and when, stays real; the numbers in it are not attention.
Shapes: B batch, T query tokens, S key tokens, H heads, D head dim.
"""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from unittest import mock

import torch
from torch import Tensor

from ringctx.ops import pair_attention
from ringctx.ops.pair_attention import PairSlice

__all__ = ["EmulatedKernels"]

# Two products of matrices forward; five backward.
_BACKWARD_FACTOR = 2.5


@dataclass(frozen=True)
class EmulatedKernels:
    """The functions of `ops/pair_attention.py`, on a device of `flops` FLOP/s."""

    flops: float

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Every call of attention in this process runs these kernels inside the block."""
        with mock.patch.multiple(
            pair_attention,
            attend_pair=self.attend_pair,
            attend_pair_=self.attend_pair_,
            differentiate_pair=self.differentiate_pair,
            differentiate_pair_=self.differentiate_pair_,
        ):
            yield

    def seconds(self, q: Tensor, slices: Sequence[PairSlice], *, factor: float = 1.0) -> float:
        """What the visible pairs of `slices` take: four FLOP for each pair, head and dim."""
        batch, _, heads, head_dim = q.shape
        pairs = sum(part.pairs for part in slices)
        return factor * 4.0 * pairs * batch * heads * head_dim / self.flops

    def attend_pair(
        self, q: Tensor, k: Tensor, v: Tensor, slices: Sequence[PairSlice], *, scale: float
    ) -> tuple[Tensor, Tensor]:
        """Zeros: `[B, T, H, D]` in the kernel's dtype where one slice fills it, and `[B, H, T]`."""
        time.sleep(self.seconds(q, slices))
        wide = torch.promote_types(q.dtype, torch.float32)
        whole = len(slices) == 1 and slices[0].q == slice(0, q.shape[1])
        lse = q.new_zeros(q.shape[0], q.shape[2], q.shape[1], dtype=wide)
        return torch.zeros_like(q, dtype=q.dtype if whole else wide), lse

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
        """Leave the accumulators as they are."""
        time.sleep(self.seconds(q, slices))

    def differentiate_pair(
        self,
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
        """Zeros."""
        time.sleep(self.seconds(q, slices, factor=_BACKWARD_FACTOR))
        return torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)

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
        """Leave the accumulators as they are."""
        time.sleep(self.seconds(q, slices, factor=_BACKWARD_FACTOR))
