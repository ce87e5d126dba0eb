"""Where a plan stands: a few counters, small enough to print, and exact.

The state names the dataset and the curriculum it belongs to, counts the pieces taken from each
bucket, and keeps the origin of the present schedule, from which every draw can be made again.
Under 1 KB whatever the size of the data; the same on every rank.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from operator import index
from typing import Any

from ringctx.config import CurriculumConfig, StageConfig
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
        plain = dataclasses.asdict(self)
        plain["curriculum"] = _changed(self.curriculum)
        plain["consumed"], plain["folded"] = list(self.consumed), list(self.folded)
        plain["origin"]["consumed"] = list(self.origin.consumed)
        return {"version": STATE_VERSION, **plain}

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
            origin = plain["origin"]
            return cls(
                dataset=plain["dataset"],
                curriculum=_read_curriculum(plain["curriculum"]),
                seed=plain["seed"],
                step=index(plain["step"]),
                consumed=tuple(map(index, plain["consumed"])),
                folded=tuple(map(index, plain["folded"])),
                origin=Origin(
                    index(origin["step"]),
                    index(origin["cycle"]),
                    tuple(map(index, origin["consumed"])),
                ),
            )
        except (KeyError, TypeError) as error:
            raise ConfigError(f"the plan state is damaged: {error!r}; use another one") from error

    def check_belongs(self, *, dataset: str, curriculum: CurriculumConfig, seed: int) -> None:
        """Refuse to go on with other data or another order; tokens_per_step may differ.

        Raises:
            ConfigError: naming every field that differs.
        """
        before = {"dataset": self.dataset, "seed": self.seed} | _fields(self.curriculum)
        now = {"dataset": dataset, "seed": seed} | _fields(curriculum)
        changed = [
            f"{name} is {now.get(name)!r}, but was {before.get(name)!r}"
            for name in before | now
            if now.get(name) != before.get(name)
        ]
        if changed:
            raise ConfigError(
                "the plan state belongs to another plan: " + "; ".join(changed) + ". Set it "
                "back, or start a new run (only tokens_per_step may change on the way)"
            )


def _changed(section: CurriculumConfig | StageConfig) -> dict[str, Any]:
    """The fields that are not at their default; all others may be left out."""
    changed = {
        field.name: getattr(section, field.name)
        for field in dataclasses.fields(section)
        if getattr(section, field.name) != field.default
    }
    if isinstance(section, CurriculumConfig) and section.stages:
        changed["stages"] = [_changed(stage) for stage in section.stages]
    return {
        name: list(value) if isinstance(value, tuple) else value for name, value in changed.items()
    }


def _read_curriculum(plain: Mapping[str, Any]) -> CurriculumConfig:
    stages = tuple(StageConfig(**stage) for stage in plain.get("stages", ()))
    return CurriculumConfig(**{**plain, "stages": stages})


def _fields(curriculum: CurriculumConfig) -> dict[str, Any]:
    fields = {
        f"curriculum.{f.name}": getattr(curriculum, f.name) for f in dataclasses.fields(curriculum)
    }
    del fields["curriculum.tokens_per_step"], fields["curriculum.stages"]
    for number, stage in enumerate(curriculum.stages):
        fields[f"curriculum.stages[{number}]"] = _changed(stage)
    return fields
