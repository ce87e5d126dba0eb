"""The example that prints routes: for every schedule and wiring, and quick to read."""

import itertools

import pytest

from examples import show_route
from ringctx.parallel.cost import SCHEDULES

TOPOLOGIES = ("cables", "two_level")


@pytest.mark.parametrize(("schedule", "topology"), list(itertools.product(SCHEDULES, TOPOLOGIES)))
def test_prints_both_passes_in_few_lines(
    schedule: str, topology: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert show_route.main(schedule, "4", topology) == 0
    printed = capsys.readouterr().out
    assert printed.count("busiest link: ") == 4
    assert "\ncausal, forward: " in printed and "a window of 5, backward: " in printed
    assert max(map(len, printed.splitlines())) <= 120


def test_names_what_works(capsys: pytest.CaptureFixture[str]) -> None:
    assert show_route.main("three_way") == 2
    assert "two_way" in capsys.readouterr().out


@pytest.mark.parametrize("ranks", ["x", "0", "-1", "2.5", ""])
def test_a_number_of_ranks_that_is_none_is_told(
    ranks: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert show_route.main("two_way", ranks) == 2
    assert f"{ranks!r} is not a number of ranks; write for example 4" in capsys.readouterr().out


@pytest.mark.parametrize("ranks", ["1", "3", "6"])
def test_nodes_fit_any_number_of_ranks(ranks: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert show_route.main("one_way", ranks, "two_level") == 0
    assert capsys.readouterr().out.count("busiest link: ") == 4
