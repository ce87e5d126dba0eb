"""What other libraries mean by the same words: decays, scale, states and layouts, converted.

Ours: S_t = exp(g_t) S_{t-1} + k_t^T v_t and o_t = scale q_t S_t with g <= 0, scale 1 / sqrt(K),
tokens before heads. None of the others has all four the same, so a state or a slope that is moved
as it is makes a model that runs and is wrong. Read in: flash-linear-attention 0.6.0
(`chunk_simple_gla`, `chunk_lightning_attn`), transformers 5.24 (`MiniMaxLightningAttention`),
OpenNLPLab/lightning-attention d15c385 (`lightning_attn2`), whose blocks LASP shares.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from ringctx.errors import LayoutError

__all__ = ["FLA", "MINIMAX", "OPENNLPLAB", "Convention", "fla_lightning_log_decay"]


@dataclass(frozen=True, kw_only=True)
class Convention:
    """Where a library differs from ours."""

    heads_first: bool
    """q, k, v and out are `[B, H, T, D]`."""
    unscaled: bool
    """There is no scale: what is called attention here with scale 1."""
    slopes: bool
    """A decay is given as its slope -g > 0, of shape `[H, 1, 1]`."""
    decayed_state: bool
    """The stored state is exp(g) S: what the next token will find, before it adds itself."""

    def scale(self, key_dim: int) -> float:
        """What to pass as `scale` for the outputs that the library has when it is given none."""
        return 1.0 if self.unscaled else key_dim**-0.5

    def tensor_from(self, theirs: Tensor) -> Tensor:
        """Their q, k, v or out as ours, `[B, T, H, D]`; a view."""
        return theirs.transpose(1, 2) if self.heads_first else theirs

    def tensor_to(self, ours: Tensor) -> Tensor:
        """Our q, k, v or out as theirs; a view."""
        return ours.transpose(1, 2) if self.heads_first else ours

    def decay_from(self, theirs: Tensor) -> Tensor:
        """Their decay as our log_decay `[H]`.

        Raises:
            LayoutError: a decay of the wrong sign: it was converted before, or is of another
                library.
        """
        ours = -theirs.flatten() if self.slopes else theirs
        _check_sign(ours, "slopes must be >= 0" if self.slopes else "log decays must be <= 0")
        return ours

    def decay_to(self, log_decay: Tensor) -> Tensor:
        """Our log_decay `[H]` as theirs.

        Raises:
            LayoutError: a positive log_decay.
        """
        _check_sign(log_decay, "log_decay must be <= 0")
        return -log_decay[:, None, None] if self.slopes else log_decay

    def state_from(self, theirs: Tensor, *, log_decay: Tensor) -> Tensor:
        """Their state as ours.

        Args:
            theirs: `[B, H, K, V]`.
            log_decay: ours, `[H]`, of the layer.
        """
        return theirs * (-log_decay)[:, None, None].exp() if self.decayed_state else theirs

    def state_to(self, ours: Tensor, *, log_decay: Tensor) -> Tensor:
        """Our state `[B, H, K, V]` as theirs; log_decay as in `state_from`."""
        return ours * log_decay[:, None, None].exp() if self.decayed_state else ours


FLA = Convention(heads_first=False, unscaled=False, slopes=False, decayed_state=False)
MINIMAX = Convention(heads_first=True, unscaled=True, slopes=True, decayed_state=False)
OPENNLPLAB = Convention(heads_first=True, unscaled=True, slopes=True, decayed_state=True)


def fla_lightning_log_decay(num_heads: int, *, layer: int, num_layers: int) -> Tensor:
    """The log decays that flash-linear-attention's `chunk_lightning_attn` takes by itself.

    They are no ALiBi slopes: linear in the head, `-(8 / H) (1 - l / L) h`, none for head 0 and
    nearly -8 for the last. Needed to run a model that was trained with that function.

    Args:
        num_heads: H.
        layer: l, from 0.
        num_layers: L.

    Returns:
        `[H]`, fp32.
    """
    rate = 8 / num_heads * (1 - layer / num_layers)
    # Not -(rate * h): head 0 has 0, not -0.
    return 0.0 - rate * torch.arange(num_heads, dtype=torch.float32)


def _check_sign(log_decay: Tensor, rule: str) -> None:
    if (log_decay > 0).any():
        largest = log_decay.max().item()
        raise LayoutError(f"{rule}, but one gives a log decay of {largest:.3g}; change its sign")
