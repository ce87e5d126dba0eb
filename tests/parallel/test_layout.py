"""Layouts: every token on exactly one rank, and back again; lengths that do not divide."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ringctx.errors import LayoutError
from ringctx.parallel import positions, shard, unshard
from ringctx.parallel.comm import Group, SoloGroup, group_rank, record_traffic
from ringctx.parallel.layout import LAYOUTS, local_len
from tests.virtual_ranks import run_virtual

worlds = st.integers(1, 8)
layouts = st.sampled_from(LAYOUTS)
blocks = st.integers(1, 7)


@given(world_size=worlds, layout=layouts, block_len=blocks)
def test_every_token_is_on_exactly_one_rank_and_positions_rise(
    world_size: int, layout: str, block_len: int
) -> None:
    seq_len = 2 * world_size * block_len
    held = [
        positions(seq_len, rank=rank, world_size=world_size, layout=layout)
        for rank in range(world_size)
    ]
    assert all(x.dtype == torch.int64 and x.numel() == 2 * block_len for x in held)
    assert all((x.diff() > 0).all() for x in held)
    assert torch.equal(torch.cat(held).sort().values, torch.arange(seq_len))


@given(world_size=worlds, layout=layouts, block_len=blocks, dim=st.sampled_from([0, 1, 2, -1]))
def test_unshard_undoes_shard(world_size: int, layout: str, block_len: int, dim: int) -> None:
    shape = [3, 3, 3]
    shape[dim] = 2 * world_size * block_len
    whole = torch.arange(float(torch.Size(shape).numel())).reshape(shape)

    def body(group: Group) -> torch.Tensor:
        rank = group_rank(group)
        local = shard(whole, rank=rank, world_size=world_size, layout=layout, dim=dim)
        return unshard(local, group=group, layout=layout, dim=dim)

    assert all(torch.equal(x, whole) for x in run_virtual(world_size, body))


def test_layouts_place_tokens_as_the_pictures_say() -> None:
    def held(layout: str) -> list[str]:
        return [
            "".join("ABCDEFGH"[i] for i in positions(8, rank=r, world_size=2, layout=layout))
            for r in range(2)
        ]

    assert held("contiguous") == ["ABCD", "EFGH"]
    assert held("zigzag") == ["ABGH", "CDEF"]
    assert held("striped") == ["ACEG", "BDFH"]


def test_gradient_of_a_shard_flows_to_its_tokens() -> None:
    whole = torch.zeros(1, 8, requires_grad=True)
    shard(whole, rank=0, world_size=2, layout="zigzag").sum().backward()
    assert whole.grad is not None
    assert whole.grad.tolist() == [[1, 1, 0, 0, 0, 0, 1, 1]]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_one_rank_takes_any_length_and_moves_nothing(layout: str) -> None:
    whole = torch.arange(7.0).reshape(1, 7)
    with record_traffic() as ledger:
        assert torch.equal(unshard(whole, group=SoloGroup(), layout=layout), whole)
    assert ledger.moved_bytes == 0
    assert torch.equal(shard(whole, rank=0, world_size=1, layout=layout), whole)


@pytest.mark.parametrize(
    ("seq_len", "layout", "message"),
    [
        (65_000, "zigzag", r"(?s)seq_len=65,000 is not divisible by 2 \* world_size = 16 "
         r"\(zigzag gives each rank two blocks\);.*are 64,992 and 65,008"),
        (65_001, "striped", r"(?s)65,001 is not divisible by world_size = 8;.* 65,000 and 65,008"),
        (3, "contiguous", r"(?s)seq_len=3 .*shortest valid length is 8"),
        (0, "contiguous", r"(?s)seq_len=0 .*shortest valid length is 8"),
        (64, "spiral", "layout='spiral' is not known; choose one of contiguous, zigzag, striped"),
    ],
    ids=["zigzag", "striped", "short", "empty", "unknown"],
)  # fmt: skip
def test_rejects_lengths_and_layouts_that_do_not_fit(
    seq_len: int, layout: str, message: str
) -> None:
    with pytest.raises(LayoutError, match=message):
        local_len(seq_len, world_size=8, layout=layout)


@pytest.mark.parametrize(("rank", "world_size"), [(-1, 2), (2, 2), (0, 0)])
def test_rejects_ranks_that_do_not_exist(rank: int, world_size: int) -> None:
    with pytest.raises(LayoutError, match="world_size="):
        positions(8, rank=rank, world_size=world_size, layout="striped")
