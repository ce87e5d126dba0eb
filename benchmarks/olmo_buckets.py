"""Our buckets and those of ai2-olmo-core on the same tokens, piece by piece, as JSON.

    python benchmarks/olmo_buckets.py                      (after peers/install_olmo.sh)
    python benchmarks/olmo_buckets.py DATASET --max-lens 8k,64k,128k

Both read the same raw files: a dataset's token files under the name `.npy` are what OLMo takes, and
`ringctx data import` takes them back. A piece is (file, start, length). Each `max_len` is compared
as the files are, and the last one once more without the last token, so that the last document has
no end marker. Without DATASET the Python standard library is taken, as bytes.
Every piece that only one side has is counted under the rule that it comes from; `unexplained` must
be 0, otherwise the exit code is 1.
"""

import argparse
import json
import subprocess
import sys
import sysconfig
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ringctx.config_file import parse_size
from ringctx.data import Dataset, build_dataset, import_dataset, open_dataset
from ringctx.data.decompose import decompose

__all__ = ["OlmoPieces", "compare", "our_pieces"]

_PEERS = Path(__file__).resolve().parent / "peers"

# Why one side has a piece or a target that the other has not.
_RULES = {
    "last_document_without_end_marker": "OLMo cuts at end ids and forgets what follows the last; "
    "ours keeps it as a document",
    "cut_by_both_but_in_none_of_their_buckets": "OLMo keeps lengths in a type that holds "
    "max_len - 1: 65,536 wraps to 0 in uint16, so its longest bucket is empty",
    "targets": "OLMo predicts a piece's tokens from within the piece, so all but the first; ours "
    "peeks one token beyond, so all but a document's first",
}


@dataclass(frozen=True, eq=False)
class OlmoPieces:
    """What `peers/olmo.py` wrote."""

    instances: NDArray[np.int64]
    """`[n, 3]`: file, start, length."""
    bucket_len: NDArray[np.int64]
    """`[n]`: length of the bucket that an instance is in; 0: none, so that it is never served."""
    targets: dict[int, int]
    """Targets of one instance, by bucket."""
    errors: tuple[str, ...] = ()
    """Buckets that it could not read, and why."""
    seconds: float = 0.0


def main() -> int:
    """Print the comparison."""
    args = _arguments()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        dataset = open_dataset(args.dataset or _standard_library(folder / "built"))
        max_lens = [parse_size(text) for text in args.max_lens.split(",")]
        cases = [(max_len, False) for max_len in max_lens] + [(max_lens[-1], True)]
        results = [
            _case(dataset, folder / f"case-{i}", args, max_len=max_len, cut=cut)
            for i, (max_len, cut) in enumerate(cases)
        ]
    head = {
        "tokenizer": dataset.tokenizer,
        "documents": dataset.num_documents,
        "tokens": dataset.num_tokens,
        "longest_document": int(dataset.lengths.max()),
        "min_len": parse_size(args.min_len),
    }
    print(json.dumps({"dataset": head, "rules": _RULES, "cases": results}, indent=2))
    return 1 if any(sum(case["unexplained"].values()) for case in results) else 0


def our_pieces(dataset: Dataset, *, min_len: int, max_len: int) -> NDArray[np.int64]:
    """All pieces of a dataset: file, start in the file, length, 1 if it ends its document."""
    lengths = dataset.lengths
    counts = [shard.documents for shard in dataset.manifest.shards]
    file_of = np.repeat(np.arange(len(counts)), counts)
    before = np.cumsum([0, *(shard.tokens for shard in dataset.manifest.shards)])
    first = np.cumsum(lengths) - lengths - before[file_of]
    rows = []
    for bucket in decompose(lengths, min_len=min_len, max_len=max_len).buckets:
        document, start = bucket.locate(np.arange(len(bucket)), lengths).T
        length = np.full(len(bucket), bucket.length)
        ends = start + length == lengths[document]
        rows.append(np.stack([file_of[document], first[document] + start, length, ends], axis=1))
    return np.concatenate(rows) if rows else np.empty((0, 4), dtype=np.int64)


def compare(
    ours: NDArray[np.int64], theirs: OlmoPieces, *, num_tokens: int, unended: NDArray[np.int64]
) -> dict[str, Any]:
    """Count equal pieces, and those of one side only by their reason.

    Args:
        ours: `[n, 4]`, see `our_pieces`.
        theirs: the other side.
        num_tokens: in the files.
        unended: `[files]`, where the last document starts that has no end marker; the number of
            the file's tokens if there is none.
    """
    served = theirs.instances[theirs.bucket_len == theirs.instances[:, 2]]
    mine, found, all_found = (_keys(rows) for rows in (ours, served, theirs.instances))
    missing = ~np.isin(mine, found)
    lost_tail = missing & (ours[:, 1] >= unended[ours[:, 0]])
    in_no_bucket = missing & np.isin(mine, all_found)
    strange = missing & ~lost_tail & ~in_no_bucket
    extra = ~np.isin(found, mine)
    equal = ours[~missing]
    return {
        "pieces": {"ours": len(ours), "theirs": len(served), "equal": len(equal)},
        "only_ours": {
            "last_document_without_end_marker": _tokens(ours[lost_tail]),
            "cut_by_both_but_in_none_of_their_buckets": _tokens(ours[in_no_bucket]),
        },
        "unexplained": {"only_ours": int(strange.sum()), "only_theirs": int(extra.sum())},
        "dropped_tokens": {
            "ours": num_tokens - int(ours[:, 2].sum()),
            "theirs": num_tokens - int(served[:, 2].sum()),
        },
        "targets": {
            "ours": int((ours[:, 2] - ours[:, 3]).sum()),
            "theirs": int(sum(theirs.targets[int(length)] for length in served[:, 2])),
            "of_equal_pieces_ours": int((equal[:, 2] - equal[:, 3]).sum()),
            "of_equal_pieces_theirs": int(sum(theirs.targets[int(n)] for n in equal[:, 2])),
        },
    }


