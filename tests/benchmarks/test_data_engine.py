"""The data engine's benchmark runs, in small, and judges by its targets."""

import json
from pathlib import Path

import pytest
from data_engine import main


def test_prints_every_measurement_with_unit_and_verdict(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("data_engine._IMPORT_TOKENS", 2**12)
    monkeypatch.setattr("data_engine._TEXT_BYTES", 2**12)
    monkeypatch.setattr("data_engine._PLANNED_DOCUMENTS", 2**8)
    (tmp_path / "a.py").write_text("import this\n" * 50)
    main(["--text", str(tmp_path), "--rounds", "1", "--documents", "1000"])
    rows = json.loads(capsys.readouterr().out)
    judged = [row for row in rows.values() if "target" in row]
    assert {"decomposition", "plan", "open", "check", "import"} <= rows.keys()
    assert len(judged) >= 7
    for row in judged:
        below = row["unit"].startswith("s")
        good = row["value"] <= row["target"] if below else row["value"] >= row["target"]
        # The value is rounded after it was judged.
        assert row["met"] == good or abs(row["value"] - row["target"]) < 1e-3
