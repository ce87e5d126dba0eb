"""Rows of a stream change places inside blocks, and nothing else."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ringctx.config import CurriculumConfig
from ringctx.data import Plan
from ringctx.data.row_pools import StreamPool, whole_documents
from ringctx.data.shuffled_rows import ShuffledPool
from tests.data.samples import MadeUpDocuments


def stream(lengths: list[int], *, row_len: int = 4) -> StreamPool:
    return StreamPool(whole_documents(np.array(lengths)), row_len=row_len, seed=0)


def as_lists(rows: object, count: int) -> list[list[list[int]]]:
    return [rows.pieces[a:b].tolist() for a, b in zip(rows.offsets, rows.offsets[1:], strict=False)]  # type: ignore[attr-defined]


@given(st.lists(st.integers(1, 30), min_size=2, max_size=12), st.integers(1, 9), st.integers(0, 3))
def test_a_block_holds_the_rows_of_the_stream_each_once(
    lengths: list[int], block: int, number: int
) -> None:
    pool = stream(lengths)
    shuffled = ShuffledPool(pool, block=block, seed=1)
    got = as_lists(shuffled.rows(number * block, block), block)
    assert sorted(got) == sorted(as_lists(pool.rows(number * block, block), block))


@given(st.integers(0, 40), st.integers(0, 20))
def test_any_range_of_rows_is_a_part_of_the_whole(first: int, count: int) -> None:
    shuffled = ShuffledPool(stream([50, 70, 30]), block=16, seed=0)
    whole = as_lists(shuffled.rows(0, 60), 60)
    assert as_lists(shuffled.rows(first, count), count) == whole[first : first + count]


@pytest.mark.parametrize("kind", ["packed", "window", "stages"])
def test_a_long_document_does_not_fill_steps_by_itself(kind: str) -> None:
    dataset = MadeUpDocuments([64 * 256, *[64] * 256])
    rule = {"kind": kind, "tokens_per_step": 512}
    rule |= {"stages": ({"len": 64, "share": 1.0},)} if kind == "stages" else {"len": 64}
    plan = Plan(dataset, rule)
    alone = sum(bool((plan.step(t).pieces[:, 0] == 0).all()) for t in range(len(plan)))
    # Eight rows a step, half of all rows from document 0: one step in 256 by chance.
    assert len(plan) == 64 and alone < 5


def test_part_of_the_data_is_drawn_from_all_of_it() -> None:
    dataset = MadeUpDocuments([64 * 256, *[64] * 256])
    rule = CurriculumConfig(kind="packed", len=64, tokens_per_step=512, total_tokens=64 * 256)
    plan = Plan(dataset, rule)
    rows = np.concatenate([plan.step(t).pieces for t in range(len(plan))])
    assert 0.35 < (rows[:, 0] == 0).mean() < 0.65
