"""Pictures of a run from its metrics: loss, throughput by length, lengths over time.

Beside them by_length.json: the table that a run logs at its end.
"""

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import numpy as np

from ringctx.by_length import LengthStats, by_length
from ringctx.errors import ConfigError
from ringctx.launch.pictures import length_label, new_figure, save_figure
from ringctx.tracking import read_metrics

__all__ = ["plot_run"]

Records = list[dict[str, Any]]


def plot_run(run_dir: Path) -> list[Path]:
    """Write into RUN_DIR/report.

    Args:
        run_dir: a run folder with metrics.jsonl.

    Returns:
        The PNG files, and by_length.json.

    Raises:
        ConfigError: if there is nothing to draw, or matplotlib is not installed.
    """
    if not (run_dir / "metrics.jsonl").exists():
        raise ConfigError(f"{run_dir} has no metrics.jsonl; name the train.run_dir of a run")
    records = read_metrics(run_dir)
    if not records:
        raise ConfigError(f"{run_dir}/metrics.jsonl has no complete line yet; no step was finished")
    report = run_dir / "report"
    paths = []
    for name, draw in (
        ("loss", _draw_loss),
        ("throughput", _draw_throughput),
        ("lengths", _draw_lengths),
    ):
        figure = new_figure()
        draw(figure, records)
        report.mkdir(exist_ok=True)
        paths.append(report / f"{name}.png")
        save_figure(figure, paths[-1])
    table = [dataclasses.asdict(stats) for stats in by_length(records)]
    paths.append(report / "by_length.json")
    paths[-1].write_text(json.dumps(table, indent=1) + "\n")
    return paths


def _color(length: int, lengths: list[int]) -> Any:
    from matplotlib import colormaps

    place = lengths.index(length) / max(1, len(lengths) - 1)
    return colormaps["viridis"](0.9 * place)


def _lengths(records: Records) -> list[int]:
    return sorted({record["bucket_len"] for record in records})


def _draw_loss(figure: Any, records: Records) -> None:
    axes, lengths = figure.subplots(), _lengths(records)
    tokens = np.array([record["tokens"] for record in records]) / 1e6
    loss = np.array([record["loss"] for record in records])
    axes.plot(tokens, loss, color="0.8", linewidth=1, zorder=1)
    for length in lengths:
        own = np.array([record["bucket_len"] == length for record in records])
        color = _color(length, lengths)
        axes.scatter(
            tokens[own], loss[own], s=14, color=color, label=length_label(length), zorder=2
        )
    axes.set(xlabel="tokens (millions)", ylabel="loss (nats per token)", title="Training loss")
    axes.legend(title="sequence length", ncols=2, frameon=False)
    axes.grid(alpha=0.3)


def _draw_throughput(figure: Any, records: Records) -> None:
    stats, lengths = by_length(records), _lengths(records)
    speed, waiting = figure.subplots(2, 1, sharex=True, height_ratios=[2, 1])
    names = [
        f"{length_label(own.bucket_len)}\ncp {own.cp_degree}\n{_efficiency(own)}" for own in stats
    ]
    colors = [_color(own.bucket_len, lengths) for own in stats]
    speeds = [own.tokens_per_s for own in stats]
    spread = _spread(stats, records)
    speed.bar(names, speeds, color=colors, yerr=spread, ecolor="0.4", capsize=3)
    speed.set(
        ylabel="tokens/s, all ranks",
        title="Throughput by length (median and middle 80 % of steps)",
    )
    speed.yaxis.set_major_formatter("{x:,.0f}")
    waiting.bar(names, [100 * own.exposed_share for own in stats], color=colors)
    waiting.set(
        xlabel="sequence length, context-parallel degree, "
        + ("MFU" if _knows_mfu(stats) else "model FLOP/s of a rank"),
        ylabel="exposed\nexchange (%)",
        ylim=(0, None),
    )
    for axes in (speed, waiting):
        axes.set_axisbelow(True)
        axes.grid(axis="y", alpha=0.3)


def _spread(stats: list[LengthStats], records: Records) -> list[list[float]]:
    """How far the 10th and the 90th percentile of tokens/s lie from each median."""
    below, above = [], []
    for own in stats:
        speeds = [
            record["tokens_per_s"]
            for record in records
            if (record["bucket_len"], record["cp_degree"]) == (own.bucket_len, own.cp_degree)
        ]
        low, high = np.percentile(speeds, [10, 90])
        below.append(own.tokens_per_s - float(low))
        above.append(float(high) - own.tokens_per_s)
    return [below, above]


def _knows_mfu(stats: list[LengthStats]) -> bool:
    return any(own.mfu is not None for own in stats)


def _efficiency(stats: LengthStats) -> str:
    """Last line below a bar."""
    if stats.mfu is not None:
        return f"{stats.mfu:.0%}"
    if stats.flops_per_s is None:
        return ""
    power = max(0, int(math.log10(max(stats.flops_per_s, 1)) // 3))
    return f"{stats.flops_per_s / 1000**power:.3g} {' kMGTPE'[power]}"


def _draw_lengths(figure: Any, records: Records) -> None:
    axes, lengths = figure.subplots(), _lengths(records)
    for length in lengths:
        own = [record for record in records if record["bucket_len"] == length]
        axes.scatter(
            [record["step"] for record in own],
            [length] * len(own),
            s=[20 + 20 * record["cp_degree"] for record in own],
            color=_color(length, lengths),
        )
    axes.set_yscale("log", base=2)
    axes.set_yticks(lengths, [length_label(length) for length in lengths])
    axes.set(
        xlabel="step",
        ylabel="sequence length",
        title="Lengths over time (larger dot: more ranks share a sequence)",
    )
    axes.grid(alpha=0.3)
