"""Never a global average alone: what a run's steps were like, by their length."""

from dataclasses import asdict, replace
from typing import Any

import pytest

from ringctx.by_length import by_length, length_table
from tests.test_tracking import record


def step(bucket_len: int, tokens_per_s: float, **changes: Any) -> dict[str, Any]:
    fields = {
        "bucket_len": bucket_len,
        "num_sequences": 1024 // bucket_len,
        "tokens_per_s": tokens_per_s,
        "step_time_s": 1024 / tokens_per_s,
    }
    return asdict(replace(record(0), **(fields | changes)))


STEPS = [
    step(512, 10.0, cp_degree=2, comm_exposed_s=51.2, mfu=0.1),
    step(256, 90.0, flops_per_s=1e9),
    step(512, 30.0, cp_degree=2, comm_exposed_s=0.0, mfu=0.3),
    step(256, 1.0, flops_per_s=3e9),
    step(512, 20.0, cp_degree=2, comm_exposed_s=25.6, mfu=0.2),
    step(256, 70.0, flops_per_s=4e9),
]


def test_steps_are_summed_up_by_length_in_medians_and_totals() -> None:
    short, long = by_length(STEPS)
    assert (short.bucket_len, short.cp_degree, short.steps) == (256, 1, 3)
    assert (short.sequences, short.tokens) == (12, 3 * 1024)
    assert (short.tokens_per_s, short.flops_per_s) == (70.0, 3e9)
    assert (short.mfu, short.exposed_share) == (None, 0.0)
    assert (long.bucket_len, long.cp_degree, long.sequences) == (512, 2, 6)
    assert (long.tokens_per_s, long.mfu) == (20.0, 0.2)
    # Shares of 0.5, 0 and 0.5.
    assert long.exposed_share == pytest.approx(0.5)


def test_a_degree_that_a_resume_changed_has_a_line_of_its_own() -> None:
    stats = by_length([step(256, 10.0), step(256, 20.0, cp_degree=2), step(256, 30.0)])
    assert [(own.cp_degree, own.steps) for own in stats] == [(1, 2), (2, 1)]


def test_lines_of_an_older_run_say_nothing_of_flops() -> None:
    old = {key: value for key, value in STEPS[1].items() if key not in ("flops_per_s", "mfu")}
    (stats,) = by_length([old])
    assert stats.flops_per_s is None and stats.mfu is None
    assert "  -  " in length_table([stats])[1]


def test_the_table_shows_mfu_where_it_is_known_and_flops_elsewhere() -> None:
    head, short, long = length_table(by_length(STEPS))
    assert "MFU" in head and "20.0%" in long and "50.0%" in long
    assert short.split() == ["256", "1", "3", "12", "3,072", "70", "-", "0.0%"]
    head, short = length_table(by_length(STEPS[1::2]))
    assert "GFLOP/s a rank" in head and short.split()[-2] == "3.0"
    assert len(head) == len(short)
