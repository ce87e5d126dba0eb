"""Plans of every kind of curriculum: nothing twice, nothing lost, any stop is no stop."""

import json
from collections import Counter
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ringctx.data.plan import Plan
from ringctx.data.steps import Step
from ringctx.errors import ConfigError
from tests.data.samples import MadeUpDocuments

LENGTHS = np.random.default_rng(3).integers(1, 400, size=120).tolist()
SOURCES = np.random.default_rng(4).integers(0, 3, size=120).tolist()
NAMES = ("code", "prose", "rare")
STEP = 512
KINDS: dict[str, dict[str, Any]] = {
    "spread": {"min_len": 8, "max_len": 64, "long_docs": "spread", "cycles": 2},
    "short tails packed": {"min_len": 32, "max_len": 256, "short_tail": "pack"},
    "longest first": {"min_len": 8, "max_len": 256, "first_step": "longest"},
    "decomposed, mixed": {"min_len": 8, "max_len": 128, "mix": {"code": 2, "prose": 1}},
    "concat": {"kind": "packed", "len": 128, "doc_mask": False},
    "concat, masks": {"kind": "packed", "len": 64},
    "concat, mixed": {"kind": "packed", "len": 64, "mix": {"code": 0.3, "rare": 0.7}},
    "best fit": {"kind": "packed", "len": 256, "packing": "best_fit"},
    "window": {"kind": "window", "len": 128, "window_start": 8, "window_growth": 2.5},
    "growing rows": {
        "kind": "stages",
        "doc_mask": False,
        "stages": [{"len": 16, "share": 1}, {"len": 64, "share": 2}, {"len": 256, "share": 1}],
    },
    "stages, mixed": {
        "kind": "stages",
        "stages": [
            {"len": 64, "share": 1, "mix": {"code@64": 1, "prose": 3}, "lr": 1e-3},
            {"len": 128, "share": 1, "mix": {"code@64": 2, "prose": 1}, "rope_theta": 1e6},
        ],
    },
}


def documents(**changes: Any) -> MadeUpDocuments:
    return MadeUpDocuments(LENGTHS, sources=SOURCES, source_names=NAMES, **changes)


def make_plan(kind: str, *, state: dict[str, Any] | None = None, **changes: Any) -> Plan:
    rule = {"max_dropped": 1.0} if KINDS[kind].get("kind") is None else {}
    return Plan(documents(), rule | KINDS[kind] | {"tokens_per_step": STEP} | changes, state=state)


def segments(step: Step) -> list[tuple[int, int, int]]:
    if step.row_offsets is None:
        return [(d, s, step.bucket_len) for d, s in step.pieces.tolist()]
    return [(d, s, n) for d, s, n in step.pieces.tolist()]


def uses(plan: Plan, first: int, last: int) -> Counter[tuple[int, int]]:
    """How often each (document, offset) is an input in steps first, ..., last - 1."""
    found: Counter[tuple[int, int]] = Counter()
    for t in range(first, last):
        for document, start, length in segments(plan.step(t)):
            found.update((document, start + i) for i in range(length))
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_one_epoch_trains_no_token_twice_and_accounts_for_all(kind: str) -> None:
    plan = make_plan(kind)
    found, summary = uses(plan, 0, len(plan)), plan.describe()
    assert set(found.values()) == {1}
    assert all(at < LENGTHS[document] for document, at in found)
    assert summary.repeated_tokens == 0
    counted = summary.tokens + summary.left_over_tokens - summary.padding_tokens
    counted += summary.dropped_tokens + summary.passed_over_tokens
    assert counted == sum(LENGTHS)
    assert summary.tokens - summary.padding_tokens <= sum(found.values()) <= summary.tokens
    assert summary.kept_tokens + summary.dropped_tokens == summary.dataset_tokens == sum(LENGTHS)


@pytest.mark.parametrize("kind", KINDS)
def test_rows_are_full_but_for_padding_and_steps_have_equal_tokens(kind: str) -> None:
    plan = make_plan(kind)
    for t in range(len(plan)):
        step = plan.step(t)
        assert step.num_rows * step.bucket_len == STEP
        if step.row_offsets is None:
            continue
        filled = np.add.reduceat(step.pieces[:, 2], step.row_offsets[:-1])
        assert (step.pieces[:, 2] > 0).all() and (filled <= step.bucket_len).all()
        if "best fit" not in kind:
            assert (filled == step.bucket_len).all()


