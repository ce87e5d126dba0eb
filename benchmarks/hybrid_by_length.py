"""Tokens a second of a hybrid model and of an all-softmax one by row length, as JSON and a picture.

    python benchmarks/hybrid_by_length.py [--max-len 16k] [--rounds 3] [--plot PICTURE.png]

Two models of the same sizes, of which one has lightning attention in three layers of four (`LLLS`)
and softmax in the fourth; a lightning layer also has a gate, so it has more parameters. Forward and
backward of one row on made-up tokens, one process, no optimizer. Each round runs all lengths, first
the one model, then the other, every other round the other way round, and gives one ratio a length.
`cost_model` is the ratio of FLOPs (`flops_per_token`). Short rows are run several times a round, up
to `--tokens`. On a busy machine threads wait for one another, so CPU seconds are told too.
"""

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from ringctx.config import ModelConfig
from ringctx.config_file import parse_size
from ringctx.errors import RingctxError
from ringctx.model import Transformer, initialise
from ringctx.model_cost import flops_per_token, parameter_count
from ringctx.parallel.comm import SoloGroup
from ringctx.parallel.mesh import context_mesh

__all__ = ["draw", "main", "summary"]

HYBRID, SOFTMAX = "LLLS", "S"
_QUICK: dict[str, Any] = {"dim": 32, "num_layers": 4, "num_heads": 2, "vocab_size": 64}
_SIZES: dict[str, Any] = {"dim": 256, "num_layers": 4, "num_heads": 4, "vocab_size": 4096}
_LOSS_CHUNK = 4096
Times = dict[str, dict[int, list[float]]]


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and print."""
    args = _arguments(arguments)
    threads = torch.get_num_threads()
    torch.set_num_threads(args.threads)
    try:
        result = _result(args)
    except RingctxError as error:
        print(f"hybrid_by_length: {error}", file=sys.stderr)
        return 1
    finally:
        torch.set_num_threads(threads)
    print(json.dumps(result, indent=2))
    if args.plot is not None:
        draw(result, args.plot, of_cpu=args.plot_cpu)
    return 0


def summary(times_s: Times, cpu_s: Times, flops: dict[str, dict[int, float]]) -> dict[str, Any]:
    """Medians by length, and ratios of the same round.

    Args:
        times_s: seconds of a row in each round, by mixers and length.
        cpu_s: CPU seconds, likewise.
        flops: of a token, by mixers and length.
    """
    rows = {}
    for length, hybrid in times_s[HYBRID].items():
        softmax = times_s[SOFTMAX][length]
        ratios = [a / b for a, b in zip(softmax, hybrid, strict=True)]
        of_cpu = zip(cpu_s[SOFTMAX][length], cpu_s[HYBRID][length], strict=True)
        rows[str(length)] = {
            "hybrid_tokens_per_s": _rate(length, hybrid),
            "softmax_tokens_per_s": _rate(length, softmax),
            "hybrid_is_faster_by": round(statistics.median(ratios), 3),
            "range": [round(min(ratios), 3), round(max(ratios), 3)],
            "hybrid_tokens_per_cpu_s": _rate(length, cpu_s[HYBRID][length]),
            "softmax_tokens_per_cpu_s": _rate(length, cpu_s[SOFTMAX][length]),
            "cpu_ratio": round(statistics.median([a / b for a, b in of_cpu]), 3),
            "cost_model": round(flops[SOFTMAX][length] / flops[HYBRID][length], 3),
        }
    return rows


def _rate(length: int, seconds: list[float]) -> float:
    return round(length / statistics.median(seconds), 1)


def draw(result: dict[str, Any], path: Path, *, of_cpu: bool = False) -> None:
    """Tokens a second by length.

    Args:
        result: what `main` prints.
        path: of the PNG.
        of_cpu: draw tokens a CPU second, which a busy machine leaves alone.
    """
    rate, ratio = "tokens_per_s", "hybrid_is_faster_by"
    if of_cpu:
        rate, ratio = "tokens_per_cpu_s", "cpu_ratio"
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    rows = {int(length): row for length, row in result["lengths"].items()}
    for name, label, color in (
        ("hybrid", "3 of 4 layers lightning (LLLS)", "tab:blue"),
        ("softmax", "all layers softmax (S)", "tab:orange"),
    ):
        rates = [row[f"{name}_{rate}"] / 1e3 for row in rows.values()]
        axes.plot(list(rows), rates, marker="o", label=label, color=color)
    for length, row in rows.items():
        note = f"{row[ratio]:.2g}x"
        place = (length, row[f"hybrid_{rate}"] / 1e3)
        axes.annotate(note, place, (0, 8), textcoords="offset points", ha="center", fontsize=9)
    axes.set_xscale("log", base=2)
    axes.set_xticks(list(rows), [_short(length) for length in rows])
    axes.minorticks_off()
    axes.set_ylim(0, 1.15 * max(row[f"hybrid_{rate}"] for row in rows.values()) / 1e3)
    config = result["config"]
    axes.set(
        xlabel="tokens of a row",
        ylabel=f"thousand tokens a {'CPU second' if of_cpu else 'second'}",
        title=f"forward + backward, {config['dim']} wide, {config['num_layers']} layers, fp32, "
        f"{config['threads']} CPU thread{'s' if config['threads'] > 1 else ''}",
    )
    axes.title.set_fontsize(10)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False, loc="lower left")
    figure.savefig(path, dpi=110)


def _short(length: int) -> str:
    return f"{length // 1024}k" if length % 1024 == 0 else str(length)


def _result(args: argparse.Namespace) -> dict[str, Any]:
    sizes = _QUICK if args.quick else _SIZES
    configs = {mixers: ModelConfig(mixers=mixers, **sizes) for mixers in (HYBRID, SOFTMAX)}
    longest = 256 if args.quick else parse_size(args.max_len)
    lengths = [64 if args.quick else parse_size(args.min_len)]
    while 2 * lengths[-1] <= longest:
        lengths.append(2 * lengths[-1])
    rounds = 1 if args.quick else args.rounds
    load = os.getloadavg()[0]
    times_s, cpu_s = _measure(configs, lengths, rounds=rounds, tokens=parse_size(args.tokens))
    flops = {
        mixers: {length: flops_per_token(config, seq_len=length) for length in lengths}
        for mixers, config in configs.items()
    }
    return {
        "config": {
            **sizes,
            "dtype": "fp32",
            "threads": torch.get_num_threads(),
            "cpu_count": os.cpu_count(),
            "rounds": rounds,
            "torch": torch.__version__,
            "load_average": [round(load, 2), round(os.getloadavg()[0], 2)],
        },
        "parameters": {
            "hybrid": parameter_count(configs[HYBRID]),
            "softmax": parameter_count(configs[SOFTMAX]),
        },
        "lengths": summary(times_s, cpu_s, flops),
    }


def _measure(
    configs: dict[str, ModelConfig], lengths: list[int], *, rounds: int, tokens: int
) -> tuple[Times, Times]:
    """Seconds and CPU seconds of a row, by round; the shortest rows before do not count."""
    models = {mixers: _model(config) for mixers, config in configs.items()}
    times_s: Times = {mixers: {length: [] for length in lengths} for mixers in models}
    cpu_s: Times = {mixers: {length: [] for length in lengths} for mixers in models}
    for model in models.values():
        _seconds(model, lengths[0])
    for number in range(rounds):
        for length in lengths:
            repeats = max(1, tokens // length)
            taken: dict[str, list[tuple[float, float]]] = {mixers: [] for mixers in models}
            for _ in range(repeats):
                for mixers in list(models)[:: -1 if number % 2 else 1]:
                    taken[mixers].append(_seconds(models[mixers], length))
            for mixers, rows in taken.items():
                times_s[mixers][length].append(sum(wall_s for wall_s, _ in rows) / repeats)
                cpu_s[mixers][length].append(sum(cpu for _, cpu in rows) / repeats)
    return times_s, cpu_s


def _model(config: ModelConfig) -> Transformer:
    model = Transformer(config, loss_chunk=_LOSS_CHUNK)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(initialise(name, parameter.shape, config=config, seed=0))
    return model


def _seconds(model: Transformer, length: int) -> tuple[float, float]:
    """Of forward and backward of one row; CPU seconds too."""
    assert model.config.vocab_size is not None
    generator = torch.Generator().manual_seed(length)
    tokens = torch.randint(0, model.config.vocab_size, (1, length + 1), generator=generator)
    begin_s, cpu_s = time.perf_counter(), time.process_time()
    loss = model(
        tokens[:, :-1],
        targets=tokens[:, 1:],
        positions=torch.arange(length),
        mesh=context_mesh(SoloGroup(), layout="contiguous"),
    )
    (loss / length).backward()
    taken_s = time.perf_counter() - begin_s, time.process_time() - cpu_s
    model.zero_grad(set_to_none=True)
    return taken_s


def _arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="tiny models and rows")
    parser.add_argument("--min-len", default="1k", help="shortest rows (%(default)s)")
    parser.add_argument("--max-len", default="16k", help="longest rows (%(default)s)")
    parser.add_argument("--tokens", default="4k", help="at least, of a round (%(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="(%(default)s)")
    parser.add_argument("--threads", type=int, default=2, help="(%(default)s)")
    parser.add_argument("--plot", type=Path, help="write a picture (needs ringctx[plot])")
    parser.add_argument("--plot-cpu", action="store_true", help="draw tokens a CPU second")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
