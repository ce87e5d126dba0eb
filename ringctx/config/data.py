"""The sections `data` and `curriculum`: which tokens, and in which order."""

from dataclasses import dataclass
from typing import Literal

from ringctx.config.checks import is_power_of_two, require

__all__ = ["CurriculumConfig", "DataConfig"]


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Where the tokens are."""

    path: str = ""
    """A dataset folder written by `ringctx data build`."""

    def __post_init__(self) -> None:
        """Check that a path was given."""
        require(
            [(bool(self.path), "data.path is not set: name a folder made by 'ringctx data build'")]
        )


@dataclass(frozen=True, kw_only=True)
class CurriculumConfig:
    """Which sequence lengths are trained when (Dataset Decomposition, arXiv 2405.13226)."""

    kind: Literal["decomposed"] = "decomposed"
    """decomposed: sequences of one power-of-two length a step, each from one document."""
    odds: Literal["uniform", "grow_p2"] = "grow_p2"
    """How likely a bucket is drawn: uniform: equal; grow_p2: twice as likely as the next longer."""
    cycles: int = 8
    """Passes of the training, each over an equal part of every bucket; grow_p2 grows in each."""
    min_len: int = 256
    """Shortest sequence, a power of two; shorter remainders of documents are dropped."""
    max_len: int = 8192
    """Longest sequence, a power of two; longer documents give several of these."""
    tokens_per_step: int = 524_288
    """Tokens of one optimizer step, whatever the sequence length."""
    total_tokens: int | None = None
    """Tokens of the whole plan; null: every sequence once."""

    def __post_init__(self) -> None:
        """Check that lengths are powers of two that fit one another."""
        powers = is_power_of_two(self.min_len) and is_power_of_two(self.max_len)
        low = self.tokens_per_step // max(self.max_len, 1) * self.max_len
        near = " or ".join(f"{n:,}" for n in (low, low + self.max_len) if n > 0)
        require(
            [
                (
                    powers and 2 <= self.min_len <= self.max_len,
                    f"curriculum.min_len={self.min_len:,} and curriculum.max_len="
                    f"{self.max_len:,} must be powers of two with 2 <= min_len <= max_len",
                ),
                (
                    1 <= self.cycles <= 10_000,
                    f"curriculum.cycles={self.cycles} must lie in 1 to 10,000; the paper uses 8",
                ),
                (
                    not powers or (self.tokens_per_step > 0 and low == self.tokens_per_step),
                    f"curriculum.tokens_per_step={self.tokens_per_step:,} is not a multiple of "
                    f"curriculum.max_len={self.max_len:,}; the nearest valid values are {near}",
                ),
                (
                    self.total_tokens is None or self.total_tokens >= self.tokens_per_step,
                    f"curriculum.total_tokens={self.total_tokens} is less than one step of "
                    f"curriculum.tokens_per_step={self.tokens_per_step:,}; null takes all tokens",
                ),
            ]
        )
