"""A decoder-only transformer whose token mixer is an argument and whose tokens may be sharded.

Everything but the mixer works on one token at a time, so each rank runs the model on its own shard
of the sequence; the mixer is told, by the `ContextMesh` of the step, with whom it shares the rest.
Positions are counted within the row, never within the shard; documents packed into one row keep
that count, since RoPE only asks for distances.
Source: Llama (arXiv 2302.13971); GQA 2305.13245.
Shapes: B rows, T local tokens, E width.
"""

import hashlib
import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ringctx.config import ModelConfig
from ringctx.layers import Linear, RMSNorm, SwiGLU, rotary_table
from ringctx.mixers import Rows, named_mixer
from ringctx.ops.losses import linear_cross_entropy_sum
from ringctx.parallel.mesh import ContextMesh

__all__ = ["Block", "Transformer", "initialise"]


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
        make_mixer = make_mixer or named_mixer
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
            window: no softmax layer sees farther than this: a token sees itself and at most the
                window - 1 tokens before it (and the sinks of a W layer); L layers have no window.
                None: each layer's own window.
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

    def logits(self, hidden: Tensor) -> Tensor:
        """Of the next token, `[B, T, vocab]`, from what `hidden` returns."""
        return F.linear(hidden, self._head_weight().to(hidden.dtype))

    def _head_weight(self) -> Tensor:
        return self.embed.weight if self.head is None else self.head.weight


class Block(nn.Module):
    """Mixer and MLP, each after a norm and added to the residual stream."""

    def __init__(self, config: ModelConfig, mixer: nn.Module) -> None:
        super().__init__()
        self.mixer_norm = RMSNorm(config.dim, eps=config.norm_eps)
        self.mixer = mixer
        self.mlp_norm = RMSNorm(config.dim, eps=config.norm_eps)
        self.mlp = SwiGLU(config.dim, width=config.mlp_width)

    def forward(self, x: Tensor, rows: Rows) -> Tensor:
        """`[B, T, E]` to `[B, T, E]`."""
        x = x + self.mixer(self.mixer_norm(x), rows)
        out: Tensor = x + self.mlp(self.mlp_norm(x))
        return out


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
    if name.endswith((".out.weight", ".down.weight")):
        deviation /= math.sqrt(2 * config.num_layers)
    elif name == "embed.weight" and not config.tie_embeddings:
        deviation = 1.0
    return torch.randn(shape, generator=generator) * deviation
