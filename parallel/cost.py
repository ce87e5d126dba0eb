"""Which schedule is the cheapest for each pass: the one function that `auto` and the planner ask.

One idea: price them with the same formulas (`pass_cost.py`) and take the fastest. Forward and
backward choose for themselves: K/V carry dK and dV home in fp32, queries only dQ. What is too close
to call goes to the first of this list, as it needs fewer buffers and peers; all_gather stays
within a bound on memory, and Q travels only where it is light and gains clearly:

    one_way   two_way   all_gather   token_ring

In this order they are priced, and no more of them once one is as fast as balanced compute alone:
the rest cannot be clearly faster.

Pure: the same shapes, mask and wiring give the same choice on every rank. Price: some 50 ms for a
new case on 8 ranks, some seconds on 1024 where compute hides the transfers of one_way (a minute or
more where all must be priced), microseconds for a known one.
"""

from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache

import numpy as np

from ringctx.parallel.layout import Sharding
from ringctx.parallel.mask import Mask
from ringctx.parallel.need import Travels, needed_pieces
from ringctx.parallel.pair_counts import visible_pairs
from ringctx.parallel.pass_cost import PassCost, bytes_between, pass_cost, route_of_pass
from ringctx.parallel.topology import Wiring
from ringctx.parallel.traffic import Shape

__all__ = [
    "SCHEDULES",
    "Choice",
    "PassCost",
    "bytes_between",
    "choose",
    "pass_cost",
    "route_of_pass",
]

# Simplest first: wins what time does not decide.
_BY_KEYS = ("one_way", "two_way", "all_gather")
SCHEDULES = (*_BY_KEYS, "token_ring")
# Times within this factor are the same.
_CLOSE = 1.02
# Q must gain more: the formulas leave out the merging of its results, and its smaller messages.
_CLOSE_FOR_Q = 1.1
# Q travels only where it weighs, with its results, at most this many times K/V with theirs: two
# streams can at best use twice the links. MHA forward is 2.02 : 2, GQA 2:1 is 2.02 : 1.
_HEAVIEST_Q = 1.5
# Memory that a schedule may take, in times of what the pass reads and returns anyway.
_MOST_MEMORY = 12
# A share of K/V worth a word.
_LITTLE = 0.5


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """The schedule of each pass, and the reason; all prices for who asks for them."""

    forward: str
    backward: str
    why: str
    case: "_Case"

    @property
    def forward_costs(self) -> tuple[PassCost, ...]:
        """In the order of SCHEDULES. Priced when asked for, also those that `choose` passed by."""
        return self.case.prices(backward=False)

    @property
    def backward_costs(self) -> tuple[PassCost, ...]:
        """As `forward_costs`."""
        return self.case.prices(backward=True)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Case:
    """What a price depends on besides schedule and pass."""

    shape: Shape
    sharding: Sharding
    mask: Mask
    wiring: Wiring

    def price(self, schedule: str, *, backward: bool) -> PassCost:
        return pass_cost(
            schedule,
            backward=backward,
            shape=self.shape,
            sharding=self.sharding,
            mask=self.mask,
            wiring=self.wiring,
        )

    def prices(self, *, backward: bool) -> tuple[PassCost, ...]:
        # On one rank all schedules are the same.
        names = SCHEDULES if self.sharding.world_size > 1 else SCHEDULES[:1]
        return tuple(self.price(name, backward=backward) for name in names)

    def least_s(self, *, backward: bool) -> float:
        """No schedule is faster: every rank computes an equal share, and nothing moves."""
        whole = Sharding(self.sharding.seq_len, 1, "contiguous")
        (pairs,) = visible_pairs(
            self.mask, whole, pieces=[whole.shard(0)], ranks=np.zeros(1, dtype=np.int64), keys=True
        ).tolist()
        share = pairs / self.sharding.world_size
        return self.shape.flops(share, backward=backward) / self.wiring.topology.flops


