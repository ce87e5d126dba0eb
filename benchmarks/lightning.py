"""Lightning attention against flash attention and against its matrix products alone, as JSON.

    python benchmarks/lightning.py                      1k to 128k tokens, some ten minutes
    python benchmarks/lightning.py --quick              seconds: that it runs, not what it gives
    python benchmarks/lightning.py --plot time.png      with a picture (needs matplotlib)

Forward and backward of one call, B = 1 (`lightning_variants.py` says of what). A round runs all
lengths and variants, every other round in reverse order, and gives one ratio a pair, so that a
drift of the machine falls on both sides; ratios and times are medians of rounds. A short call is
repeated within its round. Exponents are least squares of log time over log tokens. Memory is that
of fresh processes (`lightning_memory.py`). Malloc is as it comes: no setting of the environment.
Where other programs want the cores too, CPU seconds say more than those by the wall, but only with
OMP_WAIT_POLICY=passive: threads that wait for one another would otherwise count as busy.

flash-linear-attention is optional: pip install --no-deps flash-linear-attention fla-core einops.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning_memory import add_size_arguments, sizes_of
from lightning_variants import (
    VARIANTS,
    Variant,
    longest_by_default,
    make_inputs,
    variant,
)

from ringctx.config_file import parse_size

__all__ = ["exponent", "main", "ratios"]

# Ratios of the first to the second; above 1 the second is faster.
_PAIRS = (
    ("sdpa", "ours"),
    ("fla", "ours"),
    ("ours", "products"),
    ("ours", "products_states_again"),
    ("ours_decay_by_token", "ours"),
)
_OF_MEMORY = ("ours", "ours_decay_by_token", "sdpa")
_LENGTHS = [2**k for k in range(10, 18)]
# Longer sequences are quieter and dearer: they get --long-rounds.
_LONG = 8192
# A call is repeated within a round up to about so long.
_LEAST_S, _MOST_REPEATS = 0.1, 16

# [wall seconds, CPU seconds] of a call, round by round.
Times = list[tuple[float, float]]


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and print."""
    args = _arguments(arguments)
    torch.set_num_threads(args.threads)
    load = [os.getloadavg()[0]]
    times = _measure(args)
    rows = {tokens: {n: t for (m, n), t in times.items() if m == tokens} for tokens in args.lengths}
    load.append(os.getloadavg()[0])
    measured = {name for row in rows.values() for name in row}
    result = {
        "config": _config(args) | {"load_average_before_and_after": load},
        "lengths": {str(tokens): _row(tokens, row) for tokens, row in rows.items()},
        "exponents": {n: _exponents(n, rows) for n in args.variants if n in measured},
        "memory": _memory(args),
    }
    print(json.dumps(result, indent=2))
    if args.plot is not None:
        # Here, as matplotlib is an extra.
        from lightning_picture import save

        save(result, args.plot)
    return 0


def exponent(tokens: Sequence[int], seconds: Sequence[float]) -> float | None:
    """Of time ~ tokens^p by least squares of the logs; None for fewer than two lengths."""
    if len(tokens) < 2:
        return None
    return round(float(np.polyfit(np.log(tokens), np.log(seconds), 1)[0]), 3)


def ratios(first: Times, second: Times) -> dict[str, dict[str, float]]:
    """Of the same round: the first's time over the second's, by the wall and by CPU seconds."""
    pairs = list(zip(first, second, strict=True))
    return {
        clock: _spread([a[i] / b[i] for a, b in pairs], digits=3)
        for i, clock in enumerate(("wall", "cpu"))
    }


def _runs(args: argparse.Namespace) -> dict[tuple[int, str], Variant]:
    """What is timed, by length and variant."""
    inputs = make_inputs(sizes_of(args, tokens=max(args.lengths)))
    runs = {}
    for tokens in args.lengths:
        for name in args.variants:
            if tokens <= (longest_by_default(name) or tokens):
                run = variant(name, inputs, sizes_of(args, tokens=tokens))
                if run is not None:
                    runs[tokens, name] = run
    return runs


def _measure(args: argparse.Namespace) -> dict[tuple[int, str], Times]:
    """Time every run once a round, after one call of each that says how often to repeat it."""
    runs = _runs(args)
    repeats = {
        key: min(_MOST_REPEATS, max(1, int(_LEAST_S / _timed(run, 1)[0])))
        for key, run in runs.items()
    }
    times: dict[tuple[int, str], Times] = {key: [] for key in runs}
    most = max(_rounds(args, tokens) for tokens in args.lengths)
    for i in range(most):
        for key in list(runs) if i % 2 == 0 else list(reversed(runs)):
            if i < _rounds(args, key[0]):
                times[key].append(_timed(runs[key], repeats[key]))
        print(f"round {i + 1} of {most}", file=sys.stderr, flush=True)
    return times


