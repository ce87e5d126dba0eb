"""The plan: which pieces of which documents make up every step, as a pure function.

`piece(bucket, j) = permutation(seed, bucket, epoch)[j]` and a schedule of buckets: every rank
computes the same steps without talking, any step can be asked for at any time, and a state of a
few counters goes on exactly where a run stopped.
Price: the decomposition and the draws at the start; a permutation (4 bytes a piece) of each bucket
when it is first used; then about 0.1 ms a step.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ringctx.config import CurriculumConfig
from ringctx.config_file import build_section
from ringctx.data.curriculum import Origin, Schedule, find_folded, share_pieces
from ringctx.data.decompose import decompose
from ringctx.data.documents import Documents
from ringctx.data.manifest import new_hash
from ringctx.data.randomness import permutation
from ringctx.data.state import PlanState
from ringctx.errors import ConfigError

__all__ = ["BucketPlan", "Fold", "Plan", "PlanSummary", "Step"]


@dataclass(frozen=True, eq=False)
class Step:
    """What one optimizer step trains on, over all ranks."""

    step: int
    bucket_len: int
    """Tokens of each row."""
    pieces: NDArray[np.int64]
    """`[rows, 2]`: document and start of each row; packed `[pieces, 3]`: its length too."""
    num_targets: int
    """Tokens that have a next token in their document, over all rows."""
    row_offsets: NDArray[np.int64] | None = None
    """Packed, `[rows + 1]`: row r is pieces[row_offsets[r] : row_offsets[r + 1]], padding where
    they do not fill it; None: a row is one piece."""
    doc_mask: bool = False
    """Packed: whether tokens see only their own piece."""
    window: int | None = None
    """The largest attention window of any layer in this step."""
    rope_theta: float | None = None
    """RoPE base of this step; None: the model's."""
    lr: float | None = None
    """Peak learning rate of this step's stage; None: the run's."""
    stage_steps: tuple[int, int] | None = None
    """The stage's first step, and the one after its last; set where lr is."""

    @property
    def num_rows(self) -> int:
        """Rows over all ranks."""
        return len(self.pieces) if self.row_offsets is None else len(self.row_offsets) - 1

    def __eq__(self, other: object) -> bool:
        """Whether both train on the same rows in the same order, in the same way."""
        if not isinstance(other, Step):
            return NotImplemented
        mine, theirs = vars(self), vars(other)
        return all(np.array_equal(mine[name], theirs[name]) for name in mine)


@dataclass(frozen=True)
class BucketPlan:
    """Steps of one sequence length, and their sequences."""

    steps: int
    pieces: int


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
    buckets: dict[int, BucketPlan]
    """By sequence length, ascending."""
    kept_tokens: int
    """Tokens of the dataset that are in some sequence."""
    dropped_tokens: int
    """Tokens of the dataset in remainders below min_len."""
    left_over_tokens: int
    """Tokens that the plan may take but that fill no step at its end."""
    folds: tuple[Fold, ...]


