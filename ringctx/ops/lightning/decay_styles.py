"""How fast each head forgets: the fixed decays that linear attention models are trained with.

Heads that forget at once see what is near, heads that hardly forget see all; so a model has both.
Sources: ALiBi (arXiv 2108.12409), RetNet (2307.08621), TransNormerLLM (2307.14995), whose rule
Lightning Attention-2 and MiniMax-01 took over.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from ringctx.errors import LayoutError

__all__ = ["log_decay"]


def log_decay(num_heads: int, *, style: str, layer: int = 0, num_layers: int = 1) -> Tensor:
    """The log decay of every head.

    Args:
        num_heads: H, at least 1, of the whole model; need not be a power of two.
        style: with h = 0 .. H-1, layer l of L:
            "alibi": `-2^(-8 (h+1) / H)`, the slopes of ALiBi. One formula for every H, as MiniMax
            has it; the code of ALiBi differs where H is not a power of two.
            "retnet": `log(1 - 2^(-5-h))`.
            "tnl": the slopes of "alibi" times `1 - l / (L-1) + 1e-5`: the last layer hardly
            forgets. With one layer the factor is that of the first, `1 + 1e-5`.
            "none": 0, nothing is forgotten.
        layer: l; only "tnl" depends on it.
        num_layers: L.

    Returns:
        `[H]`, fp32, <= 0.

    Raises:
        LayoutError: an unknown style, no heads, or a layer that is not in 0 .. L-1.
    """
    if style not in _STYLES:
        raise LayoutError(f"decay style {style!r} is unknown; known are {', '.join(_STYLES)}")
    if num_heads < 1:
        raise LayoutError(f"num_heads={num_heads} must be at least 1")
    if not 0 <= layer < num_layers:
        raise LayoutError(
            f"layer={layer} must be between 0 and num_layers - 1 = {num_layers - 1}; count layers "
            "from 0"
        )
    heads = torch.arange(num_heads, dtype=torch.float64)
    return _STYLES[style](heads, layer, num_layers).float()


def _alibi(heads: Tensor, layer: int, num_layers: int) -> Tensor:
    return -torch.exp2(-8 * (heads + 1) / len(heads))


def _retnet(heads: Tensor, layer: int, num_layers: int) -> Tensor:
    # Beyond 2^-53 a 1 - x is 1; log1p is not.
    return torch.log1p(-torch.exp2(-5 - heads))


def _tnl(heads: Tensor, layer: int, num_layers: int) -> Tensor:
    passed = layer / (num_layers - 1) if num_layers > 1 else 0.0
    return _alibi(heads, layer, num_layers) * (1 - passed + 1e-5)


def _none(heads: Tensor, layer: int, num_layers: int) -> Tensor:
    return torch.zeros_like(heads)


_STYLES: dict[str, Callable[[Tensor, int, int], Tensor]] = {
    "alibi": _alibi,
    "retnet": _retnet,
    "tnl": _tnl,
    "none": _none,
}
