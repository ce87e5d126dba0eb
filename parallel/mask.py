"""Which part of a block pair a mask lets through, as slices that attention kernels run directly.

One idea: no mask is ever built. A pair (queries of rank i, keys of rank j) is cut into full
rectangles, which need no mask, and squares on the diagonal, which kernels mask themselves. Nothing
that the mask hides is computed, but for the upper triangles of a kernel's own diagonal tiles.

    causal        j = i            j < i                    j > i
    contiguous    causal square    all q x all k            nothing
    zigzag        causal square    all q x front half k     back half q x all k
    striped       causal square    causal square            q[1:] x k[:-1], causal square
"""

from dataclasses import dataclass

from ringctx.parallel.layout import check_layout

__all__ = ["PairSlice", "visible_slices"]


@dataclass(frozen=True, slots=True)
class PairSlice:
    """Queries [q_start, q_stop) against keys [k_start, k_stop), in tokens within the two blocks."""

    q_start: int
    q_stop: int
    k_start: int
    k_stop: int
    # A square on the diagonal: query q_start + i sees keys k_start .. k_start + i.
    causal: bool

    @property
    def q(self) -> slice:
        """The query rows, to index with."""
        return slice(self.q_start, self.q_stop)

    @property
    def k(self) -> slice:
        """The key rows, to index with."""
        return slice(self.k_start, self.k_stop)


def visible_slices(
    *, layout: str, causal: bool, q_rank: int, kv_rank: int, world_size: int, local_len: int
) -> tuple[PairSlice, ...]:
    """Cut one block pair into the slices that some query in it can see.

    Args:
        layout: one of `layout.LAYOUTS`.
        causal: whether a token sees only itself and earlier tokens.
        q_rank: the rank whose queries look.
        kv_rank: the rank whose keys are looked at.
        world_size: ranks that share the sequence.
        local_len: tokens per rank, at least 1; even for zigzag on two ranks or more.

    Returns:
        Disjoint slices, none of them empty. Together they are exactly the visible part.

    Raises:
        LayoutError: if the layout is unknown.
    """
    check_layout(layout)
    assert 0 <= q_rank < world_size and 0 <= kv_rank < world_size, (q_rank, kv_rank, world_size)
    n = local_len
    if not causal:
        return (PairSlice(0, n, 0, n, causal=False),)
    if q_rank == kv_rank:
        return (PairSlice(0, n, 0, n, causal=True),)
    if layout == "contiguous":
        return _contiguous(n, keys_earlier=kv_rank < q_rank)
    if layout == "zigzag":
        return _zigzag(n, keys_earlier=kv_rank < q_rank)
    return _striped(n, keys_earlier=kv_rank < q_rank)


def _contiguous(n: int, *, keys_earlier: bool) -> tuple[PairSlice, ...]:
    return (PairSlice(0, n, 0, n, causal=False),) if keys_earlier else ()


def _zigzag(n: int, *, keys_earlier: bool) -> tuple[PairSlice, ...]:
    assert n % 2 == 0, n
    half = n // 2
    # The shard of a higher rank lies between the two blocks of a lower one.
    if keys_earlier:
        return (PairSlice(0, n, 0, half, causal=False),)
    return (PairSlice(half, n, 0, n, causal=False),)


def _striped(n: int, *, keys_earlier: bool) -> tuple[PairSlice, ...]:
    if keys_earlier:
        return (PairSlice(0, n, 0, n, causal=True),)
    # Key i of a later rank comes just after query i: visible from query i + 1 on.
    return (PairSlice(1, n, 0, n - 1, causal=True),) if n > 1 else ()