def _rounds(args: argparse.Namespace, tokens: int) -> int:
    rounds: int = args.long_rounds if tokens > _LONG else args.rounds
    return rounds


def _timed(run: Variant, repeats: int) -> tuple[float, float]:
    wall_s, cpu_s = time.perf_counter(), time.process_time()
    for _ in range(repeats):
        run()
    return (time.perf_counter() - wall_s) / repeats, (time.process_time() - cpu_s) / repeats


def _row(tokens: int, row: dict[str, Times]) -> dict[str, Any]:
    wall = {name: [wall_s for wall_s, _ in times] for name, times in row.items()}
    return {
        "wall_s": {name: _spread(values) for name, values in wall.items()},
        "cpu_s": {name: _spread([cpu_s for _, cpu_s in times]) for name, times in row.items()},
        "tokens_per_s": {
            name: round(tokens / statistics.median(values)) for name, values in wall.items()
        },
        "ratios": {
            f"{a} / {b}": ratios(row[a], row[b]) for a, b in _PAIRS if a in row and b in row
        },
    }


def _exponents(name: str, rows: dict[int, dict[str, Times]]) -> dict[str, float | int | None]:
    medians = {
        tokens: [statistics.median(clock) for clock in zip(*row[name], strict=True)]
        for tokens, row in rows.items()
        if name in row
    }
    found = list(medians)
    wall, cpu = (exponent(found, [m[i] for m in medians.values()]) for i in (0, 1))
    return {"wall": wall, "cpu": cpu, "from": min(found), "to": max(found)}


def _memory(args: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Variant -> tokens -> bytes."""
    script = Path(__file__).with_name("lightning_memory.py")
    sizes = [f"--heads={args.heads}", f"--head-dim={args.head_dim}"]
    sizes += [f"--chunk-len={args.chunk_len}", f"--threads={args.threads}"]
    found: dict[str, dict[str, Any]] = {}
    for name in _OF_MEMORY if args.memory else ():
        for tokens in args.lengths:
            if name in args.variants and tokens <= (longest_by_default(name) or tokens):
                command = [sys.executable, str(script), name, f"--tokens={tokens}", *sizes]
                done = subprocess.run(command, capture_output=True, text=True, check=True)
                found.setdefault(name, {})[str(tokens)] = json.loads(done.stdout)
    return found


def _config(args: argparse.Namespace) -> dict[str, Any]:
    longest = {n: longest_by_default(n) for n in args.variants}
    left_out = {n: most for n, most in longest.items() if most and most < max(args.lengths)}
    return {
        "batch": 1,
        "heads": args.heads,
        "head_dim": args.head_dim,
        "chunk_len": args.chunk_len,
        "dtype": "float32",
        "threads": args.threads,
        "passes": "forward + backward",
        "rounds": {n: _rounds(args, n) for n in args.lengths},
        "left_out_beyond_tokens": left_out,
        "not_installed": ["fla"] if "fla" in args.variants and find_spec("fla") is None else [],
        "malloc": _settings("MALLOC_"),
        "openmp": _settings("OMP_", "GOMP_", "KMP_"),
        "torch": torch.__version__,
        "cpu_count": os.cpu_count(),
    }


def _settings(*prefixes: str) -> dict[str, str] | str:
    return {k: v for k, v in os.environ.items() if k.startswith(prefixes)} or "default"


def _spread(values: list[float], *, digits: int = 6) -> dict[str, float]:
    spread = {"median": statistics.median(values), "min": min(values), "max": max(values)}
    return {name: round(value, digits) for name, value in spread.items()}


def _arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--lengths", type=parse_size, nargs="+", default=_LENGTHS, help="tokens (1k, 2k to 128k)"
    )
    parser.add_argument("--rounds", type=int, default=5, help="up to 8k tokens (%(default)s)")
    parser.add_argument("--long-rounds", type=int, default=3, help="beyond (%(default)s)")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--memory", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--plot", type=Path, help="PNG to draw")
    parser.add_argument("--quick", action="store_true", help="short sequences, one round")
    add_size_arguments(parser)
    args = parser.parse_args(arguments)
    if args.quick:
        args.lengths, args.rounds = [128, 256], 1
    args.lengths = sorted(set(args.lengths))
    if args.lengths[0] < args.chunk_len:
        parser.error(f"--lengths {args.lengths[0]} is less than a chunk ({args.chunk_len} tokens)")
    if min(args.rounds, args.long_rounds) < 1:
        parser.error("--rounds and --long-rounds must be at least 1")
    return args


if __name__ == "__main__":
    sys.exit(main())
