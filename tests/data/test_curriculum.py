"""Algorithm 1: which bucket at which step."""

import time
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from ringctx.config import CurriculumConfig
from ringctx.data.curriculum import Origin, Schedule, find_folded, share_pieces

STEP = 2**12


def schedule(
    pieces: list[int], *, odds: str = "uniform", cycles: int = 1, seed: int = 0
) -> Schedule:
    """A schedule over buckets of lengths 16, 32, ..."""
    lengths = [2 ** (4 + k) for k in range(len(pieces))]
    curriculum = CurriculumConfig(
        odds=odds,
        cycles=cycles,
        min_len=lengths[0],
        max_len=lengths[-1],
        tokens_per_step=STEP,
    )
    return Schedule(
        curriculum,
        lengths=lengths,
        pieces=pieces,
        folded=find_folded(pieces, lengths, tokens_per_step=STEP),
        origin=Origin(0, 0, (0,) * len(pieces)),
        seed=seed,
    )


def steps_each(steps: int) -> list[int]:
    """Pieces that give six buckets this many steps each."""
    return [steps * STEP // 2 ** (4 + k) for k in range(6)]


def share(order: NDArray[Any], bucket: int) -> float:
    return float((order == bucket).mean())


def test_grow_p2_ends_with_long_and_begins_with_short_sequences_as_in_the_paper() -> None:
    order = schedule(steps_each(2000), odds="grow_p2").order
    sixth = len(order) // 6
    assert abs(share(order[:sixth], 0) - 0.50) < 0.03
    assert abs(share(order[-sixth:], 5) - 0.68) < 0.03
    assert share(order[-sixth:], 0) == 0


def algorithm_1(steps: int, odds: list[float], rng: np.random.Generator) -> NDArray[Any]:
    """The paper's pseudocode, as it stands."""
    left, order = [steps] * len(odds), []
    while any(left):
        weights = np.array([o if n else 0.0 for o, n in zip(odds, left, strict=True)])
        bucket = int(rng.choice(len(odds), p=weights / weights.sum()))
        left[bucket] -= 1
        order.append(bucket)
    return np.array(order)


@pytest.mark.parametrize(
    ("kind", "odds"), [("uniform", [1, 1, 1, 1, 1, 1]), ("grow_p2", [32, 16, 8, 4, 2, 1])]
)
def test_draws_are_distributed_like_algorithm_1(kind: str, odds: list[float]) -> None:
    rng, steps, runs = np.random.default_rng(0), 60, 60
    naive = np.stack([algorithm_1(steps, odds, rng) for _ in range(runs)])
    ours = np.stack([schedule(steps_each(steps), odds=kind, seed=s).order for s in range(runs)])
    for part in np.array_split(np.arange(naive.shape[1]), 10):
        for bucket in range(6):
            difference = share(ours[:, part], bucket) - share(naive[:, part], bucket)
            assert abs(difference) < 0.06, (part[0], bucket)


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
    odds=st.sampled_from(["uniform", "grow_p2"]),
    seed=st.integers(0, 3),
)
def test_all_but_less_than_one_step_of_tokens_is_used_and_nothing_twice(
    pieces: list[int], cycles: int, odds: str, seed: int
) -> None:
    plan = schedule(pieces, odds=odds, cycles=cycles, seed=seed)
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
