"""The picture of `ringctx data stats --plot`: documents and tokens by length."""

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ringctx.data.stats import DatasetStats
from ringctx.launch.pictures import length_label, new_figure, save_figure

__all__ = ["draw_stats"]


def draw_stats(stats: DatasetStats, lengths: NDArray[np.int64], path: Path) -> None:
    """Draw how long documents are, and which sequences they give.

    Args:
        stats: of the dataset.
        lengths: int64 `[documents]`.
        path: of the PNG.

    Raises:
        ConfigError: if matplotlib is not installed.
    """
    figure = new_figure(width=10, height=4)
    documents, sequences = figure.subplots(1, 2)
    _draw_documents(documents, lengths)
    _draw_sequences(sequences, stats)
    figure.suptitle(
        f"{stats.documents:,} documents, {stats.tokens:,} tokens, "
        f"{stats.kept_tokens / stats.tokens:.1%} of them in sequences"
    )
    save_figure(figure, path)


def _draw_documents(axes: Any, lengths: NDArray[np.int64]) -> None:
    exponents = np.floor(np.log2(lengths)).astype(int)
    first, last = int(exponents.min()), int(exponents.max())
    counts = np.bincount(exponents - first, minlength=last - first + 1)
    tokens = np.bincount(exponents - first, weights=lengths, minlength=last - first + 1)
    at = np.arange(first, last + 1)
    axes.bar(at - 0.2, counts / counts.sum(), width=0.4, label="documents", color="0.6")
    axes.bar(at + 0.2, tokens / tokens.sum(), width=0.4, label="tokens", color="tab:blue")
    shown = at[:: max(1, len(at) // 8)]
    axes.set_xticks(shown, [length_label(2**k) for k in shown.tolist()])
    axes.set(xlabel="length of the document, from", title="Documents")
    axes.margins(y=0.25)
    axes.legend(frameon=False, loc="upper left")
    _show_shares(axes, "share")


def _draw_sequences(axes: Any, stats: DatasetStats) -> None:
    names = [length_label(length) for length in stats.buckets]
    tokens = np.array([length * n for length, n in stats.buckets.items()])
    bars = axes.bar(names, tokens / max(stats.tokens, 1), color="tab:blue")
    axes.bar_label(bars, [f"{n:,}" for n in stats.buckets.values()], fontsize=7)
    axes.tick_params(axis="x", labelsize=8)
    axes.set(xlabel="length of the sequence", title="Sequences (their number above the bars)")
    _show_shares(axes, "share of all tokens")


def _show_shares(axes: Any, label: str) -> None:
    """Whole per cent on the vertical axis."""
    axes.set_ylabel(label)
    axes.locator_params(axis="y", steps=[1, 2, 5, 10])
    axes.yaxis.set_major_formatter(lambda share, _: f"{share:.0%}")
    axes.grid(axis="y", alpha=0.3)
