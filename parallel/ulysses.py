"""Ulysses attention: ranks trade tokens for heads, attend the whole sequence, trade back. Exact.

One idea: heads do not look at one another, so a rank that has all tokens of some heads needs nobody
else. Two exchanges, each directly between all ranks: q, k and v before, out after.

    before    rank p holds [B, T, H, D]         T of the P * T tokens, all heads
    between   rank p holds [B, P * T, H/P, D]   all tokens, in their order, H/P heads

Price: a rank sends (P-1)/P of its q, and as much of out, k and v; backward sends as much again. A
key/value head that query heads of several ranks look at (always with fewer heads than ranks) goes
to each of those ranks, and to no other: T tokens of it per rank that needs it. Its gradients come
back in the dtype of k and are added up in fp32. Backward keeps q, k, v, out and lse by heads: the
memory that they take by tokens, and a copy of k and v for each rank more that shares a head;
fetching those again instead would cost their bytes twice.
Overlap: q, k and v may be functions. Each is called when the one before is on its way, and backward
goes through them in reverse while the gradients of the next are on theirs.
Source: DeepSpeed Ulysses, Jacobs et al. 2023 (arXiv 2309.14509).
Shapes: B batch, T local tokens, P ranks, H heads, Hkv key/value heads, D head dim.
"""

from collections.abc import Callable, Mapping, Sequence

from torch import Tensor
from torch._compile import _disable_dynamo

from ringctx.errors import LayoutError
from ringctx.ops.block_attention import check_heads
from ringctx.parallel import comm
from ringctx.parallel.argument_check import agreed_arguments
from ringctx.parallel.head_exchange import Departed, Route, arrive, depart, key_heads, query_heads
from ringctx.parallel.layout import Sharding, local_len
from ringctx.parallel.mask import MaskSettings
from ringctx.parallel.ring_attention import ring_attention

__all__ = ["Input", "attend_by_heads", "ulysses_attention"]

Input = Tensor | Callable[[], Tensor]
"""A tensor, or what makes it: called when the transfer of the tensor before has started."""


@_disable_dynamo
def ulysses_attention(
    q: Input,
    k: Input,
    v: Input,
    *,
    group: comm.Group,
    layout: str = "zigzag",
    causal: bool = True,
    window: int | None = None,
    sinks: int = 0,
    cu_seqlens: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """Softmax attention over a sequence whose tokens are spread over the ranks of `group`.

    Every rank of the group calls it with its own shard, and with the same shapes and settings.

    Args:
        q: this rank's queries, `[B, T, H, D]`, or a function that makes them; the size of the group
            divides H.
        k: this rank's keys, `[B, T, Hkv, D]`; Hkv divides H.
        v: this rank's values, `[B, T, Hkv, D]`.
        group: the ranks that share the sequence, in layout order.
        layout: which tokens the shards hold: "contiguous", "zigzag" or "striped".
        causal: whether a token sees only itself and earlier tokens.
        window: a token sees itself and the window - 1 tokens before it; only causal.
        sinks: with a window, the first tokens (of each document) that stay visible.
        cu_seqlens: int32 `[documents + 1]` over the whole sequence, on the CPU: where documents
            begin and end; tokens see only their own.
        scale: factor on the scores; None is 1 / sqrt(D).

    Returns:
        `[B, T, H, D]` in the dtype of q.

    Raises:
        LayoutError: if inputs, layout and group do not fit together. Raised before any transfer of
            tensors; what a function makes is checked when it is there.
    """

    def attend(queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        # All tokens are here, in order: a ring of one.
        return ring_attention(
            queries,
            keys,
            values,
            group=comm.SoloGroup(),
            layout="contiguous",
            causal=causal,
            window=window,
            sinks=sinks,
            cu_seqlens=cu_seqlens,
            scale=scale,
        )

    mask = MaskSettings(causal=causal, window=window, sinks=sinks, cu_seqlens=cu_seqlens)
    return attend_by_heads(
        (q, k, v),
        group=group,
        ulysses_group=group,
        layout=layout,
        settings={**vars(mask), "scale": scale},
        check=mask.checked,
        attend=attend,
    )


def attend_by_heads(
    inputs: Sequence[Input],
    *,
    group: comm.Group,
    ulysses_group: comm.Group,
    layout: str,
    settings: Mapping[str, object],
    check: Callable[[int], object],
    attend: Callable[[Tensor, Tensor, Tensor], Tensor],
) -> Tensor:
    """Bring q, k and v to shards of heads, attend, and bring the result back to shards of tokens.

    Args:
        inputs: q, k and v, by tokens.
        group: all ranks that share the sequence.
        ulysses_group: those that share the heads; their shards make up one shard of the layout.
        layout: which tokens the shards hold.
        settings: what else all ranks must agree on, by name.
        check: raises LayoutError unless the settings fit a sequence of the length that it is given.
        attend: maps q, k and v of this rank's heads, rows in the order of positions, to the output.

    Returns:
        The output, by tokens.

    Raises:
        LayoutError: as `ulysses_attention`.
    """
    world_size, degree = comm.group_size(group), comm.group_size(ulysses_group)
    settings = {"world_size": world_size, "layout": layout, **settings}
    lazy = not all(isinstance(x, Tensor) for x in inputs)
    made: list[Tensor] = []
    under_way: list[Departed] = []
    for tag, given in enumerate(inputs):
        made.append(given if isinstance(given, Tensor) else given())
        if lazy or not tag:
            known = made if lazy else [x for x in inputs if isinstance(x, Tensor)]
            with agreed_arguments(group, **dict(zip("qkv", known, strict=False)), **settings):
                _check(known, degree=degree)
                seq_len = known[0].shape[1] * world_size
                local_len(seq_len, world_size=world_size, layout=layout)
                check(seq_len)
        if degree > 1:
            route = _route(made, tag, group=ulysses_group, layout=layout, tag=tag)
            under_way.append(depart(made[tag], route, to="heads"))
    if degree == 1:
        return attend(*made)
    out = attend(*arrive(under_way))
    back = _route(made, 0, group=ulysses_group, layout=layout, tag=len(inputs))
    (by_tokens,) = arrive([depart(out, back, to="tokens")])
    return by_tokens


def _check(known: Sequence[Tensor], *, degree: int) -> None:
    """Raise LayoutError unless what is there of q, k and v can be attended by heads."""
    q, k, v = (*known, known[-1], known[-1])[:3]
    check_heads(q, k, v)
    if q.shape[1] != k.shape[1]:
        raise LayoutError(f"q holds {q.shape[1]:,} local tokens and k, v {k.shape[1]:,}")
    query_heads(q.shape[2], world_size=degree)


def _route(
    made: Sequence[Tensor], index: int, *, group: comm.Group, layout: str, tag: int
) -> Route:
    """How q (index 0), k or v move; out moves as q does."""
    degree, num_heads = comm.group_size(group), made[0].shape[2]
    # Heads move within this group alone, and its tokens are laid out as a sequence of their own.
    sharding = Sharding(made[0].shape[1] * degree, degree, layout)
    if index == 0:
        shares = query_heads(num_heads, world_size=degree)
    else:
        shares = key_heads(num_heads, made[index].shape[2], world_size=degree)
    return Route(
        group=group,
        shares=shares,
        runs=tuple(sharding.runs(rank) for rank in range(degree)),
        num_heads=made[index].shape[2],
        tag=tag,
    )
