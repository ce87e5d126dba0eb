"""The parts of a sequence: which go on with which, told token by token and by the tables."""

from collections.abc import Sequence

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ringctx.errors import LayoutError
from ringctx.ops.lightning.chunks import cut
from ringctx.parallel.layout import Sharding
from ringctx.parallel.parts import Chain, chain_of
from tests.parallel.lightning_cases import DOCUMENTS, bounds_of


def _chain(world_size: int, layout: str, bounds: Sequence[int]) -> Chain:
    sharding = Sharding(bounds[-1], world_size, layout)
    return chain_of(sharding, torch.tensor(bounds, dtype=torch.int32))


def _document_of_tokens(bounds: Sequence[int]) -> list[int]:
    """Of each token: where its document begins."""
    return [max(b for b in bounds if b <= token) for token in range(bounds[-1])]


@st.composite
def chains(draw: st.DrawFn) -> Chain:
    world_size = draw(st.integers(1, 6))
    layout = draw(st.sampled_from(["contiguous", "zigzag"]))
    seq_len = 2 * world_size * draw(st.integers(1, 5))
    inside = draw(st.lists(st.integers(0, seq_len), max_size=2 * seq_len))
    return _chain(world_size, layout, sorted([0, *inside, seq_len]))


@given(chain=chains())
def test_parts_cover_the_sequence_in_order_and_belong_to_who_holds_them(chain: Chain) -> None:
    world_size, stop = chain.sharding.world_size, 0
    for part in chain.parts:
        assert part.start == stop < part.stop
        assert part.stop - part.start == chain.part_len
        stop = part.stop
    assert stop == chain.sharding.seq_len
    ranks = [*range(world_size)]
    zigzag = chain.sharding.layout == "zigzag" and world_size > 1
    assert [part.rank for part in chain.parts] == (ranks + ranks[::-1] if zigzag else ranks)
    for rank in ranks:
        assert [chain.parts[part].slot for part in chain.parts_of(rank)] == (
            [0, 1] if zigzag else [0]
        )


@given(chain=chains())
def test_a_part_needs_exactly_the_parts_that_hold_more_of_its_first_or_last_document(
    chain: Chain,
) -> None:
    document = _document_of_tokens(chain.bounds)

    def holds(part: int, begin: int) -> bool:
        return begin in document[chain.parts[part].start : chain.parts[part].stop]

    for index, part in enumerate(chain.parts):
        before = [p for p in range(index) if holds(p, document[part.start])]
        after = [p for p in range(index + 1, len(chain.parts)) if holds(p, document[part.stop - 1])]
        assert [*chain.sources(index, backward=False)] == before
        assert [*chain.sources(index, backward=True)] == after[::-1]
        assert chain.receives(index, backward=False) == bool(before)
        assert chain.receives(index, backward=True) == bool(after)
        # One document runs from before the part to behind it.
        through = bool(before) and document[part.start] == document[part.stop - 1]
        assert chain.passes(index, backward=False) == through
        assert chain.passes(index, backward=True) == (
            bool(after) and document[part.start] == document[part.stop - 1]
        )


@given(chain=chains(), backward=st.booleans())
def test_a_state_goes_to_every_rank_that_needs_it_and_to_no_other(
    chain: Chain, backward: bool
) -> None:
    for source in range(len(chain.parts)):
        needing = {
            chain.parts[part].rank
            for part in range(len(chain.parts))
            if source in chain.sources(part, backward=backward)
        }
        others = sorted(needing - {chain.parts[source].rank})
        assert [*chain.readers(source, backward=backward)] == others


@given(chain=chains())
def test_fragments_are_what_a_rank_holds_of_each_document(chain: Chain) -> None:
    document = _document_of_tokens(chain.bounds)
    for rank in range(chain.sharding.world_size):
        fragments = chain.fragments_of(rank)
        # Raises unless they follow one another, and slots count up.
        chunks = cut(fragments, chunk_len=16)
        parts = [chain.parts[part] for part in chain.parts_of(rank)]
        assert chunks.num_rows == chain.sharding.local_len
        assert chunks.num_entries == chunks.num_exits == len(parts)
        positions = [token for part in parts for token in range(part.start, part.stop)]
        first, last = {part.row for part in parts}, {part.row + chain.part_len for part in parts}
        borders = first | {
            row
            for row in range(1, len(positions))
            if document[positions[row]] != document[positions[row - 1]]
        }
        assert {fragment.start for fragment in fragments} == borders
        for fragment in fragments:
            assert (fragment.entry is not None) == (fragment.start in first)
            assert (fragment.exit is not None) == (fragment.stop in last)


def test_the_picture_of_the_module() -> None:
    contiguous, zigzag = (_chain(2, layout, [0, 6, 16]) for layout in ("contiguous", "zigzag"))
    assert [*contiguous.sources(1, backward=False)] == [0]
    assert [[*zigzag.sources(part, backward=False)] for part in range(4)] == [[], [0], [1], [1, 2]]
    assert zigzag.parts[1].has_inner
    assert not zigzag.parts[1].starts_doc


@pytest.mark.parametrize("documents", DOCUMENTS)
def test_empty_documents_change_nothing_and_equal_borders_give_one_object(documents: str) -> None:
    bounds = bounds_of(documents, seq_len=24, world_size=3)
    chain = _chain(3, "zigzag", bounds)
    assert _chain(3, "zigzag", bounds) is chain
    assert _chain(3, "zigzag", [*bounds[:1], *bounds]).parts == chain.parts
    assert chain.bounds == tuple(sorted(set(bounds)))


@pytest.mark.parametrize(
    ("cu_seqlens", "message"),
    [
        (torch.tensor([0, 8, 4, 16], dtype=torch.int32), r"\[2\]=4 is below cu_seqlens\[1\]=8"),
        (torch.tensor([0, 8], dtype=torch.int32), "goes from 0 to 8; it must go from 0 to seq_"),
        (torch.tensor([1, 16], dtype=torch.int32), "goes from 1 to 16; .* seq_len=16"),
        (torch.tensor([], dtype=torch.int32), "cu_seqlens is empty"),
        (torch.tensor([0, 16]), "is torch.int64 .* must be int32"),
        (torch.tensor([[0, 16]], dtype=torch.int32), r"must be int32 \[documents \+ 1\]"),
        ([0, 16], "is a list"),
    ],
)
def test_rejects_borders_that_do_not_rise_from_0_to_the_length(
    cu_seqlens: torch.Tensor, message: str
) -> None:
    with pytest.raises(LayoutError, match=message):
        chain_of(Sharding(16, 2, "zigzag"), cu_seqlens)


def test_rejects_striped_but_for_one_rank() -> None:
    with pytest.raises(LayoutError, match=r"striped.*Use layout='zigzag'"):
        chain_of(Sharding(16, 2, "striped"), None)
    assert len(chain_of(Sharding(16, 1, "striped"), None).parts) == 1
