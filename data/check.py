"""Is a dataset what its manifest says? Sizes, hashes, offsets, token ids.

`shard_problems` is the quick look that every open takes; `check_dataset` reads everything and
lists all problems instead of stopping at the first.
Price: the quick look hashes everything up to 256 MiB, and 6 MiB a shard beyond.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ringctx.data.manifest import (
    Manifest,
    hash_file,
    hash_sample,
    loss_name,
    offsets_name,
    read_manifest,
    sources_name,
    tokens_name,
)
from ringctx.errors import DatasetError

__all__ = ["Problem", "check_dataset", "shard_problems"]

_IDS_AT_ONCE = 2**24


@dataclass(frozen=True)
class Problem:
    """Something that is not what the manifest says."""

    text: str
    """Names the file, what was expected and what is there."""
    is_change: bool = False
    """The tokens are others than when the dataset was made, and can still be read."""


def check_dataset(path: str | Path) -> list[str]:
    """Verify every byte of a dataset.

    Returns:
        One message a problem, each naming its file; empty when the dataset is sound.
    """
    folder = Path(path)
    try:
        manifest = read_manifest(folder)
    except DatasetError as error:
        return [str(error)]
    problems = []
    for shard in range(len(manifest.shards)):
        found = [problem.text for problem in shard_problems(folder, manifest, shard, full=True)]
        problems += found or _id_problems(folder, manifest, shard)
    return problems


def shard_problems(
    folder: Path, manifest: Manifest, shard: int, *, full: bool
) -> Iterator[Problem]:
    """What is wrong with one shard's files, most basic first.

    Args:
        folder: the dataset.
        manifest: its manifest.
        shard: number of the shard.
        full: hash all tokens, not only the sampled blocks. Offsets are always hashed in full.
    """
    info = manifest.shards[shard]
    tokens, offsets = folder / tokens_name(shard), folder / offsets_name(shard)
    missing = [path for path in (tokens, offsets) if not path.is_file()]
    if missing:
        yield from (Problem(_missing(path)) for path in missing)
        return
    size = tokens.stat().st_size
    if size != info.bytes or info.bytes != info.tokens * np.dtype(manifest.dtype).itemsize:
        yield Problem(
            f"{_named(tokens)} holds {size:,} bytes, but the manifest says {info.bytes:,} for "
            f"{info.tokens:,} tokens of {manifest.dtype}"
        )
        return
    if full:
        changes = _hash_problem(tokens, info.tokens_hash, hash_file(tokens))
    else:
        changes = _hash_problem(tokens, info.tokens_sample, hash_sample(tokens))
    yield from (Problem(text, is_change=True) for text in changes)
    yield from map(Problem, _side_problems(folder, manifest, shard))


def _side_problems(folder: Path, manifest: Manifest, shard: int) -> Iterator[str]:
    """What is wrong with offsets, and with sources and loss bits where a shard has them."""
    info, offsets = manifest.shards[shard], folder / offsets_name(shard)
    actual = hash_file(offsets)
    yield from _hash_problem(offsets, info.offsets_hash, actual)
    if actual == info.offsets_hash:
        yield from _offset_problems(offsets, documents=info.documents, tokens=info.tokens)
    for path, expected in (
        (folder / sources_name(shard), info.sources_hash),
        (folder / loss_name(shard), info.loss_hash),
    ):
        if expected is None:
            continue
        if not path.is_file():
            yield _missing(path)
        else:
            yield from _hash_problem(path, expected, hash_file(path))
    if (info.sources_hash is None) != (not manifest.sources):
        yield f"{folder / sources_name(shard)}: the manifest names sources only for some shards"


def _missing(path: Path) -> str:
    if path.is_symlink():
        return f"{path.readlink()} is missing, which {path} links to; put it back"
    return f"{path} is missing"


def _named(path: Path) -> str:
    """A file, and where its content really is if it was imported."""
    return f"{path} (a link to {path.readlink()})" if path.is_symlink() else str(path)


def _hash_problem(path: Path, expected: str, actual: str) -> Iterator[str]:
    if actual != expected:
        yield (
            f"{_named(path)} was changed after the build: hash {actual}, the manifest says "
            f"{expected}"
        )


def _offset_problems(path: Path, *, documents: int, tokens: int) -> Iterator[str]:
    try:
        offsets = np.load(path, mmap_mode="r")
    except (ValueError, EOFError) as error:
        yield f"{path} is not a file of offsets: {error}"
        return
    if offsets.shape != (documents + 1,) or offsets.dtype != np.int64:
        yield (
            f"{path} holds {offsets.dtype} {list(offsets.shape)}, expected int64 [{documents + 1}]"
        )
    elif offsets[0] != 0 or offsets[-1] != tokens:
        yield f"{path} runs from {offsets[0]:,} to {offsets[-1]:,}, expected 0 to {tokens:,}"
    elif (shrinking := np.flatnonzero(offsets[1:] <= offsets[:-1])).size:
        yield f"{path}: document {shrinking[0]:,} of this shard has no tokens"


def _id_problems(folder: Path, manifest: Manifest, shard: int) -> list[str]:
    """The first token id of a shard that the vocabulary does not have."""
    path = folder / tokens_name(shard)
    tokens = np.memmap(path, dtype=manifest.dtype, mode="r")
    for start in range(0, len(tokens), _IDS_AT_ONCE):
        block = tokens[start : start + _IDS_AT_ONCE]
        if int(block.max()) < manifest.vocab_size:
            continue
        at = start + int(np.argmax(block >= manifest.vocab_size))
        offsets = np.load(folder / offsets_name(shard), mmap_mode="r")
        document = int(np.searchsorted(offsets, at, side="right")) - 1
        return [
            f"{path}: token id {tokens[at]} at document {document:,} of this shard, offset "
            f"{at - int(offsets[document]):,}, but vocab_size is {manifest.vocab_size:,}"
        ]
    return []
