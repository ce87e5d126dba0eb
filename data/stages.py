"""Which stage is trained at which step: one after the other, each over rows of its own length.

The counterpart of Algorithm 1 (`curriculum.py`) for plans whose order is given: GrowLength and
ProLong, a growing window, plain packing. A stage's rows are fixed when the plan is made, so another
tokens_per_step on the way changes where steps begin, never what is trained.
Price: one byte a step.
Source: GrowLength (arXiv 2310.00576); ProLong (arXiv 2410.02660).
"""

from collections.abc import Mapping, Sequence
from itertools import accumulate

import numpy as np
from numpy.typing import NDArray

from ringctx.data.curriculum import MixedStep, Origin

__all__ = ["StageSchedule"]


class StageSchedule:
    """The stages of all steps from an origin on; read like `curriculum.Schedule`."""

    mixed: Mapping[int, MixedStep] = {}
    """No step is filled with what several stages have left."""

    def __init__(
        self, *, rows: Sequence[int], rows_per_step: Sequence[int], origin: Origin
    ) -> None:
        """Lay out all steps.

        Args:
            rows: what the whole plan may take from each stage.
            rows_per_step: rows of one step of each stage.
            origin: where to start.
        """
        self.origin = origin
        self._rows_per_step = tuple(rows_per_step)
        # What stages that are over have left over stays so: no step goes back.
        begun = max((k for k, taken in enumerate(origin.consumed) if taken), default=0)
        left = [
            0 if k < begun else n - taken
            for k, (n, taken) in enumerate(zip(rows, origin.consumed, strict=True))
        ]
        self._steps = [max(0, n) // each for n, each in zip(left, rows_per_step, strict=True)]
        self._first = [0, *accumulate(self._steps)]
        self.order: NDArray[np.uint8] = np.repeat(np.arange(len(rows), dtype=np.uint8), self._steps)
        """uint8 `[steps]`: the stage of every step."""

    @property
    def end(self) -> int:
        """The number after the last step."""
        return self.origin.step + len(self.order)

    def bucket(self, step: int) -> int:
        """Number of the stage of a step."""
        return int(self.order[step - self.origin.step])

    def takes(self, step: int) -> tuple[int, ...]:
        """Rows that a step takes from each stage."""
        stage = self.bucket(step)
        return tuple(n if k == stage else 0 for k, n in enumerate(self._rows_per_step))

    def consumed(self, step: int) -> tuple[int, ...]:
        """Rows taken from each stage before a step."""
        done = step - self.origin.step
        return tuple(
            start + each * min(max(done - first, 0), steps)
            for start, each, first, steps in zip(
                self.origin.consumed, self._rows_per_step, self._first, self._steps, strict=False
            )
        )

    def cycle(self, step: int) -> int:
        """Stages know no cycles."""
        return 0

    def span(self, stage: int) -> tuple[int, int]:
        """First step of a stage and the step after its last.

        Where tokens_per_step changed within the stage, it counts as begun as many of the present
        steps ago as its tokens make: schedules over the stage go on at the same share of it.
        """
        before = self.origin.consumed[stage] // self._rows_per_step[stage]
        first = self.origin.step + self._first[stage]
        return first - before, first + self._steps[stage]
