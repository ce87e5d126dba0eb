"""Reading on and writing: a document in pieces, then token by token, on one rank.

Every layer keeps what its kind needs of the tokens so far: an S layer all keys and values, a W
layer those of its window and sinks, an L layer one matrix a head. So a model of L and W layers goes
on with a document of any length at the same price a token. Pieces of any sizes give what the whole
document would have given.
The model is one that lies whole on this rank: an engine that shards weights gathers them in the
model's own forward, which is not called here.
Shapes: B rows, T new tokens, E width.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ringctx.errors import ConfigError
from ringctx.layers import rotary_table
from ringctx.model import Block, Transformer

__all__ = ["Cache", "extend", "generate"]

_PIECE_LEN = 512


@dataclass(eq=False)
class Cache:
    """What a model keeps of the tokens so far; `Cache()` before the first."""

    rope_theta: float | None = None
    """RoPE base of all tokens; None: the config's."""
    num_tokens: int = 0
    """So far, in each row."""
    states: tuple[Any, ...] = ()
    """By layer: what its mixer's `extend` returned."""


def extend(model: Transformer, tokens: Tensor, *, cache: Cache) -> Tensor:
    """Run a model over the next tokens of its documents.

    Args:
        model: whole on this rank.
        tokens: `[B, T]`, int64: each row goes on with a document.
        cache: of the tokens before; it then holds these too. If an error is raised, it is as it
            was.

    Returns:
        The normed output of the last block, `[B, T, E]`, equal to `model.hidden` of the whole
        documents; `model.logits` makes logits of it.

    Raises:
        ConfigError: if a mixer of the model cannot go on where it stopped.
    """
    config = model.config
    theta = config.rope_theta if cache.rope_theta is None else cache.rope_theta
    end = cache.num_tokens + tokens.shape[1]
    positions = torch.arange(cache.num_tokens, end, device=tokens.device)
    rotary = rotary_table(positions, head_dim=config.head_width, theta=theta)
    x, states = model.embed(tokens).to(model.dtype), []
    for index, block in enumerate(model.layers):
        assert isinstance(block, Block)
        before = cache.states[index] if cache.states else None
        mixed, after = _extend_of(block)(block.mixer_norm(x), state=before, rotary=rotary)
        x = x + mixed
        x = x + block.mlp(block.mlp_norm(x))
        states.append(after)
    cache.num_tokens, cache.states = end, tuple(states)
    normed: Tensor = model.norm(x)
    return normed


@torch.no_grad()
def generate(
    model: Transformer,
    prompt: Tensor,
    *,
    num_tokens: int,
    cache: Cache | None = None,
    piece_len: int = _PIECE_LEN,
) -> Tensor:
    """Go on with documents, the likeliest token each time.

    Args:
        model: whole on this rank.
        prompt: `[B, T]`, int64, at least one token.
        num_tokens: to write.
        cache: of tokens before the prompt; None: there are none. It then holds these, the prompt,
            and all written tokens but the last.
        piece_len: tokens of the prompt that are read at once.

    Returns:
        `[B, num_tokens]`, int64: what was written.

    Raises:
        ConfigError: if a mixer cannot go on where it stopped, or there is nothing to go on from.
    """
    if not prompt.shape[1]:
        raise ConfigError("the prompt is empty; give at least one token, such as the first of all")
    cache = Cache() if cache is None else cache
    written: list[Tensor] = []
    for piece in prompt.split(piece_len, dim=1):
        hidden = extend(model, piece, cache=cache)
    while len(written) < num_tokens:
        # [B, T, vocab] -> [B, 1]
        written.append(model.logits(hidden[:, -1:]).argmax(-1))
        if len(written) < num_tokens:
            hidden = extend(model, written[-1], cache=cache)
    return torch.cat(written, 1) if written else prompt[:, :0]


def _extend_of(block: Block) -> Callable[..., tuple[Tensor, Any]]:
    method: Callable[..., tuple[Tensor, Any]] | None = getattr(block.mixer, "extend", None)
    if method is None:
        raise ConfigError(
            f"{type(block.mixer).__name__} has no method extend(x, *, state, rotary) -> (out, "
            "state), so a model with it cannot read in pieces; give it one"
        )
    return method
