"""Exchanges: refused when they could not work, waited for, counted; their order suits NCCL."""

import time
from collections.abc import Sequence
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from ringctx.errors import LayoutError
from ringctx.parallel.comm import (
    Exchange,
    Expected,
    Group,
    Pending,
    SoloGroup,
    Transfer,
    current_ledger,
    exchange,
    expect,
    group_rank,
    group_size,
    record_into,
    record_traffic,
)
from tests.ranks import run_ranks
from tests.virtual_ranks import Mail, VirtualGroup, run_virtual


def _swap(group: Group, value: float, tag: int = 0) -> Exchange:
    """Two ranks exchange a number."""
    peer = 1 - group_rank(group)
    sent, received = torch.full((3,), value), torch.empty(3)
    return exchange([Transfer(sent, peer, tag)], [Transfer(received, peer, tag)], group=group)


def test_wait_returns_what_arrived_in_the_order_asked_for() -> None:
    def body(group: Group) -> list[float]:
        peer = 1 - group_rank(group)
        sends = [Transfer(torch.full((1,), 10.0 * peer + tag), peer, tag) for tag in (0, 1, 2)]
        recvs = [Transfer(torch.empty(1), peer, tag) for tag in (2, 0, 1)]
        handle = exchange(sends, recvs, group=group)
        first = [x.item() for x in handle.wait()]
        assert first == [x.item() for x in handle.wait()]
        return first

    assert run_virtual(2, body) == [[2, 0, 1], [12, 10, 11]]


@pytest.mark.parametrize(
    ("sends", "message"),
    [
        ([Transfer(torch.zeros(4, 4)[:, 0], 1, 0)], "4"),
        ([Transfer(torch.zeros(1), 0, 0)], "rank 0 sends to itself"),
        ([Transfer(torch.zeros(1), 2, 0)], "2, 2"),
        ([Transfer(torch.zeros(1), 1, 5), Transfer(torch.zeros(2), 1, 5)], "two transfers share"),
    ],
    ids=["strided", "to itself", "no such peer", "same tag"],
)
def test_misuse_is_refused_before_anything_moves(sends: list[Transfer], message: str) -> None:
    class Refuses(VirtualGroup):
        def start(self, *_: Any) -> Sequence[Pending]:
            raise ValueError("a transfer started")

    group = Refuses(0, 2, Mail())
    with pytest.raises(AssertionError, match=message):
        expect(sends, group=group)
    with pytest.raises(AssertionError, match=message):
        exchange(sends, [], group=group)
    with pytest.raises(AssertionError, match=message):
        exchange([], sends, group=group)


def test_solo_group_is_rank_0_of_1_and_needs_no_process_group() -> None:
    assert (group_rank(SoloGroup()), group_size(SoloGroup())) == (0, 1)
    assert exchange([], [], group=SoloGroup()).wait() == ()


@pytest.mark.parametrize("ask", [group_rank, group_size])
def test_a_missing_group_is_named(ask: Any) -> None:
    with pytest.raises(LayoutError, match=r"group=None names no ranks.*SoloGroup"):
        ask(None)
    with pytest.raises(LayoutError, match="not a process group that this rank is in"):
        ask(dist.GroupMember.NON_GROUP_MEMBER)


def test_bytes_count_by_peer_and_only_inside_the_innermost_block() -> None:
    def body(group: Group) -> None:
        peer = 1 - group_rank(group)
        _swap(group, 0.0).wait()
        with record_traffic() as outer:
            _swap(group, 0.0).wait()
            with record_traffic() as inner:
                _swap(group, 0.0).wait()
                _swap(group, 0.0).wait()
            with record_into(None):
                _swap(group, 0.0).wait()
        assert (outer.moved_bytes, inner.moved_bytes) == (12, 24)
        assert inner.sent == inner.received == {peer: 24}
        assert current_ledger() is None

    run_virtual(2, body)


def _wait_for_a_late_peer() -> float:
    assert dist.group.WORLD is not None
    with record_traffic() as ledger:
        if dist.get_rank() == 1:
            time.sleep(0.3)
        _swap(dist.group.WORLD, 1.0).wait()
    return ledger.exposed_s()


def test_exposed_time_is_what_wait_took() -> None:
    waited_s, punctual_s = run_ranks(2, _wait_for_a_late_peer)
    assert waited_s > 0.2
    assert punctual_s < waited_s


def _posted_operations() -> list[tuple[str, int, int]]:
    """What reaches torch.distributed on a group of global ranks 2 and 0."""
    group = dist.new_group([0, 2])
    if dist.get_rank() == 1:
        return []
    posted: list[tuple[str, int, int]] = []
    post = dist.batch_isend_irecv

    def spy(operations: list[dist.P2POp]) -> list[dist.Work]:
        assert all(x.peer is not None for x in operations)
        posted.extend((x.op.__name__, x.peer, x.tag) for x in operations)
        return post(operations)

    peer = 1 - group_rank(group)
    sends = [Transfer(torch.ones(2), peer, tag) for tag in (1, 0)]
    recvs = [Transfer(torch.empty(2), peer, tag) for tag in (1, 0)]
    with mock.patch.object(dist, "batch_isend_irecv", spy):
        exchange(sends, recvs, group=group).wait()
    return posted


