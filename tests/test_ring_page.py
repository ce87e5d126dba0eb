"""docs/ring_attention.md and parallel/README.md: tables are current, examples run and are right."""

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from ringctx.ops.naive import naive_attention
from ringctx.parallel import comm, shard
from tests.ranks import run_ranks
from tests.tolerances import assert_matches

ROOT = Path(__file__).resolve().parent.parent
PAGES = ("docs/ring_attention.md", "parallel/README.md")
RANKS, SEQ_LEN, HEADS, KV_HEADS, HEAD_DIM = 4, 1024, 4, 2, 8
# What each example's last `out` is, in the order of the page.
MASKS: tuple[dict[str, Any], ...] = ({"cu_seqlens": [0, 300, 700, 1024]}, {}, {"window": 128})


def test_tables_are_current() -> None:
    result = subprocess.run(
        [sys.executable, "docs/ring_tables.py", "--check"], cwd=ROOT, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr


def test_every_picture_that_is_drawn_is_shown() -> None:
    drawn = {path.name for path in (ROOT / "docs" / "pictures").glob("ring_*.png")}
    shown = re.findall(r"\]\(pictures/(ring_\w+\.png)\)", (ROOT / PAGES[0]).read_text())
    assert drawn == set(shown)


def _examples(page: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)


def _whole() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(1, SEQ_LEN, heads, HEAD_DIM) for heads in (HEADS, KV_HEADS, KV_HEADS)]
    return [torch.randn(shape, generator=generator) for shape in shapes]


def _attend() -> list[Tensor]:
    """What every example of the page leaves in `out`."""
    whole, local_len = _whole(), SEQ_LEN // RANKS
    known: dict[str, Any] = dict(zip(("whole_q", "whole_k", "whole_v"), whole, strict=True))
    place: dict[str, Any] = {"rank": dist.get_rank(), "world_size": RANKS, "layout": "zigzag"}
    # Projections that make the shards: what they are given does not matter.
    for name, x in zip(("to_q", "to_k", "to_v"), whole, strict=True):
        known[name] = lambda _, x=x: shard(x, **place)
    known["x"] = torch.zeros(1, local_len, 1)
    outs = []
    for example in _examples(PAGES[0]):
        exec(example, known)
        outs.append(known["out"])
    return outs


def test_examples_of_the_page_equal_the_oracle() -> None:
    ranks = run_ranks(RANKS, _attend)
    q, k, v = (x.double() for x in _whole())
    for i, mask in enumerate(MASKS):
        if "cu_seqlens" in mask:
            mask = {"cu_seqlens": torch.tensor(mask["cu_seqlens"], dtype=torch.int32)}
        oracle, _ = naive_attention(q, k, v, causal=True, **mask)
        for rank, outs in enumerate(ranks):
            assert len(outs) == len(MASKS)
            expected = shard(oracle, rank=rank, world_size=RANKS, layout="zigzag")
            assert_matches(f"example {i} on rank {rank}", outs[i], expected, flash=expected)


def _run_readme() -> tuple[int, int]:
    world_size, rank = dist.get_world_size(), dist.get_rank()
    torch.manual_seed(0)
    embedding = nn.Embedding(100, 3 * HEADS * HEAD_DIM)

    def model(x: Tensor, at: Tensor) -> list[Tensor]:
        assert x.shape[1] == len(at)
        return [part.unflatten(-1, (HEADS, -1)) for part in embedding(x).chunk(3, -1)]

    known: dict[str, Any] = {
        "rank": rank,
        "world_size": world_size,
        "group": dist.group.WORLD,
        "seq_len": SEQ_LEN,
        "tokens": torch.randint(100, (1, SEQ_LEN)),
        "model": model,
        "comm": comm,
        "next_global_rank": (rank + 1) % world_size,
    }
    for example in _examples(PAGES[1]):
        exec(example, known)
    ledger = known["ledger"]
    return ledger.moved_bytes, ledger.sent[known["next_global_rank"]]


@pytest.mark.parametrize("world_size", [2, 4])
def test_examples_of_the_readme_run_and_move_something(world_size: int) -> None:
    for moved, to_next in run_ranks(world_size, _run_readme):
        assert moved >= to_next > 0
