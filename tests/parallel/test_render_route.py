"""A route as text."""

import pytest

from ringctx.parallel.mask import Mask
from ringctx.parallel.render_route import render_route
from ringctx.parallel.topology import wire_up
from ringctx.parallel.ways import build_route
from tests.parallel.route_cases import sharding_of


def rendered(schedule: str, ranks: int, mask: Mask, returns_weight: float = 0.0) -> str:
    wiring = wire_up(None, ranks=tuple(range(ranks)), world_size=ranks)
    route = build_route(
        schedule,
        sharding=sharding_of(ranks, 4, "contiguous"),
        mask=mask,
        wiring=wiring,
        returns_weight=returns_weight,
    )
    return render_route(route, world_size=ranks)


def test_a_plain_ring_reads_as_a_ring() -> None:
    assert rendered("one_way", 3, Mask(causal=False)).splitlines() == [
        "one_way: keys and values travel; nothing comes home",
        "step  rank 0   rank 1   rank 2",
        "0     own      own      own",
        "1     >2[0:4]  >0[0:4]  >1[0:4]",
        "2     >1[0:4]  >2[0:4]  >0[0:4]",
    ]


def test_results_come_home_and_pieces_that_pass_stand_in_brackets() -> None:
    # A window: rank 1 sees the end of shard 0; up is the long way for nobody.
    text = rendered("one_way", 3, Mask(window=2), returns_weight=2.0)
    assert "sums are carried along, then home" in text
    assert ">0[3:4]" in text and "<home[3:4]" in text
    documents = Mask(causal=False, cu_seqlens=(0, 4, 12))
    # Shard 2 is needed by rank 1 alone, and passes rank 0.
    assert "(>2[0:4])" in rendered("one_way", 3, documents)


@pytest.mark.parametrize("schedule", ["one_way", "two_way", "token_ring", "all_gather"])
def test_every_transfer_stands_in_the_table(schedule: str) -> None:
    wiring = wire_up(None, ranks=tuple(range(5)), world_size=5)
    sharding = sharding_of(5, 4, "zigzag")
    route = build_route(schedule, sharding=sharding, mask=Mask(), wiring=wiring, returns_weight=1.0)
    text = render_route(route, world_size=5)
    # A headline, and five columns of labels; each cell is one word.
    words = [word for line in text.splitlines()[2:] for word in line.split() if "[" in word]
    assert len(words) == len(route.guests) + len(route.results)
