"""Weights of sources: `name`, or `name@LEN` for pieces of exactly LEN tokens."""

import math
from collections.abc import Mapping

from ringctx.config.checks import Rule, is_power_of_two
from ringctx.config.sizes import parse_size
from ringctx.errors import ConfigError

__all__ = ["mix_rules", "normal_mix", "split_mix_key"]


def split_mix_key(key: str) -> tuple[str, int | None]:
    """The source and the piece length that a key of a mix names.

    Args:
        key: `name` or `name@LEN`, where LEN may have a unit: `repos@64k`.

    Returns:
        The name, and LEN in tokens; None where the key names no length.

    Raises:
        ConfigError: if what stands behind the last `@` is not a size.
    """
    name, at, length = key.rpartition("@")
    return (name, parse_size(length)) if at else (key, None)


def normal_mix(mix: Mapping[str, float] | None, *, setting: str) -> dict[str, float] | None:
    """A mix with lengths in tokens, so that `repos@64k` and `repos@65536` are equal.

    Raises:
        ConfigError: if two keys mean the same, or a length is not a size.
    """
    if mix is None:
        return None
    normal: dict[str, float] = {}
    for key, weight in mix.items():
        try:
            name, length = split_mix_key(key)
        except ConfigError as error:
            raise ConfigError(
                f"{setting}: the length behind the '@' of '{key}': {error}"
            ) from error
        key = name if length is None else f"{name}@{length}"
        if key in normal:
            raise ConfigError(f"{setting} has '{key}' twice; give it one weight")
        normal[key] = float(weight)
    return normal


def mix_rules(
    mix: Mapping[str, float] | None, *, setting: str, row_lens: Mapping[str, int] | None
) -> list[Rule]:
    """What a mix must hold to.

    Args:
        mix: normal (`normal_mix`).
        setting: where it stands, for messages.
        row_lens: lengths that a piece must divide, by the settings that give them; None where
            no lengths may be named.
    """
    if mix is None:
        return []
    rules = [(bool(mix), f"{setting}={{}} is empty: give weights of sources, or null")]
    for key, weight in mix.items():
        name, length = split_mix_key(key)
        rules += [
            (bool(name), f"{setting} has a key '{key}' without the name of a source"),
            (
                math.isfinite(weight) and weight > 0,
                f"{setting}.{key}={weight:g} must be a number above 0; leave the source out to "
                "take nothing from it",
            ),
        ]
        if length is not None:
            rules += _length_rules(f"{setting}.{key}", length, row_lens)
    return rules


def _length_rules(key: str, length: int, row_lens: Mapping[str, int] | None) -> list[Rule]:
    """What the length of a key `name@LEN` must hold to."""
    if row_lens is None:
        return [
            (
                False,
                f"{key} takes pieces of one length, which only curriculum.kind=stages does; give "
                "the weight to the source alone",
            )
        ]
    if length < 2 or not is_power_of_two(length):
        return [(False, f"{key}: the length {length:,} must be a power of two and at least 2")]
    return [
        (
            row_len % length == 0,
            f"{key}: pieces of {length:,} do not fill rows of {setting}={row_len:,}; take a power "
            "of two up to that",
        )
        for setting, row_len in row_lens.items()
    ]
