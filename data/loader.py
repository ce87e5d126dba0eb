"""From a plan to tensors: each rank reads only its own slice of every row of a step.

What a rank holds of its rows are spans of documents (`row_spans`), gathered from the memory map
with one peeked token after each, so that shifting targets needs no communication. One path serves
rows of one piece, packed rows, and rows joined under document masks.
Price: local tokens plus one a span are read; int64 tokens and targets of two steps are held.
"""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from ringctx.data.balance import deal_rows, visible_pairs
from ringctx.data.documents import Documents
from ringctx.data.row_spans import Runs, Spans, held_spans, lay_out, row_costs
from ringctx.data.steps import Step
from ringctx.errors import DatasetError
from ringctx.ops.losses import IGNORE_INDEX

__all__ = ["Loader", "Microbatch", "RowShard"]


@dataclass(frozen=True, eq=False, kw_only=True)
class RowShard:
    """What this rank holds of the steps of one sequence length."""

    dp_rank: int
    dp_degree: int
    rows: int
    """Rows of one microbatch on this rank."""
    positions: NDArray[np.int64]
    """`[local_len]`: the indices inside a row that this rank holds, rising."""
    joined_positions: NDArray[np.int64] | None = None
    """`[rows * local_len]`: the same inside a microbatch's rows joined to one, which is how rows
    with document masks are trained; None: `rows` is 1, or no step has such masks."""


@dataclass(frozen=True, eq=False)
class Microbatch:
    """What one forward takes."""

    tokens: torch.Tensor
    """int64 `[rows, local_len]`; one joined row where there are document masks."""
    targets: torch.Tensor
    """int64, as tokens: the next token of the document, or IGNORE_INDEX where there is none, in
    padding, and where the dataset says that it is no target."""
    positions: torch.Tensor
    """int64 `[local_len]`: index of each held token inside its row."""
    cu_seqlens: tuple[int, ...] | None = None
    """Where the documents of a packed row begin, and its end, counted over the whole row and not
    over what this rank holds of it; None: every row is one document."""
    window: int | None = None
    """The largest attention window of any layer."""
    rope_theta: float | None = None
    """RoPE base; None: the model's."""


class Steps(Protocol):
    """What a loader needs of a plan."""

    def step(self, step: int) -> Step:
        """The rows of a step."""


@dataclass(frozen=True, eq=False)
class _Held:
    """What a rank holds of one row, or of several joined to one."""

    runs: Runs
    positions: torch.Tensor

    @classmethod
    def of(cls, positions: NDArray[np.int64]) -> "_Held":
        return cls(Runs.of(positions), torch.tensor(positions))


