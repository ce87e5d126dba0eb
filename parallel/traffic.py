"""What one token of a travelling piece weighs, out and home, in each pass.

One idea: a schedule is chosen by bytes, so they are written down once, for the code that moves them
and for the formulas that predict them. H query heads, Hkv key/value heads, D head dim, e bytes per
element, a bytes per accumulator (4; 8 for fp64); per token:

    travels    forward, out    forward, home    backward, out       backward, home
    K/V        2 Hkv D e       -                2 Hkv D e           2 Hkv D a     dK, dV
    Q          H D e           H (D x + a)      2 H D e + 2 H a     H D a         dQ

x is e where each result goes straight home, a where it is a sum that is carried along. Backward
ships delta = rowsum(dO * out) in place of out (BurstAttention, arXiv 2403.09347).
"""

from dataclasses import dataclass

import torch

from ringctx.parallel.need import Travels
from ringctx.parallel.routes import Returns

__all__ = ["Shape"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """The sizes of one attention call that bytes and FLOPs follow from."""

    batch: int = 1
    heads: int
    kv_heads: int
    head_dim: int
    dtype: torch.dtype = torch.bfloat16

    @property
    def accumulator_dtype(self) -> torch.dtype:
        """In which partial results are added up: at least fp32."""
        return torch.promote_types(self.dtype, torch.float32)

    def guest_bytes(self, travels: Travels, *, backward: bool) -> int:
        """Bytes per token of what leaves its owner."""
        element, wide = self.dtype.itemsize, self.accumulator_dtype.itemsize
        if travels == "kv":
            return self.batch * 2 * self.kv_heads * self.head_dim * element
        row = self.head_dim * element
        return self.batch * self.heads * (2 * row + 2 * wide if backward else row)

    def result_bytes(self, travels: Travels, returns: Returns, *, backward: bool) -> int:
        """Bytes per token of what comes home."""
        element, wide = self.dtype.itemsize, self.accumulator_dtype.itemsize
        if travels == "kv":
            return self.batch * 2 * self.kv_heads * self.head_dim * wide if backward else 0
        if backward:
            return self.batch * self.heads * self.head_dim * wide
        out = element if returns == "direct" else wide
        return self.batch * self.heads * (self.head_dim * out + wide)

    def flops(self, pairs: float, *, backward: bool) -> float:
        """Of attending so many visible (query, key) pairs; backward computes the scores again."""
        products = 5 if backward else 2
        return 2.0 * products * self.batch * self.heads * self.head_dim * pairs
