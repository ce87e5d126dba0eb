"""The matrix products of chunked linear attention and nothing else: what no op on them can beat.

One idea: every product that the forward and backward of a chunk need, in groups of chunks that fit
a cache, on chunk tensors that are contiguous and allocated before. No masks, no decays, no state
running through the chunks, no layout to change, nothing to allocate; the numbers mean nothing.
Shapes: N chunks times heads, C tokens of a chunk, D head dim.
"""

from copy import copy
from dataclasses import dataclass, replace

import torch
from torch import Tensor

__all__ = ["ChunkProducts", "Sizes"]

# Forward 4, backward 9; one more where backward computes the states again.
_PRODUCTS, _STATES_AGAIN = 13, 1


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Of one call, B = 1."""

    tokens: int
    heads: int
    head_dim: int
    chunk_len: int

    @property
    def chunks(self) -> int:
        """N: over all heads."""
        return -(-self.tokens // self.chunk_len) * self.heads

    @property
    def state_bytes(self) -> int:
        """Of one fp32 state for every chunk and head."""
        return 4 * self.chunks * self.head_dim**2


class ChunkProducts:
    """Forward and backward as products alone.

    Args:
        sizes: of the call.
        group: chunks times heads of one batched product.
    """

    def __init__(self, sizes: Sizes, *, group: int) -> None:
        self.sizes, self.group = sizes, group
        n, c, d = sizes.chunks, sizes.chunk_len, sizes.head_dim
        generator = torch.Generator().manual_seed(0)
        self._inputs = [torch.randn(n, c, d, generator=generator) for _ in range(4)]
        # out, dq, dk, dv
        self._results = [torch.zeros(n, c, d) for _ in range(4)]
        # S and G
        self._states = [torch.zeros(n, d, d) for _ in range(2)]
        self._scores = [torch.zeros(min(group, n), c, c) for _ in range(2)]

    def first(self, tokens: int) -> "ChunkProducts":
        """The same with fewer tokens, in the same memory."""
        fewer = copy(self)
        fewer.sizes = replace(self.sizes, tokens=tokens)
        return fewer

    def flops(self, *, states_again: bool) -> float:
        """Of `run`: two for every multiply-add."""
        n, c, d = self.sizes.chunks, self.sizes.chunk_len, self.sizes.head_dim
        # Scores and what is made of them: 2 forward, 5 backward; those with a state: 2 and 4.
        by_scores, by_states = 7, _PRODUCTS - 7 + (_STATES_AGAIN if states_again else 0)
        return 2.0 * n * (by_scores * c * c * d + by_states * c * d * d)

    def run(self, *, states_again: bool) -> None:
        """Every product once.

        Args:
            states_again: whether backward computes what each chunk adds to the state anew, instead
                of finding the states kept.
        """
        for start in range(0, self.sizes.chunks, self.group):
            rows = slice(start, min(start + self.group, self.sizes.chunks))
            q, k, v, _ = (x[rows] for x in self._inputs)
            out, s = self._results[0][rows], self._states[0][rows]
            p = self._scores[0][: len(q)]
            _product(k.mT, v, s)
            _product(q, k.mT, p)
            _product(p, v, out)
            _add_product(q, s, out)
        for start in range(0, self.sizes.chunks, self.group):
            rows = slice(start, min(start + self.group, self.sizes.chunks))
            q, k, v, grad_out = (x[rows] for x in self._inputs)
            _, dq, dk, dv = (x[rows] for x in self._results)
            s, g = (x[rows] for x in self._states)
            p, dp = (x[: len(q)] for x in self._scores)
            if states_again:
                _product(k.mT, v, s)
            _product(q.mT, grad_out, g)
            _product(q, k.mT, p)
            _product(grad_out, v.mT, dp)
            _product(dp, k, dq)
            _add_product(grad_out, s.mT, dq)
            _product(dp.mT, q, dk)
            _add_product(v, g.mT, dk)
            _product(p.mT, grad_out, dv)
            _add_product(k, g, dv)


def _product(a: Tensor, b: Tensor, out: Tensor) -> None:
    torch.bmm(a, b, out=out)


def _add_product(a: Tensor, b: Tensor, out: Tensor) -> None:
    # The sum costs nothing: products can add to what is there.
    torch.baddbmm(out, a, b, out=out)