class Loader:
    """The microbatches of one rank."""

    def __init__(
        self, dataset: Documents, plan: Steps, *, shard_for: Callable[[int], RowShard]
    ) -> None:
        """Prepare to read.

        Args:
            dataset: where the tokens are.
            plan: which rows each step takes.
            shard_for: what this rank holds of the steps of a given row length.
        """
        self._dataset = dataset
        self._plan = plan
        self._shard_for = shard_for
        self._lengths = dataset.lengths
        self._held: dict[tuple[int, bool], _Held] = {}
        self._pin_memory = torch.cuda.is_available()

    def step(self, step: int) -> list[Microbatch]:
        """The microbatches of a step; every rank has the same number of them.

        Raises:
            DatasetError: if a token id is not in the vocabulary.
        """
        return self._gather(self._plan.step(step))

    def steps(self, first: int, last: int) -> Iterator[tuple[Step, list[Microbatch]]]:
        """Steps first, ..., last - 1, each read by a thread while the one before is used."""
        if first >= last:
            return
        with ThreadPoolExecutor(max_workers=1, thread_name_prefix="ringctx-loader") as reader:
            ahead = reader.submit(self._load, first)
            for step in range(first + 1, last + 1):
                ready = ahead.result()
                if step < last:
                    ahead = reader.submit(self._load, step)
                yield ready

    def _load(self, step: int) -> tuple[Step, list[Microbatch]]:
        planned = self._plan.step(step)
        return planned, self._gather(planned)

    def _gather(self, step: Step) -> list[Microbatch]:
        shard = self._shard_for(step.bucket_len)
        rows = _rows_of(shard, step)
        line = lay_out(step, rows)
        # Rows of a forward, and rows of the step that each of them is made of.
        width, joined = (1, shard.rows) if step.doc_mask else (shard.rows, 1)
        held = self._held_of(shard, step)
        num_whole = len(rows) // joined
        runs = held.runs.repeated(num_whole, period=joined * step.bucket_len)
        tokens, targets = (self._empty(num_whole, len(held.positions)) for _ in range(2))
        self._fill(held_spans(line, runs), tokens.view(-1).numpy(), targets.view(-1).numpy())
        return [
            Microbatch(
                tokens[at : at + width],
                targets[at : at + width],
                held.positions,
                cu_seqlens=line.borders(at * joined, (at + 1) * joined) if step.doc_mask else None,
                window=step.window,
                rope_theta=step.rope_theta,
            )
            for at in range(0, num_whole, width)
        ]

    def _fill(self, spans: Spans, tokens: NDArray[np.int64], targets: NDArray[np.int64]) -> None:
        """Read spans into tokens and targets, `[rows * local_len]` each; the rest is padding."""
        read = self._read(spans.documents, spans.starts, spans.lengths)
        if len(read) < len(tokens):
            tokens[:], targets[:] = 0, IGNORE_INDEX
        for some, places in spans.stretches():
            tokens[places] = read[some]
            targets[places.start : places.stop - 1] = read[some][1:]
        # What follows the last token of a span is not in it.
        peek = spans.starts + spans.lengths
        ahead = peek < self._lengths[spans.documents]
        last = spans.places + spans.lengths - 1
        targets[last[~ahead]] = IGNORE_INDEX
        targets[last[ahead]] = self._read(
            spans.documents[ahead], peek[ahead], np.ones_like(peek[ahead])
        )
        if self._dataset.has_loss_bits:
            self._drop_targets(spans, ahead, targets)

    def _drop_targets(
        self, spans: Spans, ahead: NDArray[np.bool_], targets: NDArray[np.int64]
    ) -> None:
        """Take away the targets whose loss bit is off."""
        # Of each span, those of its tokens that another one follows.
        lengths = spans.lengths - ~ahead
        some = lengths > 0
        bits = self._dataset.read_loss(spans.documents[some], spans.starts[some] + 1, lengths[some])
        targets[np.flatnonzero(targets != IGNORE_INDEX)[~bits]] = IGNORE_INDEX

    def _read(
        self,
        documents: NDArray[np.int64],
        starts: NDArray[np.int64],
        lengths: NDArray[np.int64],
    ) -> NDArray[np.unsignedinteger[Any]]:
        tokens = self._dataset.read_spans(documents, starts, lengths)
        if tokens.size and int(tokens.max()) >= self._dataset.vocab_size:
            at = int(np.flatnonzero(tokens >= self._dataset.vocab_size)[0])
            ends = np.cumsum(lengths)
            span = int(np.searchsorted(ends, at, side="right"))
            offset = starts[span] + at - (ends[span] - lengths[span])
            raise DatasetError(
                f"token id {tokens[at]} in document {documents[span]:,} at offset {offset:,}, "
                f"but the dataset's vocab_size is {self._dataset.vocab_size:,}; see "
                "'ringctx data check', and build it again"
            )
        return tokens

    def _held_of(self, shard: RowShard, step: Step) -> _Held:
        key = step.bucket_len, step.doc_mask
        if key not in self._held:
            positions = shard.positions
            if step.doc_mask and shard.rows > 1:
                assert shard.joined_positions is not None, key
                positions = shard.joined_positions
            self._held[key] = _Held.of(positions)
        return self._held[key]

    def _empty(self, *shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=torch.int64, pin_memory=self._pin_memory)


def _rows_of(shard: RowShard, step: Step) -> NDArray[np.int64]:
    """The rows of one rank, a microbatch after the other; some may lie beyond those of the step.

    Rows are dealt over rounds and dp ranks: round a, row r holds row
    `(a * dp_degree + dp_rank) * rows + r` of the step. Where document masks make their costs
    unequal they are dealt by cost.
    """
    rounds = -(-step.num_rows // (shard.dp_degree * shard.rows))
    every = np.arange(rounds * shard.dp_degree * shard.rows)
    if not step.doc_mask:
        table = every.reshape(rounds, shard.dp_degree, shard.rows)
        own: NDArray[np.int64] = table[:, shard.dp_rank]
        return own.reshape(-1)
    empty = visible_pairs(np.array([step.bucket_len]), window=step.window)
    costs = np.append(row_costs(step), np.repeat(empty, len(every) - step.num_rows))
    dealt: NDArray[np.int64] = deal_rows(costs, groups=shard.dp_degree)[shard.dp_rank]
    return dealt