def _tokens(pieces: NDArray[np.int64]) -> dict[str, Any]:
    lengths, counts = np.unique(pieces[:, 2], return_counts=True)
    by_length = {str(n): int(count) for n, count in zip(lengths, counts, strict=True)}
    return {"pieces": len(pieces), "tokens": int(pieces[:, 2].sum()), "by_length": by_length}


def _keys(pieces: NDArray[np.int64]) -> NDArray[np.int64]:
    """One number a piece: lengths are powers of two, files have less than 2^40 tokens."""
    exponent = np.log2(np.maximum(pieces[:, 2], 1)).astype(np.int64)
    keys: NDArray[np.int64] = (pieces[:, 0] << 46) + (pieces[:, 1] << 6) + exponent
    return keys


def _case(
    dataset: Dataset, folder: Path, args: argparse.Namespace, *, max_len: int, cut: bool
) -> dict[str, Any]:
    """One comparison: the files under OLMo's name, their import, and OLMo's buckets of them."""
    min_len = parse_size(args.min_len)
    files = _as_npy(dataset, folder, cut=cut)
    begin = time.perf_counter()
    report = import_dataset(
        files,
        folder / "imported",
        format="olmo",
        dtype="uint16" if dataset.manifest.dtype == "uint16" else "uint32",
        end_id=dataset.end_id,
        vocab_size=dataset.vocab_size,
    )
    imported_s = time.perf_counter() - begin
    imported = open_dataset(folder / "imported")
    begin = time.perf_counter()
    ours = our_pieces(imported, min_len=min_len, max_len=max_len)
    pieces_s = time.perf_counter() - begin
    theirs = _run_olmo(imported, files, folder, args, max_len=max_len)
    longer = imported.lengths[imported.lengths > max_len]
    return {
        "max_len": max_len,
        "last_token_cut_off": cut,
        "documents_longer_than_max_len": {
            "documents": len(longer),
            "pieces_of_max_len": int((longer // max_len).sum()),
        },
        **compare(ours, theirs, num_tokens=report.tokens, unended=_unended(imported)),
        "errors_of_their_buckets": list(theirs.errors),
        "seconds": {
            "ours_import": round(imported_s, 3),
            "ours_pieces": round(pieces_s, 3),
            "theirs_prepare": round(theirs.seconds, 3),
        },
    }


def _as_npy(dataset: Dataset, folder: Path, *, cut: bool) -> list[Path]:
    """The token files under names that OLMo takes; `cut`: the last one without its last token."""
    folder.mkdir()
    files = []
    for shard in range(len(dataset.manifest.shards)):
        original = (dataset.path / f"shard-{shard:05d}.bin").resolve()
        files.append(folder / f"tokens-{shard:05d}.npy")
        files[-1].symlink_to(original)
    if cut:
        tokens = np.fromfile(files[-1], dtype=dataset.manifest.dtype)
        files[-1].unlink()
        tokens[:-1].tofile(files[-1])
    return files


def _unended(dataset: Dataset) -> NDArray[np.int64]:
    """Start of the last document of each file that does not end with the end marker."""
    starts, last = [], -1
    for shard in dataset.manifest.shards:
        last += shard.documents
        document = dataset.document(last)
        missing = len(document) if document[-1] != dataset.end_id else 0
        starts.append(shard.tokens - missing)
    return np.array(starts, dtype=np.int64)


def _run_olmo(
    dataset: Dataset, files: list[Path], folder: Path, args: argparse.Namespace, *, max_len: int
) -> OlmoPieces:
    out = folder / "olmo.npz"
    asked = {
        "files": [str(file) for file in files],
        "dtype": dataset.manifest.dtype,
        "end_id": dataset.end_id,
        "vocab_size": dataset.vocab_size,
        "min_len": parse_size(args.min_len),
        "max_len": max_len,
        "work_dir": str(folder / "work"),
        "out": str(out),
    }
    script = str(_PEERS / "olmo.py")
    subprocess.run([args.peer_python, script, json.dumps(asked)], check=True, timeout=1800)
    with np.load(out) as found:
        return OlmoPieces(
            instances=found["instances"],
            bucket_len=found["bucket_len"],
            targets={int(length): int(n) for length, n in found["targets"]},
            errors=tuple(map(str, found["errors"])),
            seconds=float(found["seconds"]),
        )


def _standard_library(out: Path) -> Path:
    entries = sorted(Path(sysconfig.get_path("stdlib")).iterdir())
    inputs = [
        entry
        for entry in entries
        if entry.suffix == ".py" or (entry.is_dir() and not entry.name.endswith("-packages"))
    ]
    build_dataset(inputs, out, glob="**/*.py")
    return out


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("dataset", nargs="?", help="(the Python standard library, as bytes)")
    parser.add_argument("--min-len", default="256")
    parser.add_argument("--max-lens", default="8k,32k,64k,128k")
    parser.add_argument(
        "--peer-python", default=str(_PEERS / ".venv-olmo" / "bin" / "python"), metavar="PYTHON"
    )
    args = parser.parse_args()
    if not Path(args.peer_python).exists():
        parser.error(f"{args.peer_python} does not exist: run peers/install_olmo.sh")
    return args


if __name__ == "__main__":
    sys.exit(main())
