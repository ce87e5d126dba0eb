"""What the fields of a curriculum must hold to, with a message for each that does not."""

import dataclasses
import difflib
import math
from typing import TYPE_CHECKING

from ringctx.config.checks import Rule, is_power_of_two
from ringctx.config.mix import mix_rules, split_mix_key
from ringctx.config.sizes import near_multiples

if TYPE_CHECKING:
    from ringctx.config.curriculum import CurriculumConfig, StageConfig

__all__ = ["ODDS", "curriculum_rules"]

ODDS = ("uniform", "grow_linear", "grow_p2", "grow_p100", "shrink_p100")
"""The named odds; `ringctx.data.curriculum` says what they are."""

# Between this and the end of floating-point numbers lie the times of any clock of such odds.
_MAX_RATIO = 1e100

_DECOMPOSED = ("decomposed",)
_ROWS = ("packed", "window")
_KINDS_OF = {
    "odds": _DECOMPOSED,
    "odds_mode": _DECOMPOSED,
    "cycles": _DECOMPOSED,
    "min_len": _DECOMPOSED,
    "max_len": _DECOMPOSED,
    "long_docs": _DECOMPOSED,
    "short_tail": _DECOMPOSED,
    "first_step": _DECOMPOSED,
    "max_dropped": _DECOMPOSED,
    "len": _ROWS,
    "packing": _ROWS,
    "doc_mask": (*_ROWS, "stages"),
    "window_start": ("window",),
    "window_growth": ("window",),
    "stages": ("stages",),
}


# A plan keeps one byte a step for its stage.
MOST_STAGES = 255


def curriculum_rules(curriculum: "CurriculumConfig") -> list[Rule]:
    """All rules of a curriculum of its kind."""
    own = {
        "decomposed": _decomposed_rules,
        "stages": _stages_rules,
        "window": _window_rules,
        "packed": _packed_rules,
    }[curriculum.kind]
    return [
        *_foreign_rules(curriculum),
        *own(curriculum),
        *_total_rules(curriculum),
        *_source_rules(curriculum),
    ]


def _foreign_rules(curriculum: "CurriculumConfig") -> list[Rule]:
    """No field of another kind may be given."""
    rules = []
    for field in dataclasses.fields(curriculum):
        kinds = _KINDS_OF.get(field.name, (curriculum.kind,))
        value = getattr(curriculum, field.name)
        shown = f"={value}" if isinstance(value, str | int | float) else ""
        rules.append(
            (
                curriculum.kind in kinds or value == field.default,
                f"curriculum.{field.name}{shown} has no use with curriculum.kind="
                f"{curriculum.kind}: leave it out, or choose kind={' or '.join(kinds)}",
            )
        )
    return rules


def _decomposed_rules(curriculum: "CurriculumConfig") -> list[Rule]:
    low, high = curriculum.min_len, curriculum.max_len
    fit = is_power_of_two(low) and is_power_of_two(high) and 2 <= low <= high
    return [
        (
            fit,
            f"curriculum.min_len={low:,} and curriculum.max_len={high:,} must be powers of two "
            "with 2 <= min_len <= max_len",
        ),
        (
            1 <= curriculum.cycles <= 10_000,
            f"curriculum.cycles={curriculum.cycles} must lie in 1 to 10,000; the paper uses 8",
        ),
        (
            0 <= curriculum.max_dropped <= 1,
            f"curriculum.max_dropped={curriculum.max_dropped} must lie in 0 to 1: it is a share "
            "of the tokens",
        ),
        *(_step_rules(curriculum.tokens_per_step, "curriculum", "max_len", high) if fit else []),
        *(_odds_rules(curriculum) if fit else []),
    ]


