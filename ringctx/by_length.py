"""What a run's steps were like, by sequence length.

Under a curriculum an average over all steps says nothing: a token of a long sequence costs several
times that of a short one, and how many of each a stretch of steps has is the curriculum's choice.
Medians, since the first step of a length also pays for what is made once.
"""

import statistics
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

__all__ = ["LengthStats", "by_length", "length_table"]


@dataclass(frozen=True, kw_only=True)
class LengthStats:
    """The steps of one sequence length and context-parallel degree."""

    bucket_len: int
    """Tokens of a sequence."""
    cp_degree: int
    """Ranks that shared a sequence."""
    steps: int
    """How many there were."""
    sequences: int
    """In all of them."""
    tokens: int
    """In all of them, padding not counted."""
    tokens_per_s: float
    """Median, all ranks."""
    flops_per_s: float | None
    """Median, of a rank; null where the metrics do not say."""
    mfu: float | None
    """Median; null where it is not known."""
    exposed_share: float
    """Median share of a step's time that was blocked in attention exchanges."""


def by_length(records: Iterable[Mapping[str, Any]]) -> list[LengthStats]:
    """Sum up the lines of metrics.jsonl.

    Args:
        records: as `tracking.read_metrics` gives them.

    Returns:
        By rising length, and degree where a resume changed it.
    """
    groups: dict[tuple[int, int], list[Mapping[str, Any]]] = defaultdict(list)
    for record in records:
        groups[record["bucket_len"], record["cp_degree"]].append(record)
    return [_stats(*key, groups[key]) for key in sorted(groups)]


def length_table(stats: Sequence[LengthStats]) -> list[str]:
    """Lines of text: a head, and one a length."""
    with_mfu = any(own.mfu is not None for own in stats)
    speed = "MFU" if with_mfu else "GFLOP/s a rank"
    lines = [
        f"{'length':>9}  {'cp':>3}  {'steps':>7}  {'sequences':>10}  {'tokens':>15}  "
        f"{'tokens/s':>11}  {speed:>14}  {'exposed':>7}"
    ]
    for own in stats:
        share = _text(own.mfu, "{:.1%}")
        giga = _text(own.flops_per_s and own.flops_per_s / 1e9, "{:,.1f}")
        lines.append(
            f"{own.bucket_len:>9,}  {own.cp_degree:>3}  {own.steps:>7,}  {own.sequences:>10,}  "
            f"{own.tokens:>15,}  {own.tokens_per_s:>11,.0f}  "
            f"{share if with_mfu else giga:>14}  {own.exposed_share:>7.1%}"
        )
    return lines


def _stats(bucket_len: int, cp_degree: int, records: Sequence[Mapping[str, Any]]) -> LengthStats:
    return LengthStats(
        bucket_len=bucket_len,
        cp_degree=cp_degree,
        steps=len(records),
        sequences=sum(record["num_sequences"] for record in records),
        # A record's own tokens are cumulative, and the line before it may be of another length.
        tokens=sum(round(record["tokens_per_s"] * record["step_time_s"]) for record in records),
        tokens_per_s=statistics.median(record["tokens_per_s"] for record in records),
        flops_per_s=_median(records, "flops_per_s"),
        mfu=_median(records, "mfu"),
        exposed_share=statistics.median(
            record["comm_exposed_s"] / record["step_time_s"] for record in records
        ),
    )


def _median(records: Iterable[Mapping[str, Any]], field: str) -> float | None:
    """Over the records that have the field: older ones may not."""
    values = [record[field] for record in records if record.get(field) is not None]
    return statistics.median(values) if values else None


def _text(value: float | None, form: str) -> str:
    return "-" if value is None else form.format(value)
