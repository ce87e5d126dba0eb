"""The section `data`: where the tokens are."""

from dataclasses import dataclass

from ringctx.config.checks import require

__all__ = ["DataConfig"]


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Where the tokens are."""

    path: str = ""
    """A dataset folder written by `ringctx data build` or `import`."""
    sources: dict[str, str] | None = None
    """Several such folders as one dataset, by name: the names are its sources. In place of path."""
    allow_changed: bool = False
    """Go on with a warning where a file is not what its hash says; never on resume."""

    def __post_init__(self) -> None:
        """Check that one of path and sources was given."""
        require(
            [
                (
                    bool(self.path) or bool(self.sources),
                    "data.path is not set: name a folder made by 'ringctx data build', or several "
                    "in data.sources",
                ),
                (
                    not (self.path and self.sources),
                    f"data.path={self.path} and data.sources are both set: give one of the two",
                ),
            ]
        )
