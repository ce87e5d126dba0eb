"""The rows that a curriculum may take from a dataset, or one error that says why there are none."""

from ringctx.config import CurriculumConfig
from ringctx.data.buckets import Supply
from ringctx.data.documents import Documents
from ringctx.data.supply_decomposed import decomposed_supply
from ringctx.data.supply_staged import staged_supply
from ringctx.errors import ConfigError

__all__ = ["make_supply"]


def make_supply(dataset: Documents, rule: CurriculumConfig, *, seed: int) -> Supply:
    """The buckets of a plan.

    Args:
        dataset: the documents.
        rule: the curriculum.
        seed: names the random orders.

    Raises:
        ConfigError: if the dataset does not give one step, if more than max_dropped of it is in no
            row, or if the sources do not fit.
    """
    if rule.kind == "decomposed":
        _check_longest(dataset, rule)
        supply = decomposed_supply(dataset, rule, seed=seed)
    else:
        supply = staged_supply(dataset, rule, seed=seed)
    _check_size(supply, rule)
    _check_dropped(supply, dataset, rule)
    return supply


def _check_longest(dataset: Documents, rule: CurriculumConfig) -> None:
    longest = int(dataset.lengths.max(initial=0))
    if longest < rule.min_len and rule.short_tail == "drop":
        raise ConfigError(
            f"no document reaches curriculum.min_len={rule.min_len:,}: the longest of "
            f"{len(dataset.lengths):,} has {longest:,} tokens; lower min_len, set short_tail=pack, "
            "or build the dataset with longer documents (--group-by dir)"
        )


def _check_size(supply: Supply, rule: CurriculumConfig) -> None:
    if rule.kind == "decomposed":
        if rule.total_tokens is None and supply.tokens < rule.tokens_per_step:
            raise ConfigError(
                f"the dataset gives {supply.tokens:,} tokens in sequences of {rule.min_len:,} to "
                f"{rule.max_len:,}, less than one step of curriculum.tokens_per_step="
                f"{rule.tokens_per_step:,}; lower tokens_per_step, set total_tokens to repeat "
                "the data, or add documents"
            )
        return
    for number, bucket in enumerate(supply.buckets):
        each = bucket.rows_per_step(rule.tokens_per_step)
        if bucket.rows < each:
            raise ConfigError(
                f"stage {number} of the curriculum has {bucket.rows:,} rows of {bucket.row_len:,} "
                f"tokens, less than the {each:,} of one step; lower tokens_per_step, give the "
                "stage more tokens, or add documents"
            )


def _check_dropped(supply: Supply, dataset: Documents, rule: CurriculumConfig) -> None:
    whole = int(dataset.lengths.sum())
    if supply.dropped_tokens > rule.max_dropped * whole:
        raise ConfigError(
            f"{supply.dropped_tokens / whole:.1%} of the tokens are in remainders shorter than "
            f"curriculum.min_len={rule.min_len:,} and would be dropped, more than "
            f"curriculum.max_dropped={rule.max_dropped:g} allows; lower min_len, set "
            "short_tail=pack, or accept it by raising max_dropped"
        )