@pytest.mark.parametrize("kind", KINDS)
def test_targets_are_all_tokens_that_have_a_next_one_in_their_document(kind: str) -> None:
    plan = make_plan(kind)
    for t in range(len(plan)):
        step = plan.step(t)
        expected = sum(n - (s + n == LENGTHS[d]) for d, s, n in segments(step))
        assert step.num_targets == expected


@settings(max_examples=60)
@given(kind=st.sampled_from(sorted(KINDS)), at=st.floats(0, 1))
def test_resume_is_no_stop_from_any_step(kind: str, at: float) -> None:
    plan = make_plan(kind)
    stop = round(at * len(plan))
    state = json.loads(json.dumps(plan.state(stop)))
    again = make_plan(kind, state=state)
    assert (again.first_step, len(again)) == (stop, len(plan))
    assert all(again.step(t) == plan.step(t) for t in range(stop, len(plan)))
    assert again.hash != plan.hash or stop == 0


@settings(max_examples=60)
@given(
    kind=st.sampled_from(sorted(KINDS)),
    at=st.floats(0, 1),
    then=st.floats(0, 1),
    new_step=st.sampled_from([256, 768, 1024]),
)
def test_another_tokens_per_step_on_resume_repeats_nothing(
    kind: str, at: float, then: float, new_step: int
) -> None:
    plan = make_plan(kind)
    stop = round(at * len(plan))
    changed = make_plan(kind, tokens_per_step=new_step, state=plan.state(stop))
    found = uses(plan, 0, stop) + uses(changed, stop, len(changed))
    assert set(found.values()) <= {1}
    # What is lost is less than a step, for each stage.
    stages = len(KINDS[kind].get("stages", [0]))
    lost = sum(uses(plan, 0, len(plan)).values()) - sum(found.values())
    padding = changed.describe().padding_tokens
    assert lost < stages * new_step + padding
    again_at = stop + round(then * (len(changed) - stop))
    again = make_plan(kind, tokens_per_step=new_step, state=changed.state(again_at))
    assert all(again.step(t) == changed.step(t) for t in range(again_at, len(changed)))


def test_sources_have_their_weights_in_every_bucket() -> None:
    plan = make_plan("decomposed, mixed")
    rows: dict[int, Counter[str]] = {}
    for t in range(len(plan)):
        step = plan.step(t)
        counts = Counter(NAMES[SOURCES[d]] for d in step.pieces[:, 0].tolist())
        rows.setdefault(step.bucket_len, Counter()).update(counts)
    assert all(set(counts) == {"code", "prose"} for counts in rows.values())
    for counts in rows.values():
        n = sum(counts.values())
        assert abs(counts["code"] - 2 / 3 * n) <= 1


def test_a_source_repeats_only_as_often_as_max_epochs_says() -> None:
    once = make_plan("concat, mixed")
    twice = make_plan("concat, mixed", max_epochs={"rare": 2, "code": 2})
    assert set(uses(twice, 0, len(twice)).values()) <= {1, 2}
    assert abs(len(twice) - 2 * len(once)) <= 2
    more = once.describe().tokens * 2
    with pytest.raises(ConfigError, match=r"runs out .*max_epochs"):
        make_plan("concat, mixed", total_tokens=more)
    with pytest.raises(ConfigError, match=r"total_tokens=.* runs out .*max_epochs"):
        make_plan("decomposed, mixed", total_tokens=10 * sum(LENGTHS))


def test_a_length_without_pieces_of_a_source_is_noted_and_the_others_fill_it() -> None:
    made = MadeUpDocuments([64] * 40 + [16] * 40, sources=[0] * 40 + [1] * 40,
                           source_names=("long", "short"))  # fmt: skip
    plan = Plan(made, {"min_len": 16, "max_len": 64, "tokens_per_step": 128,
                       "mix": {"long": 1, "short": 1}})  # fmt: skip
    assert plan.bucket_lens == (16, 64)
    notes = "; ".join(plan.describe().notes)
    assert "len 64: no sequences from short" in notes and "len 16: no sequences from long" in notes


