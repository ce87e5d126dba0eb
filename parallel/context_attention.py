"""Attention over a mesh of heads and tokens: Ulysses inside, a ring outside. Exact.

One idea: the ranks of a ulysses group together hold what one rank of a shorter ring would hold.
They trade tokens for heads, attend in the rings of the ranks with the same heads, and trade back.
8 tokens, zigzag, 2 x 2 ranks:

    rank      0     1     2     3
    tokens    A H   B G   C F   D E     all heads
    ulysses   ABGH  ABGH  CDEF  CDEF    half of the heads: zigzag on 2 ranks, twice
    ring      0 <-> 2, 1 <-> 3

Price, for u x r ranks: the exchanges of Ulysses on u ranks, and a ring of r - 1 hops, with u times
the tokens and 1/u of the heads: a hop moves as much as before where u divides Hkv, and there are
fewer. A key/value head that several ranks share travels in each of their rings.
Placement: a ulysses group is neighbours, so that its exchanges can stay within a fast node; striped
it is the ring that is neighbours (`mesh.split_ranks`).
Source: USP, Fang and Zhao 2024 (arXiv 2405.07719); LoongTrain, Gu et al. 2024 (arXiv 2406.18485).
Shapes: B batch, T local tokens, H heads, Hkv key/value heads, D head dim.
"""

from torch import Tensor
from torch._compile import _disable_dynamo

from ringctx.config import Layout, Schedule, TopologyConfig
from ringctx.errors import LayoutError
from ringctx.parallel.mask import MaskSettings
from ringctx.parallel.mesh import ContextMesh
from ringctx.parallel.ring_attention import ring_attention, wiring_of
from ringctx.parallel.ulysses import Input, attend_by_heads
from ringctx.parallel.ways import check_schedule

__all__ = ["context_attention"]


@_disable_dynamo
def context_attention(
    q: Input,
    k: Input,
    v: Input,
    *,
    mesh: ContextMesh,
    layout: Layout | None = None,
    causal: bool = True,
    window: int | None = None,
    sinks: int = 0,
    cu_seqlens: Tensor | None = None,
    schedule: Schedule | None = None,
    topology: TopologyConfig | None = None,
    scale: float | None = None,
) -> Tensor:
    """Softmax attention over a sequence whose tokens are spread over the ranks of a mesh.

    Every rank of `mesh.group` calls it with its own shard, and with the same shapes and settings.

    Args:
        q: this rank's queries, `[B, T, H, D]`, or a function that makes them, as in
            `ulysses_attention`; the mesh's ulysses_degree divides H.
        k: this rank's keys, `[B, T, Hkv, D]`; Hkv divides H.
        v: this rank's values, `[B, T, Hkv, D]`.
        mesh: who shares the sequence and how; see `context_mesh`.
        layout: which tokens the shards hold; None is the mesh's.
        causal: whether a token sees only itself and earlier tokens.
        window: a token sees itself and the window - 1 tokens before it; only causal.
        sinks: with a window, the first tokens (of each document) that stay visible.
        cu_seqlens: int32 `[documents + 1]` over the whole sequence, on the CPU.
        schedule: what travels in the ring; None is the mesh's.
        topology: how the ranks of the world are wired, for the ring to choose by; None is the
            mesh's.
        scale: factor on the scores; None is 1 / sqrt(D).

    Returns:
        `[B, T, H, D]` in the dtype of q.

    Raises:
        LayoutError: as `ulysses_attention`, or if the mesh was made for another layout.
    """
    layout = mesh.layout if layout is None else layout
    schedule = mesh.schedule if schedule is None else schedule
    topology = mesh.topology if topology is None else topology
    mask = MaskSettings(causal=causal, window=window, sinks=sinks, cu_seqlens=cu_seqlens)

    def check(seq_len: int) -> None:
        _check_mesh(mesh, layout=layout, schedule=schedule)
        # Raises where the nodes of a topology do not fit the ring.
        wiring_of(mesh.ring_group, topology)
        mask.checked(seq_len)

    def attend(queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        return ring_attention(
            queries,
            keys,
            values,
            group=mesh.ring_group,
            layout=layout,
            causal=causal,
            window=window,
            sinks=sinks,
            cu_seqlens=cu_seqlens,
            schedule=schedule,
            topology=topology,
            scale=scale,
        )

    return attend_by_heads(
        (q, k, v),
        group=mesh.group,
        ulysses_group=mesh.ulysses_group,
        layout=layout,
        settings={
            **vars(mask),
            "ulysses_degree": mesh.ulysses_degree,
            "schedule": schedule,
            "topology": topology,
            "scale": scale,
        },
        check=check,
        attend=attend,
    )


def _check_mesh(mesh: ContextMesh, *, layout: str, schedule: str) -> None:
    """Raise LayoutError unless the schedule is known and the mesh was made for the layout."""
    check_schedule(schedule)
    both = mesh.ulysses_degree > 1 and mesh.ring_degree > 1
    if both and (layout == "striped") != (mesh.layout == "striped"):
        raise LayoutError(
            f"layout={layout!r} on a mesh that was made for {mesh.layout!r}: striped groups other "
            f"ranks than the rest; make the mesh with layout={layout!r}"
        )
