"""Softmax attention that goes on where it stopped: keys and values of earlier tokens are kept.

Without a window all of them; with one only the window - 1 last and the sinks, whatever the length.
Price: a copy of what is kept for each piece, less than attention reads of it.
Shapes: B rows, T new tokens, S kept ones and new ones, H heads, Hkv key/value heads, D head dim.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["KeyCache", "extend_attention"]


@dataclass(frozen=True, eq=False)
class KeyCache:
    """Keys and values that later tokens may still see, in order of position."""

    k: Tensor
    """`[B, S, Hkv, D]`."""
    v: Tensor
    """`[B, S, Hkv, D]`."""
    dropped: int
    """Positions between the sinks and the rest that no later token sees."""

    @property
    def num_seen(self) -> int:
        """Tokens so far, dropped ones included."""
        return self.k.shape[1] + self.dropped


def extend_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    cache: KeyCache | None,
    window: int | None = None,
    sinks: int = 0,
) -> tuple[Tensor, KeyCache]:
    """Causal attention of the next tokens of a document over all of it.

    Args:
        q: `[B, T, H, D]`, of the tokens after those of the cache; Hkv divides H.
        k: `[B, T, Hkv, D]`.
        v: `[B, T, Hkv, D]`.
        cache: as returned for the tokens before; None: there are none. It is not changed.
        window: a token sees itself and the window - 1 tokens before it; None: all.
        sinks: with a window, the first tokens, which stay visible.

    Returns:
        `(out, cache)`: `[B, T, H, D]`, and what the tokens after these need.
    """
    cache = KeyCache(k[:, :0], v[:, :0], 0) if cache is None else cache
    grown = KeyCache(torch.cat((cache.k, k), 1), torch.cat((cache.v, v), 1), cache.dropped)
    # What is kept is what the next token sees, so of a single one nothing is masked.
    mask = None if q.shape[1] == 1 else _visible(grown, q.shape[1], window=window, sinks=sinks)
    # [B, T or S, heads, D] -> [B, heads, T or S, D]
    queries, keys, values = (x.transpose(1, 2) for x in (q, grown.k, grown.v))
    out = F.scaled_dot_product_attention(
        queries, keys, values, attn_mask=mask, enable_gqa=q.shape[2] != k.shape[2]
    )
    return out.transpose(1, 2), _trimmed(grown, window=window, sinks=sinks)


def _visible(cache: KeyCache, num_queries: int, *, window: int | None, sinks: int) -> Tensor:
    """Whether each of the last tokens sees each that is kept: bool `[T, S]`."""
    keys = torch.arange(cache.k.shape[1], device=cache.k.device)
    keys = keys + cache.dropped * (keys >= sinks)
    queries = keys[len(keys) - num_queries :, None]
    visible = keys <= queries
    if window is not None:
        visible &= (keys > queries - window) | (keys < sinks)
    return visible


def _trimmed(cache: KeyCache, *, window: int | None, sinks: int) -> KeyCache:
    if window is None:
        return cache
    dropped = max(0, cache.num_seen - (window - 1) - sinks)
    stale = dropped - cache.dropped
    if not stale:
        return cache
    k, v = (torch.cat((x[:, :sinks], x[:, sinks + stale :]), 1) for x in (cache.k, cache.v))
    return KeyCache(k, v, dropped)
