"""Random order as a pure function of names: the same on every rank, platform and numpy version.

Built on raw Philox output, which numpy promises never to change (the methods of
`np.random.Generator` may), and, where every item needs draws of its own, on a hash of whole
numbers (the finalizer of SplitMix64).
Price: sorting n keys, about 0.1 s a million; hashing, about 0.02 s a million and name.
"""

from typing import Literal

import numpy as np
from numpy.typing import NDArray

__all__ = ["Unit", "exponential_times", "hash_numbers", "permutation"]

_CLOCK = 2

Unit = Literal["piece", "stream", "row"]
"""What is put in order: a bucket's pieces, the pieces of a stream of tokens, or packed rows."""

_UNITS: dict[Unit, int] = {"piece": 1, "stream": 3, "row": 4}


def permutation(
    n: int, *, seed: int, bucket_len: int, epoch: int, source: int = 0, unit: Unit = "piece"
) -> NDArray[np.uint32]:
    """The order in which one epoch takes n things.

    Args:
        n: how many, below 2^32.
        seed: of the run.
        bucket_len: tokens of a piece or row; 0 for a stream, which has no rows of its own.
        epoch: from 0 on.
        source: number of the source whose documents these are; each has its own order.
        unit: what the things are.
    """
    assert n < 2**32, n
    key = (seed, _UNITS[unit], bucket_len, epoch)
    keys = _bits(n, *key, source) if source else _bits(n, *key)
    return np.argsort(keys, kind="stable").astype(np.uint32)


def exponential_times(n: int, *, rate: float, key: tuple[int, ...]) -> NDArray[np.float64]:
    """The first n event times of a clock that ticks at random, `rate` times a unit of time."""
    uniform = (_bits(n, *key, _CLOCK) >> np.uint64(11)) * 2.0**-53
    return np.cumsum(-np.log1p(-uniform) / rate)


def hash_numbers(seed: int, *numbers: NDArray[np.int64]) -> NDArray[np.uint64]:
    """64 random bits for every tuple of numbers.

    Args:
        seed: of the run.
        numbers: `[n]` each; entry i of all of them names what the bits at i belong to.
    """
    state = _scramble(np.array([seed % 2**64], np.uint64))
    for number in numbers:
        state = _scramble(state + number.astype(np.uint64))
    return state


def _bits(n: int, *key: int) -> NDArray[np.uint64]:
    return np.random.Philox(np.random.SeedSequence(key)).random_raw(n)


def _scramble(state: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """One step of SplitMix64: every bit of the result hangs on every bit of the state."""
    state = state + np.uint64(0x9E3779B97F4A7C15)
    state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return state ^ (state >> np.uint64(31))
