"""The buckets of plans whose order is given: one a stage, rows packed from whole documents.

Plain packing and a growing window are plans of one stage. Within a source, a stage goes on in the
stream of documents where the one before it stopped, wherever in a document that is; how many tokens
each stage has is settled here, so that no later change of tokens_per_step moves a border.
Rows cut from the stream change places, so that a long document does not fill steps by itself: all
of an epoch in a plan of one stage, those of the stage where there are several.
Price: a permutation of the documents a source, and of the rows; best-fit packing when asked for.
Source: GrowLength (arXiv 2310.00576); ProLong (arXiv 2410.02660); SkyLadder (arXiv 2503.15450).
"""

from collections import defaultdict
from collections.abc import Sequence

from ringctx.config import CurriculumConfig, StageConfig
from ringctx.data.buckets import Mixture, RowBucket, Supply, mix_pools
from ringctx.data.decompose import Bucket, decompose
from ringctx.data.documents import Documents
from ringctx.data.packing import BestFitPool
from ringctx.data.row_pools import PiecePool, RowPool, StreamPool, whole_documents
from ringctx.data.shuffled_rows import ShuffledPool
from ringctx.data.source_shares import SourceShare, source_shares
from ringctx.errors import ConfigError

__all__ = ["staged_supply"]


def staged_supply(dataset: Documents, rule: CurriculumConfig, *, seed: int) -> Supply:
    """A bucket for each stage.

    Args:
        dataset: documents, with their sources where stages mix them.
        rule: a curriculum of kind `stages`, `packed` or `window`.
        seed: names the random orders.

    Raises:
        ConfigError: if a source is unknown, has no piece of the length asked for, or runs out.
    """
    stages = rule.stages
    if rule.kind != "stages":
        assert rule.len is not None
        stages = (StageConfig(len=rule.len, share=1.0),)
    sources = [_shares(dataset, rule, number) for number in range(len(stages))]
    builder = _Builder(rule, seed=seed)
    budgets = _budgets(rule, stages, sources, builder)
    buckets = [
        builder.bucket(number, stage, shares, budget)
        for number, (stage, shares, budget) in enumerate(zip(stages, sources, budgets, strict=True))
    ]
    return Supply(
        buckets=tuple(buckets),
        source_tokens=int(dataset.lengths.sum()),
        dropped_tokens=0,
        passed_over_tokens=builder.passed_over(dataset, sources),
        repeated_tokens=builder.repeated(sources),
        padding_tokens=builder.padding_tokens,
        notes=(*builder.notes, *_shared_sources(sources)),
    )


def _shares(dataset: Documents, rule: CurriculumConfig, number: int) -> list[SourceShare]:
    """What a stage mixes; its own mix comes before the curriculum's."""
    mix, setting = rule.mix, "curriculum.mix"
    if rule.stages and rule.stages[number].mix is not None:
        mix, setting = rule.stages[number].mix, f"curriculum.stages[{number}].mix"
    return source_shares(dataset, mix, max_epochs=rule.max_epochs, setting=setting)


def _budgets(
    rule: CurriculumConfig,
    stages: Sequence[StageConfig],
    sources: Sequence[Sequence[SourceShare]],
    builder: "_Builder",
) -> list[int]:
    """Tokens of each stage."""
    if stages[0].tokens is not None:
        return [stage.tokens or 0 for stage in stages]
    whole = sum(stage.share or 0.0 for stage in stages)
    parts = [(stage.share or 0.0) / whole for stage in stages]
    total = rule.total_tokens
    if total is None:
        # Until the first source has been used as often as it may be.
        used: dict[str, float] = defaultdict(float)
        there: dict[str, int] = {}
        for stage, shares, part in zip(stages, sources, parts, strict=True):
            weights = sum(share.weight for share in shares)
            for share in shares:
                used[share.key] += part * share.weight / weights
                there.setdefault(share.key, builder.capacity(share, row_len=stage.len))
        total = int(min(there[key] / used[key] for key in there))
    return [int(total * part) for part in parts]


