"""The buckets of Dataset Decomposition: one a length, each row a piece of one document.

With `short_tail: pack` one more: what is shorter than the shortest piece, several to a row with
document masks, so that nothing is lost. Sources mix inside every bucket by their weights; in a
length that a source has no piece of, the others share its weight, and a note says so.
Price: one decomposition a source.
Source: Pouransari et al. 2024 (arXiv 2405.13226).
"""

from collections.abc import Iterator, Sequence

from ringctx.config import CurriculumConfig
from ringctx.data.buckets import Mixture, RowBucket, Supply, mix_pools
from ringctx.data.curriculum import share_pieces
from ringctx.data.decompose import Decomposition, decompose, remainders
from ringctx.data.documents import Documents
from ringctx.data.row_pools import PiecePool, StreamPool
from ringctx.data.source_shares import SourceShare, source_shares
from ringctx.errors import ConfigError

__all__ = ["decomposed_supply"]


def decomposed_supply(dataset: Documents, rule: CurriculumConfig, *, seed: int) -> Supply:
    """A bucket for each length that some document has a piece of.

    Args:
        dataset: documents, with their sources where the curriculum mixes them.
        rule: a curriculum of kind `decomposed`.
        seed: names the random orders and cuts.

    Raises:
        ConfigError: if a source is unknown or runs out before total_tokens.
    """
    shares = source_shares(dataset, rule.mix, max_epochs=rule.max_epochs, setting="curriculum.mix")
    cuts = [
        decompose(
            share.lengths,
            min_len=rule.min_len,
            max_len=rule.max_len,
            long_docs=rule.long_docs,
            seed=seed,
        )
        for share in shares
    ]
    parts = list(zip(shares, cuts, strict=True))
    mixtures = list(_by_length(parts, seed=seed))
    dropped = sum(cut.dropped_tokens for cut in cuts)
    tails = _tails(shares, row_len=rule.min_len, seed=seed) if rule.short_tail == "pack" else None
    if tails is not None:
        dropped -= sum(pool.available(1.0) for pool in tails.parts) * rule.min_len
        mixtures.insert(0, tails)
    natural = [mixture.available() for mixture in mixtures]
    lengths = [mixture.pool.row_len for mixture in mixtures]
    if rule.mix is not None:
        _check_total(rule, natural, mixtures)
    limits = share_pieces(natural, lengths, total_tokens=rule.total_tokens)
    source_tokens = sum(int(share.lengths.sum()) for share in shares)
    # Tokens beyond one epoch, for each source in each bucket.
    more = [
        (count - part.available(1.0)) * part.row_len
        for mixture, rows in zip(mixtures, limits, strict=True)
        for part, count in zip(mixture.parts, mixture.counts(rows), strict=True)
    ]
    return Supply(
        buckets=tuple(
            RowBucket(
                row_len=mixture.pool.row_len,
                pool=mixture.pool,
                rows=rows,
                doc_mask=mixture is tails,
            )
            for mixture, rows in zip(mixtures, limits, strict=True)
        ),
        source_tokens=source_tokens,
        dropped_tokens=dropped,
        passed_over_tokens=int(dataset.lengths.sum())
        - source_tokens
        + sum(max(0, -n) for n in more),
        repeated_tokens=sum(max(0, n) for n in more),
        notes=tuple(_notes(shares, mixtures)),
    )


def _by_length(
    parts: Sequence[tuple[SourceShare, Decomposition]], *, seed: int
) -> Iterator[Mixture]:
    """The pieces of each length, by ascending length."""
    for length in sorted({bucket.length for _, cut in parts for bucket in cut.buckets}):
        yield mix_pools(
            [
                (share, PiecePool(bucket, share.lengths, seed=seed, source=share.number))
                for share, cut in parts
                for bucket in cut.buckets
                if bucket.length == length
            ]
        )


def _tails(shares: Sequence[SourceShare], *, row_len: int, seed: int) -> Mixture | None:
    """Rows of remainders; None if there is not enough for one."""
    pools = [
        (
            share,
            StreamPool(
                remainders(share.lengths, min_len=row_len),
                row_len=row_len,
                seed=seed,
                source=share.number,
            ),
        )
        for share in shares
    ]
    filled = [(share, pool) for share, pool in pools if pool.available(1.0)]
    return mix_pools(filled) if filled else None


def _check_total(
    rule: CurriculumConfig, natural: Sequence[int], mixtures: Sequence[Mixture]
) -> None:
    most = sum(n * m.pool.row_len for n, m in zip(natural, mixtures, strict=True))
    if rule.total_tokens is not None and rule.total_tokens > most:
        first = sorted({mixture.exhausted for mixture in mixtures})
        raise ConfigError(
            f"curriculum.total_tokens={rule.total_tokens:,} is more than the {most:,} that "
            f"curriculum.mix gives before a source runs out ({', '.join(first)}); lower it, change "
            "the weights, or let sources repeat with curriculum.max_epochs"
        )


def _notes(shares: Sequence[SourceShare], mixtures: Sequence[Mixture]) -> Iterator[str]:
    if len(shares) == 1:
        return
    every = {share.key for share in shares}
    for mixture in mixtures:
        length, there = mixture.pool.row_len, {share.key for share in mixture.shares}
        if missing := ", ".join(sorted(every - there)):
            yield f"len {length:,}: no sequences from {missing}, the others share the weight"
        if len(there) > 1:
            yield f"len {length:,}: {mixture.exhausted} runs out first"
