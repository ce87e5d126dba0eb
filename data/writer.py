"""Write a dataset so that it is either whole or not there.

Everything goes to `OUT.tmp-<pid>` beside OUT: token files as they come, the manifest last; files
and folder are fsynced, then one rename makes the dataset. A build that is killed leaves only the
temporary folder, which `open_dataset` refuses by name.
Price: one pass; token hashes are taken while writing. Memory, of the open shard alone: 8 bytes a
document, 2 more where sources are named, and one bit a token where some are no targets.
"""

import logging
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Self

import numpy as np
from numpy.typing import NDArray

from ringctx.data.manifest import (
    MANIFEST_NAME,
    Manifest,
    ShardInfo,
    hash_file,
    hash_sample,
    loss_name,
    new_hash,
    offsets_name,
    source_name_problem,
    sources_name,
    token_dtype,
    tokens_name,
)
from ringctx.data.vocabulary import Vocabulary
from ringctx.errors import ConfigError, DatasetError

__all__ = ["DatasetWriter"]

SHARD_BYTES = 2**30

logger = logging.getLogger(__name__)


class DatasetWriter:
    """Context manager: `add` documents, then `finish`; without `finish` nothing remains."""

    def __init__(
        self,
        out: str | Path,
        *,
        tokenizer: Vocabulary,
        sources: Sequence[str] = (),
        shard_bytes: int = SHARD_BYTES,
        dtype: str | None = None,
    ) -> None:
        """Prepare to write the dataset `out`, which must not exist.

        Args:
            out: the dataset folder to make; missing parents are made too.
            tokenizer: gives vocabulary size, ids and names.
            sources: names of the sources that documents come from; none if empty.
            shard_bytes: a new shard starts after the `add` that reaches this size.
            dtype: of the ids on disk, as linked files have it; None: the smallest that holds all.

        Raises:
            ConfigError: if `out` exists, or names of sources are wrong.
        """
        self.out = Path(out)
        self._refuse_existing()
        if problem := source_name_problem(sources):
            raise ConfigError(problem)
        self._names = tuple(sources)
        self._tokenizer = tokenizer
        self._dtype = token_dtype(tokenizer.vocab_size) if dtype is None else np.dtype(dtype)
        self._shard_bytes = shard_bytes
        self._folder = self.out.with_name(f"{self.out.name}.tmp-{os.getpid()}")
        self._shards: list[ShardInfo] = []
        self._file: BinaryIO | None = None
        self._hash = new_hash()
        self._lengths: list[NDArray[np.int64]] = []
        self._sources: list[NDArray[np.uint16]] = []
        self._loss: _LossBits | None = None
        self._shard_size = 0

    def __enter__(self) -> Self:
        """Make the temporary folder."""
        self.out.parent.mkdir(parents=True, exist_ok=True)
        for stale in sorted(self.out.parent.glob(f"{self.out.name}.tmp-*")):
            logger.warning("%s is left from another build; delete it if none is running", stale)
        try:
            self._folder.mkdir()
        except FileExistsError as error:
            raise ConfigError(f"{self._folder} is left from another build: delete it") from error
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Remove what was not finished."""
        try:
            if self._file is not None:
                # On a full disk, what is still to be written fails once more.
                self._file.close()
        finally:
            shutil.rmtree(self._folder, ignore_errors=True)

    def add(
        self,
        tokens: NDArray[Any],
        lengths: NDArray[np.int64],
        sources: NDArray[np.uint16] | None = None,
        loss: NDArray[np.bool_] | None = None,
    ) -> None:
        """Append documents.

        Args:
            tokens: `[n]`, the documents one after another, each with its end-of-document id.
            lengths: int64 `[documents]`, tokens of each, all positive.
            sources: uint16 `[documents]`, index into the names; needed exactly where there are any.
            loss: bool `[n]`, which tokens may be targets; None: all.
        """
        assert (sources is not None) == bool(self._names), (self._names, sources)
        assert loss is None or len(loss) == len(tokens), (len(tokens), loss)
        assert lengths.sum() == len(tokens) and (lengths > 0).all(), (len(tokens), lengths)
        if not len(lengths):
            return
        if self._file is None:
            self._file = (self._folder / tokens_name(len(self._shards))).open("wb")
        payload = np.ascontiguousarray(tokens, dtype=self._dtype).data
        self._file.write(payload)
        self._hash.update(payload)
        self._lengths.append(lengths)
        if sources is not None:
            assert len(sources) == len(lengths) and sources.max() < len(self._names), sources
            self._sources.append(sources.astype(np.uint16))
        self._add_loss(len(tokens), loss)
        self._shard_size += payload.nbytes
        if self._shard_size >= self._shard_bytes:
            self._close_shard()

    def link(self, tokens: Path, *, offsets: NDArray[np.int64], tokens_hash: str) -> None:
        """Append a shard whose tokens stay where they are, behind a symbolic link.

        Args:
            tokens: absolute path of a file of raw ids in the type on disk.
            offsets: int64 `[documents + 1]`, rising from 0 to the number of tokens.
            tokens_hash: of the whole file.
        """
        self._close_shard()
        shard = len(self._shards)
        (self._folder / tokens_name(shard)).symlink_to(tokens)
        path = self._folder / offsets_name(shard)
        np.save(path, offsets)
        self._shards.append(
            ShardInfo(
                tokens=int(offsets[-1]),
                documents=len(offsets) - 1,
                bytes=int(offsets[-1]) * self._dtype.itemsize,
                tokens_hash=tokens_hash,
                tokens_sample=hash_sample(tokens),
                offsets_hash=_seal(path),
            )
        )

    def finish(self, *, built_from: dict[str, Any]) -> Manifest:
        """Write the manifest and give the dataset its name.

        Raises:
            DatasetError: if no document was added.
            ConfigError: if `out` has come to exist meanwhile.
        """
        self._close_shard()
        if not self._shards:
            raise DatasetError(f"no document is left for {self.out}: nothing was written")
        manifest = Manifest(
            dtype=self._dtype.name,
            vocab_size=self._tokenizer.vocab_size,
            end_id=self._tokenizer.end_id,
            tokenizer=self._tokenizer.name,
            tokenizer_hash=self._tokenizer.hash,
            shards=tuple(self._shards),
            sources=self._names,
            built_from=built_from,
        )
        path = self._folder / MANIFEST_NAME
        path.write_text(manifest.to_json())
        _fsync(path)
        _fsync(self._folder)
        self._refuse_existing()
        self._folder.rename(self.out)
        _fsync(self.out.parent)
        return manifest

    def _close_shard(self) -> None:
        if self._file is None:
            return
        self._file.close()
        self._file = None
        shard = len(self._shards)
        tokens, offsets = self._folder / tokens_name(shard), self._folder / offsets_name(shard)
        ends = np.cumsum(np.concatenate([np.zeros(1, dtype=np.int64), *self._lengths]))
        np.save(offsets, ends)
        _fsync(tokens)
        self._shards.append(
            ShardInfo(
                tokens=int(ends[-1]),
                documents=len(ends) - 1,
                bytes=self._shard_size,
                tokens_hash=self._hash.hexdigest(),
                tokens_sample=hash_sample(tokens),
                offsets_hash=_seal(offsets),
                sources_hash=self._save_sources(self._folder / sources_name(shard)),
                loss_hash=self._save_loss(self._folder / loss_name(shard)),
            )
        )
        self._hash, self._lengths, self._shard_size = new_hash(), [], 0
        self._sources, self._loss = [], None

    def _add_loss(self, tokens: int, loss: NDArray[np.bool_] | None) -> None:
        """Keep bits from the shard's first token that is no target on."""
        if self._loss is None and loss is not None and not loss.all():
            self._loss = _LossBits(targets=self._shard_size // self._dtype.itemsize)
        if self._loss is not None:
            self._loss.add(np.ones(tokens, dtype=np.bool_) if loss is None else loss)

    def _save_sources(self, path: Path) -> str | None:
        if not self._names:
            return None
        np.save(path, np.concatenate(self._sources))
        return _seal(path)

    def _save_loss(self, path: Path) -> str | None:
        if self._loss is None:
            return None
        path.write_bytes(self._loss.to_bytes())
        return _seal(path)

    def _refuse_existing(self) -> None:
        if self.out.exists() or self.out.is_symlink():
            raise ConfigError(
                f"{self.out} exists already, and a build never overwrites: choose another --out, "
                "or delete it yourself"
            )


class _LossBits:
    """One bit a token, packed as it comes; bits that fill no byte yet wait for the next."""

    def __init__(self, *, targets: int) -> None:
        """Start with this many targets."""
        self._packed = bytearray(b"\xff" * (targets // 8))
        self._rest = np.ones(targets % 8, dtype=np.bool_)

    def add(self, bits: NDArray[np.bool_]) -> None:
        joined = np.concatenate([self._rest, bits])
        whole = len(joined) // 8 * 8
        self._packed += np.packbits(joined[:whole], bitorder="little").tobytes()
        self._rest = joined[whole:]

    def to_bytes(self) -> bytes:
        return bytes(self._packed) + np.packbits(self._rest, bitorder="little").tobytes()


def _seal(path: Path) -> str:
    """Put a file on disk for good, and hash it."""
    _fsync(path)
    return hash_file(path)


def _fsync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
