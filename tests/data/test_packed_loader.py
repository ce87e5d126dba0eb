"""Packed rows: all ranks together hold the step, each its own slice, and know its documents."""

from collections import Counter
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from ringctx.data.loader import Loader, Microbatch, RowShard
from ringctx.data.steps import Step
from ringctx.errors import DatasetError
from ringctx.ops.losses import IGNORE_INDEX
from ringctx.parallel.layout import LAYOUTS, positions
from tests.data.packed_steps import PlanByHand, packed_step, packed_steps
from tests.data.samples import STRIDE, MadeUpDocuments

WORLDS = {
    "layout": st.sampled_from(LAYOUTS),
    "cp": st.sampled_from([1, 2, 4]),
    "dp": st.integers(1, 3),
    "rows": st.integers(1, 3),
}


def load(
    documents: MadeUpDocuments, step: Step, *, layout: str, cp: int, dp: int, rows: int
) -> list[list[list[Microbatch]]]:
    """What each rank holds of a step: `[dp][cp][rounds]`."""

    def held(seq_len: int, rank: int) -> NDArray[np.int64]:
        return positions(seq_len, rank=rank, world_size=cp, layout=layout).numpy()

    def batches(dp_rank: int, cp_rank: int) -> list[Microbatch]:
        shard = RowShard(
            dp_rank=dp_rank,
            dp_degree=dp,
            rows=rows,
            positions=held(step.bucket_len, cp_rank),
            joined_positions=held(step.bucket_len * rows, cp_rank),
        )
        loader = Loader(documents, PlanByHand(step), shard_for=lambda _: shard)
        return loader.step(step.step)

    return [[batches(d, c) for c in range(cp)] for d in range(dp)]


def everything(ranks: list[list[list[Microbatch]]]) -> list[Microbatch]:
    return [batch for group in ranks for rank in group for batch in rank]


def pairs_of(batches: list[Microbatch]) -> Counter[tuple[int, int]]:
    """(token, target) of every position."""
    pairs: Counter[tuple[int, int]] = Counter()
    for batch in batches:
        pairs.update(
            zip(batch.tokens.flatten().tolist(), batch.targets.flatten().tolist(), strict=True)
        )
    return pairs


def expected(
    step: Step, lengths: list[int], *, padding: int, loss: NDArray[np.bool_] | None = None
) -> Counter[tuple[int, int]]:
    """The same, from the documents themselves."""
    pairs = Counter({(0, IGNORE_INDEX): padding})
    firsts = np.cumsum([0, *lengths])
    for document, start, length in step.pieces.tolist():
        for at in range(start, start + length):
            none = at + 1 == lengths[document]
            none = none or (loss is not None and not loss[firsts[document] + at + 1])
            token = document * STRIDE + at
            pairs[token, IGNORE_INDEX if none else token + 1] += 1
    return +pairs