def _odds_rules(curriculum: "CurriculumConfig") -> list[Rule]:
    odds = curriculum.odds
    if isinstance(odds, str):
        near = difflib.get_close_matches(odds, ODDS, n=1)
        hint = f"did you mean '{near[0]}'? " if near else ""
        return [
            (
                odds in ODDS,
                f"curriculum.odds='{odds}': {hint}expected one of {list(ODDS)}, or a list of "
                "numbers",
            )
        ]
    low, high = curriculum.min_len, curriculum.max_len
    count = (high // low).bit_length()
    positive = [
        (
            math.isfinite(number) and number > 0,
            f"curriculum.odds[{at}]={number:g} must be a number above 0; to leave lengths out, "
            "raise min_len or lower max_len",
        )
        for at, number in enumerate(odds)
    ]
    return [
        *positive,
        (
            len(odds) == count,
            f"curriculum.odds has {len(odds)} numbers, but there are {count} lengths from "
            f"min_len={low:,} to max_len={high:,}; give one for each, shortest first",
        ),
        (
            not all(holds for holds, _ in positive)
            or min(odds, default=1) >= max(odds, default=1) / _MAX_RATIO,
            f"curriculum.odds={list(odds)} span more than {_MAX_RATIO:g}; 100 from each length "
            "to the next already trains them one after another",
        ),
    ]


def _row_rules(curriculum: "CurriculumConfig") -> list[Rule]:
    row_len = curriculum.len
    if row_len is None:
        return [
            (
                False,
                f"curriculum.len is not set: all rows of kind={curriculum.kind} have one length, "
                "a power of two such as 8k",
            )
        ]
    return _len_rules(row_len, curriculum.tokens_per_step, "curriculum")


def _packed_rules(curriculum: "CurriculumConfig") -> list[Rule]:
    return _row_rules(curriculum)


def _window_rules(curriculum: "CurriculumConfig") -> list[Rule]:
    start, growth = curriculum.window_start, curriculum.window_growth
    row_len = curriculum.len
    return [
        *_row_rules(curriculum),
        (
            1 <= start <= (row_len or start),
            f"curriculum.window_start={start:,} must lie in 1 (a token sees itself) to "
            f"curriculum.len={row_len or 0:,}",
        ),
        (
            math.isfinite(growth) and growth > 0,
            f"curriculum.window_growth={growth:g} must be a number above 0; for a window that "
            "stays, set model.window and kind=packed",
        ),
    ]


def _stages_rules(curriculum: "CurriculumConfig") -> list[Rule]:
    stages = curriculum.stages
    shares = sum(stage.share is not None for stage in stages)
    tokens = sum(stage.tokens is not None for stage in stages)
    rules = [
        (
            bool(stages),
            "curriculum.stages is empty: kind=stages needs at least one, such as "
            "[{len: 1k, share: 1}, {len: 8k, share: 1}]",
        ),
        (
            len(stages) <= MOST_STAGES,
            f"curriculum.stages has {len(stages)} entries; {MOST_STAGES} is the most",
        ),
        (
            (shares, tokens) in ((len(stages), 0), (0, len(stages))),
            f"of the {len(stages)} curriculum.stages, {shares} have share and {tokens} have "
            "tokens; give all of them share, or all of them tokens",
        ),
        (
            not tokens or curriculum.total_tokens is None,
            f"curriculum.total_tokens={curriculum.total_tokens} and the tokens of "
            "curriculum.stages are both set; leave total_tokens out, or give the stages shares",
        ),
    ]
    for at, stage in enumerate(stages):
        rules += _stage_rules(stage, f"curriculum.stages[{at}]", curriculum)
    return rules


def _stage_rules(stage: "StageConfig", name: str, curriculum: "CurriculumConfig") -> list[Rule]:
    per_step = stage.tokens_per_step or curriculum.tokens_per_step
    given_in = "curriculum" if stage.tokens_per_step is None else name
    rules = [
        (
            stage.tokens_per_step is None or stage.tokens_per_step > 0,
            f"{name}.tokens_per_step={stage.tokens_per_step} must be positive, or null",
        ),
        *_len_rules(stage.len, per_step, name, given_in=given_in),
        (
            stage.tokens is None or stage.tokens > 0,
            f"{name}.tokens={stage.tokens} must be positive, or null",
        ),
    ]
    for field, above in (("share", 0), ("lr", 0), ("rope_theta", 1)):
        value = getattr(stage, field)
        rules.append(
            (
                value is None or (math.isfinite(value) and value > above),
                f"{name}.{field}={value} must be a number above {above}, or null",
            )
        )
    return rules


def _len_rules(
    row_len: int, per_step: int, name: str, *, given_in: str = "curriculum"
) -> list[Rule]:
    """A row length and the step that must hold whole rows."""
    fit = row_len >= 2 and is_power_of_two(row_len)
    return [
        (fit, f"{name}.len={row_len:,} must be a power of two and at least 2"),
        *(_step_rules(per_step, given_in, "len", row_len, len_in=name) if fit else []),
    ]


def _step_rules(
    per_step: int, name: str, field: str, length: int, *, len_in: str = "curriculum"
) -> list[Rule]:
    return [
        (
            per_step > 0 and per_step % length == 0,
            f"{name}.tokens_per_step={per_step:,} is not a multiple of {len_in}.{field}="
            f"{length:,}; the nearest valid values are {near_multiples(per_step, of=length)}",
        )
    ]


def _total_rules(curriculum: "CurriculumConfig") -> list[Rule]:
    total, per_step = curriculum.total_tokens, curriculum.tokens_per_step
    own = [stage.tokens_per_step or per_step for stage in curriculum.stages]
    per_step = min(own, default=per_step)
    return [
        (
            total is None or total >= per_step,
            f"curriculum.total_tokens={total} is less than one step of "
            f"curriculum.tokens_per_step={per_step:,}; null takes all tokens",
        )
    ]


def _source_rules(curriculum: "CurriculumConfig") -> list[Rule]:
    """Mixes, and that no epochs are given to a source that is in none."""
    staged = curriculum.kind == "stages"
    stages = {f"curriculum.stages[{at}]": stage for at, stage in enumerate(curriculum.stages)}
    common = {f"{name}.len": stage.len for name, stage in stages.items() if stage.mix is None}
    rules = mix_rules(curriculum.mix, setting="curriculum.mix", row_lens=common if staged else None)
    rules.append(
        (
            curriculum.mix is None or not staged or bool(common),
            "curriculum.mix has no use: every one of curriculum.stages has a mix of its own",
        )
    )
    for name, stage in stages.items():
        row_lens = {f"{name}.len": stage.len}
        rules += mix_rules(stage.mix, setting=f"{name}.mix", row_lens=row_lens)
    mixes = [curriculum.mix, *(stage.mix for stage in curriculum.stages)]
    sources = {split_mix_key(key)[0] for mix in mixes for key in mix or {}}
    for source, epochs in (curriculum.max_epochs or {}).items():
        near = difflib.get_close_matches(source, sources, n=1)
        hint = f"did you mean '{near[0]}'?" if near else f"mixed are: {sorted(sources)}"
        rules += [
            (source in sources, f"curriculum.max_epochs.{source} is in no mix; {hint}"),
            (
                math.isfinite(epochs) and epochs > 0,
                f"curriculum.max_epochs.{source}={epochs:g} must be a number above 0; leave it "
                "out for 1",
            ),
        ]
    return rules
