"""Plans for worlds that are no power of two: every length that fits is served alike."""

import pytest

from ringctx.config import ParallelConfig
from ringctx.data.plan import Plan
from ringctx.errors import ConfigError
from ringctx.parallel.mesh import step_layouts
from tests.data.samples import MadeUpDocuments

PER_RANK = 16_384


@pytest.mark.parametrize(
    ("ranks", "degrees"),
    [(24, {1, 2, 4, 8}), (48, {1, 2, 4, 8, 16}), (96, {1, 2, 4, 8, 16, 32})],
)
def test_every_length_that_fits_has_constant_tokens_a_rank(ranks: int, degrees: set[int]) -> None:
    longest = PER_RANK * max(degrees)
    tokens = ranks * longest
    # A piece of every length in each document, and a step of every length in all.
    documents = MadeUpDocuments([2 * longest - 1] * (tokens // 4096))
    rule = {"min_len": 4096, "max_len": longest, "tokens_per_step": tokens, "cycles": 1}
    plan = Plan(documents, rule)
    parallel = ParallelConfig(tokens_per_rank=PER_RANK)
    layouts = step_layouts(plan.bucket_lens, world_size=ranks, parallel=parallel)
    assert {layout.cp_degree for layout in layouts.values()} == degrees
    for length, layout in layouts.items():
        assert layout.cp_degree * layout.dp_degree == ranks
        assert layout.rows * length == PER_RANK * layout.cp_degree
        rows = plan.curriculum.tokens_per_step // length
        assert layout.rows_without_targets(rows) == 0
        # As many forwards of as many tokens, whatever the length.
        assert layout.num_rounds(rows) * PER_RANK * ranks == plan.curriculum.tokens_per_step
    with pytest.raises(ConfigError, match=f"holds {longest:,} tokens"):
        step_layouts([2 * longest], world_size=ranks, parallel=parallel)