@given(drawn=packed_steps(), **WORLDS)
def test_any_world_holds_every_token_and_target_of_a_packed_step_once(
    drawn: tuple[list[int], Step], layout: str, cp: int, dp: int, rows: int
) -> None:
    lengths, step = drawn
    documents = MadeUpDocuments(lengths)
    batches = everything(load(documents, step, layout=layout, cp=cp, dp=dp, rows=rows))
    held = sum(batch.tokens.numel() for batch in batches)
    rounds = -(-step.num_rows // (dp * rows))
    assert held == rounds * dp * rows * step.bucket_len
    found = pairs_of(batches)
    assert found == expected(step, lengths, padding=held - sum(lengths))
    targets = sum(n for (_, target), n in found.items() if target != IGNORE_INDEX)
    assert targets == step.num_targets


@given(drawn=packed_steps(), seed=st.integers(0, 9), **WORLDS)
def test_a_token_whose_loss_bit_is_off_is_never_a_target(
    drawn: tuple[list[int], Step], seed: int, layout: str, cp: int, dp: int, rows: int
) -> None:
    lengths, step = drawn
    loss = np.random.default_rng(seed).random(sum(lengths)) < 0.6
    documents = MadeUpDocuments(lengths, loss=loss)
    ranks = load(documents, step, layout=layout, cp=cp, dp=dp, rows=rows)
    held = sum(batch.tokens.numel() for batch in everything(ranks))
    assert pairs_of(everything(ranks)) == expected(
        step, lengths, padding=held - sum(lengths), loss=loss
    )


def whole_rows(group: list[list[Microbatch]], at: int) -> NDArray[np.int64]:
    """The rows of one round, put together from the ranks that share them."""
    parts = [rank[at] for rank in group]
    rows = np.full((parts[0].tokens.shape[0], sum(p.tokens.shape[1] for p in parts)), -1)
    for part in parts:
        rows[:, part.positions.numpy()] = part.tokens.numpy()
    return rows


def documents_of(step: Step) -> set[tuple[int, ...]]:
    return {
        tuple(range(document * STRIDE + start, document * STRIDE + start + length))
        for document, start, length in step.pieces.tolist()
    }


@given(drawn=packed_steps(), **WORLDS)
def test_borders_cut_a_joined_row_into_its_pieces_and_padding(
    drawn: tuple[list[int], Step], layout: str, cp: int, dp: int, rows: int
) -> None:
    lengths, step = drawn
    ranks = load(MadeUpDocuments(lengths), step, layout=layout, cp=cp, dp=dp, rows=rows)
    found: Counter[tuple[int, ...]] = Counter()
    for group in ranks:
        for at in range(len(group[0])):
            row = whole_rows(group, at)
            assert len({rank[at].cu_seqlens for rank in group}) == 1
            borders = group[0][at].cu_seqlens
            if not step.doc_mask:
                assert borders is None and row.shape == (rows, step.bucket_len)
                continue
            assert row.shape == (1, rows * step.bucket_len)
            assert borders is not None and (borders[0], borders[-1]) == (0, row.size)
            found.update(tuple(row[0, a:b].tolist()) for a, b in pairwise(borders))
    if step.doc_mask:
        pieces = {document: n for document, n in found.items() if any(document)}
        # A piece of only token 0 of document 0 looks like padding.
        assert pieces == dict.fromkeys(documents_of(step) - {(0,)}, 1)


def test_rows_without_masks_keep_their_order_and_their_padding_at_the_end() -> None:
    lengths = [10, 20, 9]
    rows = [[(1, 0, 7)], [(0, 0, 5), (2, 2, 3)], [(0, 5, 5)]]
    step = packed_step(rows, bucket_len=8, lengths=lengths, doc_mask=False)
    ((batches,), (others,)) = load(
        MadeUpDocuments(lengths), step, layout="zigzag", cp=1, dp=2, rows=2
    )
    first, second, third = 0, STRIDE, 2 * STRIDE
    assert batches[0].tokens.tolist() == [
        [*range(second, second + 7), 0],
        [*range(first, first + 5), *range(third + 2, third + 5)],
    ]
    assert batches[0].targets.tolist() == [
        [*range(second + 1, second + 8), IGNORE_INDEX],
        [*range(first + 1, first + 6), *range(third + 3, third + 6)],
    ]
    assert others[0].tokens.tolist() == [[5, 6, 7, 8, 9, 0, 0, 0], [0] * 8]
    assert others[0].targets[0].tolist() == [6, 7, 8, 9, *[IGNORE_INDEX] * 4]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_rank_reads_its_tokens_of_a_packed_row_and_one_more_a_span(layout: str) -> None:
    lengths = [40, 500, 100]
    row = [(0, 0, 40), (1, 10, 60), (2, 0, 28)]
    step = packed_step([row], bucket_len=128, lengths=lengths, doc_mask=True)
    for rank in range(4):
        documents = MadeUpDocuments(lengths)
        held = positions(128, rank=rank, world_size=4, layout=layout).numpy()
        shards = {128: RowShard(dp_rank=0, dp_degree=1, rows=1, positions=held)}
        Loader(documents, PlanByHand(step), shard_for=shards.__getitem__).step(0)
        # A border between pieces, and one between runs, each begin a span.
        most = 32 if layout == "striped" else 4
        assert 32 < documents.tokens_read <= 32 + most


def test_window_and_theta_of_a_step_reach_its_microbatches() -> None:
    step = Step(0, 8, np.array([[0, 0]]), 8, window=5, rope_theta=3e4)
    ((batches,),) = load(MadeUpDocuments([9]), step, layout="zigzag", cp=1, dp=1, rows=1)
    assert [(batch.window, batch.rope_theta) for batch in batches] == [(5, 3e4)]


@pytest.mark.parametrize("at", [3, 26, 30])
def test_a_token_outside_the_vocabulary_is_named_by_document_and_offset(at: int) -> None:
    class OneBadToken(MadeUpDocuments):
        def read_spans(self, *args: Any) -> NDArray[np.uint32]:
            tokens = super().read_spans(*args)
            return np.where(tokens == STRIDE + at, np.uint32(2**31), tokens)

    # Offset 30 is a target only.
    lengths = [9, 40]
    rows = [[(0, 0, 9), (1, 20, 10)], [(1, 0, 20)]]
    step = packed_step(rows, bucket_len=20, lengths=lengths, doc_mask=True)
    with pytest.raises(DatasetError, match=rf"{2**31} in document 1 at offset {at}\b"):
        load(OneBadToken(lengths), step, layout="zigzag", cp=1, dp=1, rows=1)
