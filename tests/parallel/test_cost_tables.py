"""What schedules cost in closed form, and tables of as many ranks as cannot be run here."""

import pytest

from ringctx.config import TopologyConfig
from ringctx.parallel.cost import SCHEDULES, PassCost
from ringctx.parallel.mask import Mask
from ringctx.parallel.traffic import Shape
from tests.parallel.test_cost import MHA, cost

# Closed forms, in units of the bytes of one shard of Q


def _in_units(price: PassCost, shape: Shape, local_len: int) -> list[float]:
    unit = shape.heads * shape.head_dim * shape.dtype.itemsize * local_len
    return [price.busiest_bytes / unit, price.sent_bytes.max() / unit]


@pytest.mark.parametrize(
    ("ranks", "group", "expected"),
    [
        # K/V forward, K/V backward with fp32 sums, Q forward, Q backward with fp32 dQ; the last hop
        # home is saved: the owner starts from its own share.
        (8, 1, (14.0, 42.0, 14.109375, 28.21875)),
        (8, 2, (7.0, 21.0, 14.109375, 28.21875)),
        (8, 4, (3.5, 10.5, 14.109375, 28.21875)),
        (8, 8, (1.75, 5.25, 14.109375, 28.21875)),
        (4, 8, (0.75, 2.25, 6.046875, 12.09375)),
        (16, 4, (7.5, 22.5, 30.234375, 60.46875)),
    ],
)
def test_full_attention_costs_what_the_literature_counts(
    ranks: int, group: int, expected: tuple[float, ...]
) -> None:
    shape = Shape(heads=8, kv_heads=8 // group, head_dim=128)
    found = [
        _in_units(
            cost(name, backward=backward, shape=shape, ranks=ranks, mask=Mask(causal=False)),
            shape,
            4096,
        )[1]
        for name in ("one_way", "token_ring")
        for backward in (False, True)
    ]
    assert found == pytest.approx(expected, rel=1e-12)
    gathered = [
        cost("all_gather", backward=b, shape=shape, ranks=ranks, mask=Mask(causal=False))
        for b in (False, True)
    ]
    assert [_in_units(c, shape, 4096)[1] for c in gathered] == pytest.approx(expected[:2])


@pytest.mark.parametrize("ranks", [4, 8, 64])
def test_causal_zigzag_loads_cables_as_the_closed_forms_say(ranks: int) -> None:
    cables = TopologyConfig(kind="cables")
    one_way = cost("one_way", ranks=ranks, topology=cables)
    two_way = cost("two_way", ranks=ranks, topology=cables)
    # A shard of K/V is two of Q.
    assert _in_units(one_way, MHA, 4096)[0] == 2 * (ranks - 1)
    assert _in_units(two_way, MHA, 4096)[0] == (ranks - 1)
    if ranks > 4:
        unit = 2 * 8 * 128 * 2 * 4096
        # Front blocks to everybody, back blocks to the ranks below: 3/4 on average.
        assert two_way.total_bytes == pytest.approx(0.75 * ranks * (ranks - 1) * unit)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_window_in_contiguous_shards_costs_the_same_on_any_number_of_ranks(
    schedule: str,
) -> None:
    # Only the last w - 1 tokens before a border travel (for Q: the first after it), one hop.
    found = {
        int(
            cost(
                schedule,
                ranks=ranks,
                layout="contiguous",
                mask=Mask(window=513),
                topology=TopologyConfig(kind="cables"),
            ).busiest_bytes
        )
        for ranks in (4, 8, 64)
    }
    row = 8 * 128 * (2 if schedule == "token_ring" else 2 * 2)
    home = 8 * (128 * 4 + 4) if schedule == "token_ring" else 0
    assert found == {512 * max(row, home)}


def test_backward_memory_of_a_ring_is_its_buffers_and_its_sums() -> None:
    # In shards of Q in bf16; a sum in fp32 is two. K/V at hand and arriving; dK/dV computed, on
    # their way out, and two that arrive; three sums; three of a kernel.
    shards = 2 * 2 + 4 * 4 + 3 * 2 + 3
    price = cost("one_way", backward=True, mask=Mask(causal=False))
    unit = 8 * 128 * 2 * 4096
    assert price.memory_bytes == pytest.approx(shards * unit, abs=128)


# What cannot be run here: 256 and 1024 ranks


@pytest.mark.parametrize(
    "ranks", [256, pytest.param(1024, marks=[pytest.mark.slow, pytest.mark.timeout(300)])]
)
def test_table_of_many_ranks(ranks: int) -> None:
    local_len, hops = 1024, ranks - 1
    cables = TopologyConfig(kind="cables")

    def price(schedule: str, topology: TopologyConfig | None = None) -> PassCost:
        return cost(schedule, ranks=ranks, local_len=local_len, topology=topology)

    shard, sums = 2 * 8 * 128 * 2 * local_len, 8 * (128 * 4 + 4) * local_len
    # A kernel's out, lse in three places, flags, and the rows that a merge widens at a time.
    kernel = local_len * 8 * (128 * 2 + 3 * 4 + 1) + 512 * 8 * 128 * 4
    # Front blocks go to everybody, back blocks to the ranks below.
    needed = ranks * hops * shard * 3 // 4

    one_way = price("one_way")
    assert one_way.busiest_bytes == hops * shard
    assert (one_way.ring_steps, one_way.peers) == (ranks, 2)
    assert 0 <= one_way.memory_bytes - (2 * shard + sums + kernel) < 128

    two_way = price("two_way", cables)
    assert two_way.total_bytes == needed
    assert two_way.busiest_bytes == hops * shard // 2
    assert (two_way.ring_steps, two_way.peers) == (ranks, 2)
    assert two_way.memory_bytes == one_way.memory_bytes

    all_gather = price("all_gather")
    assert all_gather.total_bytes == needed
    assert all_gather.busiest_bytes == hops * shard
    # Eight peers at once, in two parts.
    assert (all_gather.ring_steps, all_gather.peers) == (2 * -(-hops // 8) + 1, hops)
    assert all_gather.memory_bytes <= 9 * shard + sums + kernel

    token_ring = price("token_ring")
    # Q and out instead of K and V, and the lse.
    assert token_ring.total_bytes == needed * (2 * 128 * 2 + 4) // (2 * 128 * 2)
    assert (token_ring.ring_steps, token_ring.peers) == (ranks + 1, hops)
    assert token_ring.memory_bytes <= 4 * shard + sums + kernel
    # However many peers: all in one group.
    assert {c.communicators for c in (one_way, two_way, all_gather, token_ring)} == {1}


def test_a_rank_alone_needs_nobody() -> None:
    alone = cost("one_way", ranks=1)
    assert (alone.ring_steps, alone.peers, alone.communicators) == (1, 0, 0)
