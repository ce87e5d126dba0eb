"""The step-time benchmark: paired ratios, and a run in seconds."""

import json

import pytest
from step_time import main, summary


def test_ratios_are_paired_and_not_those_of_medians() -> None:
    times = {256: [1.0, 2.0, 4.0], 512: [3.0, 4.0, 6.0]}
    found = summary(times, {256: 10.0, 512: 15.0})
    # 3 / 1, 4 / 2, 6 / 4; the medians would give 4 / 2 as well, were the first not 3.
    assert found["512"] == {"seconds": 4.0, "ratio": 2.0, "cost_model_ratio": 1.5}
    assert found["256"]["ratio"] == 1.0
    assert summary({256: [1.0, 4.0], 512: [4.0, 4.0]}, {256: 1.0, 512: 1.0})["512"]["ratio"] == 2.5


def test_every_length_is_timed(capsys: pytest.CaptureFixture[str]) -> None:
    tiny = ["model.dim=16", "model.num_layers=1", "model.num_heads=2", "model.mlp_dim=16"]
    assert main(["--min-len", "64", "--max-len", "256", "--rounds", "2", "--model", *tiny]) == 0
    result = json.loads(capsys.readouterr().out)
    assert list(result["lengths"]) == ["64", "128", "256"]
    assert all(row["seconds"] > 0 for row in result["lengths"].values())


def test_a_length_that_is_no_power_of_two_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--max-len", "3000"]) == 1
    assert "power" in capsys.readouterr().err
