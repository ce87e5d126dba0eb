"""The link benchmark of lightning attention: paired ratios, and the bytes of a small run."""

import json

import pytest
from lightning_links import compare_links, compare_speed, main

from ringctx.config import TopologyConfig


def test_ranks_are_compared_with_their_share_of_the_serial_time_of_the_same_round() -> None:
    def times(total_s: list[float]) -> dict[str, list[float]]:
        return {"total_s": total_s, "cpu_s": total_s, "queued_s": [0.0, 0.0, 0.5]}

    first = {"serial": times([4.0, 8.0, 2.0]), "ranks zigzag": times([1.0, 5.0, 1.0])}
    result = compare_speed([first, {"ranks zigzag": times([3.0, 4.0, 1.0])}])
    # The slowest: 3, 5, 1; against 2, 4, 1.
    assert result["ranks zigzag"]["target_ratio"] == {"median": 1.25, "min": 1.0, "max": 1.5}
    assert result["ranks zigzag"]["on_core_ratio"]["min"] == round(2 * 0.5 / 1.5, 4)
    # 4 / 4, 9 / 8, 2 / 2
    assert result["ranks zigzag"]["cpu_ratio"]["max"] == 1.125


def test_what_is_hidden_counts_the_slowest_rank_of_each_round() -> None:
    def rank(
        exposed_s: list[float], alone_s: list[float], sent: int
    ) -> dict[str, dict[str, object]]:
        return {
            "all_gather contiguous": {
                "total_s": [1.0, 1.0],
                "cpu_s": [1.0, 1.0],
                "exposed_s": exposed_s,
                "alone_s": alone_s,
                "sent": {"0": sent},
                "wire": {},
                "max_error": 1e-7,
            }
        }

    ranks = [rank([0.0, 2.0], [4.0, 2.0], 64), rank([1.0, 1.0], [2.0, 4.0], 65)]
    settings = {"tokens": 8, "heads": 1, "head_dim": 4}
    row = compare_links(ranks, settings, TopologyConfig())["all_gather contiguous"]
    assert row["hidden"] == {"median": 0.625, "min": 0.5, "max": 0.75}
    assert row["formula_bytes"] == [64, 64]
    assert not row["bytes_match"]


@pytest.mark.slow
def test_a_small_run_sends_the_bytes_of_the_formulas(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--quick"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert list(result) == ["config", "loopback", "links", "machine"]
    assert list(result["loopback"]) == ["serial", "ranks zigzag", "ranks contiguous", "no_exchange"]
    rows = result["links"]["2"]
    states = {f"{a} {b}" for a in ("all_gather", "ring") for b in ("zigzag", "contiguous")}
    assert set(rows) == states | {"no_exchange", "head_split zigzag"}
    assert all(row["bytes_match"] for row in rows.values()), rows
    state = 2 * 16 * 16 * 4
    assert rows["all_gather contiguous"]["sent_bytes"] == [state, state]
    # q, k, v, out and their gradients: 256 tokens of one head to the other rank.
    assert rows["head_split zigzag"]["sent_bytes"] == [8 * 256 * 16 * 4] * 2
    for name, row in rows.items():
        assert ("hidden" in row) == (name in states)
        assert row["max_error"] is None or row["max_error"] < 1e-5
