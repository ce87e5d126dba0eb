"""Masks: what is refused, and slices of pairs that are exactly what is visible, in equal work."""

import itertools
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ringctx.errors import LayoutError
from ringctx.ops.block_attention import BlockMask
from ringctx.ops.pair_attention import PairSlice
from ringctx.parallel import positions
from ringctx.parallel.layout import LAYOUTS, Piece, Sharding
from ringctx.parallel.mask import Mask, pair_slices
from tests.parallel.painted import painted


def _visible(mask: Mask, query: int, key: int) -> bool:
    """The mask by its words, one pair of positions at a time."""
    first = 0
    if mask.cu_seqlens is not None:
        (first, end), *_ = (x for x in itertools.pairwise(mask.cu_seqlens) if query < x[1])
        if not first <= key < end:
            return False
    if mask.causal and key > query:
        return False
    return mask.window is None or query - key < mask.window or key - first < mask.sinks


@dataclass(frozen=True)
class _Case:
    mask: Mask
    sharding: Sharding
    q: Piece
    k: Piece

    def expected(self) -> torch.Tensor:
        rows, columns = (
            positions(
                self.sharding.seq_len,
                rank=piece.owner,
                world_size=self.sharding.world_size,
                layout=self.sharding.layout,
            )[piece.rows].tolist()
            for piece in (self.q, self.k)
        )
        visible = [[_visible(self.mask, query, key) for key in columns] for query in rows]
        return torch.tensor(visible, dtype=torch.int64).reshape(len(rows), len(columns))


@st.composite
def _cases(draw: st.DrawFn, *, layout: str) -> _Case:
    world_size = draw(st.sampled_from((1, 2, 3, 4, 8)))
    local_len = draw(st.integers(1, 12)) * (2 if layout == "zigzag" and world_size > 1 else 1)
    seq_len = world_size * local_len
    causal = draw(st.booleans())
    window = draw(st.none() | st.integers(1, seq_len)) if causal else None
    sinks = draw(st.integers(0, 5)) if window is not None else 0
    borders = draw(st.none() | st.sets(st.integers(1, seq_len), max_size=8))
    cu_seqlens = None
    if borders is not None:
        cu_seqlens = torch.tensor(sorted(borders | {0, seq_len}), dtype=torch.int32)
    mask = Mask.checked(
        causal=causal, window=window, sinks=sinks, cu_seqlens=cu_seqlens, seq_len=seq_len
    )
    rows = st.lists(st.integers(0, local_len), min_size=2, max_size=2).map(sorted)
    whole = st.just([0, local_len])
    q, k = (Piece(draw(st.integers(0, world_size - 1)), *draw(whole | rows)) for _ in range(2))
    return _Case(mask, Sharding(seq_len, world_size, layout), q, k)


@pytest.mark.proves("masks: slices are exactly what is visible, in every layout", on="CPU")
@pytest.mark.parametrize("layout", LAYOUTS)
@given(data=st.data())
def test_slices_paint_the_mask_of_the_positions_exactly_once(
    data: st.DataObject, layout: str
) -> None:
    case = data.draw(_cases(layout=layout))
    slices = pair_slices(case.mask, case.sharding, q=case.q, k=case.k)
    expected = case.expected()
    assert torch.equal(painted(slices, case.q.length, case.k.length), expected), slices
    # Not one pair is computed in vain.
    assert sum(part.pairs for part in slices) == expected.sum()


def _all_pairs(mask: Mask, sharding: Sharding) -> list[tuple[PairSlice, ...]]:
    shards = [sharding.shard(rank) for rank in range(sharding.world_size)]
    return [pair_slices(mask, sharding, q=q, k=k) for q, k in itertools.product(shards, repeat=2)]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("sinks", [0, 7])
