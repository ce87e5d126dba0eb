"""Algorithm 1: which bucket at which step."""

import time
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from numpy.typing import NDArray

from ringctx.config import ODDS, CurriculumConfig
from ringctx.data.curriculum import Origin, Schedule, find_folded, share_pieces

STEP = 2**12


def schedule(
    pieces: list[int],
    *,
    lengths: list[int] | None = None,
    tokens_per_step: int = STEP,
    origin: Origin | None = None,
    folded: tuple[int, ...] | None = None,
    seed: int = 0,
    **settings: Any,
) -> Schedule:
    """A schedule over buckets of lengths 16, 32, ..., or those given."""
    lengths = lengths or [2 ** (4 + k) for k in range(len(pieces))]
    if folded is None:
        folded = find_folded(pieces, lengths, tokens_per_step=tokens_per_step)
    settings.setdefault("odds", "uniform")
    settings.setdefault("cycles", 1)
    curriculum = CurriculumConfig(
        min_len=lengths[0], max_len=lengths[-1], tokens_per_step=tokens_per_step, **settings
    )
    return Schedule(
        curriculum,
        lengths=lengths,
        pieces=pieces,
        folded=folded,
        origin=origin or Origin(0, 0, (0,) * len(pieces)),
        seed=seed,
    )


def steps_each(*steps: int) -> list[int]:
    """Pieces that give each bucket so many steps; six buckets of as many, if one number."""
    steps = steps * 6 if len(steps) == 1 else steps
    return [n * STEP // 2 ** (4 + k) for k, n in enumerate(steps)]


def share(order: NDArray[Any], bucket: int) -> float:
    return float((order == bucket).mean())


def test_grow_p2_ends_with_long_and_begins_with_short_sequences_as_in_the_paper() -> None:
    order = schedule(steps_each(2000), odds="grow_p2").order
    sixth = len(order) // 6
    assert abs(share(order[:sixth], 0) - 0.50) < 0.03
    assert abs(share(order[-sixth:], 5) - 0.68) < 0.03
    assert share(order[-sixth:], 0) == 0


def algorithm_1(steps: list[int], odds: list[float], rng: np.random.Generator) -> NDArray[Any]:
    """The paper's pseudocode, as it stands."""
    left, order = list(steps), []
    while any(left):
        weights = np.array([o if n else 0.0 for o, n in zip(odds, left, strict=True)])
        bucket = int(rng.choice(len(odds), p=weights / weights.sum()))
        left[bucket] -= 1
        order.append(bucket)
    return np.array(order)


PAPER: dict[Any, list[float]] = {
    "uniform": [1, 1, 1, 1, 1, 1],
    "grow_linear": [6, 5, 4, 3, 2, 1],
    "grow_p2": [32, 16, 8, 4, 2, 1],
    "grow_p100": [1e10, 1e8, 1e6, 1e4, 1e2, 1],
    "shrink_p100": [1, 1e2, 1e4, 1e6, 1e8, 1e10],
    (1.0, 7.0, 0.5, 3.0, 2.0, 5.0): [1, 7, 0.5, 3, 2, 5],
}


def test_every_named_odds_is_one_of_the_papers() -> None:
    assert set(ODDS) == {name for name in PAPER if isinstance(name, str)}


@pytest.mark.parametrize("mode", ["bucket", "token_weighted"])
@pytest.mark.parametrize("odds", PAPER, ids=str)
def test_draws_are_distributed_like_algorithm_1(odds: Any, mode: str) -> None:
    rng, steps, runs = np.random.default_rng(0), [60, 20, 90, 30, 60, 40], 60
    tokens = np.array(steps if mode == "token_weighted" else [1] * 6)
    weighted = (np.array(PAPER[odds]) * tokens).tolist()
    naive = np.stack([algorithm_1(steps, weighted, rng) for _ in range(runs)])
    ours = np.stack(
        [schedule(steps_each(*steps), odds=odds, odds_mode=mode, seed=s).order for s in range(runs)]
    )
    for part in np.array_split(np.arange(naive.shape[1]), 10):
        for bucket in range(6):
            difference = share(ours[:, part], bucket) - share(naive[:, part], bucket)
            assert abs(difference) < 0.06, (part[0], bucket)


def test_the_order_of_the_rarest_is_right_at_any_ratio_of_odds() -> None:
    steps = steps_each(50, 40, 30, 20)
    alike = schedule(steps, odds=(1.0, 1.0, 1.0, 1.0)).order
    rare = schedule(steps, odds=(1e100, 1.0, 1.0, 1.0)).order
    assert not rare[:50].any()
    assert rare[50:].tolist() == alike[alike > 0].tolist()


def test_twelve_lengths_of_steep_odds_come_one_after_another() -> None:
    lengths = [2**k for k in range(1, 13)]
    pieces = [5 * STEP // length for length in lengths]
    steep = tuple(1e9**k for k in range(12))
    growing = schedule(pieces, lengths=lengths, odds=steep[::-1])
    assert growing.order.tolist() == np.repeat(range(12), 5).tolist()
    shrinking = schedule(pieces, lengths=lengths, odds=steep)
    assert shrinking.order.tolist() == np.repeat(range(11, -1, -1), 5).tolist()


@pytest.mark.parametrize("odds", [name for name in PAPER if isinstance(name, str)])
def test_a_length_without_pieces_does_not_shift_the_odds_of_the_others(odds: str) -> None:
    every = np.array(PAPER[odds])[[0, 2, 5]]
    settings: dict[str, Any] = {"lengths": [16, 64, 512], "pieces": [2560, 640, 80]}
    numbers = (every[0], 1.0, every[1], 1.0, 1.0, every[2])
    assert (schedule(odds=odds, **settings).order == schedule(odds=numbers, **settings).order).all()


FIRST_LONGEST = {
    "all have whole steps": ([1000, 500, 250], 2),
    "a step of the longest comes only in the third cycle": ([3000, 500, 33], 2),
    "the longest is folded": ([1000, 500, 20], 1),
    "only the shortest has whole steps": ([1000, 0, 0], 0),
    "all steps are mixed": ([200, 20, 10], 0),
}


@pytest.mark.parametrize(("pieces", "longest"), FIRST_LONGEST.values(), ids=FIRST_LONGEST)
def test_the_first_step_is_of_the_longest_bucket_that_fills_one(
    pieces: list[int], longest: int
) -> None:
    settings: dict[str, Any] = {"cycles": 3, "odds": "grow_p100", "tokens_per_step": 2048}
    drawn = schedule(pieces, **settings)
    moved = schedule(pieces, first_step="longest", **settings)
    assert moved.bucket(0) == longest
    assert 0 not in moved.mixed or len(moved.mixed) == moved.end
    at = int(np.argmax(drawn.order == longest))
    assert moved.order[1:].tolist() == np.delete(drawn.order, at).tolist()
    assert moved.consumed(moved.end) == drawn.consumed(drawn.end)
    # Every other step stays in its cycle.
    assert [moved.cycle(t + 1) for t in range(at)] == [drawn.cycle(t) for t in range(at)]


def test_the_first_step_is_one_that_the_plan_has_when_total_tokens_cut_it_short() -> None:
    settings: dict[str, Any] = {"odds": "grow_p100", "total_tokens": 20 * STEP}
    assert schedule(steps_each(20, 20), first_step="longest", **settings).bucket(0) == 0


@given(
    pieces=st.lists(st.integers(0, 600), min_size=2, max_size=5),
    cycles=st.integers(1, 5),
    at=st.floats(0, 1),
    rows=st.sampled_from([1, 2, 8]),
)
# The first step takes 16 of the longest, whose part of a cycle is 8.
@example(pieces=[3000, 0, 0, 0, 40], cycles=5, at=0.1, rows=1)
def test_another_step_size_after_a_longest_first_step_repeats_and_loses_nothing(
    pieces: list[int], cycles: int, at: float, rows: int
) -> None:
    settings: dict[str, Any] = {"pieces": pieces, "cycles": cycles, "odds": "grow_p100"}
    settings["first_step"] = "longest"
    before = schedule(**settings)
    stop = round(at * before.end)
    origin = Origin(stop, before.cycle(stop), before.consumed(stop))
    folded = find_folded(pieces, before.lengths, tokens_per_step=STEP)
    step = rows * before.lengths[-1]
    after = schedule(**settings, origin=origin, tokens_per_step=step, folded=folded)
    left = np.array(pieces) - after.consumed(after.end)
    assert (left >= 0).all()
    assert left @ np.array(after.lengths) < step


def test_only_the_first_step_of_a_run_is_the_longest() -> None:
    later = Origin(7, 0, (7 * STEP // 16, 0))
    settings: dict[str, Any] = {"odds": "grow_p100", "origin": later}
    moved = schedule(steps_each(20, 20), first_step="longest", **settings)
    assert (moved.order == schedule(steps_each(20, 20), **settings).order).all()


def test_every_cycle_takes_an_equal_part_of_every_bucket() -> None:
    plan = schedule(steps_each(40), odds="grow_p2", cycles=4)
    for cycle in np.split(plan.order, 4):
        assert np.bincount(cycle).tolist() == [10] * 6


def test_less_than_a_step_of_a_bucket_waits_for_a_later_cycle() -> None:
    # Three steps over two cycles: the half step of the first is kept for the second.
    plan = schedule([3 * STEP // 16], cycles=2)
    assert [plan.cycle(t) for t in range(plan.end)] == [0, 1, 1]


@given(
    pieces=st.lists(st.integers(0, 600), min_size=1, max_size=6),
    cycles=st.integers(1, 5),
    odds=st.sampled_from(ODDS),
    mode=st.sampled_from(["bucket", "token_weighted"]),
    first_step=st.sampled_from(["drawn", "longest"]),
    seed=st.integers(0, 3),
)
def test_all_but_less_than_one_step_of_tokens_is_used_and_nothing_twice(
    pieces: list[int], cycles: int, odds: str, mode: str, first_step: str, seed: int
) -> None:
    plan = schedule(
        pieces, odds=odds, odds_mode=mode, first_step=first_step, cycles=cycles, seed=seed
    )
    taken = np.zeros(len(pieces), dtype=int)
    for step in range(plan.end):
        assert plan.consumed(step) == tuple(taken)
        takes = np.array(plan.takes(step))
        assert takes @ np.array(plan.lengths) == STEP
        shortest = plan.bucket(step)
        assert not takes[:shortest].any(), "a step's length is that of its shortest piece"
        taken += takes
    assert (taken <= pieces).all()
    left = (np.array(pieces) - taken) @ np.array(plan.lengths)
    assert 0 <= left < STEP


def test_buckets_too_rare_for_a_step_are_folded_downwards() -> None:
    lengths = [16, 32, 64, 128]
    # 128: 3 of 4 pieces; 64: 5 pieces, and 6 halves from above make a step of 8.
    assert find_folded([100, 0, 5, 3], lengths, tokens_per_step=512) == (1, 3)


def test_the_shortest_bucket_is_never_folded() -> None:
    assert find_folded([1], [16], tokens_per_step=512) == ()


def test_shares_are_scaled_together_and_hold_the_tokens_asked_for() -> None:
    pieces, lengths = [1000, 10, 3], [16, 64, 4096]
    assert share_pieces(pieces, lengths, total_tokens=None) == (1000, 10, 3)
    kept = 1000 * 16 + 10 * 64 + 3 * 4096
    assert share_pieces(pieces, lengths, total_tokens=2 * kept) == (2000, 20, 6)
    half = share_pieces(pieces, lengths, total_tokens=kept // 2)
    assert half == (500, 5, 2)


def test_a_million_steps_are_drawn_in_seconds() -> None:
    start = time.perf_counter()
    plan = schedule(steps_each(200_000), odds="grow_p2", cycles=8)
    assert plan.end == 1_200_000
    assert time.perf_counter() - start < 10
