"""The plan is a pure function: nothing twice, nothing lost, and any stop is no stop."""

import json
from collections import Counter
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ringctx.data.plan import Plan
from ringctx.errors import ConfigError
from tests.data.samples import MadeUpDocuments

LENGTHS = np.random.default_rng(0).integers(1, 900, size=150).tolist()
CURRICULUM: dict[str, Any] = {
    "odds": "grow_p2",
    "cycles": 3,
    "min_len": 8,
    "max_len": 256,
    "tokens_per_step": 512,
}


def make_plan(
    lengths: list[int] = LENGTHS,
    *,
    seed: int = 0,
    state: dict[str, Any] | None = None,
    fingerprint: str = "made-up",
    **changes: Any,
) -> Plan:
    documents = MadeUpDocuments(lengths, fingerprint=fingerprint)
    return Plan(documents, CURRICULUM | changes, seed=seed, state=state)


def token_uses(plan: Plan, first: int, last: int) -> Counter[tuple[int, int]]:
    """How often each (document, offset) is an input in steps first, ..., last - 1."""
    uses: Counter[tuple[int, int]] = Counter()
    for t in range(first, last):
        step = plan.step(t)
        for document, start in step.pieces.tolist():
            uses.update((document, start + i) for i in range(step.bucket_len))
    return uses


PLANS = {
    "lengths": st.lists(st.integers(1, 700), min_size=12, max_size=40),
    "odds": st.sampled_from(["uniform", "grow_p2"]),
    "cycles": st.integers(1, 4),
    "min_len": st.sampled_from([2, 8, 32]),
    "max_len": st.sampled_from([32, 64, 256]),
    "rows": st.integers(1, 3),
    "seed": st.integers(0, 3),
}


def drawn_plan(rows: int, lengths: list[int], **settings: Any) -> Plan | None:
    try:
        return make_plan(lengths, tokens_per_step=rows * settings["max_len"], **settings)
    except ConfigError:
        return None


@given(**PLANS)
def test_every_token_is_trained_once_or_counted(**drawn: Any) -> None:
    plan = drawn_plan(**drawn)
    if plan is None:
        return
    uses, summary = token_uses(plan, 0, len(plan)), plan.describe()
    lengths = drawn["lengths"]
    assert set(uses.values()) <= {1}
    assert all(at < lengths[document] for document, at in uses)
    assert sum(uses.values()) == summary.tokens
    assert (
        summary.tokens + summary.left_over_tokens + summary.dropped_tokens
        == summary.kept_tokens + summary.dropped_tokens
        == sum(lengths)
    )
    assert summary.left_over_tokens < plan.curriculum.tokens_per_step


