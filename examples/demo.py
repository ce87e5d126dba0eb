"""Train for real in a few minutes: `make demo`.

Builds a dataset from the Python sources on this machine, trains a byte-level transformer over two
processes with sequences of 256 to 16,384 tokens, stops half-way and resumes, compares the layout
with one process, and draws the run.
"""

import subprocess
import sys
import sysconfig
import time
from importlib.resources import files
from pathlib import Path

import numpy as np
import torch

from ringctx.config_file import load_config
from ringctx.data import Dataset, open_dataset
from ringctx.tracking import read_metrics

CONFIG = str(files("ringctx.launch") / "configs" / "demo.yaml")
DATASET = Path("datasets/python")
RANKS = "2"


def main(overrides: list[str]) -> int:
    begin = time.monotonic()
    settings = [f"train.run_dir={free_folder(Path('runs/demo'))}", *overrides]
    config = load_config(CONFIG, settings)
    run_dir, half = Path(config.train.run_dir), max(1, (config.train.steps or 2) // 2)
    build_dataset()

    heading("Train half-way over two processes: short sequences alone, long ones on a ring of two")
    ringctx("train", "--nproc", RANKS, CONFIG, *settings, f"train.stop_after={half}")
    heading("Go on from the checkpoint, as after an interruption")
    ringctx("train", "--nproc", RANKS, CONFIG, *settings)
    heading("Is the layout exact? One step of each length against one process")
    ringctx("verify", "--nproc", RANKS, CONFIG, *settings)
    heading("Pictures of the run")
    ringctx("plot", str(run_dir))
    return conclude(run_dir, seconds=time.monotonic() - begin)


def build_dataset() -> None:
    """Every Python file of the standard library and of torch is a document."""
    if DATASET.exists():
        heading(f"{DATASET} is there from an earlier run: using it")
        ringctx("data", "check", str(DATASET))
    else:
        heading("Make a dataset from the Python sources on this machine, one document a file")
        library = Path(sysconfig.get_paths()["stdlib"])
        inputs = [str(path) for path in sorted(library.iterdir()) if is_module(path)]
        inputs.append(str(Path(torch.__file__).parent))
        ringctx("data", "build", *inputs, "--glob", "**/*.py", "--out", str(DATASET))
    ringctx("data", "stats", str(DATASET), "--max-len", "16k")


def is_module(path: Path) -> bool:
    """A module of the library itself, not its tests or what is installed beside it."""
    return path.suffix == ".py" or ((path / "__init__.py").exists() and path.name != "test")


def ringctx(*arguments: str) -> None:
    """Run a command of the library and show it."""
    shown = [argument.replace(str(Path.home()), "~") for argument in arguments]
    if len(shown) > 12:
        shown[4:-6] = ["..."]
    print(f"$ ringctx {' '.join(shown)}", flush=True)
    subprocess.run([sys.executable, "-m", "ringctx.launch.cli", *arguments], check=True)


def heading(text: str) -> None:
    print(f"\n== {text}", flush=True)


def free_folder(wanted: Path) -> Path:
    """The name itself, or the first of name-2, name-3, ... that is not taken."""
    folder, number = wanted, 1
    while folder.exists():
        number += 1
        folder = wanted.with_name(f"{wanted.name}-{number}")
    return folder


def unigram_entropy(dataset: Dataset) -> float:
    """What a model pays per token, in nats, that knows only how frequent each token is."""
    counts = np.zeros(dataset.vocab_size, dtype=np.int64)
    for index in range(dataset.num_documents):
        counts += np.bincount(dataset.document(index), minlength=dataset.vocab_size)
    shares = counts[counts > 0] / counts.sum()
    return float(-(shares * np.log(shares)).sum())


def conclude(run_dir: Path, *, seconds: float) -> int:
    """Say what came out; 1 if the loss is not clearly below unigram, or no step ran on a ring."""
    records = read_metrics(run_dir)
    last = [record["loss"] for record in records[-16:]]
    final, unigram = sum(last) / len(last), unigram_entropy(open_dataset(DATASET))
    ring = [record for record in records if record["cp_degree"] > 1]
    heading(f"Done in {seconds / 60:.1f} minutes")
    print(
        f"loss {records[0]['loss']:.2f} -> {final:.2f} nats per byte (mean of the last "
        f"{len(last)} steps); unigram entropy of the data: {unigram:.2f}\n"
        f"{len(ring)} of {len(records)} steps ran on a ring and moved "
        f"{sum(record['moved_bytes'] for record in ring) / 2**20:,.0f} MiB between the ranks\n"
        f"metrics: {run_dir}/metrics.jsonl   pictures: {run_dir}/report/\n"
        "\nTry next:\n"
        f"  .venv/bin/ringctx train --nproc 2 {CONFIG} train.run_dir=runs/longer "
        "train.steps=400 train.dtype=bf16\n"
        f"  .venv/bin/ringctx train --nproc 4 {CONFIG} train.run_dir=runs/four "
        "parallel.tokens_per_rank=4k\n"
        f"  .venv/bin/ringctx config show {CONFIG}"
    )
    degrees = {record["cp_degree"] for record in records}
    return 0 if final < 0.9 * unigram and degrees == {1, int(RANKS)} else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
