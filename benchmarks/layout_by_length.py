"""A layout that follows the length against one fixed ring for all lengths, as JSON.

    python benchmarks/layout_by_length.py [--ranks 4] [--max-len 8k] [--rounds 3]

The same curriculum, twice: context-parallel degree by length (`cp_degree: auto`), and the degree of
the longest rows for all. Real training over gloo ranks of one thread, a step of each length in
turn, first the one layout, then the other, every other round the other way round; each round gives
one ratio a length. More ranks than cores only make both slower.
"""

import argparse
import json
import os
import statistics
import tempfile
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from omegaconf import OmegaConf
from torch.multiprocessing.spawn import spawn

from ringctx.config_file import load_config, parse_size
from ringctx.data.tokenizers import ByteTokenizer
from ringctx.data.writer import DatasetWriter
from ringctx.parallel.mesh import World
from ringctx.run_plan import make_run_plan
from ringctx.trainer import Trainer

MIN_LEN = 256
_MODEL = {"dim": 128, "num_layers": 2, "num_heads": 2, "mlp_dim": 384}


def main(arguments: Sequence[str] | None = None) -> None:
    """Start the ranks; print rank 0's result."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=int, default=4, help="(%(default)s)")
    parser.add_argument("--max-len", default="8k", help="longest rows (%(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="(%(default)s)")
    args = parser.parse_args(arguments)
    longest = parse_size(args.max_len)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        _write(folder, longest=longest, ranks=args.ranks)
        spawn(_rank, (str(folder), args.ranks, args.rounds), nprocs=args.ranks)
        lengths = json.loads((folder / "result.json").read_text())
    config = {"ranks": args.ranks, "threads_per_rank": 1, "cores": os.cpu_count(), "model": _MODEL}
    print(json.dumps({"config": config, "lengths": lengths}, indent=2))


def _write(folder: Path, *, longest: int, ranks: int) -> None:
    """Documents with a piece of every length, and the two configs."""
    rng, tokenizer = np.random.default_rng(0), ByteTokenizer()
    with DatasetWriter(folder / "dataset", tokenizer=tokenizer) as writer:
        for _ in range(longest // MIN_LEN):
            ids = np.append(rng.integers(0, 256, 2 * longest - 2), tokenizer.end_id)
            writer.add(ids, np.array([len(ids)]))
        writer.finish(built_from={})
    for name, degree in (("auto", "auto"), ("fixed", ranks)):
        config = {
            "model": _MODEL,
            "data": {"path": str(folder / "dataset")},
            "curriculum": {
                "odds": "uniform",
                "cycles": 1,
                "min_len": MIN_LEN,
                "max_len": longest,
                "tokens_per_step": longest,
            },
            "parallel": {"tokens_per_rank": longest // ranks, "cp_degree": degree},
            "train": {"run_dir": str(folder / name), "device": "cpu"},
        }
        OmegaConf.save(OmegaConf.create(config), folder / f"{name}.yaml")


def _rank(rank: int, folder: str, ranks: int, rounds: int) -> None:
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    torch.set_num_threads(1)
    store = f"file://{folder}/store"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=ranks)
    world = World(rank=rank, size=ranks, device=torch.device("cpu"))
    trainers = {
        name: Trainer(
            make_run_plan(load_config(Path(folder) / f"{name}.yaml"), world_size=ranks), world=world
        )
        for name in ("auto", "fixed")
    }
    lengths = trainers["auto"].run.plan.bucket_lens
    found = {length: _compare(trainers, length, rounds) for length in lengths}
    if rank == 0:
        (Path(folder) / "result.json").write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


def _compare(trainers: dict[str, Trainer], length: int, rounds: int) -> dict[str, Any]:
    """Paired step times of one length; the first round is a warm-up."""
    times: dict[str, list[float]] = defaultdict(list)
    moved: dict[str, int] = {}
    for number in range(rounds + 1):
        order = list(trainers)[:: 1 if number % 2 else -1]
        for name in order:
            trainer = trainers[name]
            step = int(trainer.run.plan.steps_of(length)[0])
            batches = trainer.loader.step(step)
            record = trainer.train_step(trainer.run.plan.step(step), batches)
            times[name].append(record.step_time_s)
            moved[name] = record.moved_bytes
    ratios = [a / b for a, b in zip(times["fixed"][1:], times["auto"][1:], strict=True)]
    layouts = {name: trainer.mesh.for_length(length).sizes for name, trainer in trainers.items()}
    return {
        "cp_auto": layouts["auto"].cp_degree,
        "cp_fixed": layouts["fixed"].cp_degree,
        "fixed_over_auto": round(statistics.median(ratios), 3),
        "range": [round(min(ratios), 3), round(max(ratios), 3)],
        "moved_bytes_auto": moved["auto"],
        "moved_bytes_fixed": moved["fixed"],
    }


if __name__ == "__main__":
    main()
