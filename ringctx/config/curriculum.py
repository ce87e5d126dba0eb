"""The section `curriculum`: which rows are trained at which step."""

import dataclasses
import difflib
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from ringctx.config.checks import is_power_of_two, require

__all__ = ["NAMED_ODDS", "CurriculumConfig", "StageConfig"]

NAMED_ODDS = ("uniform", "grow_linear", "grow_p2", "grow_p100", "shrink_p100")

Rule = tuple[bool, str]

# Fields that only some kinds have a use for.
_KINDS_OF = {
    **dict.fromkeys(
        ("odds", "odds_mode", "cycles", "min_len", "max_len", "long_docs", "short_tail"),
        ("decomposed",),
    ),
    **dict.fromkeys(("first_step", "max_dropped"), ("decomposed",)),
    **dict.fromkeys(("len", "packing"), ("packed", "window")),
    "doc_mask": ("packed", "window", "stages"),
    **dict.fromkeys(("window_start", "window_growth"), ("window",)),
    "stages": ("stages",),
}
_SOURCE_KEY = re.compile(r"([^@]+)(?:@(\d+)([kKmMgG]?))?")


@dataclass(frozen=True, kw_only=True)
class StageConfig:
    """One stage of a curriculum of kind `stages`."""

    len: int
    """Tokens of a row, a power of two."""
    share: float | None = None
    """Part of the plan's tokens, beside the other stages' shares."""
    tokens: int | None = None
    """Tokens of the stage, in place of a share."""
    tokens_per_step: int | None = None
    """Tokens of one step; null: the curriculum's."""
    mix: dict[str, float] | None = None
    """Weights of sources as in `curriculum.mix`; `name@LEN`: only whole pieces of LEN tokens, from
    documents that reach it, as many as fill a row. Null: the curriculum's."""
    rope_theta: float | None = None
    """Base of the rotary frequencies; null: the model's."""
    lr: float | None = None
    """Peak learning rate; warm-up and decay then run within the stage. Null: `optim.lr`."""


