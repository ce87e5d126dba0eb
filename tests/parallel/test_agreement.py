"""What fails on one rank fails on all, with the same message; nobody waits for ever."""

import pytest
import torch.distributed as dist

from ringctx.errors import ConfigError, DatasetError
from ringctx.parallel.agreement import agree, agree_on_first, require_equal
from tests.ranks import RankError, run_ranks


def _fail_on(ranks: tuple[int, ...], kind: type[Exception]) -> str:
    def act() -> int:
        if dist.get_rank() in ranks:
            raise kind("the disk is on fire")
        return dist.get_rank()

    try:
        return str(agree(act, error=ConfigError))
    except DatasetError as error:
        assert error.on_all_ranks
        return f"DatasetError: {error}"
    except ConfigError as error:
        assert error.on_all_ranks
        return f"ConfigError: {error}"


def test_each_rank_keeps_its_own_result() -> None:
    assert run_ranks(3, _fail_on, (), DatasetError) == ["0", "1", "2"]


def test_one_failing_rank_fails_all_and_is_named() -> None:
    expected = "DatasetError: rank 1: the disk is on fire"
    assert run_ranks(3, _fail_on, (1,), DatasetError) == [expected] * 3


def test_the_same_failure_everywhere_is_told_once() -> None:
    expected = "DatasetError: the disk is on fire"
    assert run_ranks(3, _fail_on, (0, 1, 2), DatasetError) == [expected] * 3


def test_an_error_of_the_system_becomes_the_callers_own() -> None:
    expected = "ConfigError: rank 1: the disk is on fire"
    assert run_ranks(2, _fail_on, (1,), OSError) == [expected] * 2


def test_a_bug_ends_its_own_rank() -> None:
    with pytest.raises(RankError, match="ZeroDivisionError"):
        run_ranks(1, _fail_on, (0,), ZeroDivisionError)


def _ask_first(fails: bool) -> str:
    def act() -> str:
        assert dist.get_rank() == 0
        if fails:
            raise OSError("no such folder")
        return "from rank 0"

    try:
        return agree_on_first(act, error=DatasetError)
    except DatasetError as error:
        return str(error)


def test_what_the_first_rank_finds_alone_reaches_all() -> None:
    assert run_ranks(2, _ask_first, False) == ["from rank 0"] * 2
    assert run_ranks(2, _ask_first, True) == ["no such folder"] * 2


def _require(values: tuple[str, ...]) -> None:
    require_equal({"sky": "blue", "weather": values[dist.get_rank()]}, error=ConfigError)


def test_different_values_are_listed_by_name_and_rank() -> None:
    run_ranks(2, _require, ("sun", "sun"))
    with pytest.raises(
        RankError, match=r"do not agree:\nweather: rank 0 has sun, rank 1 has rain$"
    ):
        run_ranks(2, _require, ("sun", "rain"))