@lru_cache(maxsize=1024)
def choose(*, shape: Shape, sharding: Sharding, mask: Mask, wiring: Wiring) -> Choice:
    """The cheapest schedule of each pass.

    Prices no more schedules than it takes to know.

    Args:
        shape: what a token weighs.
        sharding: the sequence and its layout.
        mask: who sees whom.
        wiring: the links between the ranks.

    Returns:
        On one rank, where all schedules are the same: one_way.
    """
    case = _Case(shape=shape, sharding=sharding, mask=mask, wiring=wiring)
    if sharding.world_size == 1:
        why = "one rank holds the whole sequence"
        return Choice(forward=SCHEDULES[0], backward=SCHEDULES[0], why=why, case=case)
    first, second = (_cheapest(case, backward=backward) for backward in (False, True))
    reasons = [
        *_facts(shape, sharding, mask),
        f"forward: {_reason(first, case, backward=False)}",
        f"backward: {_reason(second, case, backward=True)}",
    ]
    return Choice(
        forward=first.schedule, backward=second.schedule, why="; ".join(reasons), case=case
    )


def _cheapest(case: _Case, *, backward: bool) -> PassCost:
    enough = _CLOSE * case.least_s(backward=backward)
    most = _MOST_MEMORY * _local_bytes(case.shape, case.sharding, backward=backward)
    priced: list[PassCost] = []
    for name in _BY_KEYS:
        cost = case.price(name, backward=backward)
        if name == "one_way" or cost.memory_bytes <= most:
            priced.append(cost)
        fastest = min(map(_time_s, priced))
        best = next(cost for cost in priced if _time_s(cost) <= _CLOSE * fastest)
        # What is still to be priced cannot be clearly faster.
        if _time_s(best) <= enough:
            return best
    if _weight_of_q(case.shape, backward=backward) > _HEAVIEST_Q:
        return best
    by_queries = case.price("token_ring", backward=backward)
    return by_queries if _CLOSE_FOR_Q * _time_s(by_queries) < _time_s(best) else best


def _time_s(cost: PassCost) -> float:
    """To nine digits: the last bits of a sum depend on the processor, the choice must not."""
    return float(f"{cost.time_s:.9g}")


def _weight_of_q(shape: Shape, *, backward: bool) -> float:
    """Q and its results, in times of K/V and theirs."""

    def both_ways(travels: Travels) -> int:
        out = shape.guest_bytes(travels, backward=backward)
        return out + shape.result_bytes(travels, "direct", backward=backward)

    return both_ways("q") / both_ways("kv")


def _local_bytes(shape: Shape, sharding: Sharding, *, backward: bool) -> int:
    """q, k, v, out, and backward the gradient of each."""
    row = 2 * (shape.heads + shape.kv_heads) * shape.head_dim * shape.dtype.itemsize
    return (2 if backward else 1) * shape.batch * sharding.local_len * row


def _facts(shape: Shape, sharding: Sharding, mask: Mask) -> list[str]:
    """What about shape and mask decides."""
    facts = []
    if shape.heads > shape.kv_heads:
        plural = "s" if shape.kv_heads > 1 else ""
        facts.append(
            f"K/V weighs {Fraction(shape.kv_heads, shape.heads)} of Q and out "
            f"({shape.heads} query heads to {shape.kv_heads} K/V head{plural})"
        )
    needed = needed_pieces(sharding, mask, travels="kv")
    share = sum(item.piece.length for item in needed) / sharding.seq_len
    if share < _LITTLE:
        narrow = "window" if mask.window is not None else "documents"
        facts.append(f"{narrow}: only {share:.1%} of K/V leaves its rank")
    return facts


def _reason(best: PassCost, case: _Case, *, backward: bool) -> str:
    reasons = {
        "one_way": "nothing else is clearly faster",
        "two_way": "both directions at once",
        "all_gather": "straight to each user",
        "token_ring": "Q with its results is lighter than K/V with theirs",
    }
    reason = f"{best.schedule}, {reasons[best.schedule]}"
    if best.schedule != "one_way":
        one_way = case.price("one_way", backward=backward)
        return f"{reason}: {best.time_s / one_way.time_s:.0%} of one_way's time"
    hidden = best.time_s <= _CLOSE * best.compute_s
    return f"{best.schedule}, compute hides all transfers" if hidden else reason