@dataclass(frozen=True, kw_only=True)
class CurriculumConfig:
    """Which rows are trained when; every kind keeps the tokens of a step constant."""

    kind: Literal["decomposed", "packed", "stages", "window"] = "decomposed"
    """decomposed: rows of one power-of-two length a step, each from one document (Dataset
    Decomposition, arXiv 2405.13226); packed: documents packed into rows of one length; stages: row
    lengths in a given order; window: as packed, with an attention window that grows."""
    tokens_per_step: int = 524_288
    """Tokens of one optimizer step, whatever the row length."""
    total_tokens: int | None = None
    """Tokens of the whole plan; null: every row once. Without a mix, more than there are repeat
    the data."""
    mix: dict[str, float] | None = None
    """Weights of the dataset's sources, the same inside every length and stage; null: documents as
    they are."""
    max_epochs: dict[str, float] | None = None
    """By source of a mix: how often it may be repeated before it counts as used up; default 1."""
    odds: Any = "grow_p2"
    """decomposed: how likely a length is drawn. uniform; grow_linear: n to 1; grow_p2: twice as
    likely as the next longer; grow_p100: a hundred times, shrink_p100: the reverse; or numbers, one
    for each length from min_len to max_len."""
    odds_mode: Literal["bucket", "token_weighted"] = "bucket"
    """decomposed: token_weighted multiplies the odds by the tokens of each length, as the paper's
    released code does."""
    cycles: int = 8
    """decomposed: passes of the training, each over an equal part of every length; grow_p2 grows
    in each."""
    min_len: int = 256
    """decomposed: shortest sequence, a power of two."""
    max_len: int = 8192
    """decomposed: longest sequence, a power of two; longer documents give several of these."""
    long_docs: Literal["greedy", "spread"] = "greedy"
    """decomposed: longer documents are cut into longest sequences (greedy), or at random so that
    every length gets equal tokens (spread, the paper's released code)."""
    short_tail: Literal["drop", "pack"] = "drop"
    """decomposed: remainders shorter than min_len are dropped, or packed into rows of min_len with
    document masks."""
    first_step: Literal["drawn", "longest"] = "drawn"
    """decomposed: longest begins with a step of the longest sequences: what does not fit fails at
    once."""
    max_dropped: float = 0.2
    """decomposed: a larger share of tokens in dropped remainders is an error."""
    len: int | None = None
    """packed, window: tokens of a row, a power of two."""
    packing: Literal["concat", "best_fit"] = "concat"
    """packed, window: concat: documents one after another, cut at the end of a row; best_fit: no
    document is cut that fits into a row (arXiv 2404.10830)."""
    doc_mask: bool = True
    """packed, window, stages: tokens see only their own document."""
    window_start: int = 32
    """window: tokens that a token sees in step 0, itself included (SkyLadder, arXiv 2503.15450)."""
    window_growth: float = 0.125
    """window: tokens that the window grows a step, up to the row."""
    stages: tuple[StageConfig, ...] = ()
    """stages: a list of sections (below), trained one after another."""

    def __post_init__(self) -> None:
        """Check the fields against one another; odds become a name or a tuple of floats."""
        if isinstance(self.odds, Sequence) and not isinstance(self.odds, str):
            object.__setattr__(self, "odds", tuple(self.odds))
        object.__setattr__(self, "stages", tuple(self.stages))
        require([*self._foreign(), *self._common(), *self._of_kind(), *self._mixes()])

    def mixes(self) -> list[tuple[str, Mapping[str, float]]]:
        """Every mix with the name of its setting."""
        named = [("curriculum.mix", self.mix)] + [
            (f"curriculum.stages[{n}].mix", stage.mix) for n, stage in enumerate(self.stages)
        ]
        return [(name, mix) for name, mix in named if mix is not None]

    def _foreign(self) -> Iterator[Rule]:
        """No field may be set that this kind has no use for."""
        for field in dataclasses.fields(self):
            kinds = _KINDS_OF.get(field.name)
            if kinds is not None and self.kind not in kinds:
                value = getattr(self, field.name)
                yield (
                    value == field.default,
                    f"curriculum.{field.name}={_shown(value)} has no use with curriculum.kind="
                    f"{self.kind}, only with {' or '.join(kinds)}: leave it out",
                )

    def _common(self) -> Iterator[Rule]:
        yield (
            self.total_tokens is None or self.total_tokens >= self.tokens_per_step,
            f"curriculum.total_tokens={self.total_tokens} is less than one step of "
            f"curriculum.tokens_per_step={self.tokens_per_step:,}; null takes all tokens",
        )

    def _of_kind(self) -> Iterator[Rule]:
        if self.kind == "decomposed":
            yield from self._decomposed()
        elif self.kind == "stages":
            yield from self._staged()
        else:
            yield from self._one_length()

    def _decomposed(self) -> Iterator[Rule]:
        powers = is_power_of_two(self.min_len) and is_power_of_two(self.max_len)
        ordered = powers and 2 <= self.min_len <= self.max_len
        yield (
            ordered,
            f"curriculum.min_len={self.min_len:,} and curriculum.max_len="
            f"{self.max_len:,} must be powers of two with 2 <= min_len <= max_len",
        )
        yield (
            1 <= self.cycles <= 10_000,
            f"curriculum.cycles={self.cycles} must lie in 1 to 10,000; the paper uses 8",
        )
        yield (
            0 <= self.max_dropped <= 1,
            f"curriculum.max_dropped={self.max_dropped} is a share: it must lie in 0 to 1",
        )
        if powers:
            yield _whole_rows(self.tokens_per_step, "", self.max_len, "curriculum.max_len")
        if ordered:
            yield from self._odds_rules()

    def _odds_rules(self) -> Iterator[Rule]:
        if isinstance(self.odds, str):
            near = difflib.get_close_matches(self.odds, NAMED_ODDS, n=1)
            hint = f"did you mean {near[0]}" if near else f"write {', '.join(NAMED_ODDS)}"
            yield (
                self.odds in NAMED_ODDS,
                f"curriculum.odds={self.odds} is not known: {hint}, or a list of numbers, one for "
                "each length from min_len to max_len",
            )
            return
        if not isinstance(self.odds, tuple):
            yield (
                False,
                f"curriculum.odds={self.odds} must be one of {', '.join(NAMED_ODDS)}, or a list of "
                "numbers",
            )
            return
        lengths = (self.max_len // self.min_len).bit_length()
        yield (
            len(self.odds) == lengths,
            f"curriculum.odds={_shown(self.odds)} has {len(self.odds)} numbers, but there are "
            f"{lengths} lengths from curriculum.min_len={self.min_len:,} to max_len="
            f"{self.max_len:,}",
        )
        yield (
            all(_is_number(odds) and math.isfinite(odds) and odds > 0 for odds in self.odds),
            f"curriculum.odds={_shown(self.odds)}: every number must be above 0 and finite; a "
            "length is left out by min_len and max_len",
        )

    def _one_length(self) -> Iterator[Rule]:
        if self.len is None:
            yield (
                False,
                f"curriculum.kind={self.kind} needs curriculum.len: the tokens of a row, for "
                "example 8k",
            )
            return
        yield (
            is_power_of_two(self.len) and self.len >= 2,
            f"curriculum.len={self.len:,} must be a power of two, at least 2",
        )
        yield _whole_rows(self.tokens_per_step, "", self.len, "curriculum.len")
        if self.kind == "window":
            yield (
                1 <= self.window_start <= self.len,
                f"curriculum.window_start={self.window_start:,} must lie between 1, a token that "
                f"sees itself, and curriculum.len={self.len:,}",
            )
            yield (
                math.isfinite(self.window_growth) and self.window_growth > 0,
                f"curriculum.window_growth={self.window_growth} must be above 0: tokens a step",
            )

    def _staged(self) -> Iterator[Rule]:
        yield bool(self.stages), "curriculum.kind=stages needs curriculum.stages, at least one"
        with_tokens = [stage.tokens is not None for stage in self.stages]
        yield (
            all(with_tokens) or not any(with_tokens),
            "curriculum.stages: either all stages have tokens, or all have a share",
        )
        yield (
            self.total_tokens is None or not any(with_tokens),
            f"curriculum.total_tokens={self.total_tokens} has no use where stages have tokens of "
            "their own: leave it out, or give shares",
        )
        for number, stage in enumerate(self.stages):
            yield from self._stage(f"curriculum.stages[{number}]", stage)

    def _stage(self, name: str, stage: StageConfig) -> Iterator[Rule]:
        """What one stage asks for."""
        power = is_power_of_two(stage.len) and stage.len >= 2
        yield power, f"{name}.len={stage.len:,} must be a power of two, at least 2"
        yield (
            (stage.share is None) != (stage.tokens is None),
            f"{name} has share={stage.share} and tokens={stage.tokens}: give one of the two",
        )
        own = stage.tokens_per_step
        if power:
            prefix = "" if own is None else f"{name}."
            yield _whole_rows(own or self.tokens_per_step, prefix, stage.len, f"{name}.len")
        above_zero = {"share": stage.share, "tokens": stage.tokens, "lr": stage.lr}
        for field, value in above_zero.items():
            yield (
                value is None or (math.isfinite(value) and value > 0),
                f"{name}.{field}={value} must be above 0",
            )
        yield (
            stage.rope_theta is None or stage.rope_theta > 1,
            f"{name}.rope_theta={stage.rope_theta} must be above 1; 10000 is the usual smallest "
            "value",
        )

    def _mixes(self) -> Iterator[Rule]:
        mixed: set[str] = set()
        for setting, mix in self.mixes():
            yield bool(mix), f"{setting} is empty: name sources with weights, or leave it out"
            for key, weight in mix.items():
                yield (
                    math.isfinite(weight) and weight > 0,
                    f"{setting}: the weight of {key} is {weight:g}; it must be above 0, and a "
                    "source is left out by not naming it",
                )
                match = _SOURCE_KEY.fullmatch(key)
                yield (
                    match is not None,
                    f"{setting}: {key!r} is not a name, or name@LEN as in a@64k",
                )
                if match is not None:
                    mixed.add(match[1])
                    yield from self._piece_rules(setting, key, match)
        for source, epochs in (self.max_epochs or {}).items():
            yield (
                source in mixed,
                f"curriculum.max_epochs names {source}, which is in no mix; in mixes: "
                f"{', '.join(sorted(mixed)) or 'none'}",
            )
            yield (
                epochs > 0,
                f"curriculum.max_epochs: {source} has {epochs:g}; it must be above 0",
            )

    def _piece_rules(self, setting: str, key: str, match: "re.Match[str]") -> Iterator[Rule]:
        """`name@LEN` needs stages, and pieces that fill their rows."""
        if match[2] is None:
            return
        units = {"": 1, "k": 2**10, "m": 2**20, "g": 2**30}
        length = int(match[2]) * units[match[3].lower()]
        yield (
            self.kind == "stages",
            f"{setting}: {key} asks for whole pieces, which only curriculum.kind=stages has",
        )
        rows = [
            stage.len
            for number, stage in enumerate(self.stages)
            if setting in (f"curriculum.stages[{number}].mix", "curriculum.mix")
            and (stage.mix is None or setting != "curriculum.mix")
        ]
        yield (
            is_power_of_two(length) and all(length <= row for row in rows),
            f"{setting}: the pieces of {key} must be a power of two of tokens and fit the stage's "
            f"rows of {min(rows, default=0):,}",
        )


def _whole_rows(tokens_per_step: int, prefix: str, row_len: int, setting: str) -> Rule:
    """A step is a whole number of rows."""
    low = tokens_per_step // max(row_len, 1) * row_len
    near = " or ".join(f"{n:,}" for n in (low, low + row_len) if n > 0)
    return (
        tokens_per_step > 0 and low == tokens_per_step,
        f"{prefix or 'curriculum.'}tokens_per_step={tokens_per_step:,} is not a multiple of "
        f"{setting}={row_len:,}; the nearest valid values are {near}",
    )


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _shown(value: Any) -> str:
    if isinstance(value, tuple) and any(isinstance(entry, StageConfig) for entry in value):
        return f"({len(value)} stages)"
    return str(list(value)) if isinstance(value, tuple) else str(value)
