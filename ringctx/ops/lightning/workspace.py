"""Memory and products of the groups of one pass: every group uses the same buffers again.

Fresh memory is slow memory: the system clears it at the first touch, and whoever frees and takes
megabytes in a loop pays for that each time.
Shapes: n chunks in a group, B batch, H heads.
"""

from math import prod

import torch
from torch import Tensor

__all__ = ["Workspace", "add_product_"]


class Workspace:
    """Named buffers of one dtype; a name is one tensor at a time, whatever its shape."""

    def __init__(self, *, dtype: torch.dtype, device: torch.device) -> None:
        self.dtype, self._device = dtype, device
        self._buffers: dict[str, Tensor] = {}

    def empty(self, name: str | None, shape: tuple[int, ...]) -> Tensor:
        """Unwritten memory: the buffer of this name, or fresh without one."""
        if name is None:
            return torch.empty(shape, dtype=self.dtype, device=self._device)
        size = prod(shape)
        if name not in self._buffers or self._buffers[name].numel() < size:
            self._buffers[name] = torch.empty(size, dtype=self.dtype, device=self._device)
        return self._buffers[name][:size].view(shape)

    def product(self, x: Tensor, y: Tensor, name: str | None) -> Tensor:
        """X Y of every matrix of `[n, B, H, ., .]`."""
        out = self.empty(name, (*x.shape[:-1], y.shape[-1]))
        torch.bmm(_flat(x), _flat(y), out=_flat(out))
        return out


def add_product_(out: Tensor, x: Tensor, y: Tensor) -> None:
    """Add X Y of every matrix of `[n, B, H, ., .]`."""
    _flat(out).baddbmm_(_flat(x), _flat(y))


def _flat(x: Tensor) -> Tensor:
    """`[n, B, H, ., .]` as one batch of matrices."""
    return x.flatten(0, 2)
