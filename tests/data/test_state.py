"""The state of a plan: small, equal after JSON, and refused where it does not belong."""

import dataclasses
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ringctx.config import ODDS, CurriculumConfig, StageConfig
from ringctx.data.curriculum import Origin
from ringctx.data.state import PlanState
from ringctx.errors import ConfigError

SHORT = {
    "fineweb-edu": 0.1,
    "fineweb": 0.1,
    "stackexchange": 0.04,
    "wikipedia": 0.04,
    "tulu": 0.03,
    "arxiv": 0.03,
    "openwebmath": 0.03,
    "textbooks": 0.03,
}
PROLONG = CurriculumConfig(
    kind="stages",
    max_epochs={"books": 4},
    stages=(
        StageConfig(
            len=2**16,
            tokens=20 * 10**9,
            tokens_per_step=2**22,
            rope_theta=8e6,
            lr=1e-5,
            mix={"repos@64k": 0.2, "repos": 0.1, "books@64k": 0.2, "books": 0.1, **SHORT},
        ),
        StageConfig(
            len=2**19,
            tokens=20 * 10**9,
            tokens_per_step=2**23,
            rope_theta=1.28e8,
            lr=5e-6,
            mix={
                "repos@512k": 0.15,
                "repos@64k": 0.15,
                "books@512k": 0.05,
                "books@64k": 0.25,
                **SHORT,
            },
        ),
    ),
)
OTHERS = {
    "prolong": PROLONG,
    "numbers": CurriculumConfig(odds=(3, 1, 2), min_len=2048, odds_mode="token_weighted"),
    "packed": CurriculumConfig(kind="packed", len=1024, packing="best_fit", doc_mask=False),
    "window": CurriculumConfig(kind="window", len=1024, window_start=4, window_growth=0.5),
    "mixed": CurriculumConfig(mix={"a": 1, "b": 2}, max_epochs={"a": 2.5}, total_tokens=10**9),
}


def state(curriculum: CurriculumConfig = PROLONG, **changes: Any) -> PlanState:
    made = PlanState(
        dataset="0123456789abcdef" * 2,
        curriculum=curriculum,
        seed=0,
        step=7000,
        consumed=(305_175, 38_146),
        folded=(),
        origin=Origin(0, 0, (0, 0)),
    )
    return dataclasses.replace(made, **changes)


def test_two_stages_of_twelve_sources_stay_below_1_kb() -> None:
    assert [len(stage.mix or {}) for stage in PROLONG.stages] == [12, 12]
    later = Origin(5000, 0, (305_175, 0))
    for made in (state(), state(origin=later)):
        assert len(json.dumps(made.to_dict())) < 1000


@pytest.mark.parametrize("name", OTHERS)
@pytest.mark.parametrize("origin", [Origin(0, 0, (0, 0)), Origin(3, 1, (5, 0))], ids=str)
def test_a_state_reads_back_equal_from_json(name: str, origin: Origin) -> None:
    made = state(OTHERS[name], origin=origin, folded=(1,))
    assert PlanState.from_dict(json.loads(json.dumps(made.to_dict()))) == made


@given(
    odds=st.sampled_from(ODDS) | st.lists(st.floats(1e-9, 1e9), min_size=6, max_size=6).map(tuple),
    cycles=st.integers(1, 9),
    total_tokens=st.none() | st.integers(2**19, 2**40),
    mix=st.none() | st.dictionaries(st.text("abc", min_size=1), st.floats(1e-9, 1e9), min_size=1),
)
def test_any_curriculum_reads_back_equal_from_json(**fields: Any) -> None:
    made = state(CurriculumConfig(**fields))
    assert PlanState.from_dict(json.loads(json.dumps(made.to_dict()))) == made


def test_a_state_with_every_field_written_out_reads_back_equal() -> None:
    made = state()
    plain = dataclasses.asdict(made)
    assert PlanState.from_dict({"version": 1, **json.loads(json.dumps(plain))}) == made


def test_what_is_at_its_default_is_not_written() -> None:
    plain = state(CurriculumConfig(cycles=3)).to_dict()
    assert plain["curriculum"] == {"cycles": 3}
    assert "origin" not in plain


def changed_stage(**changes: Any) -> CurriculumConfig:
    first, second = PROLONG.stages
    return dataclasses.replace(PROLONG, stages=(first, dataclasses.replace(second, **changes)))


@pytest.mark.parametrize(
    ("curriculum", "said"),
    [
        (changed_stage(lr=1e-5), r"curriculum\.stages\[1\]\.lr is 1e-05, but was 5e-06\. Set"),
        (
            changed_stage(tokens_per_step=2**22),
            r"curriculum\.stages\[1\]\.tokens_per_step is 4194304",
        ),
        (
            changed_stage(mix={"repos@512k": 0.3, "books@512k": 0.7}),
            r"curriculum\.stages\[1\]\.mix\.repos@524288 is 0\.3, but was 0\.15;",
        ),
        (
            dataclasses.replace(PROLONG, max_epochs=None),
            r"curriculum\.max_epochs is None, but was \{'books': 4\.0\}\. Set",
        ),
        (
            dataclasses.replace(PROLONG, stages=PROLONG.stages[:1]),
            r"curriculum\.stages is \[\{'len': 65536.*, but was ",
        ),
    ],
    ids=["lr", "tokens_per_step", "mix", "max_epochs", "stages"],
)
def test_another_curriculum_is_refused_by_the_innermost_name(
    curriculum: CurriculumConfig, said: str
) -> None:
    made = state()
    with pytest.raises(ConfigError, match=f"another plan: {said}"):
        made.check_belongs(dataset=made.dataset, curriculum=curriculum, seed=0)


def test_only_tokens_per_step_may_differ() -> None:
    made = state()
    curriculum = dataclasses.replace(PROLONG, tokens_per_step=2**20)
    made.check_belongs(dataset=made.dataset, curriculum=curriculum, seed=0)
    with pytest.raises(ConfigError, match="seed is 1, but was 0"):
        made.check_belongs(dataset=made.dataset, curriculum=curriculum, seed=1)


@pytest.mark.parametrize(
    "curriculum",
    [{"cycels": 3}, {"stages": [{"length": 3}]}, {"stages": 3}, {"mix": 3}, {"odds": ["a"]}, None],
    ids=str,
)
def test_a_damaged_curriculum_is_refused(curriculum: Any) -> None:
    with pytest.raises(ConfigError, match="plan state is damaged"):
        PlanState.from_dict(state().to_dict() | {"curriculum": curriculum})
