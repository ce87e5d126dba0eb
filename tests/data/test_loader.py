"""Each rank reads its own slice, and all ranks together the whole step."""

import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from ringctx.data.loader import Loader, Microbatch, RowShard
from ringctx.data.plan import Plan
from ringctx.data.steps import Step
from ringctx.errors import DatasetError
from ringctx.ops.losses import IGNORE_INDEX
from tests.data.samples import STRIDE, MadeUpDocuments

LENGTHS = np.random.default_rng(1).integers(8, 900, size=60).tolist()
CURRICULUM = {"min_len": 16, "max_len": 256, "tokens_per_step": 512, "cycles": 2}
Layout = Callable[[int, int, int], NDArray[np.int64]]


def contiguous(length: int, rank: int, ranks: int) -> NDArray[np.int64]:
    return np.split(np.arange(length), ranks)[rank]


def zigzag(length: int, rank: int, ranks: int) -> NDArray[np.int64]:
    blocks = np.arange(length).reshape(2 * ranks, -1)
    return np.concatenate([blocks[rank], blocks[2 * ranks - 1 - rank]])


def striped(length: int, rank: int, ranks: int) -> NDArray[np.int64]:
    return np.arange(rank, length, ranks)


def uneven(length: int, rank: int, ranks: int) -> NDArray[np.int64]:
    """Runs of different lengths: 2, 4, 2, 4, ..."""
    cuts = np.split(np.arange(length), np.flatnonzero(np.isin(np.arange(length) % 6, (0, 2)))[1:])
    return np.concatenate(cuts[rank::ranks])


LAYOUTS = [contiguous, zigzag, striped, uneven]


def make_loader(
    layout: Layout,
    *,
    cp_rank: int = 0,
    cp: int = 1,
    dp_rank: int = 0,
    dp: int = 1,
    rows: int = 1,
    documents: MadeUpDocuments | None = None,
) -> Loader:
    documents = documents or MadeUpDocuments(LENGTHS)
    plan = Plan(documents, CURRICULUM)

    def shard_for(bucket_len: int) -> RowShard:
        return RowShard(
            dp_rank=dp_rank,
            dp_degree=dp,
            rows=rows,
            positions=layout(bucket_len, cp_rank, cp),
        )

    return Loader(documents, plan, shard_for=shard_for)


def expected(step: Step) -> set[tuple[int, int]]:
    """(token, target) of every position of a step, from the documents themselves."""
    pairs = set()
    for document, start in step.pieces.tolist():
        for at in range(start, start + step.bucket_len):
            end = at + 1 == LENGTHS[document]
            target = IGNORE_INDEX if end else document * STRIDE + at + 1
            pairs.add((document * STRIDE + at, target))
    return pairs


def pairs_of(batch: Microbatch) -> list[tuple[int, int]]:
    return list(zip(batch.tokens.flatten().tolist(), batch.targets.flatten().tolist(), strict=True))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("cp", "dp", "rows"), [(1, 1, 1), (4, 1, 2), (2, 3, 1), (2, 2, 5)])
def test_the_ranks_together_hold_every_token_and_target_of_a_step_once(
    layout: Layout, cp: int, dp: int, rows: int
) -> None:
    ranks = [
        make_loader(layout, cp_rank=c, cp=cp, dp_rank=d, dp=dp, rows=rows)
        for c in range(cp)
        for d in range(dp)
    ]
    plan = Plan(MadeUpDocuments(LENGTHS), CURRICULUM)
    for t in range(0, len(plan), 7):
        step = plan.step(t)
        found = [pairs_of(batch) for loader in ranks for batch in loader.step(t)]
        # Rows beyond the step hold token 0 and no target; so does no real position but one.
        real = [pair for pairs in found for pair in pairs if pair != (0, IGNORE_INDEX)]
        assert len(real) == len(set(real))
        assert set(real) == expected(step)
        assert sum(target != IGNORE_INDEX for _, target in real) == step.num_targets


@pytest.mark.parametrize(("dp", "rows"), [(1, 1), (3, 1), (3, 2), (64, 8)])
def test_every_rank_has_the_same_number_of_microbatches_of_the_same_shape(
    dp: int, rows: int
) -> None:
    loaders = [make_loader(contiguous, dp_rank=d, dp=dp, rows=rows) for d in range(dp)]
    for t in (0, 5):
        shapes = {
            tuple(tuple(batch.tokens.shape) for batch in loader.step(t)) for loader in loaders
        }
        assert len(shapes) == 1


