"""`ringctx plan attention`: what a person types, and what they read."""

import json
from typing import Any

import pytest
import torch

from ringctx.config import TopologyConfig
from ringctx.launch.cli import main
from ringctx.parallel.cost import SCHEDULES, choose
from ringctx.parallel.layout import Sharding
from ringctx.parallel.mask import Mask
from ringctx.parallel.topology import wire_up
from ringctx.parallel.traffic import Shape

CASE = "plan attention --seq-len 128k --heads 32 --kv-heads 8 --ranks 8"


def plan(words: str, capsys: pytest.CaptureFixture[str]) -> str:
    assert main(words.split()) == 0
    return capsys.readouterr().out


def planned(words: str, capsys: pytest.CaptureFixture[str]) -> Any:
    return json.loads(plan(f"{words} --json", capsys))


def test_table_shows_every_schedule_in_both_passes_and_marks_the_choice(
    capsys: pytest.CaptureFixture[str],
) -> None:
    lines = plan(f"{CASE} --topology cables", capsys).splitlines()
    assert lines[0] == (
        "131,072 tokens over 8 ranks (zigzag, 16,384 each), 32 query heads to 8 K/V, "
        "cables of 400 Gbit/s"
    )
    rows = [line for line in lines if line[2:].split(" ")[0] in SCHEDULES]
    assert len(rows) == 2 * len(SCHEDULES)
    assert sum(row.startswith("*") for row in rows) == 2
    assert any(line.startswith("auto: ") for line in lines)
    assert "  K/V weighs 1/4 of Q and out (32 query heads to 8 K/V heads)" in lines
    assert max(map(len, lines)) <= 100


def test_json_is_what_auto_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    words = (
        "plan attention --seq-len 64k --heads 16 --kv-heads 16 --ranks 4 --topology "
        "fully_connected --link-gbit 25 --latency-us 50 --flops 1e13 --head-dim 64 --dtype fp32 "
        "--batch 2 --layout contiguous --window 9k --sinks 16"
    )
    topology = TopologyConfig(kind="fully_connected", link_gbit=25.0, latency_us=50.0, flops=1e13)
    choice = choose(
        shape=Shape(batch=2, heads=16, kv_heads=16, head_dim=64, dtype=torch.float32),
        sharding=Sharding(65536, 4, "contiguous"),
        mask=Mask(window=9 * 1024, sinks=16),
        wiring=wire_up(topology, ranks=(0, 1, 2, 3), world_size=4),
    )
    told = planned(words, capsys)
    assert (told["forward"], told["backward"]) == (choice.forward, choice.backward)
    assert told["why"] == choice.why
    for name, costs in (("forward", choice.forward_costs), ("backward", choice.backward_costs)):
        assert [row["schedule"] for row in told["passes"][name]] == list(SCHEDULES)
        for row, cost in zip(told["passes"][name], costs, strict=True):
            assert row["time_s"] == cost.time_s
            assert row["busiest_bytes"] == cost.busiest_bytes
            assert row["total_bytes"] == cost.total_bytes
            assert row["memory_bytes"] == cost.memory_bytes


def test_full_attention_moves_more_than_causal(capsys: pytest.CaptureFixture[str]) -> None:
    causal, full = (planned(words, capsys) for words in (CASE, f"{CASE} --full"))
    for name in ("forward", "backward"):
        for a, b in zip(causal["passes"][name], full["passes"][name], strict=True):
            assert a["total_bytes"] < b["total_bytes"] and a["compute_s"] < b["compute_s"]


def test_key_value_heads_are_the_query_heads_unless_told(
    capsys: pytest.CaptureFixture[str],
) -> None:
    short = "plan attention --seq-len 4k --heads 8 --ranks 2"
    assert planned(short, capsys) == planned(f"{short} --kv-heads 8", capsys)


def test_two_levels_take_nodes(capsys: pytest.CaptureFixture[str]) -> None:
    told = planned(f"{CASE} --topology two_level --ranks-per-node 4 --node-gbit 3000", capsys)
    links = {row["busiest_link"] for row in told["passes"]["forward"]}
    assert any("node" in link for link in links)


def test_one_rank_has_nothing_to_choose(capsys: pytest.CaptureFixture[str]) -> None:
    told = planned("plan attention --seq-len 4k --heads 8 --ranks 1", capsys)
    assert told["why"] == "one rank holds the whole sequence"
    (row,) = told["passes"]["backward"]
    assert row["busiest_link"] is None and row["total_bytes"] == 0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--seq-len 100x --heads 8 --ranks 2", "'100x' is not a size"),
        ("--seq-len 101 --heads 8 --ranks 2", "seq_len=101 is not divisible by 2 * world_size"),
        ("--seq-len 4k --heads 8 --kv-heads 3 --ranks 2", "--heads 8 is not divisible by"),
        ("--seq-len 4k --heads 0 --ranks 2", "--heads 0 must be at least 1"),
        ("--seq-len 4k --heads 8 --ranks 0", "--ranks 0 must be at least 1"),
        ("--seq-len 4k --heads 8 --ranks 2 --sinks 4", "sinks=4 needs a window"),
        ("--seq-len 4k --heads 8 --ranks 2 --window 8 --full", "window=8 needs causal=True"),
        ("--seq-len 4k --heads 8 --ranks 2 --link-gbit 0", "link_gbit=0.0 must be above 0"),
        ("--seq-len 4k --heads 8 --ranks 2 --ranks-per-node 2", "ranks_per_node=2 with kind="),
        ("--seq-len 4k --heads 8 --ranks 2 --topology two_level", "ranks_per_node=None with"),
        (
            "--seq-len 12k --heads 8 --ranks 3 --topology two_level --ranks-per-node 2",
            "does not spread the 3 ranks",
        ),
    ],
)
def test_a_mistake_is_one_message_and_exit_code_2(
    words: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", "attention", *words.split()]) == 2
    told = capsys.readouterr()
    assert message in told.err and told.err.startswith("ringctx: error: ")
    assert not told.out
