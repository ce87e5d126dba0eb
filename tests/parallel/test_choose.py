"""The choice is that of the whole table, found with no more prices than it takes to know."""

import itertools

import pytest

from ringctx.config import TopologyConfig
from ringctx.parallel import cost
from ringctx.parallel.cost import SCHEDULES, Choice, PassCost, choose, pass_cost
from ringctx.parallel.layout import Sharding
from ringctx.parallel.mask import Mask
from ringctx.parallel.topology import Wiring, wire_up
from ringctx.parallel.traffic import Shape

MHA = Shape(heads=8, kv_heads=8, head_dim=128)
GQA = Shape(heads=8, kv_heads=1, head_dim=128)
MIXED = Shape(heads=8, kv_heads=4, head_dim=128)


def wired(kind: str, ranks: int) -> Wiring:
    node = {"ranks_per_node": 2} if kind == "two_level" else {}
    topology = TopologyConfig(kind=kind, **node)  # type: ignore[arg-type]
    return wire_up(topology, ranks=tuple(range(ranks)), world_size=ranks)


def chosen(shape: Shape, local_len: int, kind: str, mask: Mask, layout: str = "zigzag") -> Choice:
    sharding = Sharding(8 * local_len, 8, layout)
    return choose(shape=shape, sharding=sharding, mask=mask, wiring=wired(kind, 8))


@pytest.fixture
def priced(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, bool]]:
    """The schedules and passes that were priced, in order."""
    asked: list[tuple[str, bool]] = []

    def price(schedule: str, *, backward: bool, **case: object) -> PassCost:
        asked.append((schedule, backward))
        return cost_of(schedule, backward=backward, **case)

    cost_of = cost.pass_cost
    monkeypatch.setattr(cost, "pass_cost", price)
    # A choice that is known asks for no price.
    choose.cache_clear()
    return asked


def test_where_compute_hides_one_way_nothing_else_is_priced(
    priced: list[tuple[str, bool]],
) -> None:
    choice = chosen(GQA, 1 << 18, "cables", Mask())
    assert (choice.forward, choice.backward) == ("one_way", "one_way")
    assert "compute hides all transfers" in choice.why
    assert priced == [("one_way", False), ("one_way", True)]


def test_heavy_queries_are_never_priced(priced: list[tuple[str, bool]]) -> None:
    chosen(GQA, 64, "cables", Mask())
    assert {name for name, _ in priced} == {"one_way", "two_way", "all_gather"}


def test_light_queries_are_priced_where_links_decide(priced: list[tuple[str, bool]]) -> None:
    assert chosen(MHA, 4096, "fully_connected", Mask(), "contiguous")
    assert ("token_ring", True) in priced


def test_all_prices_are_there_for_who_asks() -> None:
    choice = chosen(GQA, 1 << 18, "cables", Mask())
    for backward, costs in ((False, choice.forward_costs), (True, choice.backward_costs)):
        assert [c.schedule for c in costs] == list(SCHEDULES)
        assert costs == tuple(
            pass_cost(
                schedule,
                backward=backward,
                shape=GQA,
                sharding=Sharding(8 << 18, 8, "zigzag"),
                mask=Mask(),
                wiring=wired("cables", 8),
            )
            for schedule in SCHEDULES
        )


def whole_table(choice: Choice, shape: Shape, *, backward: bool, local_len: int) -> str:
    """The rule, on all four prices at once."""
    costs = {c.schedule: c for c in (choice.backward_costs if backward else choice.forward_costs)}
    local = (2 if backward else 1) * local_len * 2 * (shape.heads + shape.kv_heads) * 128 * 2
    by_keys = [
        costs[name]
        for name in ("one_way", "two_way", "all_gather")
        if name == "one_way" or costs[name].memory_bytes <= 12 * local
    ]
    fastest = min(c.time_s for c in by_keys)
    best = next(c for c in by_keys if c.time_s <= 1.02 * fastest)
    # Q and its results to K/V and theirs: forward 1.01, 2.02, 8.06; backward 0.67, 1.34, 5.38.
    heavy = shape.heads // shape.kv_heads > (2 if backward else 1)
    if not heavy and 1.1 * costs["token_ring"].time_s < best.time_s:
        return "token_ring"
    return best.schedule


@pytest.mark.parametrize("kind", ["switch", "cables", "fully_connected", "two_level"])
@pytest.mark.parametrize("shape", [MHA, GQA, MIXED], ids=["mha", "gqa8", "gqa2"])
def test_the_choice_is_that_of_the_whole_table(kind: str, shape: Shape) -> None:
    masks = (Mask(), Mask(causal=False), Mask(window=700), Mask(cu_seqlens=(0, 300, 512)))
    for mask, local_len, layout in itertools.product(
        masks, (64, 2048, 16384, 1 << 17), ("zigzag", "contiguous")
    ):
        if mask.cu_seqlens is not None:
            mask = Mask(cu_seqlens=(0, 300, 8 * local_len))
        choice = chosen(shape, local_len, kind, mask, layout)
        for backward, name in ((False, choice.forward), (True, choice.backward)):
            told = whole_table(choice, shape, backward=backward, local_len=local_len)
            assert name == told, (mask, local_len, layout, backward)
