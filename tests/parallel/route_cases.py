"""Random cases of routes, and the plain truth about who needs what."""

from typing import Any

import numpy as np
import numpy.typing as npt
from hypothesis import strategies as st

from ringctx.config import TopologyConfig
from ringctx.parallel.layout import Sharding, positions
from ringctx.parallel.mask import Mask
from ringctx.parallel.topology import Wiring, wire_up

__all__ = ["masks", "seen", "sharded_masks", "sharding_of", "wirings"]


@st.composite
def masks(draw: st.DrawFn, seq_len: int) -> Mask:
    causal = draw(st.booleans())
    window = draw(st.none() | st.integers(1, max(1, seq_len - 1))) if causal else None
    sinks = draw(st.integers(0, 4)) if window else 0
    cuts = draw(st.sets(st.integers(1, max(1, seq_len - 1)), max_size=4)) if seq_len > 1 else set()
    bounds = (0, *sorted(cuts), seq_len) if cuts else None
    return Mask(causal=causal, window=window, sinks=sinks, cu_seqlens=bounds)


@st.composite
def sharded_masks(draw: st.DrawFn, most_ranks: int = 8) -> tuple[Sharding, Mask]:
    world_size = draw(st.integers(1, most_ranks))
    layout = draw(st.sampled_from(["contiguous", "zigzag", "striped"]))
    local_len = draw(st.integers(1, 6)) * (2 if layout == "zigzag" else 1)
    sharding = Sharding(local_len * world_size, world_size, layout)
    return sharding, draw(masks(sharding.seq_len))


@st.composite
def wirings(draw: st.DrawFn, ranks: int) -> Wiring:
    """Of a group that is the whole run, or ranks 1, 2, ... of a larger one."""
    kind: Any = draw(st.sampled_from(["switch", "cables", "fully_connected", "two_level"]))
    node = None
    if kind == "two_level":
        node = draw(st.sampled_from([n for n in range(1, ranks + 1) if ranks % n == 0]))
    beyond = 0 if node else draw(st.sampled_from([0, 3]))
    first = 1 if beyond else 0
    return wire_up(
        TopologyConfig(kind=kind, ranks_per_node=node),
        ranks=tuple(range(first, first + ranks)),
        world_size=ranks + beyond,
    )


def sharding_of(ranks: int, local_len: int, layout: str) -> Sharding:
    return Sharding(ranks * local_len, ranks, layout)


def seen(sharding: Sharding, mask: Mask) -> npt.NDArray[np.bool_]:
    """Which query sees which key, `[rank, row, rank, row]`: by positions alone."""
    at = np.stack(
        [
            positions(
                sharding.seq_len,
                rank=rank,
                world_size=sharding.world_size,
                layout=sharding.layout,
            ).numpy()
            for rank in range(sharding.world_size)
        ]
    )
    q, k = at[:, :, None, None], at[None, None, :, :]
    bounds = np.array(mask.cu_seqlens or (0, sharding.seq_len))
    document = np.searchsorted(bounds, at, side="right") - 1
    visible: npt.NDArray[np.bool_] = document[:, :, None, None] == document[None, None, :, :]
    if mask.causal:
        visible = visible & (k <= q)
    if mask.window is not None:
        sink = k < (bounds[document] + mask.sinks)[None, None, :, :]
        visible = visible & ((k > q - mask.window) | sink)
    return visible
