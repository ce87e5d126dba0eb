"""Pictures and a table, whatever a run's metrics know."""

import json
from pathlib import Path
from typing import Any

import pytest

from ringctx.by_length import by_length
from ringctx.launch.plot import plot_run
from tests.test_by_length import STEPS

OLD = [{k: v for k, v in step.items() if k not in ("flops_per_s", "mfu")} for step in STEPS]


@pytest.mark.parametrize(
    "steps", [STEPS, STEPS[1::2], OLD[:1]], ids=["two lengths", "one", "an old step"]
)
def test_a_run_gives_three_pictures_and_the_table_by_length(
    tmp_path: Path, steps: list[dict[str, Any]]
) -> None:
    lines = [json.dumps(step | {"step": at}) for at, step in enumerate(steps)]
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    *pictures, table = plot_run(tmp_path)
    assert [path.name for path in pictures] == ["loss.png", "throughput.png", "lengths.png"]
    assert all(path.read_bytes()[:4] == b"\x89PNG" for path in pictures)
    assert table == tmp_path / "report/by_length.json"
    rows = json.loads(table.read_text())
    assert rows == [vars(stats) for stats in by_length(steps)]
