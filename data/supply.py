"""The rows that a curriculum may take from a dataset, or one error that says why there are none."""

from ringctx.config import CurriculumConfig
from ringctx.data.buckets import Supply
from ringctx.data.documents import Documents
from ringctx.data.supply_decomposed import decomposed_supply
from ringctx.data.supply_staged import staged_supply
from ringctx.errors import ConfigError

__all__ = ["check_stages", "make_supply"]


def make_supply(dataset: Documents, rule: CurriculumConfig, *, seed: int) -> Supply:
    """The buckets of a plan.

    Args:
        dataset: the documents.
        rule: the curriculum.
        seed: names the random orders.

    Raises:
        ConfigError: if the dataset does not give one step of sequences, if more than max_dropped of
            it is in no row, or if the sources do not fit.
    """
    if rule.kind == "decomposed":
        _check_longest(dataset, rule)
        supply = decomposed_supply(dataset, rule, seed=seed)
        _check_decomposed(supply, rule)
        return supply
    return staged_supply(dataset, rule, seed=seed)


def check_stages(supply: Supply, rule: CurriculumConfig) -> None:
    """Refuse to start a plan with a stage that has no whole step.

    Raises:
        ConfigError: naming the stage. On resume, a stage that is over may be too short for a step
            that has grown.
    """
    if rule.kind == "decomposed":
        return
    for number, bucket in enumerate(supply.buckets):
        each = bucket.rows_per_step(rule.tokens_per_step)
        if bucket.rows < each:
            where = f"curriculum.stages[{number}]" if rule.stages else "the curriculum"
            raise ConfigError(
                f"{where} has {bucket.rows:,} rows of {bucket.row_len:,} tokens, less than the "
                f"{each:,} of one step; lower tokens_per_step, give it more tokens, or add "
                "documents"
            )


def _check_longest(dataset: Documents, rule: CurriculumConfig) -> None:
    longest = int(dataset.lengths.max(initial=0))
    if longest < rule.min_len and rule.short_tail == "drop":
        raise ConfigError(
            f"no document reaches curriculum.min_len={rule.min_len:,}: the longest of "
            f"{len(dataset.lengths):,} has {longest:,} tokens; lower min_len, set short_tail=pack, "
            "or build the dataset with longer documents (--group-by dir)"
        )


def _check_decomposed(supply: Supply, rule: CurriculumConfig) -> None:
    if supply.dropped_tokens > rule.max_dropped * supply.source_tokens:
        share = supply.dropped_tokens / supply.source_tokens
        ways = "lower min_len, or accept it by raising max_dropped"
        if rule.short_tail == "drop":
            ways = "lower min_len, set short_tail=pack, or accept it by raising max_dropped"
        raise ConfigError(
            f"{share:.1%} of the tokens are in remainders shorter than curriculum.min_len="
            f"{rule.min_len:,} and would be dropped, more than curriculum.max_dropped="
            f"{rule.max_dropped:g} allows; {ways}"
        )
    enough = rule.total_tokens is not None or supply.tokens >= rule.tokens_per_step
    if not supply.tokens or not enough:
        raise ConfigError(
            f"the dataset gives {supply.tokens:,} tokens in sequences of {rule.min_len:,} to "
            f"{rule.max_len:,}, less than one step of curriculum.tokens_per_step="
            f"{rule.tokens_per_step:,}; lower tokens_per_step, set total_tokens to repeat "
            "the data, or add documents"
        )
