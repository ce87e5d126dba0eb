"""How likely each bucket is drawn: the paper's odds, or own numbers.

Odds are ratios, so the largest is made 1. They become rates of clocks (`ringctx.data.curriculum`)
whose times are compared as floating-point numbers: 100 to the 30th between two of them is far from
the end of that range, and the order of times is right at any ratio that the configuration takes.
Source: Pouransari et al. 2024 (arXiv 2405.13226), section 3.3; token_weighted: its released code.
"""

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from ringctx.config import CurriculumConfig

__all__ = ["bucket_odds"]

# By the place of a length among n: 0 is the longest.
_NAMED: dict[str, Callable[[int, int], float]] = {
    "uniform": lambda i, n: 1.0,
    "grow_linear": lambda i, n: i + 1.0,
    "grow_p2": lambda i, n: 2.0**i,
    "grow_p100": lambda i, n: 100.0**i,
    "shrink_p100": lambda i, n: 100.0 ** (n - 1 - i),
}


def bucket_odds(
    curriculum: CurriculumConfig, *, lengths: Sequence[int], pieces: Sequence[int]
) -> NDArray[np.float64]:
    """Odds of the buckets, the largest 1.

    A bucket has the odds of its place among all lengths from min_len to max_len, so that a length
    without pieces does not shift the odds of the others.

    Args:
        curriculum: odds, odds_mode, min_len and max_len.
        lengths: length of each bucket.
        pieces: what the whole plan may take from each bucket.
    """
    n = (curriculum.max_len // curriculum.min_len).bit_length()
    given = curriculum.odds
    every = [_NAMED[given](n - 1 - at, n) for at in range(n)] if isinstance(given, str) else given
    places = [(length // curriculum.min_len).bit_length() - 1 for length in lengths]
    odds: NDArray[np.float64] = np.array([every[place] for place in places]) / max(every)
    if curriculum.odds_mode == "token_weighted":
        # A bucket that gets its steps by folding alone counts as one piece.
        odds *= [max(count, 1) * length for count, length in zip(pieces, lengths, strict=True)]
    odds /= odds.max()
    return odds
