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


def test_documents_hide_pairs_and_spare_links(capsys: pytest.CaptureFixture[str]) -> None:
    whole, packed = (planned(words, capsys) for words in (CASE, f"{CASE} --documents 6000"))
    for name in ("forward", "backward"):
        for a, b in zip(whole["passes"][name], packed["passes"][name], strict=True):
            assert b["compute_s"] < a["compute_s"] and b["total_bytes"] < a["total_bytes"]
    assert "documents: only " in packed["why"]
    # One document is none.
    assert planned(f"{CASE} --documents 128k", capsys) == whole


def test_the_last_document_is_as_long_as_what_is_left(capsys: pytest.CaptureFixture[str]) -> None:
    told = planned("plan attention --seq-len 40 --heads 2 --ranks 2 --documents 17", capsys)
    borders = (0, 17, 34, 40)
    choice = choose(
        shape=Shape(heads=2, kv_heads=2, head_dim=128),
        sharding=Sharding(40, 2, "zigzag"),
        mask=Mask(cu_seqlens=borders),
        wiring=wire_up(None, ranks=(0, 1), world_size=2),
    )
    rows = told["passes"]["backward"]
    assert [row["compute_s"] for row in rows] == [cost.compute_s for cost in choice.backward_costs]


@pytest.mark.parametrize("topology", ["cables", "switch"])
def test_json_says_what_every_link_carries(
    topology: str, capsys: pytest.CaptureFixture[str]
) -> None:
    told = planned(f"{CASE} --topology {topology} --full", capsys)
    for rows in told["passes"].values():
        for row in rows:
            assert row["links"][row["busiest_link"]] == row["busiest_bytes"]
            assert max(row["links"].values()) == row["busiest_bytes"]
    one_way = told["passes"]["forward"][0]
    # 7 of 8 shards go over every cable; on a switch, over the two ports of every rank.
    shard = 2 * 8 * 128 * 2 * 131072 // 8
    names = [f"{i} -> {(i + 1) % 8}" for i in range(8)]
    if topology == "switch":
        names = [f"{way} {i}" for way in ("out of", "into") for i in range(8)]
    assert one_way["links"] == dict.fromkeys(names, 7 * shard)


def test_many_ranks_are_told_to_take_time_and_few_are_not(
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = "plan attention --seq-len 5140 --heads 1 --head-dim 8 --window 2 --layout contiguous"
    for ranks, told in ((257, True), (20, False)):
        assert main([*words.split(), "--ranks", str(ranks)]) == 0
        printed = capsys.readouterr()
        assert (f"pricing every schedule on {ranks} ranks takes" in printed.err) is told
        assert sum(line[2:].startswith("one_way ") for line in printed.out.splitlines()) == 2


def wrong(words: str, message: str) -> tuple[str, str]:
    return f"--seq-len 4k --heads 8 --ranks 2 {words}", message


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--seq-len abc --heads 8 --ranks 2", "--seq-len: 'abc' is not a size"),
        ("--seq-len 0 --heads 8 --ranks 2", "--seq-len 0 must be at least 1"),
        (
            "--seq-len 101 --heads 8 --ranks 2",
            "--seq-len 101 --ranks 2: seq_len=101 is not divisible by 2 * world_size",
        ),
        ("--seq-len 4k --heads 8 --kv-heads 3 --ranks 2", "--heads 8 is not divisible by"),
        ("--seq-len 4k --heads 0 --ranks 2", "--heads 0 must be at least 1"),
        ("--seq-len 4k --heads 8 --ranks 0", "--ranks 0 must be at least 1"),
        wrong("--sinks 4", "--sinks 4 has no use without --window"),
        wrong("--window 8 --sinks x", "--sinks: 'x' is not a size"),
        wrong("--window 8 --sinks -1", "--sinks: '-1' is not a size"),
        wrong("--window 0", "--window 0 must be at least 1"),
        wrong("--window wide", "--window: 'wide' is not a size"),
        wrong("--window 16 --full", "--window 16 does not go with --full"),
        wrong("--documents 0", "--documents 0 must be at least 1"),
        wrong("--documents some", "--documents: 'some' is not a size"),
        ("--seq-len 4g --heads 8 --ranks 2 --documents 1k", "--documents goes up to --seq-len 2,"),
        wrong("--link-gbit 0", "--link-gbit 0.0 must be above 0"),
        wrong("--latency-us inf", "--latency-us inf must be at least 0, and a finite number"),
        wrong("--flops nan", "--flops nan must be above 0"),
        wrong("--node-gbit 9", "--node-gbit 9.0 has no use with --topology switch"),
        wrong("--ranks-per-node 2", "--ranks-per-node 2 has no use with --topology switch"),
        wrong("--topology two_level", "--topology two_level needs --ranks-per-node: how many"),
        (
            "--seq-len 12k --heads 8 --ranks 3 --topology two_level --ranks-per-node 2",
            "--ranks-per-node 2 does not spread the 3 ranks",
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
