"""What the pictures of `ringctx plot` and `ringctx data stats` share; matplotlib is an extra."""

from pathlib import Path
from typing import Any

from ringctx.errors import ConfigError

__all__ = ["length_label", "new_figure", "save_figure"]


def new_figure(*, width: float = 8, height: float = 4.5) -> Any:
    """An empty figure, without a window.

    Args:
        width: in inches.
        height: in inches.

    Raises:
        ConfigError: if matplotlib is not installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ConfigError("plots need matplotlib: pip install 'ringctx[plot]'") from error
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def save_figure(figure: Any, path: Path) -> None:
    """Write a PNG.

    Raises:
        ConfigError: if the name is not that of a PNG, or its folder does not exist.
    """
    if path.suffix != ".png" or not path.parent.is_dir():
        raise ConfigError(f"{path} must be the name of a .png file in a folder that exists")
    figure.savefig(path, dpi=120)


def length_label(length: int) -> str:
    """A power of two as 256 or 16k."""
    if length >= 2**20:
        return f"{length // 2**20}M"
    return f"{length // 1024}k" if length >= 1024 else str(length)
