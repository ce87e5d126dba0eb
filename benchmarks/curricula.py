"""Curricula side by side on real text: held-out loss by tokens, by seconds, by position.

    python benchmarks/corpora.py CORPUS --group-by file --ranks 2048
    python benchmarks/curricula.py CORPUS --out RUNS --tokens 3M
    python benchmarks/curricula.py CORPUS --out RUNS --report [--plot PNG]

Each variant trains the same small model on the same number of tokens with the same optimizer, in a
process of one thread; as many run at once as there are cores. Seconds are CPU seconds of training,
evaluation left out, so that other work on the machine does not count. Prints JSON.
"""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

from curricula_report import draw, summarise, table
from curricula_run import run_variant
from omegaconf import OmegaConf

from ringctx.config_file import parse_size

TRAIN_LEN = 4096
STEP_TOKENS = 8192
_PACKED = {"kind": "packed", "len": TRAIN_LEN}
_DECOMPOSED = {"kind": "decomposed", "min_len": 256, "max_len": TRAIN_LEN}
VARIANTS: dict[str, dict[str, Any]] = {
    "concat": {**_PACKED, "packing": "concat", "doc_mask": False},
    "concat_masks": {**_PACKED, "packing": "concat", "doc_mask": True},
    "best_fit_masks": {**_PACKED, "packing": "best_fit", "doc_mask": True},
    "uniform": {**_DECOMPOSED, "odds": "uniform", "cycles": 1},
    "grow_p2_x1": {**_DECOMPOSED, "odds": "grow_p2", "cycles": 1},
    "grow_p2_x8": {**_DECOMPOSED, "odds": "grow_p2", "cycles": 8},
}
MODEL = {
    "dim": 128,
    "num_layers": 3,
    "num_heads": 2,
    "mlp_dim": 384,
    "qk_norm": True,
    "rope_theta": 1e5,
    "tie_embeddings": True,
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run or report the experiment."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("corpus", type=Path, help="folder made by corpora.py")
    parser.add_argument("--out", type=Path, required=True, help="folder of the measurements")
    parser.add_argument("--tokens", default="3M", help="that each variant trains on (%(default)s)")
    parser.add_argument("--lr", type=float, default=3e-3, help="peak (%(default)s)")
    parser.add_argument("--evals", type=int, default=10, help="on the way (%(default)s)")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--report", action="store_true", help="only print what is there")
    parser.add_argument("--plot", type=Path, metavar="PNG", help="with --report: draw it")
    parser.add_argument("--one", choices=VARIANTS, help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    args.out.mkdir(parents=True, exist_ok=True)
    if args.one:
        _run_one(args)
        return 0
    if not args.report:
        _run_all(args)
    measured = summarise(args.out, list(VARIANTS))
    print(json.dumps(measured, indent=2))
    if args.report:
        sys.stderr.write("\n".join(table(measured)) + "\n")
    if args.plot:
        draw(args.out, measured, args.plot)
    return 0


def _run_all(args: argparse.Namespace) -> None:
    """Every variant in a process of its own, as many at once as there are cores."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, __file__, str(args.corpus), "--out", str(args.out)]
    command += ["--tokens", args.tokens, "--lr", str(args.lr), "--evals", str(args.evals)]
    start = partial(subprocess.run, check=True, env=environment)
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        list(pool.map(start, [[*command, "--one", name] for name in args.variants]))


def _run_one(args: argparse.Namespace) -> None:
    tokens = parse_size(args.tokens) // STEP_TOKENS * STEP_TOKENS
    config = {
        "model": MODEL,
        "data": {"path": str(args.corpus / "train")},
        "curriculum": {
            **VARIANTS[args.one],
            "tokens_per_step": STEP_TOKENS,
            "total_tokens": tokens,
        },
        "parallel": {"tokens_per_rank": STEP_TOKENS, "engine": "ddp"},
        "optim": {"lr": args.lr, "warmup_steps": 20, "min_lr_ratio": 0.05},
        # On a CPU with bf16 instructions half of the seconds of fp32.
        "train": {"run_dir": str(args.out / args.one), "device": "cpu", "dtype": "bf16"},
    }
    path = args.out / f"{args.one}.yaml"
    OmegaConf.save(OmegaConf.create(config), path)
    run_variant(
        args.one,
        path,
        heldout=args.corpus / "heldout",
        out=args.out,
        num_evals=args.evals,
        train_len=TRAIN_LEN,
    )


if __name__ == "__main__":
    sys.exit(main())