def test_rows_are_dealt_over_rounds_then_ranks_then_rows() -> None:
    plan = Plan(MadeUpDocuments(LENGTHS), CURRICULUM)
    t = next(t for t in range(len(plan)) if plan.step(t).bucket_len == 32)
    first_tokens = [document * STRIDE + start for document, start in plan.step(t).pieces.tolist()]
    batches = make_loader(contiguous, dp_rank=1, dp=2, rows=3).step(t)
    # 16 rows: rank 1 holds 3-5, 9-11, and of 15-17 only row 15 exists.
    rows = [int(row[0]) for batch in batches for row in batch.tokens]
    assert rows == [first_tokens[i] for i in (3, 4, 5, 9, 10, 11, 15)] + [0, 0]
    assert (batches[-1].targets[1:] == IGNORE_INDEX).all()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_positions_are_the_indices_inside_the_sequence(layout: Layout) -> None:
    loader = make_loader(layout, cp_rank=1, cp=2)
    plan = Plan(MadeUpDocuments(LENGTHS), CURRICULUM)
    step = plan.step(3)
    (row, *_) = loader.step(3)
    document, start = step.pieces[0].tolist()
    assert row.positions.tolist() == layout(step.bucket_len, 1, 2).tolist()
    assert row.tokens[0].tolist() == (document * STRIDE + start + row.positions).tolist()
    assert {x.dtype for x in (row.tokens, row.targets, row.positions)} == {torch.int64}


@pytest.mark.parametrize(("layout", "runs"), [(contiguous, 1), (zigzag, 2)])
def test_a_rank_of_four_reads_a_quarter_and_one_peeked_token_a_run(
    layout: Layout, runs: int
) -> None:
    documents = MadeUpDocuments(LENGTHS)
    loader = make_loader(layout, cp_rank=1, cp=4, documents=documents)
    plan = Plan(documents, CURRICULUM)
    for t in range(len(plan)):
        documents.tokens_read = 0
        loader.step(t)
        rows = len(plan.step(t).pieces)
        assert 0 <= documents.tokens_read - 512 // 4 <= runs * rows


def test_a_striped_rank_reads_its_tokens_and_their_successors_only() -> None:
    documents = MadeUpDocuments(LENGTHS)
    loader = make_loader(striped, cp_rank=0, cp=4, documents=documents)
    loader.step(0)
    assert documents.tokens_read <= 2 * 512 // 4


def test_prefetched_steps_are_the_steps() -> None:
    loader = make_loader(zigzag, cp_rank=1, cp=2, rows=2)
    plan = Plan(MadeUpDocuments(LENGTHS), CURRICULUM)
    count = 0
    for t, (step, batches) in enumerate(loader.steps(4, 12), start=4):
        assert step == plan.step(t)
        alone = loader.step(t)
        assert len(batches) == len(alone)
        for one, two in zip(batches, alone, strict=True):
            assert torch.equal(one.tokens, two.tokens) and torch.equal(one.targets, two.targets)
        count += 1
    assert count == 8
    assert not list(loader.steps(4, 4))


def threads() -> list[str]:
    return [t.name for t in threading.enumerate() if t.name.startswith("ringctx-loader")]


def test_the_reading_thread_ends_when_the_consumer_stops_early() -> None:
    steps = make_loader(contiguous).steps(0, 20)
    next(steps)
    assert threads()
    steps.close()  # type: ignore[attr-defined]
    assert not threads()


class BrokenDocuments(MadeUpDocuments):
    """Reading fails after some calls."""

    calls = 0

    def read_spans(self, *args: Any) -> NDArray[np.uint32]:
        self.calls += 1
        if self.calls > 4:
            raise OSError("the disk is gone")
        return super().read_spans(*args)


def test_an_error_of_the_reading_thread_reaches_the_caller() -> None:
    loader = make_loader(contiguous, documents=BrokenDocuments(LENGTHS))
    with pytest.raises(OSError, match="the disk is gone"):
        for _ in loader.steps(0, 20):
            pass
    assert not threads()


@pytest.mark.parametrize("at", [100, 128])
def test_a_token_outside_the_vocabulary_is_named_before_it_is_used(at: int) -> None:
    class OneBadToken(MadeUpDocuments):
        def read_spans(self, *args: Any) -> NDArray[np.uint32]:
            tokens = super().read_spans(*args)
            return np.where(tokens == at, np.uint32(2**31), tokens)

    # Offset 128 is a target (of the first piece) before it is a token.
    documents = OneBadToken([256 + 128])
    plan = Plan(documents, {"min_len": 128, "max_len": 128, "tokens_per_step": 128})
    shard = RowShard(dp_rank=0, dp_degree=1, rows=1, positions=np.arange(128))
    loader = Loader(documents, plan, shard_for=lambda _: shard)
    t = next(t for t in range(len(plan)) if plan.step(t).pieces[0, 1] == 0)
    with pytest.raises(DatasetError, match=rf"{2**31} in document 0 at offset {at}\b"):
        loader.step(t)
