"""The section `curriculum`: which tokens are trained in which order, and in rows of which length.

Every kind has fields of its own; a field of another kind is refused, so that nothing is given in
vain. What must hold between them is in `curriculum_rules`.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

from ringctx.config.checks import require
from ringctx.config.curriculum_rules import curriculum_rules
from ringctx.config.mix import normal_mix

__all__ = ["CurriculumConfig", "StageConfig"]


@dataclass(frozen=True, kw_only=True)
class StageConfig:
    """A part of the training in rows of one length; `CurriculumConfig` checks it."""

    len: int
    """Tokens of each row of this stage, a power of two."""
    share: float | None = None
    """How much of the plan's tokens this stage takes, relative to the shares of the others."""
    tokens: int | None = None
    """Instead of share, in all stages alike: how many tokens this stage takes."""
    tokens_per_step: int | None = None
    """Tokens of one optimizer step in this stage; null: curriculum.tokens_per_step."""
    mix: dict[str, float] | None = None
    """Weights of sources in this stage; null: curriculum.mix. Beside `name` also `name@LEN`:
    pieces of exactly LEN tokens out of documents that have them, several to a row."""
    rope_theta: float | None = None
    """Base of the rotary frequencies in this stage; null: model.rope_theta."""
    lr: float | None = None
    """Peak learning rate of this stage, with a warm-up and a decay of its own; null: optim.lr,
    in one schedule over the whole run."""


@dataclass(frozen=True, kw_only=True)
class CurriculumConfig:
    """Which sequence lengths are trained when, and how documents fill the rows."""

    kind: Literal["decomposed", "stages", "window", "packed"] = "decomposed"
    """decomposed: sequences of one power-of-two length a step, each from one document (Dataset
    Decomposition, arXiv 2405.13226); stages: row lengths one after another (GrowLength, arXiv
    2310.00576; ProLong, arXiv 2410.02660); window: rows of one length, attention over a window
    that grows (SkyLadder, arXiv 2503.15450); packed: rows of one length, filled with documents."""
    odds: str | tuple[float, ...] = "grow_p2"
    """decomposed: how likely a bucket is drawn. uniform: all alike; grow_linear: n, ..., 2, 1,
    shortest first; grow_p2: twice as likely as the next longer; grow_p100: a hundred times;
    shrink_p100: a hundred times as likely as the next shorter; or a list of numbers, one a length
    from min_len to max_len."""
    odds_mode: Literal["bucket", "token_weighted"] = "bucket"
    """decomposed: bucket: the odds as they are (the paper); token_weighted: times the tokens that
    the plan may take from the bucket (the paper's released code)."""
    cycles: int = 8
    """decomposed: passes of the training, each over an equal part of every bucket; growing odds
    grow in each."""
    min_len: int = 256
    """decomposed: shortest sequence, a power of two; for shorter remainders see short_tail."""
    max_len: int = 8192
    """decomposed: longest sequence, a power of two; for longer documents see long_docs."""
    long_docs: Literal["greedy", "spread"] = "greedy"
    """decomposed: documents longer than max_len give as many sequences of max_len as they can
    (greedy), or of drawn lengths with equal tokens each (spread)."""
    short_tail: Literal["drop", "pack"] = "drop"
    """decomposed: remainders below min_len are dropped, or fill rows of min_len with a document
    mask (pack)."""
    first_step: Literal["drawn", "longest"] = "drawn"
    """decomposed: longest: the first step is one of the longest sequences, so that a lack of
    memory shows at once."""
    max_dropped: float = 0.2
    """decomposed: largest share of the tokens that may be dropped, 0 to 1; more is an error."""
    len: int | None = None
    """packed, window: tokens of each row, a power of two."""
    packing: Literal["concat", "best_fit"] = "concat"
    """packed, window: documents one after another, cut where a row ends (concat), or whole where
    they fit best (best_fit)."""
    doc_mask: bool = True
    """packed, window, stages: tokens see only their own document."""
    window_start: int = 32
    """window: tokens that a token sees at step 0, itself included."""
    window_growth: float = 0.125
    """window: how many more in each step: min(len, window_start + floor(window_growth * step))."""
    stages: tuple[StageConfig, ...] = ()
    """stages: a list of sections, in order of training."""
    tokens_per_step: int = 524_288
    """Tokens of one optimizer step, whatever the sequence length."""
    total_tokens: int | None = None
    """Tokens of the whole plan; null: every sequence once (with stages: what their tokens add
    up to)."""
    mix: dict[str, float] | None = None
    """Weights of sources, inside every bucket and in every stage without a mix of its own;
    null: all documents alike."""
    max_epochs: dict[str, float] | None = None
    """How often a source of a mix may be repeated, by name; where none is given, 1. It counts for
    `name` and each `name@LEN` by themselves."""

    def __post_init__(self) -> None:
        """Bring nested values into their own types, and check what one section can know."""
        put = object.__setattr__
        if not isinstance(self.odds, str):
            put(self, "odds", tuple(map(float, self.odds)))
        put(self, "stages", tuple(_stage(stage, at) for at, stage in enumerate(self.stages)))
        put(self, "mix", normal_mix(self.mix, setting="curriculum.mix"))
        if self.max_epochs is not None:
            put(self, "max_epochs", {name: float(n) for name, n in self.max_epochs.items()})
        require(curriculum_rules(self))


def _stage(stage: "StageConfig | Mapping[str, object]", at: int) -> StageConfig:
    """A stage with a normal mix; a mapping is what JSON makes of one."""
    made = StageConfig(**stage) if isinstance(stage, Mapping) else stage  # type: ignore[arg-type]
    return replace(made, mix=normal_mix(made.mix, setting=f"curriculum.stages[{at}].mix"))
