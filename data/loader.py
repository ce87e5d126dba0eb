"""From a plan to tensors: each rank reads only its own slice of every sequence of a step.

A rank's positions fall into runs of neighbours (contiguous: one, zigzag: two, striped: every
position by itself); runs are gathered from the memory map, with one peeked token after each, so
that shifting targets needs no communication.
Price: local tokens plus one a run are read; int64 tokens and targets of two steps are held.
"""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ringctx.data.documents import Documents
from ringctx.data.plan import Plan, Step
from ringctx.errors import DatasetError
from ringctx.ops.losses import IGNORE_INDEX

__all__ = ["Loader", "Microbatch", "RowShard"]


@dataclass(frozen=True, eq=False, kw_only=True)
class RowShard:
    """What this rank holds of the steps of one sequence length."""

    dp_rank: int
    dp_degree: int
    rows: int
    """Sequences of one microbatch on this rank."""
    positions: NDArray[np.int64]
    """`[local_len]`: the indices inside a sequence that this rank holds, in order."""


@dataclass(frozen=True, eq=False)
class Microbatch:
    """What one forward takes."""

    tokens: torch.Tensor
    """int64 `[rows, local_len]`."""
    targets: torch.Tensor
    """int64 `[rows, local_len]`: the next token, or IGNORE_INDEX where the document ends."""
    positions: torch.Tensor
    """int64 `[local_len]`: index of each held token inside its row."""
    cu_seqlens: tuple[int, ...] | None = None
    """Where the documents of a packed row begin, and its end, counted over the whole row and not
    over what this rank holds of it; None: every row is one document."""


@dataclass(frozen=True, eq=False)
class _Slice:
    """A rank's positions as runs of one length."""

    shard: RowShard
    run_starts: NDArray[np.int64]
    run_len: int
    positions: torch.Tensor


class Loader:
    """The microbatches of one rank."""

    def __init__(
        self, dataset: Documents, plan: Plan, *, shard_for: Callable[[int], RowShard]
    ) -> None:
        """Prepare to read.

        Args:
            dataset: where the tokens are.
            plan: which sequences each step takes.
            shard_for: what this rank holds of the steps of a given sequence length.
        """
        self._dataset = dataset
        self._plan = plan
        self._shard_for = shard_for
        self._lengths = dataset.lengths
        self._slices: dict[int, _Slice] = {}
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
        part = self._slice(step.bucket_len)
        shard, local_len = part.shard, len(part.shard.positions)
        rows = _rows_of(shard, len(step.pieces))
        tokens, targets = self._empty(len(rows), local_len), self._empty(len(rows), local_len)
        # Rows ascend, so those beyond the step are the last ones; they train nothing.
        real = int(np.searchsorted(rows, len(step.pieces)))
        self._fill(part, step.pieces[rows[:real]], tokens[:real].numpy(), targets[:real].numpy())
        tokens[real:] = 0
        targets[real:] = IGNORE_INDEX
        return [
            Microbatch(tokens[at : at + shard.rows], targets[at : at + shard.rows], part.positions)
            for at in range(0, len(rows), shard.rows)
        ]

    def _fill(
        self,
        part: _Slice,
        pieces: NDArray[np.int64],
        tokens: NDArray[np.int64],
        targets: NDArray[np.int64],
    ) -> None:
        """Read this rank's slice of the pieces into tokens and targets, `[n, local_len]` each."""
        # From here on one row a run: [n, local_len] -> [n * runs, run_len]
        documents = np.repeat(pieces[:, 0], len(part.run_starts))
        starts = (pieces[:, 1, None] + part.run_starts).reshape(-1)
        spans = self._read(documents, starts, part.run_len)
        tokens.reshape(spans.shape)[:] = spans
        shifted = targets.reshape(spans.shape)
        shifted[:, :-1] = spans[:, 1:]
        peek = starts + part.run_len
        inside = peek < self._lengths[documents]
        shifted[:, -1] = IGNORE_INDEX
        shifted[inside, -1] = self._read(documents[inside], peek[inside], 1)[:, 0]

    def _read(
        self, documents: NDArray[np.int64], starts: NDArray[np.int64], length: int
    ) -> NDArray[np.unsignedinteger[Any]]:
        spans = self._dataset.read(documents, starts, length)
        if spans.size and int(spans.max()) >= self._dataset.vocab_size:
            row, at = np.argwhere(spans >= self._dataset.vocab_size)[0]
            raise DatasetError(
                f"token id {spans[row, at]} in document {documents[row]:,} at offset "
                f"{starts[row] + at:,}, but the dataset's vocab_size is "
                f"{self._dataset.vocab_size:,}; see 'ringctx data check', and build it again"
            )
        return spans

    def _slice(self, bucket_len: int) -> _Slice:
        if bucket_len not in self._slices:
            shard = self._shard_for(bucket_len)
            run_starts, run_len = _runs(shard.positions)
            positions = torch.tensor(shard.positions)
            self._slices[bucket_len] = _Slice(shard, run_starts, run_len, positions)
        return self._slices[bucket_len]

    def _empty(self, *shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=torch.int64, pin_memory=self._pin_memory)


def _rows_of(shard: RowShard, num_rows: int) -> NDArray[np.int64]:
    """The global rows of one rank, ascending; some of the last may lie beyond num_rows.

    Rows are dealt over rounds and dp ranks: round a, row r holds global row
    `(a * dp_degree + dp_rank) * rows + r`.
    """
    rounds = -(-num_rows // (shard.dp_degree * shard.rows))
    every = np.arange(rounds * shard.dp_degree * shard.rows)
    return every.reshape(rounds, shard.dp_degree, shard.rows)[:, shard.dp_rank].reshape(-1)


def _runs(positions: NDArray[np.int64]) -> tuple[NDArray[np.int64], int]:
    """Cut positions into runs of neighbours, all of one length: their starts, and the length."""
    breaks = np.flatnonzero(np.diff(positions) != 1) + 1
    lengths = np.diff(np.concatenate([[0], breaks, [len(positions)]]))
    run_len = int(np.gcd.reduce(lengths))
    return positions[::run_len], run_len
