"""A plan in numbers: steps and rows by length, and where every token of the dataset went.

    dataset tokens = dropped + passed over + places of all rows - padding - repeated
    places of all rows = trained before + in steps + left over

Price: nothing is read but counters.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ringctx.config import CurriculumConfig
from ringctx.data.buckets import Supply
from ringctx.data.curriculum import MixedStep
from ringctx.data.documents import Documents

__all__ = ["BucketPlan", "Fold", "PlanSummary", "summarise"]


@dataclass(frozen=True)
class BucketPlan:
    """Steps of one row length, and their rows."""

    steps: int
    pieces: int
    """Rows; unpacked, each is one piece."""
    tokens: int
    rows_per_step: int
    """Rows of a step; of the largest, where stages of one length differ."""


@dataclass(frozen=True)
class Fold:
    """Pieces of one bucket that are cut to the length of a shorter one."""

    bucket: int
    pieces: int
    into: int
    reason: str


@dataclass(frozen=True, kw_only=True)
class PlanSummary:
    """A plan in numbers, from its first step on."""

    steps: int
    tokens: int
    """Tokens of all steps, padding included."""
    buckets: dict[int, BucketPlan]
    """By row length, ascending."""
    dataset_tokens: int
    kept_tokens: int
    """Tokens of the dataset that some row can hold."""
    dropped_tokens: int
    """Tokens of the dataset that no row can hold: remainders below min_len."""
    passed_over_tokens: int
    """Tokens of the dataset that the rows leave out: by total_tokens, stages, weights of sources,
    and at the end of a stream."""
    trained_tokens: int
    """Tokens of the steps before the first."""
    left_over_tokens: int
    """Tokens that the plan may take but that fill no step at its end."""
    repeated_tokens: int
    """Tokens in the rows that the plan may take that had been in one before."""
    padding_tokens: int
    """Places without a token in the rows that the plan may take."""
    folds: tuple[Fold, ...]
    notes: tuple[str, ...]
    """What else to know, a sentence each."""


def summarise(
    supply: Supply,
    *,
    dataset: Documents,
    curriculum: CurriculumConfig,
    steps: Sequence[int],
    spent: Sequence[int],
    mixed: Mapping[int, MixedStep],
    folded: Sequence[int],
) -> PlanSummary:
    """Count a plan.

    Args:
        supply: its buckets.
        dataset: its documents.
        curriculum: tokens_per_step.
        steps: steps of each bucket that are counted.
        spent: rows of each bucket taken before.
        mixed: steps, among these, that several buckets fill.
        folded: buckets, by number, too rare for steps of their own.
    """
    buckets: dict[int, BucketPlan] = {}
    for bucket, count in zip(supply.buckets, steps, strict=True):
        each = bucket.rows_per_step(curriculum.tokens_per_step)
        if count:
            had = buckets.get(bucket.row_len, BucketPlan(0, 0, 0, 0))
            buckets[bucket.row_len] = BucketPlan(
                steps=had.steps + count,
                pieces=had.pieces + count * each,
                tokens=had.tokens + count * each * bucket.row_len,
                rows_per_step=max(had.rows_per_step, each),
            )
    tokens = sum(bucket.tokens for bucket in buckets.values())
    before = sum(n * b.row_len for n, b in zip(spent, supply.buckets, strict=True))
    whole = int(dataset.lengths.sum())
    kept = whole - supply.dropped_tokens
    return PlanSummary(
        steps=sum(steps),
        tokens=tokens,
        buckets=dict(sorted(buckets.items())),
        dataset_tokens=whole,
        kept_tokens=kept,
        dropped_tokens=supply.dropped_tokens,
        passed_over_tokens=supply.passed_over_tokens,
        trained_tokens=before,
        left_over_tokens=supply.tokens - before - tokens,
        repeated_tokens=supply.repeated_tokens,
        padding_tokens=supply.padding_tokens,
        folds=_folds(supply, mixed, folded),
        notes=supply.notes,
    )


def _folds(
    supply: Supply, mixed: Mapping[int, MixedStep], folded: Sequence[int]
) -> tuple[Fold, ...]:
    lengths = [bucket.row_len for bucket in supply.buckets]
    return tuple(
        Fold(
            bucket=lengths[bucket],
            pieces=step.takes[bucket],
            into=lengths[step.bucket],
            reason="too few for one step" if bucket in folded else "left over at the end",
        )
        for _, step in sorted(mixed.items())
        for bucket in range(step.bucket + 1, len(lengths))
        if step.takes[bucket] and lengths[bucket] > lengths[step.bucket]
    )
