"""Is a dataset what its manifest says? Sizes, hashes, offsets, sources, loss bits, token ids.

`shard_problems` is the quick look that every open takes; `check_dataset` reads everything and
lists all problems instead of stopping at the first.
Price: the quick look hashes everything up to 256 MiB, and beyond that 6 MiB of tokens a
shard; offsets, sources and loss bits (1/16 of the tokens' bytes) always whole.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

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
    """Something wrong with a file of a dataset."""

    path: Path
    text: str
    """Names the file, what was expected and what is there."""
    changed: bool = False
    """The content is another than was built, but may be read; otherwise it cannot be."""


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
    problems: list[str] = []
    for shard in range(len(manifest.shards)):
        # A file that was changed may break rules besides: it is told once.
        found: dict[Path, str] = {}
        readable = True
        for problem in shard_problems(folder, manifest, shard, full=True):
            found.setdefault(problem.path, problem.text)
            readable &= problem.changed
        problems += found.values()
        if readable:
            problems += _id_problems(folder, manifest, shard)
    return problems


def shard_problems(
    folder: Path, manifest: Manifest, shard: int, *, full: bool
) -> Iterator[Problem]:
    """What is wrong with one shard's files, most basic first.

    Args:
        folder: the dataset.
        manifest: its manifest.
        shard: number of the shard.
        full: hash all tokens, not only the sampled blocks. The other files are always hashed whole.
    """
    info = manifest.shards[shard]
    tokens, offsets = folder / tokens_name(shard), folder / offsets_name(shard)
    sources = folder / sources_name(shard) if info.sources_hash else None
    loss = folder / loss_name(shard) if info.loss_hash else None
    missing = [p for p in (tokens, offsets, sources, loss) if p is not None and not p.is_file()]
    if missing:
        yield from (Problem(path, _missing(path)) for path in missing)
        return
    size = info.tokens * np.dtype(manifest.dtype).itemsize
    yield from _size_problem(tokens, size, f"{info.tokens:,} tokens of {manifest.dtype}")
    if full:
        yield from _hash_problem(tokens, info.tokens_hash, hash_file(tokens))
    else:
        yield from _hash_problem(tokens, info.tokens_sample, hash_sample(tokens))
    yield from _hash_problem(offsets, info.offsets_hash, hash_file(offsets))
    yield from _offset_problems(offsets, documents=info.documents, tokens=info.tokens)
    if sources is not None:
        yield from _hash_problem(sources, info.sources_hash, hash_file(sources))
        yield from _source_problems(sources, info.documents, len(manifest.sources))
    if loss is not None:
        yield from _size_problem(loss, -(-info.tokens // 8), f"one bit of {info.tokens:,} tokens")
        yield from _hash_problem(loss, info.loss_hash, hash_file(loss))


def _size_problem(path: Path, expected: int, content: str) -> Iterator[Problem]:
    size = path.stat().st_size
    if size != expected:
        yield Problem(
            path,
            f"{_named(path)} holds {size:,} bytes, but the manifest says {expected:,} for "
            f"{content}",
        )


def _hash_problem(path: Path, expected: str | None, actual: str) -> Iterator[Problem]:
    if actual != expected:
        yield Problem(
            path,
            f"{_named(path)} was changed after the build: hash {actual}, the manifest says "
            f"{expected}",
            changed=True,
        )


def _missing(path: Path) -> str:
    if path.is_symlink():
        return f"{path.readlink()} is missing, which {path} links to; put it back"
    return f"{path} is missing"


def _named(path: Path) -> str:
    """A file, and where its content really is if it was imported."""
    return f"{path} (a link to {path.readlink()})" if path.is_symlink() else str(path)


def _offset_problems(path: Path, *, documents: int, tokens: int) -> Iterator[Problem]:
    offsets = _array(path, np.int64, documents + 1)
    if isinstance(offsets, Problem):
        yield offsets
    elif offsets[0] != 0 or offsets[-1] != tokens:
        yield Problem(
            path, f"{path} runs from {offsets[0]:,} to {offsets[-1]:,}, expected 0 to {tokens:,}"
        )
    elif (shrinking := np.flatnonzero(offsets[1:] <= offsets[:-1])).size:
        yield Problem(path, f"{path}: document {shrinking[0]:,} of this shard has no tokens")


def _source_problems(path: Path, documents: int, names: int) -> Iterator[Problem]:
    sources = _array(path, np.uint16, documents)
    if isinstance(sources, Problem):
        yield sources
    elif (strange := np.flatnonzero(sources >= names)).size:
        yield Problem(
            path,
            f"{path}: document {strange[0]:,} of this shard has source {sources[strange[0]]}, but "
            f"the manifest names {names}",
        )


def _array(path: Path, dtype: type[np.generic], length: int) -> NDArray[Any] | Problem:
    """The array in a file, or why it is not one of this type and length."""
    expected = f"{np.dtype(dtype)} [{length}]"
    try:
        array: NDArray[Any] = np.load(path, mmap_mode="r")
    except (ValueError, EOFError) as error:
        return Problem(path, f"{path} is no array file of {expected}: {error}")
    if array.shape != (length,) or array.dtype != dtype:
        held = f"{array.dtype} {list(array.shape)}"
        return Problem(path, f"{path} holds {held}, expected {expected}")
    return array


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
