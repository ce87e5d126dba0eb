"""What the sections check themselves with."""

from collections.abc import Sequence

from ringctx.errors import ConfigError

__all__ = ["Rule", "is_power_of_two", "require"]

Rule = tuple[bool, str]
"""Whether it holds, and what to say if not."""


def is_power_of_two(n: int) -> bool:
    """Whether n is 1, 2, 4, ..."""
    return n > 0 and n & (n - 1) == 0


def require(rules: Sequence[Rule]) -> None:
    """Raise one ConfigError that lists the message of every rule that does not hold."""
    broken = [message for holds, message in rules if not holds]
    if broken:
        raise ConfigError("\n".join(broken))
