"""Lightning attention as a layer, for any model: linear in length, one state a head between ranks.

    q, k = rotate(silu(Wq x)), rotate(silu(Wk x))        the rotation only if a table is given
    out  = Wout (sigmoid(Wgate x) * rms_norm(attention(q, k, Wv x)))

Token t sees token s with the weight (q_t . k_s) exp(sum of the log decays of s + 1 to t). There is
no softmax, so what came before is one `[D, D]` state a head, and where softmax would divide by the
sum of the weights there is a norm of each head by itself.
Price: 12 H D^2 FLOPs a token besides the matrices, forward and backward, at any length.
Source: TransNormer (arXiv 2210.10340, norm instead of a denominator); Lightning Attention-2
(2401.04658); MiniMax-01 (2501.08313): SiLU feature map, norm and sigmoid gate.
Shapes: B rows, T local tokens, E width, H heads, D head dim.
"""

import math
from typing import get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._compile import _disable_dynamo

from ringctx.config import DecayStyle, Layout, LightningBackend, StateExchange, TopologyConfig
from ringctx.errors import ConfigError
from ringctx.layers import Linear, RMSNorm, RotaryTable, rotate
from ringctx.ops import lightning_attention, lightning_step
from ringctx.ops.lightning.decay_styles import log_decay
from ringctx.parallel.comm import Group
from ringctx.parallel.context_lightning import context_lightning

__all__ = ["LightningAttention"]


