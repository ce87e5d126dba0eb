"""Time of a training step by sequence length, at constant tokens a step, beside the cost model.

    python benchmarks/step_time.py [--max-len 16k] [--rounds 5] [--model model.dim=256 ...]

The library's own training step (`Trainer.train_step`) in one process of one thread, on made-up
tokens: loading is left out, everything from forward to the optimizer is in. Seconds are CPU seconds
of this process. Each round runs all lengths, every other round from the longest down, and gives one
ratio a length, to the shortest; the model's ratio is that of its FLOPs (`flops_per_token`). Printed
as JSON. A measured ratio above the model's: attention runs at fewer FLOP/s than matrix products do.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ringctx.config import Config
from ringctx.config_file import load_config, parse_size
from ringctx.data.tokenizers import ByteTokenizer
from ringctx.data.writer import DatasetWriter
from ringctx.errors import RingctxError
from ringctx.launch.distributed import world_group
from ringctx.model_cost import flops_per_token, parameter_count
from ringctx.run_plan import make_run_plan
from ringctx.trainer import Trainer

__all__ = ["main", "summary"]

# The 257 ids of the made-up text would leave out the head's share of the work.
_VOCAB_SIZE = 8192
_MODEL = (
    "model.dim=256",
    "model.num_layers=4",
    "model.num_heads=4",
    "model.num_kv_heads=2",
    "model.qk_norm=true",
)
# Dataset Decomposition (arXiv 2405.13226), figure 7: 1 B parameters on H100, 16,384 tokens a step.
_PAPER = {2048: 1.04, 4096: 1.14, 8192: 1.33, 16_384: 1.69}


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--min-len", default="256", help="shortest sequence (%(default)s)")
    parser.add_argument(
        "--max-len", default="16k", help="longest sequence, and tokens of a step (%(default)s)"
    )
    parser.add_argument("--rounds", type=int, default=5, help="(%(default)s)")
    parser.add_argument("--dtype", choices=["fp32", "bf16"], default="fp32")
    parser.add_argument("--model", nargs="+", default=_MODEL, metavar="KEY=VALUE")
    args = parser.parse_args(arguments)
    torch.set_num_threads(1)
    try:
        with tempfile.TemporaryDirectory() as folder:
            config = _config(args, Path(folder))
            times = _measure(config, rounds=args.rounds)
    except RingctxError as error:
        print(f"step_time: {error}", file=sys.stderr)
        return 1
    print(json.dumps(_report(config, times), indent=2))
    return 0


def summary(times_s: dict[int, list[float]], flops: dict[int, float]) -> dict[str, Any]:
    """Medians, and ratios to the shortest length.

    Args:
        times_s: seconds of each round, by length, ascending.
        flops: of a token, by length.
    """
    shortest = min(times_s)
    return {
        str(length): {
            "seconds": round(statistics.median(times), 4),
            "ratio": round(
                statistics.median(
                    [own / base for own, base in zip(times, times_s[shortest], strict=True)]
                ),
                3,
            ),
            "cost_model_ratio": round(flops[length] / flops[shortest], 3),
        }
        for length, times in times_s.items()
    }


def _report(config: Config, times_s: dict[int, list[float]]) -> dict[str, Any]:
    flops = {length: flops_per_token(config.model, seq_len=length) for length in times_s}
    return {
        "config": {
            "tokens_per_step": config.curriculum.tokens_per_step,
            "parameters": parameter_count(config.model),
            "dim": config.model.dim,
            "layers": config.model.num_layers,
            "dtype": config.train.dtype,
            "rounds": len(next(iter(times_s.values()))),
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "cpu_count": os.cpu_count(),
            "seconds": "CPU seconds of the process",
        },
        "lengths": summary(times_s, flops),
        "paper_ratios_to_1024": {str(length): ratio for length, ratio in _PAPER.items()},
    }


def _config(args: argparse.Namespace, folder: Path) -> Config:
    """A plan with steps of every length, over documents that give a piece of each."""
    min_len, max_len = parse_size(args.min_len), parse_size(args.max_len)
    path, text = folder / "dataset", folder / "config.yaml"
    rng = np.random.default_rng(0)
    with DatasetWriter(path, tokenizer=ByteTokenizer()) as writer:
        length = 2 * max_len - min_len
        # A step of the shortest takes one piece of each of so many documents.
        for _ in range(max_len // max(min_len, 1)):
            tokens = rng.integers(0, 256, length, dtype=np.uint16)
            writer.add(tokens, np.array([length]))
        writer.finish(built_from={})
    text.write_text("data: {path: " + str(path) + "}\n")
    return load_config(
        text,
        [
            f"model.vocab_size={_VOCAB_SIZE}",
            *args.model,
            f"curriculum.min_len={min_len}",
            f"curriculum.max_len={max_len}",
            f"curriculum.tokens_per_step={max_len}",
            "curriculum.cycles=1",
            # One forward a step, whatever the length.
            f"parallel.tokens_per_rank={max_len}",
            "parallel.engine=ddp",
            f"train.dtype={args.dtype}",
            "train.device=cpu",
        ],
    )


def _measure(config: Config, *, rounds: int) -> dict[int, list[float]]:
    """CPU seconds of a step of each length, round by round; one step before does not count."""
    with world_group("cpu", timeout=timedelta(hours=1)) as world:
        trainer = Trainer(make_run_plan(config, world_size=1), world=world)
        plan = trainer.run.plan
        first = {plan.bucket_len(step): step for step in reversed(range(len(plan)))}
        steps = {n: (plan.step(first[n]), trainer.loader.step(first[n])) for n in sorted(first)}
        times_s: dict[int, list[float]] = {length: [] for length in steps}
        for number in range(-1, rounds):
            for length in sorted(steps, reverse=number % 2 == 1):
                begin = time.process_time()
                trainer.train_step(*steps[length])
                if number >= 0:
                    times_s[length].append(time.process_time() - begin)
    return times_s


if __name__ == "__main__":
    sys.exit(main())
