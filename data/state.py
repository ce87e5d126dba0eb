"""Where a plan stands: a few counters, small enough to print, and exact.

The state names the dataset and the curriculum it belongs to, counts the pieces taken from each
bucket, and keeps the origin of the present schedule, from which every draw can be made again.
What is at its default, and an origin that is the start, are not written.
Under 1 KB whatever the size of the data, also with several stages of a dozen sources; the same on
every rank.
"""

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from operator import index
from typing import Any

from ringctx.config import CurriculumConfig
from ringctx.config_file import config_to_dict
from ringctx.data.curriculum import Origin
from ringctx.errors import ConfigError

__all__ = ["PlanState"]

STATE_VERSION = 1


@dataclass(frozen=True, kw_only=True)
class PlanState:
    """A plan before one of its steps."""

    dataset: str
    """Fingerprint of the dataset."""
    curriculum: CurriculumConfig
    seed: int
    step: int
    consumed: tuple[int, ...]
    """Pieces taken from each bucket, shortest bucket first."""
    folded: tuple[int, ...]
    """Buckets, by number, found too rare for steps of their own when the run began."""
    origin: Origin

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers, lists and strings, for JSON."""
        plain = {"version": STATE_VERSION, **_given(self)}
        if self.origin == _start(len(self.consumed)):
            del plain["origin"]
        return plain

    @classmethod
    def from_dict(cls, plain: Mapping[str, Any]) -> "PlanState":
        """Read what `to_dict` gave.

        Raises:
            ConfigError: if it is of another version or damaged.
        """
        if plain.get("version") != STATE_VERSION:
            raise ConfigError(
                f"the plan state has version {plain.get('version')!r}, this ringctx reads "
                f"{STATE_VERSION}; go on with the version that wrote it, or start a new run"
            )
        try:
            consumed = tuple(map(index, plain["consumed"]))
            return cls(
                dataset=plain["dataset"],
                curriculum=CurriculumConfig(**plain["curriculum"]),
                seed=plain["seed"],
                step=index(plain["step"]),
                consumed=consumed,
                folded=tuple(map(index, plain["folded"])),
                origin=_origin(plain["origin"]) if "origin" in plain else _start(len(consumed)),
            )
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ConfigError(f"the plan state is damaged: {error!r}; use another one") from error

    def check_belongs(self, *, dataset: str, curriculum: CurriculumConfig, seed: int) -> None:
        """Refuse to go on with other data or another order; tokens_per_step may differ.

        Raises:
            ConfigError: naming every field that differs.
        """
        before, now = (
            {"dataset": data, "seed": number, "curriculum": config_to_dict(section)}
            for data, number, section in (
                (self.dataset, self.seed, self.curriculum),
                (dataset, seed, curriculum),
            )
        )
        changed = [
            f"{name} is {new!r}, but was {old!r}"
            for name, old, new in _changes(before, now)
            if name != "curriculum.tokens_per_step"
        ]
        if changed:
            raise ConfigError(
                "the plan state belongs to another plan: " + "; ".join(changed) + ". Set it "
                "back, or start a new run (of these only tokens_per_step may change)"
            )


def _start(buckets: int) -> Origin:
    return Origin(0, 0, (0,) * buckets)


def _origin(plain: Mapping[str, Any]) -> Origin:
    return Origin(index(plain["step"]), index(plain["cycle"]), tuple(map(index, plain["consumed"])))


def _given(value: Any) -> Any:
    """A value as JSON has it; of a dataclass, what differs from its defaults."""
    if dataclasses.is_dataclass(value):
        given = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
        defaults = {field.name: field.default for field in dataclasses.fields(value)}
        return {key: _given(inner) for key, inner in given.items() if inner != defaults[key]}
    return [_given(inner) for inner in value] if isinstance(value, tuple) else value


def _changes(old: Any, new: Any, name: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Where two plain values differ: the innermost name, what was there and what is there now."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key in dict.fromkeys([*old, *new]):
            yield from _changes(old.get(key), new.get(key), f"{name}.{key}" if name else key)
    elif isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        for at, (before, now) in enumerate(zip(old, new, strict=True)):
            yield from _changes(before, now, f"{name}[{at}]")
    elif old != new:
        yield name, old, new
