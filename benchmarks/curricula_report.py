"""The curriculum experiment in numbers and as a picture."""

import json
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

__all__ = ["draw", "summarise", "table"]

_COLORS = {
    "concat": "0.35",
    "concat_masks": "0.6",
    "best_fit_masks": "tab:olive",
    "uniform": "tab:cyan",
    "grow_p2_x1": "tab:blue",
    "grow_p2_x8": "tab:red",
}


def summarise(out: Path, names: list[str]) -> dict[str, Any]:
    """What each variant came to.

    Args:
        out: folder of the experiment.
        names: of the variants; those without measurements are left out.
    """
    measured = {}
    for name in names:
        lines = _lines(out, name)
        steps = [line for line in lines if "train_loss" in line]
        evals = [line for line in lines if "loss" in line]
        if not evals or not steps:
            continue
        near = [line for line in evals if line["limit"] == evals[0]["limit"]]
        measured[name] = {
            "tokens": steps[-1]["tokens"],
            "cpu_seconds": round(steps[-1]["cpu_seconds"], 3),
            "finished": bool(evals[-1].get("final")),
            "heldout_loss": near[-1]["loss"],
            "evaluations": [[e["tokens"], round(e["cpu_seconds"], 3), e["loss"]] for e in near],
            "by_position": evals[-1]["by_position"],
            "edges": evals[-1].get("edges"),
            "steps_by_length": dict(sorted(Counter(s["bucket_len"] for s in steps).items())),
        }
    return measured


def table(measured: dict[str, Any]) -> list[str]:
    """A Markdown table: one row a variant."""
    base = measured.get("concat")
    lines = [
        "| variant | held-out loss | CPU seconds | of concat's | seconds to concat's loss |",
        "|---|---|---|---|---|",
    ]
    for name, row in measured.items():
        share = reached = "-"
        if base is not None:
            share = f"{row['cpu_seconds'] / base['cpu_seconds']:.2f}"
            seconds = _seconds_to(row["evaluations"], base["evaluations"][-1][2])
            if seconds is not None:
                reached = f"{seconds / base['cpu_seconds']:.2f} of concat's"
        lines.append(
            f"| {name} | {row['heldout_loss']:.3f} | {row['cpu_seconds']:,.0f} | {share} | "
            f"{reached} |"
        )
    return lines


def draw(out: Path, measured: dict[str, Any], path: Path) -> None:
    """Loss by tokens, by seconds, and by position in the document.

    Args:
        out: folder of the experiment.
        measured: from `summarise`.
        path: of the PNG.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    by_tokens, by_seconds, by_position = figure.subplots(1, 3)
    for name, row in measured.items():
        style = {"color": _COLORS[name], "label": name.replace("_", " ")}
        tokens, seconds, losses = zip(*row["evaluations"], strict=True)
        by_tokens.plot(np.array(tokens) / 1e6, losses, marker=".", **style)
        by_seconds.plot(seconds, losses, marker=".", **style)
        if row["edges"]:
            middles = np.sqrt(np.maximum(row["edges"][:-1], 32) * np.array(row["edges"][1:]))
            by_position.plot(middles, row["by_position"], marker=".", **style)
    # The first steep fall of all variants is the same, and would hide the rest.
    top = max(row["evaluations"][:3][-1][2] for row in measured.values())
    low = min(row["evaluations"][-1][2] for row in measured.values())
    for axes, label in ((by_tokens, "tokens (millions)"), (by_seconds, "CPU seconds of training")):
        axes.set(xlabel=label, ylabel="held-out loss (nats)", ylim=(low - 0.1, top))
        axes.grid(alpha=0.3)
    by_position.set_xscale("log", base=2)
    ticks = [2**k for k in range(6, 14, 2)]
    by_position.set_xticks(ticks, [str(tick) for tick in ticks])
    by_position.set(xlabel="position in the document", ylabel="held-out loss at the end (nats)")
    by_position.grid(alpha=0.3)
    by_tokens.legend(frameon=False)
    figure.savefig(path, dpi=110)


def _lines(out: Path, name: str) -> list[dict[str, Any]]:
    path = out / f"{name}.jsonl"
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text().splitlines()]


def _seconds_to(evaluations: list[list[float]], loss: float) -> float | None:
    """CPU seconds until the loss is first reached, between evaluations on a straight line."""
    for (_, began, before), (_, ended, after) in pairwise(evaluations):
        if after <= loss:
            part = (before - loss) / max(before - after, 1e-9)
            return began + part * (ended - began)
    return None