class _Builder:
    """Makes the buckets of the stages in their order, and remembers how far each source is."""

    def __init__(self, rule: CurriculumConfig, *, seed: int) -> None:
        self._rule, self._seed = rule, seed
        self._used: dict[str, int] = defaultdict(int)
        """Places by key."""
        self._taken: dict[int, int] = defaultdict(int)
        """Tokens by number of source."""
        self._pools: dict[tuple[str, int, int], RowPool] = {}
        self.notes: list[str] = []
        self.padding_tokens = 0

    def capacity(self, share: SourceShare, *, row_len: int) -> int:
        """Tokens that a source has for all stages."""
        return mix_pools([(share, self._pool(share, row_len=row_len))]).available() * row_len

    def bucket(
        self, number: int, stage: StageConfig, shares: Sequence[SourceShare], budget: int
    ) -> RowBucket:
        """The bucket of the next stage.

        Args:
            number: of the stage, for messages.
            stage: its section.
            shares: what it mixes.
            budget: its tokens.
        """
        mixture = mix_pools([(share, self._pool(share, row_len=stage.len)) for share in shares])
        rows, most = budget // stage.len, mixture.available()
        if rows > most:
            rows = self._beyond(number, stage, mixture, rows, most)
        self._count(mixture, rows)
        counts = mixture.counts(rows)
        shuffled = [
            (share, self._shuffled(share, part, count))
            for share, part, count in zip(mixture.shares, mixture.parts, counts, strict=True)
        ]
        return RowBucket(
            row_len=stage.len,
            pool=mix_pools(shuffled).pool,
            rows=rows,
            doc_mask=self._rule.doc_mask,
            tokens_per_step=stage.tokens_per_step,
        )

    def passed_over(self, dataset: Documents, sources: Sequence[Sequence[SourceShare]]) -> int:
        """Tokens of the dataset that no row takes."""
        there = _tokens_by_source(sources)
        unnamed = int(dataset.lengths.sum()) - sum(there.values())
        return unnamed + sum(max(0, n - self._taken[source]) for source, n in there.items())

    def repeated(self, sources: Sequence[Sequence[SourceShare]]) -> int:
        """Tokens that rows take beyond one use of each document."""
        there = _tokens_by_source(sources)
        return sum(max(0, self._taken[source] - n) for source, n in there.items())

    def _beyond(
        self, number: int, stage: StageConfig, mixture: Mixture, rows: int, most: int
    ) -> int:
        """The rows of a stage that asks for more than there are."""
        if self._rule.total_tokens is None and stage.tokens is None:
            # Shares of what there is, to rounding.
            return most
        if mixture.shares[0].key:
            raise ConfigError(
                f"stage {number} of the curriculum takes {rows * stage.len:,} tokens, but "
                f"{mixture.exhausted} runs out after {most * stage.len:,}; lower the tokens or "
                "its weight, or let it repeat with curriculum.max_epochs"
            )
        there = int(mixture.shares[0].lengths.sum())
        times = (self._used[""] + rows * stage.len) / there
        self.notes.append(f"up to stage {number} the documents are used {times:.1f} times")
        return rows

    def _count(self, mixture: Mixture, rows: int) -> None:
        """Remember what a stage takes."""
        for share, pool, count in zip(
            mixture.shares, mixture.parts, mixture.counts(rows), strict=True
        ):
            places, padding = count * pool.row_len, 0
            if isinstance(pool, BestFitPool):
                padding = round(pool.padding_share * places)
            self._used[share.key] += places
            self._taken[share.number] += places - padding
            self.padding_tokens += padding

    def _pool(self, share: SourceShare, *, row_len: int) -> RowPool:
        """Rows of one source, from where earlier stages left off."""
        start = self._used[share.key]
        key = share.key, row_len, start
        if key not in self._pools:
            self._pools[key] = self._make_pool(share, row_len=row_len, start=start)
        return self._pools[key]

    def _make_pool(self, share: SourceShare, *, row_len: int, start: int) -> RowPool:
        order = {"seed": self._seed, "source": share.number}
        if share.piece_len is not None:
            return PiecePool(
                _whole_pieces(share, share.piece_len),
                share.lengths,
                pieces_per_row=row_len // share.piece_len,
                start=start // share.piece_len,
                **order,
            )
        pieces = whole_documents(share.lengths)
        if self._rule.packing == "best_fit":
            return BestFitPool(pieces, row_len=row_len, **order)
        return StreamPool(pieces, row_len=row_len, start=start, **order)

    def _shuffled(self, share: SourceShare, pool: RowPool, count: int) -> RowPool:
        """The rows of a source in a stage; those of a stream change places."""
        if not isinstance(pool, StreamPool):
            return pool
        epoch = max(1, pool.epoch_tokens // pool.row_len)
        order = {"seed": self._seed, "source": share.number}
        if self._rule.kind == "stages":
            # A later stage goes on where this one stops: only the rows of this one change places.
            return ShuffledPool(pool, block=min(count, epoch), total=count, **order)
        return ShuffledPool(pool, block=epoch, **order)


def _tokens_by_source(sources: Sequence[Sequence[SourceShare]]) -> dict[int, int]:
    """Tokens of each source that some stage mixes."""
    return {share.number: int(share.lengths.sum()) for shares in sources for share in shares}


def _shared_sources(sources: Sequence[Sequence[SourceShare]]) -> list[str]:
    """A note for each source that mixes name in several ways."""
    keys: dict[int, set[str]] = defaultdict(set)
    for share in (share for shares in sources for share in shares):
        keys[share.number].add(share.key)
    return [
        f"{', '.join(sorted(names))} are of one source; max_epochs counts for each of them"
        for _, names in sorted(keys.items())
        if len(names) > 1
    ]


def _whole_pieces(share: SourceShare, length: int) -> Bucket:
    """All pieces of one length from documents that reach it."""
    found = decompose(share.lengths, min_len=length, max_len=length).buckets
    if not found:
        raise ConfigError(
            f"{share.key}: the longest document of this source has "
            f"{int(share.lengths.max()):,} tokens, so it gives no piece of {length:,}"
        )
    return found[0]
