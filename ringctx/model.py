"""A decoder-only transformer whose token mixer is an argument and whose tokens may be sharded.

Everything but the mixer works on one token at a time, so each rank runs the model on its own shard
of the sequence; the mixer is told, by the `ContextMesh` of the step, with whom it shares the rest.
Positions are counted within the row, never within the shard; documents packed into one row keep
that count, since RoPE only asks for distances.
Source: Llama (arXiv 2302.13971); RoPE arXiv 2104.09864; GQA 2305.13245; SwiGLU 2002.05202.
Shapes: B rows, T local tokens, E width, H query heads, Hkv key/value heads, D head dim.
"""

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ringctx.config import ModelConfig
from ringctx.ops.losses import linear_cross_entropy_sum
from ringctx.parallel.context_attention import context_attention
from ringctx.parallel.mesh import ContextMesh

__all__ = [
    "RotaryTable",
    "Rows",
    "SoftmaxMixer",
    "Transformer",
    "initialise",
    "sight",
]

RotaryTable = tuple[Tensor, Tensor]


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
    """The largest window of any layer; None: each layer's own."""


class Transformer(nn.Module):
    """Embedding, `num_layers` blocks, norm, head and loss, all on the local shard.

    Args:
        config: sizes; `vocab_size` must be set.
        make_mixer: called as `make_mixer(config, layer)`, once a layer; the module it returns maps
            `(x [B, T, E], rows)` to `[B, T, E]`. Default: what `config.mixers` names.
        dtype: of activations and matrix products; weights stay as they are stored.
        recompute: keep only each block's input and run the block again in backward.
        loss_chunk: tokens whose logits exist at once; None: all.
    """

    def __init__(
        self,
        config: ModelConfig,
        *,
        make_mixer: Callable[[ModelConfig, int], nn.Module] | None = None,
        dtype: torch.dtype = torch.float32,
        recompute: bool = False,
        loss_chunk: int | None = None,
    ) -> None:
        super().__init__()
        assert config.vocab_size is not None, "vocab_size comes from the dataset before this"
        make_mixer = make_mixer or _named_mixer
        self.config = config
        self.dtype = dtype
        self.recompute = recompute
        self.loss_chunk = loss_chunk
        self.embed = nn.Embedding(config.vocab_size, config.dim)
        self.layers = nn.ModuleList(
            Block(config, make_mixer(config, layer)) for layer in range(config.num_layers)
        )
        self.norm = RMSNorm(config.dim, eps=config.norm_eps)
        self.head = None if config.tie_embeddings else Linear(config.dim, config.vocab_size)

    def forward(
        self,
        tokens: Tensor,
        *,
        targets: Tensor,
        positions: Tensor,
        mesh: ContextMesh,
        cu_seqlens: Sequence[int] | None = None,
        window: int | None = None,
        rope_theta: float | None = None,
    ) -> Tensor:
        """Sum of the losses of the local tokens that have a target.

        Args:
            tokens: `[B, T]`, int64: the local shard of each row.
            targets: `[B, T]`, int64: the next token of each; IGNORE_INDEX where there is none.
            positions: `[T]`, int64: index of each local token within its row.
            mesh: with whom the rows are shared.
            cu_seqlens: where the documents of a packed row begin, and its end, counted over the
                whole row, the same for all rows; tokens see only their own document. None: a row
                is one document. Plain numbers: an engine would move a tensor to the device, and
                the host needs them.
            window: no layer sees farther than this: a token sees itself and at most the window - 1
                tokens before it (and the sinks of a W layer). None: each layer's own window.
            rope_theta: RoPE base; None: the config's.

        Returns:
            A scalar in fp32 (float64 for a float64 model).
        """
        hidden = self.hidden(
            tokens,
            positions=positions,
            mesh=mesh,
            cu_seqlens=cu_seqlens,
            window=window,
            rope_theta=rope_theta,
        )
        return linear_cross_entropy_sum(
            hidden.flatten(0, 1),
            self._head_weight().to(hidden.dtype),
            targets.flatten(),
            chunk=self.loss_chunk,
        )

    def hidden(
        self,
        tokens: Tensor,
        *,
        positions: Tensor,
        mesh: ContextMesh,
        cu_seqlens: Sequence[int] | None = None,
        window: int | None = None,
        rope_theta: float | None = None,
    ) -> Tensor:
        """The normed output of the last block, `[B, T, E]`; arguments as in `forward`."""
        x = self.embed(tokens).to(self.dtype)
        theta = self.config.rope_theta if rope_theta is None else rope_theta
        rows = Rows(
            rotary=rotary_table(positions, head_dim=self.config.head_width, theta=theta),
            mesh=mesh,
            cu_seqlens=None if cu_seqlens is None else torch.tensor(cu_seqlens, dtype=torch.int32),
            window=window,
        )
        for layer in self.layers:
            if self.recompute and torch.is_grad_enabled():
                x = checkpoint(layer, x, rows, use_reentrant=False)
            else:
                x = layer(x, rows)
        normed: Tensor = self.norm(x)
        return normed

    def _head_weight(self) -> Tensor:
        return self.embed.weight if self.head is None else self.head.weight


