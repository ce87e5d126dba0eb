"""What fails on one rank fails on all, with the same message; nobody waits for ever."""

import pytest
import torch.distributed as dist

from ringctx.errors import ConfigError, DatasetError
from ringctx.parallel.agreement import require_equal, together
from tests.ranks import RankError, run_ranks


def _fail_on(ranks: tuple[int, ...]) -> str:
    def act() -> int:
        if dist.get_rank() in ranks:
            raise DatasetError("the disk is on fire")
        return dist.get_rank()

    try:
        return str(together(act, failures=(DatasetError,)))
    except DatasetError as error:
        return str(error)


def test_results_come_in_rank_order() -> None:
    assert run_ranks(3, _fail_on, ()) == ["[0, 1, 2]"] * 3


def test_one_failing_rank_fails_all_and_is_named() -> None:
    assert run_ranks(3, _fail_on, (1,)) == ["rank 1: the disk is on fire"] * 3


def test_the_same_failure_everywhere_is_told_once() -> None:
    assert run_ranks(3, _fail_on, (0, 1, 2)) == ["the disk is on fire"] * 3


def _only_first() -> tuple[list[int], int]:
    ran: list[int] = []
    together(lambda: ran.append(dist.get_rank()), failures=(), only_first=True)
    return ran, len(together(lambda: 7, failures=(), only_first=True))


def test_what_the_first_rank_does_alone_is_done_once() -> None:
    assert run_ranks(2, _only_first) == [([0], 1), ([], 1)]


def _require(values: tuple[str, ...]) -> None:
    require_equal(values[dist.get_rank()], what="the weather", error=ConfigError)


def test_different_values_are_listed_by_rank() -> None:
    run_ranks(2, _require, ("sun", "sun"))
    with pytest.raises(RankError, match="do not agree on the weather: rank 0: sun; rank 1: rain"):
        run_ranks(2, _require, ("sun", "rain"))