@given(**PLANS)
def test_every_step_has_the_same_tokens_in_sequences_of_one_length(**drawn: Any) -> None:
    plan = drawn_plan(**drawn)
    if plan is None:
        return
    seen = set()
    for t in range(len(plan)):
        step = plan.step(t)
        assert step.pieces.shape == (plan.curriculum.tokens_per_step // step.bucket_len, 2)
        ends = [start + step.bucket_len for _, start in step.pieces.tolist()]
        at_end = sum(
            end == drawn["lengths"][d] for end, d in zip(ends, step.pieces[:, 0], strict=True)
        )
        assert step.num_targets == plan.curriculum.tokens_per_step - at_end
        seen.add(step.bucket_len)
    assert plan.bucket_lens == tuple(sorted(seen))


@given(at=st.floats(0, 1), total_tokens=st.sampled_from([None, 900, 20_000]), **PLANS)
def test_resume_is_no_stop_from_any_step(at: float, total_tokens: int | None, **drawn: Any) -> None:
    plan = drawn_plan(**drawn, total_tokens=total_tokens)
    if plan is None:
        return
    stop = round(at * len(plan))
    state = json.loads(json.dumps(plan.state(stop)))
    rows, lengths = drawn.pop("rows"), drawn.pop("lengths")
    again = make_plan(
        lengths,
        state=state,
        total_tokens=total_tokens,
        tokens_per_step=rows * drawn["max_len"],
        **drawn,
    )
    assert (again.first_step, len(again)) == (stop, len(plan))
    assert all(again.step(t) == plan.step(t) for t in range(stop, len(plan)))
    assert again.state(len(plan)) == plan.state(len(plan))


@given(at=st.floats(0, 1), then=st.floats(0, 1), new_rows=st.integers(1, 5), **PLANS)
def test_another_tokens_per_step_on_resume_repeats_and_loses_nothing(
    at: float, then: float, new_rows: int, **drawn: Any
) -> None:
    plan = drawn_plan(**drawn)
    if plan is None:
        return
    stop = round(at * len(plan))
    del drawn["rows"]
    changed = make_plan(
        state=plan.state(stop), tokens_per_step=new_rows * drawn["max_len"], **drawn
    )
    uses = token_uses(plan, 0, stop) + token_uses(changed, stop, len(changed))
    assert set(uses.values()) <= {1}
    left = plan.describe().kept_tokens - sum(uses.values())
    assert left == changed.describe().left_over_tokens < changed.curriculum.tokens_per_step
    # A state of the changed plan goes on exactly, too.
    again_at = stop + round(then * (len(changed) - stop))
    again = make_plan(
        state=changed.state(again_at), tokens_per_step=new_rows * drawn["max_len"], **drawn
    )
    assert all(again.step(t) == changed.step(t) for t in range(again_at, len(changed)))


def test_seed_changes_the_order_but_not_what_is_trained() -> None:
    one, two = make_plan(seed=1), make_plan(seed=2)
    assert len(one) == len(two) and one.hash != two.hash
    assert not all(one.step(t) == two.step(t) for t in range(len(one)))
    assert one.bucket_lens == two.bucket_lens


def test_two_ranks_compute_the_same_plan() -> None:
    one, two = make_plan(), make_plan()
    assert one.hash == two.hash
    assert all(one.step(t) == two.step(t) for t in range(len(one)))


def test_half_of_the_tokens_is_half_of_every_bucket() -> None:
    whole = make_plan(tokens_per_step=256)
    half = make_plan(tokens_per_step=256, total_tokens=whole.describe().tokens // 2)
    assert len(half) == len(whole) // 2
    for length, bucket in half.describe().buckets.items():
        assert abs(bucket.steps - whole.describe().buckets[length].steps / 2) <= 1.5


def test_more_tokens_than_there_are_repeat_all_in_a_new_order() -> None:
    kept = make_plan().describe().kept_tokens
    plan = make_plan(total_tokens=3 * kept)
    uses = token_uses(plan, 0, len(plan))
    assert set(uses.values()) <= {2, 3}
    assert sum(uses.values()) == 3 * kept // 512 * 512
    first, second = (
        [step.pieces.tolist() for t in part if (step := plan.step(t)).bucket_len == 256]
        for part in (range(len(plan) // 3), range(len(plan) // 3, 2 * len(plan) // 3))
    )
    assert first and second and first != second[: len(first)]


def test_total_tokens_are_exactly_as_many_steps() -> None:
    assert len(make_plan(total_tokens=20 * 512)) == 20
    assert len(make_plan(total_tokens=200 * 512)) == 200


def test_a_bucket_too_rare_for_one_step_is_folded_and_listed() -> None:
    # 36 pieces of 64 fill 4 steps of 8; the other 4 and the halves of halves of 256 fill a fifth.
    plan = make_plan([256] + [64] * 36, min_len=64)
    (fold,) = plan.describe().folds
    assert (fold.bucket, fold.pieces, fold.into) == (256, 1, 64)
    assert fold.reason == "too few for one step"
    assert plan.bucket_lens == (64,)
    assert token_uses(plan, 0, len(plan))[0, 200] == 1


def test_a_folded_bucket_stays_folded_when_steps_become_smaller() -> None:
    lengths = [256] + [64] * 40
    plan = make_plan(lengths, min_len=64)
    smaller = make_plan(lengths, min_len=64, tokens_per_step=256, state=plan.state(2))
    assert make_plan(lengths, min_len=64, tokens_per_step=256).bucket_lens == (64, 256)
    assert smaller.bucket_lens == (64,)


def test_a_state_is_below_1_kb_for_large_data_and_many_buckets() -> None:
    lengths = [2**30 - 1] * 5 + [2**20 - 1] * 100_000
    plan = make_plan(lengths, min_len=2**8, max_len=2**26, tokens_per_step=2**26, cycles=8)
    state = plan.state(len(plan) // 2)
    changed = make_plan(
        lengths, min_len=2**8, max_len=2**26, tokens_per_step=2**27, cycles=8, state=state
    )
    assert len(json.dumps(changed.state(len(changed)))) < 1000


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"odds": "uniform"}, "curriculum.odds"),
        ({"cycles": 4}, "curriculum.cycles"),
        ({"min_len": 16}, "curriculum.min_len"),
        ({"max_len": 128}, "curriculum.max_len"),
        ({"total_tokens": 4096}, "curriculum.total_tokens"),
        ({"seed": 5}, "seed"),
        ({"fingerprint": "other"}, "dataset"),
    ],
)
def test_rejects_a_state_of_another_plan_naming_the_field(
    change: dict[str, Any], field: str
) -> None:
    with pytest.raises(ConfigError, match=f"another plan: {field} is "):
        make_plan(state=make_plan().state(3), **change)


@pytest.mark.parametrize(
    "damage",
    [
        {"consumed": [0] * 6},
        {"consumed": [0]},
        {"step": 10**6},
        {"step": None},
        {"origin": {"step": 0}},
        {"origin": {"step": 0, "cycle": 3, "consumed": [0] * 6}},
        {"origin": {"step": 0, "cycle": 0, "consumed": [0]}},
        {"version": 2},
    ],
)
def test_rejects_a_damaged_state(damage: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="plan state"):
        make_plan(state=make_plan().state(3) | damage)


def test_rejects_data_smaller_than_one_step_with_both_numbers() -> None:
    with pytest.raises(ConfigError, match=r"gives 296 tokens .*tokens_per_step=512") as error:
        make_plan([100, 207])
    assert "lower tokens_per_step" in str(error.value)


def test_rejects_data_in_which_no_document_reaches_min_len() -> None:
    with pytest.raises(ConfigError, match="longest of 3 has 7 tokens"):
        make_plan([3, 7, 5])


@pytest.mark.parametrize("step", [-1, 2, 10**6])
def test_rejects_steps_outside_the_plan(step: int) -> None:
    plan = make_plan(state=make_plan().state(3))
    for ask in (plan.step, plan.state):
        with pytest.raises(IndexError, match="not in the plan: 3 to"):
            ask(step)


def test_an_unknown_field_of_the_curriculum_is_named() -> None:
    with pytest.raises(ConfigError, match=r"curriculum\.cycels.*cycles"):
        make_plan(cycels=3)


def test_sequences_of_65536_and_131072_tokens_work() -> None:
    plan = make_plan([65_536, 131_072, 200_000], min_len=65_536, max_len=131_072,
                     tokens_per_step=131_072)  # fmt: skip
    uses = [plan.step(t) for t in range(len(plan))]
    assert sorted(step.bucket_len for step in uses) == [65_536, 131_072, 131_072]
