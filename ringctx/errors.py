"""The errors that a user can cause; each message names setting, value, rule and a way out."""

__all__ = [
    "CheckpointError",
    "ConfigError",
    "DatasetError",
    "LayoutError",
    "RingctxError",
    "TrainingError",
]


class RingctxError(Exception):
    """Any error of this library that a user can mend."""

    on_all_ranks = False
    """Whether every rank raises it at the same point, so that one of them may speak for all."""


class ConfigError(RingctxError, ValueError):
    """A setting, or a combination of settings, that cannot work."""


class LayoutError(RingctxError, ValueError):
    """Shapes, lengths or rank counts that do not fit the requested layout."""


class DatasetError(RingctxError, ValueError):
    """A dataset or an input document on disk that is missing, damaged or of another kind."""


class CheckpointError(RingctxError, RuntimeError):
    """A checkpoint that is missing, damaged, or belongs to another run."""


class TrainingError(RingctxError, RuntimeError):
    """A run that cannot go on, for example because its gradient is not finite."""
