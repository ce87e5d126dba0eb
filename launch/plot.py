"""Pictures of a run from its metrics: loss, throughput by length, lengths over time."""

from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np

from ringctx.errors import ConfigError
from ringctx.tracking import read_metrics

__all__ = ["plot_run"]

Records = list[dict[str, Any]]


def plot_run(run_dir: Path) -> list[Path]:
    """Draw into RUN_DIR/report.

    Args:
        run_dir: a run folder with metrics.jsonl.

    Returns:
        The PNG files.

    Raises:
        ConfigError: if there is nothing to draw, or matplotlib is not installed.
    """
    if not (run_dir / "metrics.jsonl").exists():
        raise ConfigError(f"{run_dir} has no metrics.jsonl; name the train.run_dir of a run")
    records = read_metrics(run_dir)
    if not records:
        raise ConfigError(f"{run_dir}/metrics.jsonl has no complete line yet; no step was finished")
    figure_class, canvas_class = _matplotlib()
    report = run_dir / "report"
    report.mkdir(exist_ok=True)
    paths = []
    for name, draw in (
        ("loss", _draw_loss),
        ("throughput", _draw_throughput),
        ("lengths", _draw_lengths),
    ):
        figure = figure_class(figsize=(8, 4.5), layout="constrained")
        canvas_class(figure)
        draw(figure.subplots(), records)
        paths.append(report / f"{name}.png")
        figure.savefig(paths[-1], dpi=120)
    return paths


def _matplotlib() -> tuple[Any, Any]:
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ConfigError("plots need matplotlib: pip install 'ringctx[plot]'") from error
    return Figure, FigureCanvasAgg


def _color(length: int, lengths: list[int]) -> Any:
    from matplotlib import colormaps

    place = lengths.index(length) / max(1, len(lengths) - 1)
    return colormaps["viridis"](0.9 * place)


def _lengths(records: Records) -> list[int]:
    return sorted({record["bucket_len"] for record in records})


def _label(length: int) -> str:
    return f"{length // 1024}k" if length >= 1024 else str(length)


def _draw_loss(axes: Any, records: Records) -> None:
    lengths = _lengths(records)
    tokens = np.array([record["tokens"] for record in records]) / 1e6
    loss = np.array([record["loss"] for record in records])
    axes.plot(tokens, loss, color="0.8", linewidth=1, zorder=1)
    for length in lengths:
        own = np.array([record["bucket_len"] == length for record in records])
        color = _color(length, lengths)
        axes.scatter(tokens[own], loss[own], s=14, color=color, label=_label(length), zorder=2)
    axes.set(xlabel="tokens (millions)", ylabel="loss (nats per token)", title="Training loss")
    axes.legend(title="sequence length", ncols=2, frameon=False)
    axes.grid(alpha=0.3)


def _draw_throughput(axes: Any, records: Records) -> None:
    by_length: dict[int, list[float]] = defaultdict(list)
    degrees: dict[int, int] = {}
    for record in records:
        by_length[record["bucket_len"]].append(record["tokens_per_s"])
        degrees[record["bucket_len"]] = record["cp_degree"]
    lengths = sorted(by_length)
    medians = [float(np.median(by_length[length])) for length in lengths]
    spread = [
        [median - min(by_length[length]) for length, median in zip(lengths, medians, strict=True)],
        [max(by_length[length]) - median for length, median in zip(lengths, medians, strict=True)],
    ]
    names = [f"{_label(length)}\ncp {degrees[length]}" for length in lengths]
    colors = [_color(length, lengths) for length in lengths]
    axes.bar(names, medians, color=colors, yerr=spread, ecolor="0.4", capsize=3)
    axes.set(
        xlabel="sequence length and context-parallel degree",
        ylabel="tokens per second, all ranks",
        title="Throughput by length (median, range)",
    )
    axes.yaxis.set_major_formatter("{x:,.0f}")
    axes.grid(axis="y", alpha=0.3)


def _draw_lengths(axes: Any, records: Records) -> None:
    lengths = _lengths(records)
    for length in lengths:
        own = [record for record in records if record["bucket_len"] == length]
        axes.scatter(
            [record["step"] for record in own],
            [length] * len(own),
            s=[20 + 20 * record["cp_degree"] for record in own],
            color=_color(length, lengths),
        )
    axes.set_yscale("log", base=2)
    axes.set_yticks(lengths, [_label(length) for length in lengths])
    axes.set(
        xlabel="step",
        ylabel="sequence length",
        title="Lengths over time (larger dot: more ranks share a sequence)",
    )
    axes.grid(alpha=0.3)
