"""Draws what `lightning.py` measured: CPU seconds by tokens, and the same for each token.

    python benchmarks/lightning.py > lightning.json
    python benchmarks/lightning_picture.py lightning.json docs/pictures/lightning_time.png

CPU seconds, which other programs on the machine hardly change. Needs matplotlib (ringctx[plot]).
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

__all__ = ["draw", "main", "save"]

# Okabe and Ito: told apart by colour-blind readers; markers tell them apart without colour.
_TIME_LINES = {
    "sdpa": ("softmax: flash attention of torch", "#E69F00", "s"),
    "fla": ("naive chunked reference of fla", "#CC79A7", "^"),
    "ours_decay_by_token": ("lightning_attention, decay by token", "#56B4E9", "D"),
    "ours": ("lightning_attention", "#0072B2", "o"),
    "products_states_again": ("its matrix products alone", "0.4", "x"),
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Write the picture."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("measured", type=Path, help="what lightning.py printed")
    parser.add_argument("picture", type=Path, help="PNG to write")
    args = parser.parse_args(arguments)
    save(json.loads(args.measured.read_text()), args.picture)


def save(result: dict[str, Any], path: Path) -> None:
    """Write a PNG, the same bytes every time.

    Args:
        result: from `lightning.py`.
        path: of the PNG.
    """
    figure = draw(result)
    FigureCanvasAgg(figure)
    figure.savefig(path, dpi=110, metadata={"Software": None})


def draw(result: dict[str, Any]) -> Figure:
    """CPU seconds by tokens, and the same for each token.

    Args:
        result: from `lightning.py`.
    """
    figure = Figure(figsize=(11, 4.6), layout="constrained")
    whole, each = figure.subplots(1, 2)
    lengths = [int(tokens) for tokens in result["lengths"]]
    for name, (label, color, marker) in _TIME_LINES.items():
        seconds = {
            int(tokens): row["cpu_s"][name]["median"]
            for tokens, row in result["lengths"].items()
            if name in row["cpu_s"]
        }
        if seconds:
            style = {"color": color, "marker": marker, "markersize": 5, "label": label}
            whole.plot(list(seconds), list(seconds.values()), **style)
            each.plot(list(seconds), [1e6 * s / n for n, s in seconds.items()], **style)
    # Through ours at the shortest length, a little below all that is measured.
    first = result["lengths"][str(lengths[0])]["cpu_s"]
    start_s = 0.6 * min(row["median"] for row in first.values())
    guide = [start_s * n / lengths[0] for n in lengths]
    whole.plot(lengths, guide, color="0.6", linestyle=":", label="time grows as tokens do")
    whole.set(ylabel="CPU seconds, forward + backward", yscale="log")
    each.set(ylabel="CPU microseconds a token", yscale="log")
    for axes in (whole, each):
        _by_tokens(axes, lengths)
        axes.grid(alpha=0.3)
    heads = "{heads} heads of {head_dim}, fp32, {threads} threads".format(**result["config"])
    figure.suptitle(f"One attention call, {heads}", fontsize=11)
    handles, labels = whole.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, fontsize=9, frameon=False)
    return figure


def _by_tokens(axes: Any, lengths: list[int]) -> None:
    axes.set_xscale("log", base=2)
    names = [f"{n // 1024}k" if n % 1024 == 0 else str(n) for n in lengths]
    axes.set_xticks(lengths, names)
    axes.tick_params(axis="x", which="minor", bottom=False)
    axes.set_xlabel("tokens")


if __name__ == "__main__":
    main()