class LightningAttention(nn.Module):
    """Lightning attention over a sequence whose tokens may be spread over ranks.

    Args:
        dim: E.
        num_heads: H, of queries, keys and values alike.
        head_dim: D; None: dim / num_heads.
        layer: which layer of the model this is, from 0; the decay may depend on it.
        num_layers: of the model.
        decay_style: how fast heads forget. alibi, retnet, tnl, none: fixed numbers, see
            `ringctx.ops.lightning.decay_styles`. data: of token t and head h, -a_h *
            softplus(w_h . x_t) / ln 2 with learned w and a_h the decay of alibi, which it equals
            where w_h . x_t is 0.
        norm_eps: added to the mean square in the norm of a head's output.
        backend: what computes it.

    Raises:
        ConfigError: if sizes do not fit, or style or backend is unknown.
    """

    def __init__(
        self,
        dim: int,
        *,
        num_heads: int,
        head_dim: int | None = None,
        layer: int = 0,
        num_layers: int = 1,
        decay_style: DecayStyle = "alibi",
        norm_eps: float = 1e-5,
        backend: LightningBackend = "torch",
    ) -> None:
        super().__init__()
        _check(dim, num_heads, head_dim, layer=layer, num_layers=num_layers)
        _check_known("decay_style", decay_style, get_args(DecayStyle))
        _check_known("backend", backend, get_args(LightningBackend))
        self.num_heads = num_heads
        self.head_dim = dim // num_heads if head_dim is None else head_dim
        self.layer, self.num_layers = layer, num_layers
        self.decay_style, self.backend = decay_style, backend
        inner = num_heads * self.head_dim
        self.q, self.k, self.v, self.gate = (Linear(dim, inner) for _ in range(4))
        self.decay = Linear(dim, num_heads) if decay_style == "data" else None
        self.norm = RMSNorm(self.head_dim, eps=norm_eps)
        self.out = Linear(inner, dim)
        # By device, made where the model runs: it may have been built on another, or on none.
        self._per_head: dict[torch.device, Tensor] = {}

    def forward(
        self,
        x: Tensor,
        *,
        group: Group,
        layout: Layout = "zigzag",
        cu_seqlens: Tensor | None = None,
        rotary: RotaryTable | None = None,
        exchange: StateExchange = "auto",
        topology: TopologyConfig | None = None,
    ) -> Tensor:
        """Mix the tokens of whole documents, of which this rank holds a shard.

        Args:
            x: `[B, T, E]`: this rank's tokens.
            group: the ranks that share the sequence, in layout order; `comm.SoloGroup()` on one.
            layout: which tokens a rank holds: zigzag or contiguous.
            cu_seqlens: int32 `[documents + 1]` over the whole sequence, on the CPU; None: a row is
                one document.
            rotary: of the local tokens' positions, to rotate queries and keys; None: they are not,
                and tokens are told apart by the decay alone.
            exchange: how states travel.
            topology: how the ranks of the world are wired, for `auto`; None is a switch.

        Returns:
            `[B, T, E]` in the dtype of x.

        Raises:
            LayoutError: as `context_lightning`.
        """
        q, k, v = self._heads(x, rotary)
        mixed = context_lightning(
            q,
            k,
            v,
            log_decay=self.log_decay(x),
            group=group,
            layout=layout,
            exchange=exchange,
            cu_seqlens=cu_seqlens,
            backend=self.backend,
            topology=topology,
        )
        return self._finish(mixed, x)

    def extend(
        self, x: Tensor, *, state: Tensor | None = None, rotary: RotaryTable | None = None
    ) -> tuple[Tensor, Tensor]:
        """Go on with a document on one rank: piece after piece, or token by token.

        Args:
            x: `[B, T, E]`: the next tokens.
            state: what the tokens before them left, as returned; None: there are none.
            rotary: of the positions of these tokens; as in `forward`.

        Returns:
            `(out, state)`: `[B, T, E]` as `forward` gives for the whole document, and `[B, H, D,
            D]` in fp32 (float64 for float64).
        """
        q, k, v = self._heads(x, rotary)
        log_decay = self.log_decay(x)
        if state is None:
            state = self._zero_state(x)
        if x.shape[1] == 1:
            if log_decay.ndim == 3:
                log_decay = log_decay[:, 0]
            mixed, state = lightning_step(
                q[:, 0], k[:, 0], v[:, 0], log_decay=log_decay, state=state
            )
            return self._finish(mixed[:, None], x), state
        mixed, left = lightning_attention(
            q, k, v, log_decay=log_decay, initial_state=state, backend=self.backend
        )
        assert left is not None
        return self._finish(mixed, x), left

    def log_decay(self, x: Tensor) -> Tensor:
        """Log decays, at most 0: `[H]`, or of style data `[B, T, H]`, at least fp32."""
        per_head = self._fixed(x.device)
        if self.decay is None:
            return per_head
        wide = torch.promote_types(x.dtype, torch.float32)
        return per_head.to(wide) * F.softplus(self.decay(x).to(wide)) / math.log(2)

    def _heads(self, x: Tensor, rotary: RotaryTable | None) -> tuple[Tensor, Tensor, Tensor]:
        # [B, T, H * D] -> [B, T, H, D]
        q, k, v = (
            project(x).unflatten(-1, (self.num_heads, self.head_dim))
            for project in (self.q, self.k, self.v)
        )
        q, k = F.silu(q), F.silu(k)
        return (q, k, v) if rotary is None else (rotate(q, rotary), rotate(k, rotary), v)

    def _finish(self, mixed: Tensor, x: Tensor) -> Tensor:
        """Norm, gate and output matrix: `[B, T, H, D]` to `[B, T, E]`."""
        # [B, T, H, D] -> [B, T, H * D]
        gated = self.norm(mixed).flatten(-2) * torch.sigmoid(self.gate(x))
        out: Tensor = self.out(gated)
        return out

    def _zero_state(self, x: Tensor) -> Tensor:
        wide = torch.promote_types(x.dtype, torch.float32)
        return x.new_zeros(x.shape[0], self.num_heads, self.head_dim, self.head_dim, dtype=wide)

    @_disable_dynamo
    def _fixed(self, device: torch.device) -> Tensor:
        """The log decay of every head, `[H]`, fp32; no buffer, so that no engine moves it."""
        if device not in self._per_head:
            style = "alibi" if self.decay_style == "data" else self.decay_style
            # What inference mode makes can never be used to train.
            with torch.inference_mode(False):
                own = log_decay(
                    self.num_heads, style=style, layer=self.layer, num_layers=self.num_layers
                ).to(device)
            # A fake tensor is only good for the pass that made it.
            if type(own) is not Tensor:
                return own
            self._per_head[device] = own
        return self._per_head[device]


def _check(dim: int, num_heads: int, head_dim: int | None, *, layer: int, num_layers: int) -> None:
    if head_dim is not None and head_dim < 1:
        raise ConfigError(f"head_dim={head_dim} must be at least 1, or None for dim / num_heads")
    if num_heads < 1:
        raise ConfigError(f"num_heads={num_heads} must be at least 1")
    if head_dim is None and dim % num_heads:
        raise ConfigError(
            f"dim={dim} is not divisible by num_heads={num_heads}; pass head_dim, or change one of "
            "the two"
        )
    if not 0 <= layer < num_layers:
        raise ConfigError(
            f"layer={layer} is not one of num_layers={num_layers}: layers count from 0"
        )


def _check_known(name: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise ConfigError(f"{name}={value!r} is unknown; choose one of {', '.join(known)}")
