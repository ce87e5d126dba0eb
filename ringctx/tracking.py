"""What a run leaves behind: one JSON object a step; the console and wandb are fed from the same.

`metrics.jsonl` is the truth. It is only ever appended to: after a resume a step may stand in it
twice, and the later line counts. A line cut off by a kill is skipped by the reader.
"""

import dataclasses
import json
import logging
import netrc
import os
import secrets
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TextIO
from urllib.parse import urlsplit

from tqdm import tqdm

from ringctx.config import TrackingConfig

__all__ = ["StepRecord", "Tracker", "read_metrics"]

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class StepRecord:
    """One line of metrics.jsonl, the same on all ranks."""

    step: int
    """Optimizer step, from 0."""
    tokens: int
    """Tokens trained on since the run began, this step included; padding is not counted."""
    loss: float
    """Mean loss of the step's targets, in nats."""
    lr: float
    """Learning rate of this step."""
    grad_norm: float
    """Global 2-norm of the gradient before clipping."""
    bucket_len: int
    """Tokens of each sequence of this step."""
    num_sequences: int
    """Sequences of this step: rows, where they are packed."""
    num_documents: int
    """Pieces of documents in them."""
    window: int | None
    """The largest attention window of any layer in this step; null: the model's own."""
    cp_degree: int
    """Ranks that shared a sequence."""
    step_time_s: float
    """Wall time, waiting for data included, checkpoints not."""
    tokens_per_s: float
    """Tokens of this step over its time, all ranks."""
    flops_per_s: float
    """Model FLOP/s of a rank: forward and backward, visible pairs only, nothing recomputed."""
    mfu: float | None
    """That as a share of tracking.peak_flops; null where that is not set."""
    comm_exposed_s: float
    """Time blocked in attention exchanges, the slowest rank's."""
    moved_bytes: int
    """Bytes sent by attention exchanges, all ranks."""
    max_memory_bytes: int
    """Peak memory, the largest rank's: resident set on CPU, allocator on CUDA."""


class Tracker:
    """Writes the records of a run; only rank 0 makes one. Use it as a context manager."""

    def __init__(
        self,
        run_dir: Path,
        *,
        config: TrackingConfig,
        resolved: dict[str, Any],
        first_step: int,
        num_steps: int,
    ) -> None:
        self._file = _open_for_append(run_dir / "metrics.jsonl")
        self._console = _Console(config, first_step=first_step, num_steps=num_steps)
        self._wandb = (
            None if config.wandb is None else _start_wandb(config.wandb, run_dir, resolved)
        )

    def __enter__(self) -> Self:
        """Return itself."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Close every sink."""
        self._file.close()
        self._console.close()
        if self._wandb is not None:
            self._wandb.finish(exit_code=0 if kind is None else 1)

    def log(self, record: StepRecord) -> None:
        """Hand one step to every sink."""
        fields = dataclasses.asdict(record)
        self._file.write(json.dumps(fields) + "\n")
        self._file.flush()
        self._console.show(record)
        if self._wandb is not None:
            self._wandb.log(fields, step=record.step)


def read_metrics(run_dir: Path) -> list[dict[str, Any]]:
    """The records of a run in order of steps.

    Where a resume went back, what had come after that step belongs to a branch that was given up:
    the later lines count.
    """
    records: list[dict[str, Any]] = []
    with (run_dir / "metrics.jsonl").open() as file:
        for line in file:
            try:
                record = json.loads(line)
                step = record["step"]
            except (ValueError, KeyError, TypeError):
                # Cut off by a kill in the middle of a write.
                continue
            while records and records[-1]["step"] >= step:
                records.pop()
            records.append(record)
    return records


class _Console:
    """A progress line on a terminal, a log line now and then elsewhere."""

    def __init__(self, config: TrackingConfig, *, first_step: int, num_steps: int) -> None:
        self._every, self._last = config.log_every, num_steps - 1
        self._start, self._first = time.monotonic(), first_step
        self._bar = (
            tqdm(
                total=num_steps,
                initial=first_step,
                # Without the bar itself: 80 columns are needed for the rest.
                bar_format="{percentage:3.0f}% {n}/{total} [{elapsed}<{remaining}{postfix}]",
                # Some terminals say that they are 0 wide and 0 high; tqdm would then show nothing.
                ncols=shutil.get_terminal_size().columns,
                nrows=shutil.get_terminal_size().lines,
            )
            if sys.stderr.isatty()
            else None
        )

    def show(self, record: StepRecord) -> None:
        text = (
            f"loss {record.loss:.4f}  {record.tokens_per_s:,.0f} tok/s  "
            f"len {record.bucket_len:,} (cp {record.cp_degree})"
        )
        if self._bar is not None:
            self._bar.set_postfix_str(text, refresh=False)
            self._bar.update()
        elif record.step % self._every == 0 or record.step == self._last:
            done = record.step + 1
            each = (time.monotonic() - self._start) / (done - self._first)
            eta = tqdm.format_interval((self._last + 1 - done) * each)
            _LOG.info("step %d/%d  %s  ETA %s", done, self._last + 1, text, eta)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()


def _open_for_append(path: Path) -> TextIO:
    """Open at the end, on a line of its own even if the last one was cut off."""
    file = path.open("a")
    if file.tell() > 0:
        with path.open("rb") as written:
            written.seek(-1, os.SEEK_END)
            if written.read() != b"\n":
                file.write("\n")
    return file


def _start_wandb(project: str, run_dir: Path, resolved: dict[str, Any]) -> Any:
    """A wandb run that goes on with the same id after a resume; offline where there is no key."""
    import wandb

    marker = run_dir / "wandb-id"
    run_id = marker.read_text().strip() if marker.exists() else secrets.token_hex(4)
    start: Callable[..., Any] = wandb.init
    settings = {
        "project": project,
        "dir": str(run_dir),
        "id": run_id,
        "resume": "allow",
        "config": resolved,
    }
    if "WANDB_MODE" not in os.environ and not _wandb_has_key(wandb.setup().settings):
        # Asked before the start: on a terminal wandb would wait for an answer.
        _LOG.info("wandb has no API key: writing offline; 'wandb sync' uploads it later")
        settings["mode"] = "offline"
    run = start(**settings)
    marker.write_text(run_id + "\n")
    run.define_metric("*", step_metric="step")
    return run


def _wandb_has_key(settings: Any) -> bool:
    """Whether wandb would find a key where it looks for one without asking."""
    if settings.api_key or os.environ.get("WANDB_API_KEY") or settings.identity_token_file:
        return True
    try:
        known = netrc.netrc(os.environ.get("NETRC"))
    except (OSError, netrc.NetrcParseError):
        return False
    return known.authenticators(urlsplit(settings.base_url).hostname or "") is not None