def test_whole_pieces_of_a_source_fill_rows_of_a_later_stage() -> None:
    plan = make_plan("stages, mixed")
    for t in range(len(plan)):
        step = plan.step(t)
        for document, start, length in segments(step):
            if NAMES[SOURCES[document]] == "code":
                assert length == 64 and start % 64 == 0
    lens = [plan.step(t).bucket_len for t in range(len(plan))]
    assert lens == sorted(lens) and set(lens) == {64, 128}


def test_stages_set_learning_rate_and_rotary_base() -> None:
    plan = make_plan("stages, mixed")
    first = plan.step(0)
    last = plan.step(len(plan) - 1)
    border = len(plan.steps_of(64))
    assert (first.lr, first.rope_theta, first.stage_steps) == (1e-3, None, (0, border))
    assert (last.lr, last.rope_theta, last.stage_steps) == (None, 1e6, None)


def test_a_stage_keeps_its_share_of_the_schedule_when_steps_change_size() -> None:
    plan = make_plan("stages, mixed")
    stop = len(plan.steps_of(64)) // 2
    changed = make_plan("stages, mixed", tokens_per_step=STEP // 2, state=plan.state(stop))
    first, end = changed.step(stop).stage_steps or (0, 0)
    assert (stop - first) / (end - first) == pytest.approx(
        stop / len(plan.steps_of(64)), abs=1 / (end - first)
    )


def test_no_step_goes_back_to_a_stage_that_is_over_when_steps_shrink() -> None:
    plan = make_plan("growing rows", tokens_per_step=4096)
    stop = len(plan.steps_of(16)) + 2
    changed = make_plan("growing rows", tokens_per_step=256, state=plan.state(stop))
    lengths = [changed.bucket_len(t) for t in range(stop, len(changed))]
    assert lengths[0] == 64 and lengths == sorted(lengths)


def test_a_stage_that_is_over_may_be_shorter_than_a_step_has_become() -> None:
    rule: dict[str, Any] = {
        "stages": [{"len": 16, "tokens": STEP}, {"len": 64, "tokens": 16 * STEP}]
    }
    plan = make_plan("growing rows", **rule)
    changed = make_plan("growing rows", tokens_per_step=4 * STEP, state=plan.state(3), **rule)
    assert [changed.bucket_len(t) for t in range(3, len(changed))] == [64, 64, 64]
    with pytest.raises(
        ConfigError, match=r"stages\[0\] has 32 rows of 16 tokens, less than the 128"
    ):
        make_plan("growing rows", tokens_per_step=4 * STEP, **rule)


def test_stages_beyond_the_data_use_every_document_again_before_any_a_third_time() -> None:
    total = int(2.5 * sum(LENGTHS))
    plan = make_plan("growing rows", total_tokens=total)
    found = uses(plan, 0, len(plan))
    assert set(found.values()) <= {1, 2, 3}
    # What stages leave over at their ends was to be used as well.
    left = plan.describe().left_over_tokens + 3 * 256
    assert sum(1 for n in found.values() if n < 2) <= left
    assert any("are used 2.5 times" in note for note in plan.describe().notes)


def test_a_source_in_several_ways_is_noted() -> None:
    notes = "; ".join(make_plan("stages, mixed").describe().notes)
    assert "max_epochs" not in notes
    rule: dict[str, Any] = {"stages": [{"len": 64, "share": 1, "mix": {"code": 1, "code@32": 1}}]}
    notes = "; ".join(make_plan("stages, mixed", **rule).describe().notes)
    assert "code, code@32 are of one source; max_epochs counts for each of them" in notes


def test_the_dropped_share_is_that_of_the_sources_that_are_mixed() -> None:
    made = MadeUpDocuments([6400] * 40 + [127] * 40, sources=[0] * 40 + [1] * 40,
                           source_names=("long", "short"))  # fmt: skip
    rule: dict[str, Any] = {"min_len": 64, "max_len": 64, "tokens_per_step": 128}
    assert Plan(made, rule).describe().dropped_tokens == 40 * 63
    with pytest.raises(ConfigError, match=r"49\.6% of the tokens .*max_dropped=0\.2"):
        Plan(made, rule | {"mix": {"short": 1}})


def test_rejects_tails_that_fill_no_row() -> None:
    rule = {"min_len": 256, "max_len": 256, "tokens_per_step": 256, "short_tail": "pack",
            "max_dropped": 1.0, "total_tokens": 256}  # fmt: skip
    with pytest.raises(ConfigError, match=r"gives 0 tokens in sequences of 256 to 256"):
        Plan(MadeUpDocuments([100, 50]), rule)


def test_the_window_grows_with_the_steps_up_to_the_row() -> None:
    plan = make_plan("window")
    windows = [plan.step(t).window for t in range(len(plan))]
    grown = [8 + int(2.5 * t) for t in range(len(plan))]
    assert windows == [w if w < 128 else None for w in grown]


def test_the_first_step_is_of_the_longest_rows_when_asked() -> None:
    plan = make_plan("longest first")
    assert plan.step(0).bucket_len == max(plan.bucket_lens)
    plain = make_plan("longest first", first_step="drawn")
    assert plan.describe().buckets == plain.describe().buckets


def test_packed_tails_lose_less_than_a_row() -> None:
    packed, dropped = make_plan("short tails packed"), make_plan("short tails packed",
                                                                  short_tail="drop")  # fmt: skip
    assert packed.describe().dropped_tokens < 32 < dropped.describe().dropped_tokens
    masks = {plan_step.doc_mask for t in packed.steps_of(32).tolist()
             for plan_step in [packed.step(t)]}  # fmt: skip
    assert True in masks


def test_masks_stand_only_where_rows_hold_several_pieces() -> None:
    assert all(make_plan("concat, masks").step(t).doc_mask for t in (0, 1))
    assert not any(make_plan("concat").step(t).doc_mask for t in (0, 1))
    assert not make_plan("longest first").step(0).doc_mask


def test_loss_bits_decide_what_is_a_target() -> None:
    rng = np.random.default_rng(0)
    loss = [rng.random(n) < 0.5 for n in LENGTHS]
    made = documents(loss=np.concatenate(loss))
    plan = Plan(made, {"kind": "packed", "len": 64, "tokens_per_step": STEP})
    for t in range(0, len(plan), 5):
        step = plan.step(t)
        expected = sum(int(loss[d][s + 1 : s + n + 1].sum()) for d, s, n in segments(step))
        assert step.num_targets == expected


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mix": {"code": 1, "poems": 1}}, r"curriculum\.mix: .*no source 'poems'.*code, prose"),
        ({"min_len": 128, "max_dropped": 0.2}, r"dropped, more than curriculum\.max_dropped=0\.2"),
        ({"kind": "packed", "min_len": 256, "max_len": 8192, "len": 64,
          "tokens_per_step": 2**20}, r"the curriculum has .* rows of 64 .* the 16,384 of one step"),
    ],
)  # fmt: skip
def test_rejects_what_the_documents_do_not_give(changes: dict[str, Any], message: str) -> None:
    rule = {"min_len": 8, "max_len": 128, "tokens_per_step": STEP}
    with pytest.raises(ConfigError, match=message):
        Plan(documents(), rule | changes)


def test_rejects_a_mix_of_a_dataset_without_sources() -> None:
    with pytest.raises(ConfigError, match=r"the dataset has none: build it with NAME=PATH"):
        Plan(MadeUpDocuments(LENGTHS), {"min_len": 8, "max_len": 64, "tokens_per_step": STEP,
                                        "mix": {"code": 1}})  # fmt: skip


def test_rejects_pieces_that_no_document_of_a_source_reaches() -> None:
    with pytest.raises(ConfigError, match=r"code@512: the longest document .* no piece of 512"):
        stage = {"len": 512, "share": 1, "mix": {"code@512": 1}}
        Plan(documents(), {"kind": "stages", "tokens_per_step": STEP, "stages": [stage]})
