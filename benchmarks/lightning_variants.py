"""What `lightning.py` compares: forward and backward of one call, on the same inputs.

    ours                 ringctx's lightning_attention, a fixed decay per head
    ours_decay_by_token  the same with a decay that depends on the data, and its gradient
    sdpa                 torch's causal flash attention: softmax, quadratic
    products             the matrix products of the chunks alone (`lightning_gemms.py`)
    products_states_again  with one product more: backward makes the states anew, as ours does
    fla                  flash-linear-attention's naive chunked reference, where it is installed

Inputs are the first tokens of one set of tensors, so all lengths fit in memory at once.
Shapes: B = 1, T tokens, H heads, D head dim.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from importlib.util import find_spec
from warnings import catch_warnings, simplefilter

import torch
from lightning_gemms import ChunkProducts, Sizes
from torch import Tensor
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from ringctx.ops.lightning import lightning_attention
from ringctx.ops.lightning.decay_styles import log_decay

__all__ = ["VARIANTS", "Inputs", "Sizes", "Variant", "longest_by_default", "make_inputs", "variant"]

VARIANTS = (
    "ours",
    "ours_decay_by_token",
    "sdpa",
    "products",
    "products_states_again",
    "fla",
)

Variant = Callable[[], object]

# Chunks times heads of a batched product: the fastest that was found.
_GROUP = 64


@dataclass(frozen=True)
class Inputs:
    """`[1, T, H, D]` each, and the log decay `[H]` and `[1, T, H]`."""

    q: Tensor
    k: Tensor
    v: Tensor
    grad_out: Tensor
    per_head: Tensor
    per_token: Tensor

    def first(self, tokens: int) -> "Inputs":
        """Views of the first tokens."""
        names = ("q", "k", "v", "grad_out", "per_token")
        return replace(self, **{name: getattr(self, name)[:, :tokens] for name in names})


def make_inputs(sizes: Sizes) -> Inputs:
    """Inputs of one length."""
    generator = torch.Generator().manual_seed(0)
    shape = (1, sizes.tokens, sizes.heads, sizes.head_dim)
    q, k, v, grad_out = (torch.randn(shape, generator=generator) for _ in range(4))
    per_head = log_decay(sizes.heads, style="alibi")
    per_token = per_head * torch.rand(shape[:3], generator=generator)
    return Inputs(q, k, v, grad_out, per_head, per_token)


def longest_by_default(name: str) -> int | None:
    """Tokens beyond which a variant takes minutes; None: it is linear."""
    # The reference slices tensors within autograd, so its backward is quadratic too.
    return {"sdpa": 16_384, "fla": 4096}.get(name)


def variant(name: str, inputs: Inputs, sizes: Sizes) -> Variant | None:
    """Forward and backward of the first `sizes.tokens` tokens; None where it is not installed."""
    if name.startswith("products"):
        longest = replace(sizes, tokens=inputs.q.shape[1])
        products = _products(longest).first(sizes.tokens)
        return lambda: products.run(states_again=name == "products_states_again")
    if name == "fla" and find_spec("fla") is None:
        return None
    attend = {
        "ours": _ours,
        "ours_decay_by_token": _ours_by_token,
        "sdpa": _sdpa,
        "fla": _fla,
    }[name]
    mine = inputs.first(sizes.tokens)
    return lambda: attend(mine, sizes)


@lru_cache(maxsize=1)
def _products(sizes: Sizes) -> ChunkProducts:
    # Gigabytes, so all lengths and both bounds share them.
    return ChunkProducts(sizes, group=_GROUP)


def _ours(x: Inputs, sizes: Sizes) -> tuple[Tensor, ...]:
    return _both_passes(
        x,
        lambda q, k, v: lightning_attention(
            q, k, v, log_decay=x.per_head, chunk_len=sizes.chunk_len, return_state=False
        )[0],
    )


def _ours_by_token(x: Inputs, sizes: Sizes) -> tuple[Tensor, ...]:
    per_token = x.per_token.detach().requires_grad_()
    return _both_passes(
        x,
        lambda q, k, v: lightning_attention(
            q, k, v, log_decay=per_token, chunk_len=sizes.chunk_len, return_state=False
        )[0],
        per_token,
    )


def _sdpa(x: Inputs, sizes: Sizes) -> tuple[Tensor, ...]:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        query, key, value = (y.transpose(1, 2) for y in (q, k, v))
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            out = functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        return out.transpose(1, 2)

    return _both_passes(x, attend)


def _fla(x: Inputs, sizes: Sizes) -> tuple[Tensor, ...]:
    with catch_warnings():
        # It warns where there is no GPU.
        simplefilter("ignore")
        from fla.ops.simple_gla.naive import naive_chunk_simple_gla

    decay = x.per_head.expand(x.per_token.shape)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out: Tensor = naive_chunk_simple_gla(q, k, v, decay, chunk_size=sizes.chunk_len)[0]
        return out

    return _both_passes(x, attend)


def _both_passes(
    x: Inputs, attend: Callable[[Tensor, Tensor, Tensor], Tensor], *others: Tensor
) -> tuple[Tensor, ...]:
    """The output and the gradients of q, k, v and of `others`."""
    leaves = [y.detach().requires_grad_() for y in (x.q, x.k, x.v)]
    out = attend(*leaves)
    return out.detach(), *torch.autograd.grad(out, [*leaves, *others], x.grad_out)
