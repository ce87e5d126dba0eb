"""What an exchange of states costs, and which one is the cheapest: what `exchange="auto"` asks.

One idea: a pass moves one state of S = B H K V elements a part, so its transfers are a small table
of parts and readers. With P ranks and one document:

    method       layout       sent by rank r      received by rank r    most received   steps
    all_gather   contiguous   (P - 1 - r) S       r S                   (P - 1) S       1
                 zigzag       (P - 1 + r) S       (2 P - 2 - r) S       (2 P - 2) S     1
    ring         contiguous   S, the last none    S, the first none     S               P - 1
                 zigzag       2 S, both ends S    2 S, both ends S      2 S             2 P - 2

Backward is the mirror: contiguous, what was received is sent; zigzag, the same again. Borders
between documents only take away. Time:

    all_gather   latency + bytes on the busiest link / rate, beyond the work inside chunks, during
                 which it travels
    ring         the longest way along the chain, each hop with its latency and S / the rate of its
                 slowest link; none of it counts as hidden: a hop waits until its rank looks up from
                 its own work, between groups of chunks on a CPU, after all of them on a GPU

On a switch the last rank must receive as many bytes either way, so all_gather is right there until
its buffers of 2 P - 2 states matter; over cables or between nodes, where its transfers share links,
ring wins by volume. FLOP/s are those of the topology: the work inside chunks takes rather longer,
so all_gather is never flattered.

Pure: the same shapes, chain and wiring give the same choice on every rank. Price: of the order of
all_gather's transfers and their links: milliseconds for 64 ranks.
"""

from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise

import numpy as np
import numpy.typing as npt
import torch

from ringctx.parallel.parts import Chain
from ringctx.parallel.topology import Ints, Wiring

__all__ = ["ExchangeCost", "StateShape", "choose_exchange", "exchange_cost"]

# Cheapest first where time does not decide.
_METHODS = ("all_gather", "ring")
# Times within this factor are the same.
_CLOSE = 1.02
# Transfers that are laid on their links at once.
_CHUNK = 1 << 16


@dataclass(frozen=True, slots=True, kw_only=True)
class StateShape:
    """The sizes of one call of lightning attention that bytes and FLOPs follow from."""

    batch: int = 1
    heads: int
    key_dim: int
    value_dim: int
    # Of states: fp32, or float64.
    dtype: torch.dtype = torch.float32
    # Whether decays depend on the data: then all_gather sends each part's along.
    data_decay: bool = False
    chunk_len: int = 64

    def message_bytes(self, method: str) -> int:
        """Bytes of one message."""
        state = self.key_dim * self.value_dim
        decay = 1 if self.data_decay and method == "all_gather" else 0
        return self.batch * self.heads * (state + decay) * self.dtype.itemsize

    def hiding_flops(self, tokens: int, *, backward: bool) -> float:
        """Of the work inside the chunks of so many tokens."""
        dims = (
            (3 * self.key_dim + 2 * self.value_dim) if backward else self.key_dim + self.value_dim
        )
        return 2.0 * self.batch * tokens * self.heads * self.chunk_len * dims


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ExchangeCost:
    """The price of one direction under one method."""

    method: str
    # What each rank sends and receives.
    sent_bytes: Ints
    received_bytes: Ints
    # Transfers that wait for one another.
    steps: int
    # In words; None where nothing moves.
    busiest_link: str | None
    busiest_bytes: int
    # Until the last state has arrived.
    time_s: float
    # What of it no other work hides.
    exposed_s: float


@lru_cache(maxsize=256)
def exchange_cost(
    method: str, *, backward: bool, shape: StateShape, chain: Chain, wiring: Wiring
) -> ExchangeCost:
    """Price one direction.

    Args:
        method: "all_gather" or "ring".
        backward: which of the two directions.
        shape: what a state weighs.
        chain: the parts and the borders between documents.
        wiring: the links between the ranks.
    """
    weight, ranks = shape.message_bytes(method), chain.sharding.world_size
    moves = _moves(method, chain, backward=backward)
    away = moves.between_ranks()
    link, link_bytes = _link_bytes(away, weight, wiring)
    busy_s = link_bytes / wiring.bytes_per_s(link)
    busiest = int(busy_s.argmax()) if len(link) else None
    steps, way_s = _longest_way(moves, weight, wiring) if method == "ring" else (1, 0.0)
    latency_s = wiring.topology.latency_us * 1e-6
    time_s = 0.0 if busiest is None else max(way_s, float(busy_s[busiest]) + latency_s)
    hidden_s = 0.0
    if method == "all_gather":
        work = shape.hiding_flops(chain.sharding.local_len, backward=backward)
        hidden_s = work / wiring.topology.flops
    return ExchangeCost(
        method=method,
        sent_bytes=weight * np.bincount(away.src, minlength=ranks),
        received_bytes=weight * np.bincount(away.dst, minlength=ranks),
        steps=steps if len(link) else 0,
        busiest_link=None if busiest is None else wiring.link_name(int(link[busiest])),
        busiest_bytes=0 if busiest is None else int(link_bytes[busiest]),
        time_s=time_s,
        exposed_s=max(0.0, time_s - hidden_s),
    )


