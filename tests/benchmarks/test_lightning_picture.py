"""The picture is drawn from what the benchmark prints."""

from pathlib import Path

import pytest
from lightning import main as measure

pytest.importorskip("matplotlib")


def test_a_picture_is_drawn_of_the_measurement(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from lightning_picture import main

    sizes = ["--heads", "2", "--head-dim", "8", "--threads", "1"]
    measure(["--quick", "--no-memory", *sizes, "--variants", "ours", "sdpa"])
    measured, picture = tmp_path / "measured.json", tmp_path / "picture.png"
    measured.write_text(capsys.readouterr().out)
    main([str(measured), str(picture)])
    assert picture.read_bytes().startswith(b"\x89PNG")
