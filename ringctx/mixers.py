"""The token mixers that the letters of `model.mixers` name, each over the ranks of a mesh.

A mixer maps `(x, rows)` to x's shape and, on one rank, can go on where it stopped (`extend`). All
kinds take the same shards, so a model may mix them freely and nothing is moved between layers.
Shapes: B rows, T local tokens, E width, H query heads, Hkv key/value heads, D head dim.
"""

from dataclasses import dataclass
from functools import partial

from torch import Tensor, nn

from ringctx.config import ModelConfig
from ringctx.kv_cache import KeyCache, extend_attention
from ringctx.layers import Linear, RMSNorm, RotaryTable, rotate
from ringctx.lightning_layer import LightningAttention
from ringctx.parallel.context_attention import context_attention
from ringctx.parallel.mesh import ContextMesh

__all__ = ["LightningMixer", "Rows", "SoftmaxMixer", "named_mixer", "sight"]


@dataclass(frozen=True, eq=False)
class Rows:
    """What every mixer of one forward is told of the rows, besides their local tokens."""

    rotary: RotaryTable
    """Of the local tokens."""
    mesh: ContextMesh
    """With whom the rows are shared."""
    cu_seqlens: Tensor | None
    """int32 `[documents + 1]`, on the CPU: where the documents of the whole packed row begin, and
    its end; None: a row is one document."""
    window: int | None
    """The largest window of any softmax layer; None: each layer's own."""


def named_mixer(config: ModelConfig, layer: int) -> nn.Module:
    """The mixer that the letter of a layer stands for."""
    kinds = {"S": SoftmaxMixer, "W": SoftmaxMixer, "L": LightningMixer}
    return kinds[config.mixer(layer)](config, layer)


def sight(config: ModelConfig, layer: int, largest: int | None) -> tuple[int | None, int]:
    """How far a softmax layer sees.

    Args:
        config: of the model.
        layer: from 0; not an L layer, which has no pairs of tokens that see one another.
        largest: window that no layer may pass; None: no such limit.

    Returns:
        Its window, None for all tokens, and its sinks.
    """
    assert config.mixer(layer) != "L", layer
    own, sinks = (config.window, config.sinks) if config.mixer(layer) == "W" else (None, 0)
    windows = [window for window in (own, largest) if window is not None]
    return min(windows, default=None), sinks


class SoftmaxMixer(nn.Module):
    """Causal grouped-query attention over the ranks of the mesh; in a W layer, with a window."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.head_dim = config.head_width
        self.rotates = config.rotates(layer)
        self.sight = partial(sight, config, layer)
        kv_dim = config.kv_heads * config.head_width
        self.q = Linear(config.dim, config.num_heads * config.head_width)
        self.k = Linear(config.dim, kv_dim)
        self.v = Linear(config.dim, kv_dim)
        self.out = Linear(config.num_heads * config.head_width, config.dim)
        self.q_norm = RMSNorm(config.head_width, eps=config.norm_eps) if config.qk_norm else None
        self.k_norm = RMSNorm(config.head_width, eps=config.norm_eps) if config.qk_norm else None

    def forward(self, x: Tensor, rows: Rows) -> Tensor:
        """`[B, T, E]` to `[B, T, E]`."""
        window, sinks = self.sight(rows.window)
        rotary = rows.rotary if self.rotates else None
        # As functions: where heads are traded, each is made while the one before is on its way.
        out = context_attention(
            partial(self._heads, x, self.q, norm=self.q_norm, rotary=rotary),
            partial(self._heads, x, self.k, norm=self.k_norm, rotary=rotary),
            partial(self._heads, x, self.v),
            mesh=rows.mesh,
            window=window,
            sinks=sinks,
            cu_seqlens=rows.cu_seqlens,
        )
        # [B, T, H, D] -> [B, T, H * D]
        mixed: Tensor = self.out(out.flatten(-2))
        return mixed

    def extend(
        self, x: Tensor, *, state: KeyCache | None, rotary: RotaryTable
    ) -> tuple[Tensor, KeyCache]:
        """The next tokens of a document on one rank, `[B, T, E]`, and what later ones need."""
        window, sinks = self.sight(None)
        table = rotary if self.rotates else None
        out, state = extend_attention(
            self._heads(x, self.q, norm=self.q_norm, rotary=table),
            self._heads(x, self.k, norm=self.k_norm, rotary=table),
            self._heads(x, self.v),
            cache=state,
            window=window,
            sinks=sinks,
        )
        # [B, T, H, D] -> [B, T, H * D]
        return self.out(out.flatten(-2)), state

    def _heads(
        self,
        x: Tensor,
        project: nn.Module,
        *,
        norm: nn.Module | None = None,
        rotary: RotaryTable | None = None,
    ) -> Tensor:
        """Project, cut into heads, norm and rotate: `[B, T, E]` to `[B, T, heads, D]`."""
        # [B, T, heads * D] -> [B, T, heads, D]
        heads: Tensor = project(x).unflatten(-1, (-1, self.head_dim))
        if norm is not None:
            heads = norm(heads)
        return heads if rotary is None else rotate(heads, rotary)


class LightningMixer(nn.Module):
    """Lightning attention over all ranks of the mesh; no window concerns it."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.rotates = config.rotates(layer)
        self.lightning = LightningAttention(
            config.dim,
            num_heads=config.num_heads,
            head_dim=config.head_width,
            layer=layer,
            num_layers=config.num_layers,
            decay_style=config.decay_style,
            norm_eps=config.norm_eps,
            backend=config.lightning_backend,
        )

    def forward(self, x: Tensor, rows: Rows) -> Tensor:
        """`[B, T, E]` to `[B, T, E]`."""
        mixed: Tensor = self.lightning(
            x,
            group=rows.mesh.group,
            layout=rows.mesh.layout,
            cu_seqlens=rows.cu_seqlens,
            rotary=rows.rotary if self.rotates else None,
            exchange=rows.mesh.state_exchange,
            topology=rows.mesh.topology,
        )
        return mixed

    def extend(
        self, x: Tensor, *, state: Tensor | None, rotary: RotaryTable
    ) -> tuple[Tensor, Tensor]:
        """The next tokens of a document on one rank, `[B, T, E]`, and their state."""
        return self.lightning.extend(x, state=state, rotary=rotary if self.rotates else None)
