"""The data engine against its targets: cutting, planning, reading, encoding, importing, as JSON.

    python benchmarks/data_engine.py [--text FOLDER] [--tokenizer FILE[:N]] [--rounds 5]

One core, one thread. Times are CPU seconds of this process, so that other work on the machine does
not count; where processes are compared, wall seconds of runs in turn. Each entry holds the median
over the rounds, the target of the design, and whether it is met.
"""

import argparse
import json
import os
import statistics
import sysconfig
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ringctx.data import Loader, Plan, RowShard, build_dataset, import_dataset, open_dataset
from ringctx.data.check import check_dataset
from ringctx.data.decompose import decompose
from ringctx.data.tokenizers import ByteTokenizer, load_tokenizer
from ringctx.data.writer import DatasetWriter
from ringctx.parallel import positions

ROW_LENS = (256, 4096, 65_536)
_STEP_TOKENS, _TOKENS_PER_RANK = 2**21, 2**14
_PLANNED_DOCUMENTS, _IMPORT_TOKENS, _TEXT_BYTES = 1_000_000, 2**27, 30_000_000


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure everything and print it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--text", type=Path, default=Path(sysconfig.get_paths()["stdlib"]))
    parser.add_argument("--tokenizer", default="bytes", help="rank file for the encoding rows")
    parser.add_argument("--rounds", type=int, default=5, help="(%(default)s)")
    parser.add_argument("--documents", type=int, default=10_000_000, help="to cut (%(default)s)")
    args = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_tokens(folder / "dataset", num_tokens=2**26)
        rows = {
            **cutting(args.documents, args.rounds),
            **planning(args.rounds),
            **reading(folder / "dataset", args.rounds),
            **opening(folder / "dataset", args.rounds),
            **importing(folder, args.rounds),
            **encoding(args.text, args.tokenizer, folder, args.rounds),
        }
    print(json.dumps(rows, indent=2))


def cutting(num_documents: int, rounds: int) -> dict[str, Any]:
    """Decomposition from the documents' lengths."""
    rng = np.random.default_rng(0)
    lengths = rng.lognormal(7.5, 1.2, num_documents).astype(np.int64) + 1
    seconds = _median(lambda: decompose(lengths, min_len=256, max_len=131_072), rounds)
    return {
        "decomposition": _row(lengths.sum() / seconds / 1e9, 2.0, "Gtokens/s"),
        "decomposition of all documents": _row(seconds, 5.0, "s", documents=num_documents),
    }


