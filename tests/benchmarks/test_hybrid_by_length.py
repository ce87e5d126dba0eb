"""The hybrid benchmark: paired ratios, and a run in seconds with its picture."""

import json
from pathlib import Path

import pytest
from hybrid_by_length import main, summary


def test_ratios_are_paired_and_not_those_of_medians() -> None:
    times = {"LLLS": {100: [1.0, 2.0, 4.0]}, "S": {100: [4.0, 2.0, 5.0]}}
    cpu = {"LLLS": {100: [1.0, 1.0, 2.0]}, "S": {100: [2.0, 3.0, 5.0]}}
    flops = {"LLLS": {100: 10.0}, "S": {100: 15.0}}
    # 4 / 1, 2 / 2, 5 / 4; the medians would give 4 / 2.
    assert summary(times, cpu, flops)["100"] == {
        "hybrid_tokens_per_s": 50.0,
        "softmax_tokens_per_s": 25.0,
        "hybrid_is_faster_by": 1.25,
        "range": [1.0, 4.0],
        "hybrid_tokens_per_cpu_s": 100.0,
        "softmax_tokens_per_cpu_s": 33.3,
        "cpu_ratio": 2.5,
        "cost_model": 1.5,
    }


def test_every_length_is_timed_and_drawn(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    picture = tmp_path / "picture.png"
    assert main(["--quick", "--threads", "1", "--plot", str(picture)]) == 0
    result = json.loads(capsys.readouterr().out)
    assert list(result["lengths"]) == ["64", "128", "256"]
    assert all(row["hybrid_tokens_per_s"] > 0 for row in result["lengths"].values())
    # Fewer pairs to look at, the longer the row.
    ratios = [row["cost_model"] for row in result["lengths"].values()]
    assert ratios == sorted(ratios)
    assert result["parameters"]["hybrid"] > result["parameters"]["softmax"]
    assert picture.stat().st_size > 0
