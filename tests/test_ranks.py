"""The test tool itself: ranks report results, failures, deaths and hangs."""

import os
import time

import pytest
import torch
import torch.distributed as dist

from tests.ranks import RankError, run_ranks


def _sum_of_ranks(offset: int) -> tuple[int, int, float]:
    total = torch.tensor([float(dist.get_rank() + offset)])
    dist.all_reduce(total)
    return dist.get_rank(), os.getpid(), total.item()


def _fail_on_rank_1() -> None:
    assert dist.get_rank() != 1, "rank 1 says no"
    dist.barrier()


def _die_on_rank_1() -> None:
    if dist.get_rank() == 1:
        os._exit(7)
    dist.barrier()


def _hang_on_rank_0() -> None:
    if dist.get_rank() == 0:
        time.sleep(1000)


def _unwritten_memory() -> bool:
    return bool(torch.empty(100).isnan().all())


def test_ranks_share_a_group_and_return_in_rank_order() -> None:
    results = run_ranks(3, _sum_of_ranks, 10)
    assert [rank for rank, _, _ in results] == [0, 1, 2]
    assert all(total == 33.0 for _, _, total in results)


def test_processes_are_reused_by_the_next_call_of_any_size() -> None:
    pids = [pid for _, pid, _ in run_ranks(3, _sum_of_ranks, 0)]
    assert [pid for _, pid, _ in run_ranks(2, _sum_of_ranks, 0)] == pids[:2]


def test_a_failing_rank_s_traceback_reaches_the_test() -> None:
    with pytest.raises(RankError, match=r"(?s)rank 1 of 2.*in _fail_on_rank_1.*rank 1 says no"):
        run_ranks(2, _fail_on_rank_1)


def test_a_dead_rank_is_named_with_its_exit_code() -> None:
    with pytest.raises(RankError, match="rank 1 of 2 died, exit code 7"):
        run_ranks(2, _die_on_rank_1)


def test_a_hang_is_killed_and_shows_where_it_stands() -> None:
    with pytest.raises(RankError, match=r"(?s)not finished after 3 s.*rank 0.*_hang_on_rank_0"):
        run_ranks(2, _hang_on_rank_0, timeout_s=3.0)
    assert len(run_ranks(2, _sum_of_ranks, 0)) == 2


def test_unwritten_memory_is_nan_here_and_on_ranks() -> None:
    assert torch.empty(100).isnan().all()
    assert torch.ones(100).new_empty(3).isnan().all()
    assert torch.empty_like(torch.ones(3)).isnan().all()
    assert torch.empty_strided((2, 2), (2, 1)).isnan().all()
    assert all(run_ranks(2, _unwritten_memory))
