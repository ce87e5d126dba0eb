"""ai2-olmo-core's buckets of token files, written to a file; runs in its own environment.

    peers/.venv-olmo/bin/python peers/olmo.py '{"files": [...], ...}'      (install_olmo.sh)

Written are all instances as `[n, 3]` (file, start, length), the length that the index of its
buckets gives each (0: it is in none), by bucket the targets of one instance, and the errors of
buckets that cannot be read.
"""

import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from olmo_core.data.numpy_dataset import NumpyVSLDataset  # type: ignore[import-not-found]
from olmo_core.data.utils import get_labels  # type: ignore[import-not-found]

__all__ = ["main"]

_IGNORED = -100


def main() -> None:
    """Prepare the dataset that the first argument describes, and write what came of it."""
    asked = json.loads(sys.argv[1])
    dataset = NumpyVSLDataset(
        *asked["files"],
        pad_token_id=asked["end_id"],
        eos_token_id=asked["end_id"],
        vocab_size=asked["vocab_size"],
        min_sequence_length=asked["min_len"],
        max_sequence_length=asked["max_len"],
        dtype=np.dtype(asked["dtype"]).type,
    )
    dataset.work_dir = Path(asked["work_dir"])
    begin = time.perf_counter()
    dataset.prepare()
    seconds = time.perf_counter() - begin
    instances = np.concatenate([_instances(dataset, i) for i in range(len(dataset.paths))])
    bucket_len = np.zeros(len(instances), dtype=np.int64)
    targets, errors = [], []
    for length in dataset.all_sequence_lengths:
        try:
            bucket = np.asarray(dataset.get_instance_bucket(length), dtype=np.int64)
        except ValueError as error:
            errors.append(f"{length}: {error}")
            continue
        bucket_len[bucket] = length
        if len(bucket):
            labels = get_labels({"input_ids": dataset[int(bucket[0])]["input_ids"][None]})
            targets.append((length, int((labels != _IGNORED).sum())))
    np.savez(
        asked["out"],
        instances=instances,
        bucket_len=bucket_len,
        targets=np.array(targets, dtype=np.int64).reshape(-1, 2),
        errors=np.array(errors, dtype=np.str_),
        seconds=seconds,
    )


def _instances(dataset: Any, file: int) -> np.ndarray:
    raw = np.fromfile(
        dataset._get_document_indices_path(dataset.paths[file]), dtype=dataset.indices_dtype
    )
    spans = raw.reshape(-1, 2).astype(np.int64)
    return np.stack([np.full(len(spans), file), spans[:, 0], spans[:, 1] - spans[:, 0]], axis=1)


if __name__ == "__main__":
    main()