def test_a_window_s_slices_do_not_multiply_with_the_length_or_the_window(
    layout: str, sinks: int
) -> None:
    for world_size, length, window in itertools.product((1, 4), (2**10, 2**20), (1, 96, 512)):
        mask = Mask(window=window, sinks=sinks)
        pairs = _all_pairs(mask, Sharding(length, world_size, layout))
        assert max(len(slices) for slices in pairs) <= (18 if sinks else 12)


def test_a_window_that_divides_a_shard_is_two_slices_on_its_own_keys() -> None:
    for layout, world_size in (("contiguous", 4), ("zigzag", 4), ("striped", 1)):
        sharding = Sharding(4096, world_size, layout)
        rows = sharding.local_len
        own = pair_slices(Mask(window=64), sharding, q=sharding.shard(0), k=sharding.shard(0))
        causal = PairSlice(0, 64, 0, 64, "causal", rows // 64)
        assert own[0] == causal
        assert [part.kind for part in own[1:]] == ["anticausal"] * (1 + (layout == "zigzag"))


def test_a_window_crosses_a_border_as_one_anticausal_square() -> None:
    sharding = Sharding(4096, 4, "contiguous")
    across = pair_slices(Mask(window=64), sharding, q=sharding.shard(2), k=sharding.shard(1))
    assert across == (PairSlice(0, 63, 1024 - 63, 63, "anticausal"),)
    whole = pair_slices(Mask(window=1025), sharding, q=sharding.shard(2), k=sharding.shard(1))
    assert whole == (PairSlice(0, 1024, 0, 1024, "anticausal"),)


def test_equal_documents_are_one_slice_and_others_one_each() -> None:
    sharding = Sharding(4096, 1, "contiguous")
    shard = sharding.shard(0)
    for causal, kind in ((True, "causal"), (False, "full")):
        equal = Mask(causal=causal, cu_seqlens=tuple(range(0, 4097, 128)))
        (found,) = pair_slices(equal, sharding, q=shard, k=shard)
        assert (found.kind, found.q_len, found.count) == (kind, 128, 32)
        mixed = Mask(causal=causal, cu_seqlens=(0, 7, 600, 2000, 4096))
        slices = pair_slices(mixed, sharding, q=shard, k=shard)
        assert [(part.kind, part.q_len) for part in slices] == [
            (kind, length) for length in (7, 593, 1400, 2096)
        ]


def test_documents_elsewhere_cost_nothing() -> None:
    sharding = Sharding(2**20, 64, "zigzag")
    mask = Mask(cu_seqlens=tuple(range(0, 2**20 + 1, 2**8)))
    assert all(
        bool(slices) == (i // 64 == i % 64) and len(slices) <= 1
        for i, slices in enumerate(_all_pairs(mask, sharding))
    )


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("world_size", [1, 2, 5])
def test_plain_masks_are_one_slice_a_pair_but_for_nothing(layout: str, world_size: int) -> None:
    sharding = Sharding(world_size * 10, world_size, layout)
    for mask in (Mask(), Mask(causal=False)):
        for q, k in itertools.product(range(world_size), repeat=2):
            slices = pair_slices(mask, sharding, q=sharding.shard(q), k=sharding.shard(k))
            hidden = mask.causal and layout == "contiguous" and k > q
            assert len(slices) == (0 if hidden else 1), slices
            if q == k:
                kind: BlockMask = "causal" if mask.causal else "full"
                assert slices == (PairSlice(0, 10, 0, 10, kind),)


def _work(layout: str, world_size: int, local_len: int) -> list[list[int]]:
    """Visible pairs of each rank in each ring step."""
    sharding = Sharding(local_len * world_size, world_size, layout)

    def pairs(rank: int, ring_step: int) -> int:
        owner = (rank - ring_step) % world_size
        slices = pair_slices(Mask(), sharding, q=sharding.shard(rank), k=sharding.shard(owner))
        return sum(part.pairs for part in slices)

    return [[pairs(rank, step) for step in range(world_size)] for rank in range(world_size)]


@pytest.mark.parametrize("world_size", range(2, 9))
def test_zigzag_gives_every_rank_equal_causal_work_in_every_ring_step(world_size: int) -> None:
    work = _work("zigzag", world_size, local_len=10)
    assert all(rank == work[0] for rank in work)


@pytest.mark.parametrize("world_size", range(2, 9))
def test_striped_differs_by_one_diagonal_at_most_in_every_ring_step(world_size: int) -> None:
    for ring_step in zip(*_work("striped", world_size, local_len=10), strict=True):
        assert max(ring_step) - min(ring_step) <= 10


def test_contiguous_leaves_the_first_rank_idle_after_its_own_block() -> None:
    assert _work("contiguous", 4, local_len=10)[0] == [55, 0, 0, 0]


def _int32(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


def _checked(**changes: Any) -> Mask:
    settings = {"causal": True, "window": None, "sinks": 0, "cu_seqlens": None, "seq_len": 12}
    return Mask.checked(**(settings | changes))


def test_settings_that_hide_nothing_are_left_out() -> None:
    assert _checked(window=12, sinks=3) == Mask()
    assert _checked(cu_seqlens=_int32(0, 12)) == Mask()
    assert _checked(window=11, sinks=3) == Mask(window=11, sinks=3)
    assert _checked(causal=False, cu_seqlens=_int32(0, 5, 12)) == Mask(
        causal=False, cu_seqlens=(0, 5, 12)
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"window": 0}, "window=0 must be a whole number of at least 1.*None for no window"),
        ({"window": -1}, "window=-1 must be a whole number of at least 1"),
        ({"window": 2.5}, "window=2.5 must be a whole number"),
        ({"window": True}, "window=True must be a whole number"),
        ({"window": 4, "causal": False}, "window=4 needs causal=True"),
        ({"sinks": 2}, r"sinks=2 needs a window.*set window=\.\.\., or sinks=0"),
        ({"sinks": -1}, "sinks=-1 needs a window"),
        ({"window": 4, "sinks": -1}, "sinks=-1 must be a whole number of at least 0"),
        ({"window": 12, "sinks": -1}, "sinks=-1 must be a whole number of at least 0"),
        ({"cu_seqlens": [0, 12]}, "cu_seqlens is a list; it must be an int32 CPU tensor"),
        ({"cu_seqlens": _int32(0, 12).long()}, r"cu_seqlens is torch.int64 \[2\] on cpu"),
        ({"cu_seqlens": _int32(0, 12)[None]}, r"cu_seqlens is torch.int32 \[1, 2\] on cpu"),
        ({"cu_seqlens": _int32(0, 12).to("meta")}, "on meta; it must be .* on the CPU"),
        ({"cu_seqlens": _int32()}, "cu_seqlens is empty; it must begin with 0 and end with"),
        ({"cu_seqlens": _int32(0)}, r"cu_seqlens is \[0\]; it must begin with 0 and end with"),
        ({"cu_seqlens": _int32(1, 12)}, "cu_seqlens begins with 1; it must begin with 0"),
        (
            {"cu_seqlens": _int32(0, 5, 5, 12)},
            r"cu_seqlens\[2\]=5 does not rise above cu_seqlens\[1\]=5; .*leave empty ones out",
        ),
        ({"cu_seqlens": _int32(0, 8, 5, 12)}, r"cu_seqlens\[2\]=5 does not rise"),
        ({"cu_seqlens": _int32(0, 6)}, "cu_seqlens ends with 6 and the whole sequence with 12"),
        ({"cu_seqlens": _int32(0, 24)}, "cu_seqlens ends with 24 and the whole sequence with 12"),
    ],
    ids=lambda value: None if isinstance(value, str) else str(value),
)
def test_rejects_masks_that_cannot_be_meant(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(LayoutError, match=message):
        _checked(**changes)


def test_rejects_an_unknown_layout() -> None:
    with pytest.raises(LayoutError, match="layout='spiral' is not known"):
        Sharding(4, 1, "spiral")
