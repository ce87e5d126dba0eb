"""The layouts compared are the ones named, and short rows move nothing where the layout follows."""

import json

import pytest
from layout_by_length import main


@pytest.mark.slow
def test_prints_a_ratio_for_every_length(capsys: pytest.CaptureFixture[str]) -> None:
    main(["--ranks", "2", "--max-len", "1k", "--rounds", "1"])
    lengths = json.loads(capsys.readouterr().out)["lengths"]
    assert list(lengths) == ["256", "512", "1024"]
    assert [row["cp_auto"] for row in lengths.values()] == [1, 1, 2]
    assert {row["cp_fixed"] for row in lengths.values()} == {2}
    assert [row["moved_bytes_auto"] > 0 for row in lengths.values()] == [False, False, True]
    assert all(row["moved_bytes_fixed"] > 0 for row in lengths.values())
    assert all(row["fixed_over_auto"] > 0 for row in lengths.values())