def planning(rounds: int) -> dict[str, Any]:
    """A plan of a million steps."""
    made = _Lengths(np.full(_PLANNED_DOCUMENTS, 2**13 - 1, dtype=np.int64))
    rule = {"min_len": 256, "max_len": 4096, "tokens_per_step": 4096, "cycles": 8}
    plans: list[Plan] = []
    seconds = _median(lambda: plans.append(Plan(made, rule)), rounds)
    steps = len(plans[-1])
    one = (
        _median(lambda: [plans[-1].step(t) for t in range(0, steps, max(1, steps // 100))], rounds)
        / 100
    )
    return {
        "plan": _row(seconds * 1e6 / steps, 30.0, "s a million steps", steps=steps),
        "a step of the plan": {"value": round(one * 1e3, 3), "unit": "ms"},
    }


def reading(path: Path, rounds: int) -> dict[str, Any]:
    """Steps from memory maps to tensors, whole rows and shares of a ring."""
    dataset, found = open_dataset(path), {}
    for length in ROW_LENS:
        rule = {"min_len": length, "max_len": length, "tokens_per_step": _STEP_TOKENS, "cycles": 1}
        plan = Plan(dataset, rule)
        layouts = (("contiguous", 1), ("zigzag", 8), ("striped", 8))
        for layout, cp in layouts if length > _TOKENS_PER_RANK else layouts[:1]:
            shard = RowShard(
                dp_rank=0,
                dp_degree=1,
                rows=max(1, _TOKENS_PER_RANK // length),
                positions=positions(length, rank=0, world_size=cp, layout=layout).numpy(),
            )
            loader = Loader(dataset, plan, shard_for=partial(_first, shard))
            seconds = _median(partial(loader.step, 0), rounds)
            target = 100.0 if cp == 1 else None
            found[f"gather, rows of {length:,}, {layout} cp {cp}"] = _row(
                _STEP_TOKENS / cp / seconds / 1e6, target, "Mtokens/s of a rank"
            )
    return found


def opening(path: Path, rounds: int) -> dict[str, Any]:
    """Opening with a warm cache, and reading every byte."""
    size = open_dataset(path).manifest.num_bytes
    return {
        "open": _row(_median(lambda: open_dataset(path), rounds), 2.0, "s", bytes=size),
        "check": _row(size / _median(lambda: check_dataset(path), rounds) / 1e9, 0.5, "GB/s"),
    }


def importing(folder: Path, rounds: int) -> dict[str, Any]:
    """A raw token file as a dataset, beside reading the file from the disk."""
    source, count = folder / "raw.npy", _IMPORT_TOKENS
    tokens = np.random.default_rng(0).integers(0, 50_000, count, dtype=np.uint16)
    tokens[999::1000] = tokens[-1] = 50_000
    tokens.tofile(source)
    number = iter(range(10_000))

    def run() -> None:
        import_dataset(
            [source], folder / f"import-{next(number)}", end_id=50_000, vocab_size=50_001
        )

    size, disk = source.stat().st_size / 1e9, []
    for _ in range(rounds):
        _forget(source)
        begin = time.perf_counter()
        source.read_bytes()
        disk.append(size / (time.perf_counter() - begin))
    speed = size / _median(run, rounds)
    from_disk = statistics.median(disk)
    return {
        "import": _row(speed, from_disk / 2, "GB/s", disk=round(from_disk, 3)),
    }


def _forget(path: Path) -> None:
    """Drop a file from the page cache."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def encoding(text: Path, tokenizer: str, folder: Path, rounds: int) -> dict[str, Any]:
    """A build beside the bare tokenizer on the same texts, in turn, over one and two processes."""
    texts, bare, number = _texts(text), load_tokenizer(tokenizer), iter(range(10_000))
    source = folder / "text.jsonl"
    source.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    tokens = sum(len(bare.encode(text)) for text in texts)

    def build(workers: int) -> None:
        out = folder / f"build-{next(number)}"
        build_dataset([source], out, tokenizer=tokenizer, workers=workers)

    alone = _median(lambda: [bare.encode(text) for text in texts], rounds)
    ratio = alone / _median(lambda: build(1), rounds)
    wall: dict[int, list[float]] = {1: [], 2: []}
    for _ in range(rounds):
        for workers, times in wall.items():
            begin = time.perf_counter()
            build(workers)
            times.append(time.perf_counter() - begin)
    two = statistics.median(a / b for a, b in zip(wall[1], wall[2], strict=True))
    return {
        "encoding, of the bare tokenizer": _row(
            ratio, 0.9, "", tokenizer=Path(tokenizer).name, tokens=tokens
        ),
        "encoding, two processes over one (wall)": _row(two, None, "", cores=os.cpu_count()),
    }


def _texts(folder: Path) -> list[str]:
    """The Python sources of a folder, several times over if they are few."""
    texts = [file.read_bytes().decode(errors="ignore") for file in sorted(folder.rglob("*.py"))]
    size = sum(map(len, texts))
    return texts * max(1, -(-_TEXT_BYTES // max(size, 1)))


def write_tokens(path: Path, *, num_tokens: int) -> None:
    """A dataset of one shard in documents of 65,537 tokens."""
    rng, tokenizer = np.random.default_rng(0), ByteTokenizer()
    length = 65_537
    with DatasetWriter(path, tokenizer=tokenizer) as writer:
        for _ in range(num_tokens // length):
            writer.add(rng.integers(0, 256, length, dtype=np.uint16), np.array([length]))
        writer.finish(built_from={})


def _first(shard: RowShard, _: int) -> RowShard:
    """The same share of every row length."""
    return shard


class _Lengths:
    """Documents of which only the lengths are asked for."""

    fingerprint, vocab_size, source_names, sources = "lengths", 1, (), None
    has_loss_bits = False

    def __init__(self, lengths: NDArray[np.int64]) -> None:
        self.lengths = lengths

    def read_spans(self, *_: Any) -> Any:
        raise AssertionError("a plan reads no tokens")

    read_loss = read_spans


def _median(run: Callable[[], object], rounds: int) -> float:
    """CPU seconds, after one run that does not count."""
    run()
    times = []
    for _ in range(rounds):
        begin = time.process_time()
        run()
        times.append(time.process_time() - begin)
    return statistics.median(times)


def _row(value: float, target: float | None, unit: str, **more: Any) -> dict[str, Any]:
    row: dict[str, Any] = {"value": round(float(value), 3), "unit": unit, **more}
    if target is not None:
        # Seconds are to be below their target, everything else above.
        row["target"] = target
        row["met"] = bool(value <= target if unit.startswith("s") else value >= target)
    return row


if __name__ == "__main__":
    main()
