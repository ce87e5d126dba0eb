"""Launches of the Triton kernels as data: arguments, tiles, tables of chunks.

One idea: what is launched can be looked at. A `Launch` that runs here is compiled ahead of time by
the tests and by benchmarks/lightning_kernels.py, for GPUs that are not there.

Price: none of the tiles has been timed on hardware yet. They are chosen so that nothing spills and
a program's shared memory fits every GPU since Ampere.
Shapes: B batch, T tokens, H heads, N chunks.
"""

from contextlib import nullcontext
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from ringctx.ops.lightning.chunks import Chunks

__all__ = ["SCAN_TILE", "Launch", "Tables", "Tiles", "attend_tiles", "run", "sum_tiles", "tables"]

SCAN_TILE = 512
"""Numbers of a state that one program of the scan carries."""


@dataclass(frozen=True, eq=False)
class Launch:
    """One launch of a kernel: what it is given, and in how many programs of how many warps."""

    kernel: Any
    programs: int
    arguments: dict[str, Tensor | float | None]
    constants: dict[str, int | bool]
    num_warps: int

    @property
    def options(self) -> dict[str, Any]:
        """What the compiler is told beside the constants."""
        return {"num_warps": self.num_warps, "num_stages": 2, "enable_fp_fusion": True}


def run(launch: Launch) -> None:
    """Run it on the device of its tensors."""
    if not launch.programs:
        return
    device = next(x for x in launch.arguments.values() if isinstance(x, Tensor)).device
    # Triton launches on the current device, wherever the tensors are.
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        launch.kernel[(launch.programs,)](**launch.arguments, **launch.constants, **launch.options)


@dataclass(frozen=True, eq=False)
class Tables:
    """The chunks and fragments of a call, on its device: int32, and starts int64."""

    starts: Tensor
    lengths: Tensor
    firsts: Tensor
    entries: Tensor
    exits: Tensor


@lru_cache(maxsize=64)
def tables(chunks: Chunks, device: torch.device) -> Tables:
    """The tables of `chunks`; slots that are not there are -1."""

    def table(numbers: list[int], dtype: torch.dtype = torch.int32) -> Tensor:
        return torch.tensor(numbers, dtype=dtype, device=device)

    def slots(of_fragments: list[int | None]) -> Tensor:
        return table([-1 if slot is None else slot for slot in of_fragments])

    return Tables(
        starts=table([start for start, _ in chunks.bounds], torch.int64),
        lengths=table([length for _, length in chunks.bounds]),
        firsts=table(list(chunks.first)),
        entries=slots([fragment.entry for fragment in chunks.fragments]),
        exits=slots([fragment.exit for fragment in chunks.fragments]),
    )


@dataclass(frozen=True, slots=True)
class Tiles:
    """Sides of a kernel's tiles, and its warps; no keys in `sum_chunks`."""

    rows: int
    keys: int
    inner: int
    outer: int
    warps: int


def attend_tiles(chunk_len: int, inner: int, outer: int, dtype: torch.dtype) -> Tiles:
    """Tiles of `attend_chunks`, where x and y have head dim `inner`, z and out `outer`.

    A program holds up to 64 rows of a chunk, 32 in fp32: as often is a state read.
    """
    rows = min(chunk_len, 64)
    if dtype == torch.float32:
        # Products without tensor cores hold their operands in registers: short steps.
        return Tiles(min(rows, 32), 16, 16, _side(outer, 64), warps=4)
    outer_side = _side(outer, 128 if rows == 64 else 64)
    inner_side = _side(inner, 32 if outer_side == 128 else 64)
    # Masks of head dims that do not fill their tiles take registers too.
    masked = inner % inner_side or outer % outer_side
    wide = rows * outer_side > 64 * 64 or (masked and rows == 64)
    return Tiles(rows, rows, inner_side, outer_side, warps=8 if wide else 4)


def sum_tiles(chunk_len: int, inner: int, outer: int, dtype: torch.dtype) -> Tiles:
    """Tiles of `sum_chunks`, where x has head dim `inner` and y `outer`."""
    if dtype == torch.float32:
        return Tiles(16, 0, _side(inner, 64), _side(outer, 64), warps=8)
    sides = _side(inner, 64), _side(outer, 128)
    warps = 8 if sides[0] * sides[1] > 64 * 64 else 4
    return Tiles(min(chunk_len, 64), 0, *sides, warps=warps)


def _side(length: int, longest: int) -> int:
    """The power of two that covers a length, but at most `longest` and at least 16."""
    return min(longest, max(16, 1 << (length - 1).bit_length()))