@lru_cache(maxsize=256)
def choose_exchange(*, shape: StateShape, chain: Chain, wiring: Wiring) -> str:
    """The method that leaves the least to wait for in both directions together.

    Args:
        shape: what a state weighs.
        chain: the parts and the borders between documents.
        wiring: the links between the ranks.

    Returns:
        "all_gather" where it makes no difference.
    """
    best, best_s = "", float("inf")
    for method in _METHODS:
        exposed_s = sum(
            exchange_cost(
                method, backward=backward, shape=shape, chain=chain, wiring=wiring
            ).exposed_s
            for backward in (False, True)
        )
        # To nine digits: the last bits of a sum depend on the processor, the choice must not.
        exposed_s = float(f"{exposed_s:.9g}")
        if _CLOSE * exposed_s < best_s:
            best, best_s = method, exposed_s
    return best


@dataclass(frozen=True, slots=True, eq=False)
class _Moves:
    """Transfers between ranks, in the order of the chain; all of one weight."""

    # The part whose state travels, or with which it has been folded.
    part: Ints
    src: Ints
    dst: Ints
    # Whether it waits for the one before.
    waits: npt.NDArray[np.bool_]

    def between_ranks(self) -> "_Moves":
        """Without those from a rank to itself."""
        away = self.src != self.dst
        return _Moves(self.part[away], self.src[away], self.dst[away], self.waits[away])


@lru_cache(maxsize=256)
def _moves(method: str, chain: Chain, *, backward: bool) -> _Moves:
    order, rows = chain.order(backward=backward), []
    if method == "all_gather":
        for part in order:
            src = chain.parts[part].rank
            rows += [(part, src, dst, 0) for dst in chain.readers(part, backward=backward)]
    else:
        # Within a rank a state hops for free; the next hop waits for it all the same.
        for part, reader in pairwise(order):
            if chain.receives(reader, backward=backward):
                waits = int(chain.passes(part, backward=backward))
                rows.append((part, chain.parts[part].rank, chain.parts[reader].rank, waits))
    table = np.array(rows, dtype=np.int64).reshape(-1, 4)
    return _Moves(table[:, 0], table[:, 1], table[:, 2], table[:, 3].astype(bool))


def _link_bytes(moves: _Moves, weight: int, wiring: Wiring) -> tuple[Ints, npt.NDArray[np.float64]]:
    """The links that carry anything, rising, and the bytes of each."""
    found, counts = np.zeros(0, dtype=np.int64), np.zeros(0)
    for start in range(0, len(moves.src), _CHUNK):
        some = slice(start, start + _CHUNK)
        link = wiring.occupied(moves.src[some], moves.dst[some]).link
        found, index = np.unique(np.concatenate([found, link]), return_inverse=True)
        loads = np.concatenate([counts, np.ones(len(link))])
        counts = np.bincount(index, weights=loads).astype(np.float64)
    return found, weight * counts


def _longest_way(hops: _Moves, weight: int, wiring: Wiring) -> tuple[int, float]:
    """Hops between ranks that follow one another, and the seconds that they take."""
    used = wiring.occupied(hops.src, hops.dst)
    hop_s = np.zeros(len(hops.src))
    np.maximum.at(hop_s, used.transfer, weight / wiring.bytes_per_s(used.link))
    hop_s += wiring.topology.latency_us * 1e-6
    hop_s[hops.src == hops.dst] = 0.0
    longest, way, longest_s, way_s = 0, 0, 0.0, 0.0
    for away, waits, seconds in zip(
        (hops.src != hops.dst).tolist(), hops.waits.tolist(), hop_s.tolist(), strict=True
    ):
        way, way_s = (way + away, way_s + seconds) if waits else (int(away), seconds)
        longest, longest_s = max(longest, way), max(longest_s, way_s)
    return longest, longest_s
