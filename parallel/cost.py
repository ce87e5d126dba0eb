"""Which schedule is the cheapest for each pass: the one function that `auto` and the planner ask.

One idea: price all four with the same formulas (`pass_cost.py`) and take the fastest. Forward and
backward choose for themselves: K/V carry dK and dV home in fp32, queries only dQ. What is too close
to call goes to the first of this list, as it needs fewer buffers and peers; all_gather stays
within a bound on memory, and Q travels only where it is light and gains clearly:

    one_way   two_way   all_gather   token_ring

Pure: the same shapes, mask and wiring give the same choice on every rank. Price: some 50 ms for a
new case on 8 ranks, microseconds for a known one.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache

from ringctx.parallel.layout import Sharding
from ringctx.parallel.mask import Mask
from ringctx.parallel.need import Travels, needed_pieces
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
SCHEDULES = ("one_way", "two_way", "all_gather", "token_ring")
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
    """The schedule of each pass, all prices in the order of SCHEDULES, and the reason."""

    forward: str
    backward: str
    forward_costs: tuple[PassCost, ...]
    backward_costs: tuple[PassCost, ...]
    why: str


@lru_cache(maxsize=1024)
def choose(*, shape: Shape, sharding: Sharding, mask: Mask, wiring: Wiring) -> Choice:
    """The cheapest schedule of each pass.

    Args:
        shape: what a token weighs.
        sharding: the sequence and its layout.
        mask: who sees whom.
        wiring: the links between the ranks.

    Returns:
        On one rank, where all schedules are the same: only one_way.
    """
    names = SCHEDULES if sharding.world_size > 1 else SCHEDULES[:1]
    forward, backward = (
        tuple(
            pass_cost(
                name, backward=backward, shape=shape, sharding=sharding, mask=mask, wiring=wiring
            )
            for name in names
        )
        for backward in (False, True)
    )
    first = _cheapest(forward, shape, sharding, backward=False)
    second = _cheapest(backward, shape, sharding, backward=True)
    facts = [*_facts(shape, sharding, mask), f"forward: {_reason(first, forward)}"]
    return Choice(
        forward=first.schedule,
        backward=second.schedule,
        forward_costs=forward,
        backward_costs=backward,
        why="; ".join([*facts, f"backward: {_reason(second, backward)}"])
        if sharding.world_size > 1
        else "one rank holds the whole sequence",
    )


def _cheapest(
    costs: Sequence[PassCost], shape: Shape, sharding: Sharding, *, backward: bool
) -> PassCost:
    simplest, *others = costs
    most = _MOST_MEMORY * _local_bytes(shape, sharding, backward=backward)
    by_keys = [c for c in others if c.schedule != "token_ring" and c.memory_bytes <= most]
    fastest = min(cost.time_s for cost in (simplest, *by_keys))
    best = next(cost for cost in (simplest, *by_keys) if cost.time_s <= _CLOSE * fastest)
    if _weight_of_q(shape, backward=backward) > _HEAVIEST_Q:
        return best
    by_queries = (cost for cost in others if cost.schedule == "token_ring")
    return next((c for c in by_queries if _CLOSE_FOR_Q * c.time_s < best.time_s), best)


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


def _reason(best: PassCost, costs: Sequence[PassCost]) -> str:
    one_way = costs[0]
    reasons = {
        "one_way": "nothing else is clearly faster",
        "two_way": "both directions at once",
        "all_gather": "straight to each user",
        "token_ring": "Q with its results is lighter than K/V with theirs",
    }
    reason = f"{best.schedule}, {reasons[best.schedule]}"
    if best is not one_way:
        return f"{reason}: {best.time_s / one_way.time_s:.0%} of one_way's time"
    hidden = best.time_s <= _CLOSE * best.compute_s
    return f"{best.schedule}, compute hides all transfers" if hidden else reason
