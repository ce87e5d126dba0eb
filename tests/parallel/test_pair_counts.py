"""Pairs that are counted in closed form are those of the slices that kernels run."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from ringctx.parallel.layout import LAYOUTS, Piece, Sharding
from ringctx.parallel.mask import Mask, pair_slices
from ringctx.parallel.pair_counts import visible_pairs


@st.composite
def shardings(draw: st.DrawFn) -> Sharding:
    world_size = draw(st.sampled_from([1, 2, 3, 4, 8]))
    layout = draw(st.sampled_from(LAYOUTS))
    local_len = draw(st.integers(1, 12)) * (2 if layout == "zigzag" else 1)
    return Sharding(world_size * local_len, world_size, layout)


@st.composite
def masks(draw: st.DrawFn, seq_len: int) -> Mask:
    causal = draw(st.booleans())
    window = draw(st.none() | st.integers(1, seq_len)) if causal else None
    sinks = 0 if window is None else draw(st.integers(0, 5))
    inside = draw(st.sets(st.integers(1, max(1, seq_len - 1)), max_size=5))
    bounds = tuple(sorted({0, *inside, seq_len}))
    documents = bounds if len(bounds) > 2 else None
    return Mask(causal=causal, window=window, sinks=sinks, cu_seqlens=documents)


@st.composite
def pieces(draw: st.DrawFn, sharding: Sharding) -> Piece:
    start = draw(st.integers(0, sharding.local_len - 1))
    stop = draw(st.integers(start + 1, sharding.local_len))
    return Piece(draw(st.integers(0, sharding.world_size - 1)), start, stop)


@given(st.data())
def test_counts_the_pairs_of_the_slices(data: st.DataObject) -> None:
    sharding = data.draw(shardings())
    mask = data.draw(masks(sharding.seq_len))
    some = data.draw(st.lists(pieces(sharding), min_size=1, max_size=4))
    # Every piece with every rank: also those that see nothing of each other.
    which, ranks = np.indices((len(some), sharding.world_size)).reshape(2, -1)
    for keys in (True, False):
        counted = visible_pairs(mask, sharding, pieces=some, which=which, ranks=ranks, keys=keys)
        for piece, rank, found in zip(which.tolist(), ranks.tolist(), counted, strict=True):
            here, shard = some[piece], sharding.shard(rank)
            q, k = (shard, here) if keys else (here, shard)
            slices = pair_slices(mask, sharding, q=q, k=k)
            assert found == sum(part.pairs for part in slices), (q, k)


@given(st.data())
def test_counts_each_pair_of_the_whole_sequence_once(data: st.DataObject) -> None:
    sharding = data.draw(shardings())
    mask = data.draw(masks(sharding.seq_len))
    ranks = range(sharding.world_size)
    shards = [sharding.shard(rank) for rank in ranks]
    which, others = np.indices((len(shards), len(shards))).reshape(2, -1)
    counted = visible_pairs(mask, sharding, pieces=shards, which=which, ranks=others, keys=True)
    i, j = np.ogrid[: sharding.seq_len, : sharding.seq_len]
    visible = (j <= i) if mask.causal else (i + j >= 0)
    first = np.zeros(sharding.seq_len, dtype=np.int64)
    if mask.cu_seqlens is not None:
        bounds = np.array(mask.cu_seqlens)
        document = np.searchsorted(bounds, np.arange(sharding.seq_len), side="right") - 1
        visible = visible & (document[:, None] == document)
        first = bounds[document]
    if mask.window is not None:
        visible = visible & ((j > i - mask.window) | (j < first[:, None] + mask.sinks))
    assert counted.sum() == visible.sum()