class Plan:
    """All steps of a run."""

    def __init__(
        self,
        dataset: Documents,
        curriculum: CurriculumConfig | Mapping[str, Any],
        seed: int = 0,
        state: Mapping[str, Any] | None = None,
    ) -> None:
        """Plan all steps, or those from a state on.

        Args:
            dataset: gives the documents' lengths.
            curriculum: the section of the configuration, or its fields.
            seed: names the order of sequences.
            state: what `state` of an earlier plan gave, to go on from there; tokens_per_step may
                have changed since.

        Raises:
            ConfigError: if the dataset is too small for the curriculum, or the state belongs to
                another plan.
        """
        if not isinstance(curriculum, CurriculumConfig):
            curriculum = build_section(CurriculumConfig, curriculum, name="curriculum")
            assert isinstance(curriculum, CurriculumConfig)
        self.curriculum = curriculum
        self.seed = seed
        self._dataset = dataset.fingerprint
        self._lengths = dataset.lengths
        self._parts = decompose(
            self._lengths, min_len=curriculum.min_len, max_len=curriculum.max_len
        )
        self._orders: dict[int, tuple[int, NDArray[np.uint32]]] = {}
        self._check_size()
        self._bucket_lens = tuple(bucket.length for bucket in self._parts.buckets)
        self._share = share_pieces(
            [len(bucket) for bucket in self._parts.buckets],
            self._bucket_lens,
            total_tokens=curriculum.total_tokens,
        )
        if state is None:
            self._start()
        else:
            self._go_on(PlanState.from_dict(state))

    def __len__(self) -> int:
        """The number after the last step; steps before `first_step` count too."""
        return self._schedule.end

    @property
    def first_step(self) -> int:
        """The first step of this plan: 0, or the state's."""
        return self._first_step

    @property
    def bucket_lens(self) -> tuple[int, ...]:
        """Sequence lengths of the steps from `first_step` on, ascending."""
        return tuple(self._bucket_lens[bucket] for bucket in np.unique(self._order()))

    @property
    def hash(self) -> str:
        """Hex name of all that the plan will do; ranks compare it at the start."""
        digest = new_hash()
        digest.update(json.dumps(self.state(self.first_step), sort_keys=True).encode())
        digest.update(self._order().tobytes())
        return digest.hexdigest()

    def bucket_len(self, step: int) -> int:
        """The sequence length of a step, without looking up its sequences."""
        return self._bucket_lens[self._schedule.bucket(step)]

    def step(self, step: int) -> Step:
        """The sequences of a step, first_step <= step < len(plan)."""
        if not self.first_step <= step < len(self):
            raise IndexError(f"step {step} is not in the plan: {self.first_step} to {len(self)}")
        takes, consumed = self._schedule.takes(step), self._schedule.consumed(step)
        length = self._bucket_lens[self._schedule.bucket(step)]
        parts = [
            _cut(self._pieces(bucket, consumed[bucket], count), self._bucket_lens[bucket], length)
            for bucket, count in enumerate(takes)
            if count
        ]
        pieces = np.concatenate(parts)
        at_end = pieces[:, 1] + length == self._lengths[pieces[:, 0]]
        return Step(step, length, pieces, pieces.shape[0] * length - int(at_end.sum()))

    def state(self, step: int) -> dict[str, Any]:
        """The state before a step, first_step <= step <= len(plan): plain values, under 1 KB."""
        if not self.first_step <= step <= len(self):
            raise IndexError(f"step {step} is not in the plan: {self.first_step} to {len(self)}")
        return PlanState(
            dataset=self._dataset,
            curriculum=self.curriculum,
            seed=self.seed,
            step=step,
            consumed=self._schedule.consumed(step),
            folded=self._folded,
            origin=self._schedule.origin,
        ).to_dict()

    def describe(self) -> PlanSummary:
        """The plan in numbers, from `first_step` on."""
        counts = np.bincount(self._order(), minlength=len(self._bucket_lens))
        rows = [self.curriculum.tokens_per_step // length for length in self._bucket_lens]
        steps = len(self) - self.first_step
        tokens = steps * self.curriculum.tokens_per_step
        spent = self._tokens(self._schedule.consumed(self.first_step))
        total = self.curriculum.total_tokens or self._parts.kept_tokens
        return PlanSummary(
            steps=steps,
            tokens=tokens,
            buckets={
                length: BucketPlan(int(n), int(n) * per_step)
                for length, n, per_step in zip(self._bucket_lens, counts, rows, strict=True)
                if n
            },
            kept_tokens=self._parts.kept_tokens,
            dropped_tokens=self._parts.dropped_tokens,
            left_over_tokens=total - spent - tokens,
            folds=tuple(self._folds()),
        )

    def _check_size(self) -> None:
        rule, kept = self.curriculum, self._parts.kept_tokens
        if not kept:
            longest = int(self._lengths.max(initial=0))
            raise ConfigError(
                f"no document reaches curriculum.min_len={rule.min_len:,}: the longest of "
                f"{len(self._lengths):,} has {longest:,} tokens; lower min_len, or build the "
                "dataset with longer documents (--group-by dir)"
            )
        if rule.total_tokens is None and kept < rule.tokens_per_step:
            raise ConfigError(
                f"the dataset gives {kept:,} tokens in sequences of {rule.min_len:,} to "
                f"{rule.max_len:,}, less than one step of curriculum.tokens_per_step="
                f"{rule.tokens_per_step:,}; lower tokens_per_step, set total_tokens to repeat "
                "the data, or add documents"
            )

    def _start(self) -> None:
        self._folded = find_folded(
            self._share, self._bucket_lens, tokens_per_step=self.curriculum.tokens_per_step
        )
        self._first_step = 0
        self._schedule = self._draw(self.curriculum, Origin(0, 0, (0,) * len(self._share)))

    def _go_on(self, state: PlanState) -> None:
        state.check_belongs(dataset=self._dataset, curriculum=self.curriculum, seed=self.seed)
        self._folded = state.folded
        self._first_step = state.step
        self._schedule = self._replay(state)
        if self.curriculum.tokens_per_step != state.curriculum.tokens_per_step:
            origin = Origin(state.step, self._schedule.cycle(state.step), state.consumed)
            self._schedule = self._draw(self.curriculum, origin)

    def _replay(self, state: PlanState) -> Schedule:
        """The schedule that wrote a state, drawn again; its counters must be the state's."""
        origin, buckets = state.origin, len(self._bucket_lens)
        if len(origin.consumed) == buckets and 0 <= origin.cycle < self.curriculum.cycles:
            schedule = self._draw(state.curriculum, origin)
            in_plan = origin.step <= state.step <= schedule.end
            if in_plan and schedule.consumed(state.step) == state.consumed:
                return schedule
        raise ConfigError(
            f"the plan state is damaged: its counters {list(state.consumed)} are not those of "
            f"step {state.step:,}; use another one"
        )

    def _draw(self, curriculum: CurriculumConfig, origin: Origin) -> Schedule:
        return Schedule(
            curriculum,
            lengths=self._bucket_lens,
            pieces=self._share,
            folded=self._folded,
            origin=origin,
            seed=self.seed,
        )

    def _order(self) -> NDArray[np.uint8]:
        """The bucket of every step from `first_step` on."""
        return self._schedule.order[self.first_step - self._schedule.origin.step :]

    def _pieces(self, bucket: int, first: int, count: int) -> NDArray[np.int64]:
        """Pieces first, first + 1, ... in a bucket's order over all epochs: `[count, 2]`."""
        size = len(self._parts.buckets[bucket])
        ordinals = np.arange(first, first + count)
        chosen = [
            self._permutation(bucket, epoch)[ordinals[ordinals // size == epoch] % size]
            for epoch in range(first // size, (first + count - 1) // size + 1)
        ]
        return self._parts.buckets[bucket].locate(np.concatenate(chosen), self._lengths)

    def _permutation(self, bucket: int, epoch: int) -> NDArray[np.uint32]:
        cached = self._orders.get(bucket)
        if cached is None or cached[0] != epoch:
            length, size = self._bucket_lens[bucket], len(self._parts.buckets[bucket])
            order = permutation(size, seed=self.seed, bucket_len=length, epoch=epoch)
            cached = self._orders[bucket] = (epoch, order)
        return cached[1]

    def _tokens(self, pieces: tuple[int, ...]) -> int:
        return sum(n * length for n, length in zip(pieces, self._bucket_lens, strict=True))

    def _folds(self) -> list[Fold]:
        folds = []
        for at, mixed in sorted(self._schedule.mixed.items()):
            for bucket in range(mixed.bucket + 1, len(self._bucket_lens)):
                rare = bucket in self._folded
                if at >= self.first_step and mixed.takes[bucket]:
                    folds.append(
                        Fold(
                            bucket=self._bucket_lens[bucket],
                            pieces=mixed.takes[bucket],
                            into=self._bucket_lens[mixed.bucket],
                            reason="too few for one step" if rare else "left over at the end",
                        )
                    )
        return folds


def _cut(pieces: NDArray[np.int64], length: int, into: int) -> NDArray[np.int64]:
    """Cut every piece of one length into pieces of a shorter one, in order."""
    parts = np.arange(0, length, into)
    documents = np.repeat(pieces[:, 0], len(parts))
    starts = (pieces[:, 1, None] + parts).reshape(-1)
    return np.stack([documents, starts], axis=1)
