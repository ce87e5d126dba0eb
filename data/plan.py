"""The plan: which pieces of which documents make up every step, as a pure function.

Rows come from buckets (`buckets.py`), a schedule says which bucket is trained at which step
(`curriculum.py`, `stages.py`): every rank computes the same steps without talking, any step can be
asked for at any time, and a state of a few counters goes on exactly where a run stopped.
Price: the decomposition or packing and the draws at the start; a permutation (4 bytes a piece) of
each bucket when it is first used; then about 0.1 ms a step.
"""

import json
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ringctx.config import CurriculumConfig
from ringctx.config_file import build_section
from ringctx.data.curriculum import Origin, Schedule, find_folded
from ringctx.data.documents import Documents
from ringctx.data.manifest import new_hash
from ringctx.data.row_pools import Rows
from ringctx.data.stages import StageSchedule
from ringctx.data.state import PlanState
from ringctx.data.steps import Step, count_targets
from ringctx.data.summary import PlanSummary, summarise
from ringctx.data.supply import check_stages, make_supply
from ringctx.errors import ConfigError

__all__ = ["Plan"]


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
            dataset: gives the documents' lengths, sources and loss bits.
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
        self._dataset = dataset
        self._supply = make_supply(dataset, curriculum, seed=seed)
        self._bucket_lens = tuple(bucket.row_len for bucket in self._supply.buckets)
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
        """Row lengths of the steps from `first_step` on, ascending."""
        return tuple(sorted({self._bucket_lens[bucket] for bucket in np.unique(self._order())}))

    @property
    def hash(self) -> str:
        """Hex name of all that the plan will do; ranks compare it at the start."""
        digest = new_hash()
        digest.update(json.dumps(self.state(self.first_step), sort_keys=True).encode())
        digest.update(self._order().tobytes())
        return digest.hexdigest()

    def bucket_len(self, step: int) -> int:
        """The row length of a step, without looking up its rows."""
        return self._bucket_lens[self._schedule.bucket(step)]

    def steps_of(self, bucket_len: int) -> NDArray[np.int64]:
        """The steps from `first_step` on whose rows have this length, ascending."""
        buckets = [k for k, length in enumerate(self._bucket_lens) if length == bucket_len]
        return self.first_step + np.flatnonzero(np.isin(self._order(), buckets))

    def step(self, step: int) -> Step:
        """The rows of a step, first_step <= step < len(plan)."""
        self._check_step(step, end=len(self))
        takes, consumed = self._schedule.takes(step), self._schedule.consumed(step)
        bucket = self._supply.buckets[self._schedule.bucket(step)]
        parts = [
            other.pool.rows(consumed[number], takes[number]).cut(other.row_len, into=bucket.row_len)
            for number, other in enumerate(self._supply.buckets)
            if takes[number]
        ]
        rows = Rows.join(parts)
        planned = Step(
            step,
            bucket.row_len,
            rows.pieces,
            count_targets(self._dataset, rows.pieces),
            row_offsets=rows.offsets,
            doc_mask=bucket.doc_mask,
            **self._settings(step),
        )
        if rows.is_single(bucket.row_len):
            return replace(planned, pieces=rows.pieces[:, :2], row_offsets=None, doc_mask=False)
        return planned

    def state(self, step: int) -> dict[str, Any]:
        """The state before a step, first_step <= step <= len(plan): plain values, under 1 KB."""
        self._check_step(step, end=len(self) + 1)
        return PlanState(
            dataset=self._dataset.fingerprint,
            curriculum=self.curriculum,
            seed=self.seed,
            step=step,
            consumed=self._schedule.consumed(step),
            folded=self._folded,
            origin=self._schedule.origin,
        ).to_dict()

    def describe(self) -> PlanSummary:
        """The plan in numbers, from `first_step` on."""
        return summarise(
            self._supply,
            dataset=self._dataset,
            curriculum=self.curriculum,
            steps=np.bincount(self._order(), minlength=len(self._bucket_lens)).tolist(),
            spent=self._schedule.consumed(self.first_step),
            mixed={t: step for t, step in self._schedule.mixed.items() if t >= self.first_step},
            folded=self._folded,
        )

    def _check_step(self, step: int, *, end: int) -> None:
        if not self.first_step <= step < end:
            raise IndexError(f"step {step} is not in the plan: {self.first_step} to {len(self)}")

    def _start(self) -> None:
        check_stages(self._supply, self.curriculum)
        self._folded: tuple[int, ...] = ()
        if self.curriculum.kind == "decomposed":
            self._folded = find_folded(
                [bucket.rows for bucket in self._supply.buckets],
                self._bucket_lens,
                tokens_per_step=self.curriculum.tokens_per_step,
            )
        self._first_step = 0
        self._schedule = self._draw(self.curriculum, Origin(0, 0, (0,) * len(self._bucket_lens)))

    def _go_on(self, state: PlanState) -> None:
        state.check_belongs(
            dataset=self._dataset.fingerprint, curriculum=self.curriculum, seed=self.seed
        )
        self._folded = state.folded
        self._first_step = state.step
        self._schedule = self._replay(state)
        if self.curriculum.tokens_per_step != state.curriculum.tokens_per_step:
            origin = Origin(state.step, self._schedule.cycle(state.step), state.consumed)
            self._schedule = self._draw(self.curriculum, origin)

    def _replay(self, state: PlanState) -> Schedule | StageSchedule:
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

    def _draw(self, curriculum: CurriculumConfig, origin: Origin) -> Schedule | StageSchedule:
        rows = [bucket.rows for bucket in self._supply.buckets]
        if curriculum.kind != "decomposed":
            each = [b.rows_per_step(curriculum.tokens_per_step) for b in self._supply.buckets]
            return StageSchedule(rows=rows, rows_per_step=each, origin=origin)
        return Schedule(
            curriculum,
            lengths=self._bucket_lens,
            pieces=rows,
            folded=self._folded,
            origin=origin,
            seed=self.seed,
        )

    def _order(self) -> NDArray[np.uint8]:
        """The bucket of every step from `first_step` on."""
        return self._schedule.order[self.first_step - self._schedule.origin.step :]

    def _settings(self, step: int) -> dict[str, Any]:
        """What the curriculum sets for a step beside its rows."""
        rule = self.curriculum
        if rule.kind == "window":
            window = rule.window_start + int(rule.window_growth * step)
            # Without a limit the model's own windows decide.
            return {"window": window if window < self.bucket_len(step) else None}
        if rule.kind != "stages":
            return {}
        number = self._schedule.bucket(step)
        stage = rule.stages[number]
        settings: dict[str, Any] = {"rope_theta": stage.rope_theta, "lr": stage.lr}
        if stage.lr is not None:
            assert isinstance(self._schedule, StageSchedule)
            settings["stage_steps"] = self._schedule.span(number)
        return settings
