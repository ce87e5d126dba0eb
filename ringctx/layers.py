"""What works on one token at a time: matrices, norms, the MLP and the rotation by position.

Weights may be stored in another dtype than a layer computes in, so that the same model runs with
fp32 weights (DDP) and with bf16 ones (FSDP2).
Source: RMSNorm arXiv 1910.07467; SwiGLU 2002.05202; RoPE 2104.09864.
Shapes: B rows, T local tokens, E width, H heads, D head dim.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["Linear", "RMSNorm", "RotaryTable", "SwiGLU", "rotary_table", "rotate"]

RotaryTable = tuple[Tensor, Tensor]
"""Cosine and sine of each token's angles, `[T, D/2]`, float64; see `rotary_table`."""


class Linear(nn.Linear):
    """A matrix without bias that computes in the dtype of its input.

    So weights may stay in fp32 (DDP) or arrive in bf16 (FSDP2) and the model computes the same.
    """

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """`[..., in]` to `[..., out]`."""
        return F.linear(x, self.weight.to(x.dtype))


class RMSNorm(nn.RMSNorm):
    """Root-mean-square norm (arXiv 1910.07467), in at least fp32 whatever the input."""

    def forward(self, x: Tensor) -> Tensor:
        """Over the last dim; returns the input's dtype."""
        wide = torch.promote_types(x.dtype, torch.float32)
        normed = F.rms_norm(x.to(wide), self.normalized_shape, self.weight.to(wide), self.eps)
        return normed.to(x.dtype)


class SwiGLU(nn.Module):
    """down(silu(gate(x)) * up(x)) (arXiv 2002.05202, equation 6).

    Args:
        dim: E.
        width: inner width.
    """

    def __init__(self, dim: int, *, width: int) -> None:
        super().__init__()
        self.gate = Linear(dim, width)
        self.up = Linear(dim, width)
        self.down = Linear(width, dim)

    def forward(self, x: Tensor) -> Tensor:
        """`[B, T, E]` to `[B, T, E]`."""
        out: Tensor = self.down(F.silu(self.gate(x)) * self.up(x))
        return out


def rotary_table(positions: Tensor, *, head_dim: int, theta: float) -> RotaryTable:
    """Cosine and sine of position * theta^(-2i/D) (arXiv 2104.09864, equation 15), `[T, D/2]`.

    Angles are float64: at position 4 M an fp32 angle is off by a quarter of a radian.
    """
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float64, device=positions.device)
    angles = positions.double()[:, None] * theta ** (-exponents / head_dim)
    return angles.cos(), angles.sin()


def rotate(x: Tensor, rotary: RotaryTable) -> Tensor:
    """Rotate the pairs (x[i], x[i + D/2]) of each head by its position's angle.

    Args:
        x: `[B, T, H, D]`.
        rotary: cosine and sine, `[T, D/2]`.

    Returns:
        The same shape and dtype; the rotation is done in at least fp32.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    cos, sin = (table.to(wide)[:, None, :] for table in rotary)
    first, second = x.to(wide).chunk(2, dim=-1)
    rotated = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
    return rotated.to(x.dtype)
