"""metrics.jsonl is the truth: appended to, readable after a kill, and the same in every sink."""

import dataclasses
import json
import logging
import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest

from ringctx.config import TrackingConfig
from ringctx.errors import ConfigError
from ringctx.tracking import StepRecord, Tracker, read_metrics


def record(step: int, loss: float = 1.5) -> StepRecord:
    return StepRecord(
        step=step, tokens=100 * (step + 1), loss=loss, lr=1e-3, grad_norm=0.5, bucket_len=256,
        num_sequences=4, num_documents=4, window=None, cp_degree=1, step_time_s=0.1,
        tokens_per_s=1000.0, flops_per_s=1e9, mfu=None, comm_exposed_s=0.0, moved_bytes=0,
        max_memory_bytes=1,
    )  # fmt: skip


def tracker(run_dir: Path, *, first_step: int = 0) -> Tracker:
    return Tracker(
        run_dir,
        config=TrackingConfig(log_every=2),
        resolved={},
        first_step=first_step,
        num_steps=5,
    )


def test_each_step_is_one_json_object_with_all_fields(tmp_path: Path) -> None:
    with tracker(tmp_path) as sink:
        sink.log(record(0))
        sink.log(record(1))
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [
        dataclasses.asdict(record(step)) for step in (0, 1)
    ]


def test_a_resume_appends_and_the_later_line_of_a_step_counts(tmp_path: Path) -> None:
    with tracker(tmp_path) as sink:
        sink.log(record(0))
        sink.log(record(1, loss=9.0))
    with tracker(tmp_path, first_step=1) as sink:
        sink.log(record(1, loss=2.0))
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 3
    assert [entry["loss"] for entry in read_metrics(tmp_path)] == [1.5, 2.0]


def test_a_line_cut_off_by_a_kill_harms_no_other(tmp_path: Path) -> None:
    whole = json.dumps(dataclasses.asdict(record(0))) + "\n"
    (tmp_path / "metrics.jsonl").write_text(whole + whole[:30])
    with tracker(tmp_path, first_step=1) as sink:
        sink.log(record(1))
    assert [entry["step"] for entry in read_metrics(tmp_path)] == [0, 1]


def test_the_console_shows_loss_speed_length_and_time_left(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, logger="ringctx"), tracker(tmp_path) as sink:
        for step in range(5):
            sink.log(record(step))
    assert len(caplog.messages) == 3, "every second step and the last"
    assert caplog.messages[0].startswith("step 1/5  loss 1.5000  1,000 tok/s  len 256 (cp 1)  ETA")


WANDB_RUN = """
import sys
from pathlib import Path
from tests.test_tracking import record
from ringctx.config import TrackingConfig
from ringctx.tracking import Tracker
run_dir = Path(sys.argv[1])
for step in range(2):
    with Tracker(run_dir, config=TrackingConfig(wandb="ringctx-test"), resolved={"a": 1},
                 first_step=step, num_steps=2) as sink:
        sink.log(record(step))
"""


@pytest.mark.slow
def test_wandb_goes_offline_without_asking_for_a_key_and_keeps_its_id(tmp_path: Path) -> None:
    pytest.importorskip("wandb")
    environment = {k: v for k, v in os.environ.items() if not k.startswith("WANDB")}
    environment["HOME"] = str(tmp_path)
    # A terminal, where wandb by itself would ask for a key and wait.
    controller, terminal = pty.openpty()
    result = subprocess.run(
        [sys.executable, "-c", WANDB_RUN, str(tmp_path)],
        cwd=Path(__file__).parent.parent,
        env=environment,
        stdin=terminal,
        stdout=terminal,
        stderr=terminal,
        timeout=60,
    )
    os.close(terminal)
    os.close(controller)
    assert result.returncode == 0
    runs = list((tmp_path / "wandb").glob("offline-run-*/run-*.wandb"))
    run_id = (tmp_path / "wandb-id").read_text().strip()
    assert len(runs) == 2
    assert all(run.stem == f"run-{run_id}" for run in runs)
    assert all(run.stat().st_size > 100 for run in runs)
    assert len(read_metrics(tmp_path)) == 2


PROGRESS_RUN = """
import sys
from pathlib import Path
from tests.test_tracking import record, tracker
with tracker(Path(sys.argv[1])) as sink:
    for step in range(5):
        sink.log(record(step))
"""


def test_a_terminal_shows_a_bar_with_loss_speed_and_length(tmp_path: Path) -> None:
    # Of no known width, as some terminals are.
    controller, terminal = pty.openpty()
    result = subprocess.run(
        [sys.executable, "-c", PROGRESS_RUN, str(tmp_path)],
        cwd=Path(__file__).parent.parent,
        stderr=terminal,
        timeout=60,
    )
    os.close(terminal)
    shown = os.read(controller, 65_536).decode()
    os.close(controller)
    assert result.returncode == 0
    assert "100% 5/5 [00:00<00:00" in shown
    assert "loss 1.5000  1,000 tok/s  len 256 (cp 1)" in shown


def test_rejects_a_peak_that_is_no_rate() -> None:
    with pytest.raises(ConfigError, match=r"tracking\.peak_flops=0\.0 must be above 0"):
        TrackingConfig(peak_flops=0.0)
