"""A decoder-only transformer whose token mixer is an argument and whose tokens may be sharded.

Everything but the mixer works on one token at a time, so each rank runs the model on its own shard
of the sequence; the mixer is told, by the `ContextMesh` of the step, with whom it shares the rest.
Positions are counted within the row, never within the shard.
Source: Llama (arXiv 2302.13971); RoPE arXiv 2104.09864; GQA 2305.13245; SwiGLU 2002.05202.
Shapes: B rows, T local tokens, E width, H query heads, Hkv key/value heads, D head dim.
"""

import hashlib
import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ringctx.config import ModelConfig
from ringctx.ops.losses import linear_cross_entropy_sum
from ringctx.parallel.mesh import ContextMesh
from ringctx.parallel.ring_attention import ring_attention

__all__ = [
    "RotaryTable",
    "SoftmaxMixer",
    "Transformer",
    "flops_per_token",
    "initialise",
    "parameter_count",
]

RotaryTable = tuple[Tensor, Tensor]


class Transformer(nn.Module):
    """Embedding, `num_layers` blocks, norm, head and loss, all on the local shard.

    Args:
        config: sizes; `vocab_size` must be set.
        make_mixer: called as `make_mixer(config, layer)`, once a layer; the module it returns maps
            `(x [B, T, E], rotary, mesh)` to `[B, T, E]`. Default: softmax attention.
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
        make_mixer = make_mixer or SoftmaxMixer
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
        self, tokens: Tensor, *, targets: Tensor, positions: Tensor, mesh: ContextMesh
    ) -> Tensor:
        """Sum of the losses of the local tokens that have a target.

        Args:
            tokens: `[B, T]`, int64: the local shard of each row.
            targets: `[B, T]`, int64: the next token of each; IGNORE_INDEX where there is none.
            positions: `[T]`, int64: index of each local token within its row.
            mesh: with whom the rows are shared.

        Returns:
            A scalar in fp32 (float64 for a float64 model).
        """
        hidden = self.hidden(tokens, positions=positions, mesh=mesh)
        return linear_cross_entropy_sum(
            hidden.flatten(0, 1),
            self._head_weight().to(hidden.dtype),
            targets.flatten(),
            chunk=self.loss_chunk,
        )

    def hidden(self, tokens: Tensor, *, positions: Tensor, mesh: ContextMesh) -> Tensor:
        """The normed output of the last block, `[B, T, E]`; arguments as in `forward`."""
        x = self.embed(tokens).to(self.dtype)
        rotary = rotary_table(
            positions, head_dim=self.config.head_width, theta=self.config.rope_theta
        )
        for layer in self.layers:
            if self.recompute and torch.is_grad_enabled():
                x = checkpoint(layer, x, rotary, mesh, use_reentrant=False)
            else:
                x = layer(x, rotary, mesh)
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

    def forward(self, x: Tensor, rotary: RotaryTable, mesh: ContextMesh) -> Tensor:
        """`[B, T, E]` to `[B, T, E]`."""
        x = x + self.mixer(self.mixer_norm(x), rotary, mesh)
        out: Tensor = x + self.mlp(self.mlp_norm(x))
        return out


class SoftmaxMixer(nn.Module):
    """Causal grouped-query attention over the ranks of the mesh."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.num_heads, self.num_kv_heads = config.num_heads, config.kv_heads
        self.head_dim = config.head_width
        kv_dim = config.kv_heads * config.head_width
        self.q = Linear(config.dim, config.num_heads * config.head_width)
        self.k = Linear(config.dim, kv_dim)
        self.v = Linear(config.dim, kv_dim)
        self.out = Linear(config.num_heads * config.head_width, config.dim)
        self.q_norm = RMSNorm(config.head_width, eps=config.norm_eps) if config.qk_norm else None
        self.k_norm = RMSNorm(config.head_width, eps=config.norm_eps) if config.qk_norm else None

    def forward(self, x: Tensor, rotary: RotaryTable, mesh: ContextMesh) -> Tensor:
        """`[B, T, E]` to `[B, T, E]`."""
        # [B, T, H * D] -> [B, T, H, D]
        q = self.q(x).unflatten(-1, (self.num_heads, self.head_dim))
        k = self.k(x).unflatten(-1, (self.num_kv_heads, self.head_dim))
        v = self.v(x).unflatten(-1, (self.num_kv_heads, self.head_dim))
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        out = ring_attention(
            rotate(q, rotary),
            rotate(k, rotary),
            v,
            group=mesh.group,
            layout=mesh.layout,
            schedule=mesh.schedule,
        )
        # [B, T, H, D] -> [B, T, H * D]
        mixed: Tensor = self.out(out.flatten(-2))
        return mixed


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


def parameter_count(config: ModelConfig) -> int:
    """Parameters of the whole model, embeddings included, with softmax mixers."""
    assert config.vocab_size is not None
    heads = 1 if config.tie_embeddings else 2
    embeddings = heads * config.vocab_size * config.dim
    return embeddings + config.dim + config.num_layers * _block_parameters(config)


def flops_per_token(config: ModelConfig, *, seq_len: int) -> float:
    """Model FLOPs of one token, forward and backward, causal, nothing recomputed.

    6 for each weight of a matrix product (the embedding look-up is none), and for attention, whose
    queries see seq_len / 2 keys on average, 6 * layers * H * D * seq_len.
    Source: PaLM (arXiv 2204.02311), appendix B, with the causal half counted once.
    """
    assert config.vocab_size is not None
    width = config.num_heads * config.head_width
    matrices = config.num_layers * _block_matrices(config) + config.vocab_size * config.dim
    return 6.0 * matrices + 6.0 * config.num_layers * width * seq_len


def _block_matrices(config: ModelConfig) -> int:
    heads = 2 * (config.num_heads + config.kv_heads)
    return heads * config.head_width * config.dim + 3 * config.dim * config.mlp_width


def _block_parameters(config: ModelConfig) -> int:
    qk_norms = 2 * config.head_width if config.qk_norm else 0
    return _block_matrices(config) + 2 * config.dim + qk_norms
