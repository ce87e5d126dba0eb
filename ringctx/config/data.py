"""The section `data`: where the tokens are."""

from dataclasses import dataclass

from ringctx.config.checks import require

__all__ = ["DataConfig"]


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Where the tokens are: one dataset, or several joined."""

    path: str = ""
    """A dataset folder written by `ringctx data build` or `ringctx data import`; either this or
    sources is required."""
    sources: dict[str, str] | None = None
    """Instead of path: dataset folders by name, joined; `curriculum.mix` weighs the names."""
    allow_changed: bool = False
    """Train on a dataset whose files changed since it was built; never on resume."""

    def __post_init__(self) -> None:
        """Check that there is exactly one of path and sources, and that all are named."""
        named = self.sources or {}
        require(
            [
                (
                    bool(self.path) or self.sources is not None,
                    "data.path is not set: name a folder made by 'ringctx data build', or several "
                    "in data.sources",
                ),
                (
                    not self.path or self.sources is None,
                    f"data.path={self.path} and data.sources={list(named)} are both set: take "
                    "path for one dataset, or sources for several with data.path=''",
                ),
                (
                    self.sources is None or bool(named),
                    "data.sources={} is empty: give a name and a folder for each dataset",
                ),
                *(
                    (bool(path), f"data.sources.{name} is empty: name a folder")
                    for name, path in named.items()
                ),
                *(
                    (
                        bool(name) and "@" not in name,
                        f"data.sources names a source '{name}': a name is not empty and has no "
                        "'@', which stands before a length in curriculum.mix",
                    )
                    for name in named
                ),
            ]
        )