def test_one_batch_holds_receives_first_by_tag_with_global_peers() -> None:
    first, _, third = run_ranks(3, _posted_operations)
    assert first == [("irecv", 2, 0), ("irecv", 2, 1), ("isend", 2, 0), ("isend", 2, 1)]
    assert third == [("irecv", 0, 0), ("irecv", 0, 1), ("isend", 0, 0), ("isend", 0, 1)]


def _receive_what_is_announced() -> tuple[bool, list[float], list[int]]:
    """Rank 1 sends two numbers, late; rank 0 expects them, and has them before its exchange."""
    assert dist.group.WORLD is not None
    group, buffers = dist.group.WORLD, [torch.zeros(2), torch.zeros(2)]
    with record_traffic() as ledger:
        if dist.get_rank() == 1:
            # After rank 0 has announced what it expects.
            dist.barrier()
            time.sleep(0.2)
            sends = [Transfer(torch.full((2,), 5.0 + tag), 0, tag) for tag in (1, 0)]
            exchange(sends, [], group=group).wait()
            return True, [], [ledger.moved_bytes]
        expected = expect([Transfer(x, 1, tag) for tag, x in enumerate(buffers)], group=group)
        counted = [ledger.received.total()]
        dist.barrier()
        early = _arrives(buffers)
        handle = exchange([], expected, group=group)
        counted.append(ledger.received.total())
        received = [x[0].item() for x in handle.wait()]
        counted.append(ledger.received.total())
    return early, received, counted


def _arrives(buffers: list[torch.Tensor], *, within_s: float = 10.0) -> bool:
    deadline_s = time.monotonic() + within_s
    while not all(x.all() for x in buffers) and time.monotonic() < deadline_s:
        time.sleep(0.01)
    return all(bool(x.all()) for x in buffers)


def test_what_is_expected_on_gloo_arrives_before_its_exchange_and_counts_once() -> None:
    receiver, sender = run_ranks(2, _receive_what_is_announced)
    assert receiver == (True, [5.0, 6.0], [0, 16, 16])
    assert sender == (True, [], [16])


def test_what_is_expected_elsewhere_is_posted_with_its_exchange_and_counts_once() -> None:
    def body(group: Group) -> list[int]:
        peer, buffer = 1 - group_rank(group), torch.zeros(2)
        with record_traffic() as ledger:
            expected = expect([Transfer(buffer, peer, 3)], group=group)
            assert isinstance(expected, Expected) and expected.posted is None
            # Nobody may write to it yet: a virtual rank's receive makes it NaN.
            assert not buffer.any()
            counted = [ledger.received.total()]
            sent = torch.full((2,), 1.0 + group_rank(group))
            handle = exchange([Transfer(sent, peer, 3)], expected, group=group)
            assert buffer.isnan().all()
            (received,) = handle.wait()
            counted += [ledger.received.total(), ledger.moved_bytes]
        assert received is buffer
        assert received.tolist() == [1.0 + peer] * 2
        return counted

    assert run_virtual(2, body) == [[0, 8, 8]] * 2


def _look_before_and_after(rank: int) -> list[bool]:
    """Rank 0 looks whether something has arrived, which rank 1 sends when it is told to."""
    group = dist.group.WORLD
    assert group is not None
    told, number = torch.zeros(1), torch.zeros(3)
    if rank == 1:
        exchange((), [Transfer(told, 0, tag=0)], group=group).wait()
        exchange([Transfer(number + 7, 0, tag=1)], (), group=group).wait()
        return []
    arriving = exchange((), [Transfer(number, 1, tag=1)], group=group)
    looks = [arriving.done(), arriving.done()]
    exchange([Transfer(told, 1, tag=0)], (), group=group).wait()
    while not arriving.done():
        time.sleep(0.001)
    looks.append(arriving.done())
    (received,) = arriving.wait()
    assert torch.equal(received, torch.full((3,), 7.0))
    return [*looks, arriving.done()]


def _as_rank() -> list[bool]:
    return _look_before_and_after(dist.get_rank())


def test_an_exchange_is_done_when_it_has_arrived_and_not_before() -> None:
    looks, _ = run_ranks(2, _as_rank)
    assert looks == [False, False, True, True]


class _Failing:
    def wait(self) -> None:
        raise RuntimeError("the peer is gone")


class _Lonely(VirtualGroup):
    def start(self, sends: Sequence[Transfer], recvs: Sequence[Transfer]) -> Sequence[Pending]:
        return [_Failing()]


def test_what_goes_wrong_while_it_is_watched_is_raised_where_it_is_waited_for() -> None:
    started = exchange((), [Transfer(torch.zeros(1), 1, tag=0)], group=_Lonely(0, 2, Mail()))
    while not started.done():
        time.sleep(0.001)
    with pytest.raises(RuntimeError, match="the peer is gone"):
        started.wait()


def test_an_exchange_of_nothing_is_done_at_once() -> None:
    assert exchange((), (), group=SoloGroup()).done()