class Block(nn.Module):
    """Mixer and MLP, each after a norm and added to the residual stream."""

    def __init__(self, config: ModelConfig, mixer: nn.Module) -> None:
        super().__init__()
        self.mixer_norm = RMSNorm(config.dim, eps=config.norm_eps)
        self.mixer = mixer
        self.mlp_norm = RMSNorm(config.dim, eps=config.norm_eps)
        self.mlp = SwiGLU(config)

    def forward(self, x: Tensor, rows: Rows) -> Tensor:
        """`[B, T, E]` to `[B, T, E]`."""
        x = x + self.mixer(self.mixer_norm(x), rows)
        out: Tensor = x + self.mlp(self.mlp_norm(x))
        return out


class SoftmaxMixer(nn.Module):
    """Causal grouped-query attention over the ranks of the mesh; in a W layer, with a window."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.head_dim = config.head_width
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
        # As functions: where heads are traded, each is made while the one before is on its way.
        out = context_attention(
            partial(self._heads, x, self.q, norm=self.q_norm, rotary=rows.rotary),
            partial(self._heads, x, self.k, norm=self.k_norm, rotary=rows.rotary),
            partial(self._heads, x, self.v),
            mesh=rows.mesh,
            window=window,
            sinks=sinks,
            cu_seqlens=rows.cu_seqlens,
        )
        # [B, T, H, D] -> [B, T, H * D]
        mixed: Tensor = self.out(out.flatten(-2))
        return mixed

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


def _named_mixer(config: ModelConfig, layer: int) -> nn.Module:
    """The mixer that the letter of a layer stands for."""
    kinds = {"S": SoftmaxMixer, "W": SoftmaxMixer}
    return kinds[config.mixer(layer)](config, layer)


def sight(config: ModelConfig, layer: int, largest: int | None) -> tuple[int | None, int]:
    """How far a layer sees.

    Args:
        config: of the model.
        layer: from 0.
        largest: window that no layer may pass; None: no such limit.

    Returns:
        Its window, None for all tokens, and its sinks.
    """
    own, sinks = (config.window, config.sinks) if config.mixer(layer) == "W" else (None, 0)
    windows = [window for window in (own, largest) if window is not None]
    return min(windows, default=None), sinks


class SwiGLU(nn.Module):
    """down(silu(gate(x)) * up(x)) (arXiv 2002.05202, equation 6)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gate = Linear(config.dim, config.mlp_width)
        self.up = Linear(config.dim, config.mlp_width)
        self.down = Linear(config.mlp_width, config.dim)

    def forward(self, x: Tensor) -> Tensor:
        """`[B, T, E]` to `[B, T, E]`."""
        out: Tensor = self.down(F.silu(self.gate(x)) * self.up(x))
        return out


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


@torch.no_grad()
def initialise(name: str, shape: torch.Size, *, config: ModelConfig, seed: int) -> Tensor:
    """The starting value of one parameter, the same on every rank, world and engine.

    Norms start at 1. Matrices are normal with deviation 1 / sqrt(inputs), an untied embedding with
    deviation 1 (PaLM, arXiv 2204.02311, section 5); those that write into the residual stream are
    divided by sqrt(2 num_layers) (GPT-2, section 2.3).

    Args:
        name: as in `named_parameters`; it seeds the draw together with `seed`.
        shape: the whole shape, not a rank's shard.
        config: for the depth.
        seed: of the run.

    Returns:
        fp32, on the CPU.
    """
    if len(shape) == 1:
        return torch.ones(shape)
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))
    deviation: float = shape[1] ** -0.5
    if name.endswith(("mixer.out.weight", "mlp.down.weight")):
        deviation /= math.sqrt(2 * config.num_layers)
    elif name == "embed.weight" and not config.tie_embeddings:
        deviation = 1.0
    return torch.randn(shape, generator=generator) * deviation
