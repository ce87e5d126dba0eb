"""Sizes in tokens, as people write them: `4096`, `128k`, `0.5M` (powers of 1024)."""

import re

from ringctx.errors import ConfigError

__all__ = ["near_multiples", "parse_size"]

_UNITS = {"": 1, "k": 2**10, "m": 2**20, "g": 2**30}
_SIZE = re.compile(r"(\d+(?:\.\d+)?)([kmg]?)", re.IGNORECASE)


def parse_size(text: str) -> int:
    """Read a size in tokens: `4096`, `128k`, `0.5M`, `2g` (k, M, G are powers of 1024).

    Raises:
        ConfigError: if the text is not a whole number of tokens.
    """
    match = _SIZE.fullmatch(text.strip().replace("_", "").replace(",", ""))
    size = float(match[1]) * _UNITS[match[2].lower()] if match else 0.5
    if size != int(size):
        raise ConfigError(f"'{text}' is not a size; write for example 4096, 128k or 0.5M")
    return int(size)


def near_multiples(size: int, *, of: int) -> str:
    """The positive multiples below and above a size, as `8,192 or 16,384`."""
    low = max(size, 0) // of * of
    return " or ".join(f"{n:,}" for n in (low, low + of) if n > 0)
