"""What a dataset folder says about itself: `dataset.json`, and the hashes that hold it to that.

One JSON file names the token type, the tokenizer and, for every shard, its counts and content
hashes. A checksum over the whole file finds edits; the fingerprint covers content only, so a
dataset keeps it when it is moved or built again from other paths.
Price: hashing runs at about 1 GB/s; a sampled hash reads 6 MiB of a shard, whatever its size.
"""

import dataclasses
import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ringctx.errors import DatasetError

__all__ = [
    "FORMAT_VERSION",
    "MANIFEST_NAME",
    "Manifest",
    "ShardInfo",
    "hash_file",
    "hash_json",
    "hash_sample",
    "loss_name",
    "new_hash",
    "offsets_name",
    "read_manifest",
    "source_name_problem",
    "sources_name",
    "token_dtype",
    "tokens_name",
]

FORMAT_VERSION = 1
MANIFEST_NAME = "dataset.json"
DTYPES = ("uint16", "uint32")
MAX_SOURCES = 2**16

_SOURCE_NAME = re.compile(r"[A-Za-z0-9._-]+")
_MIB = 2**20
_SAMPLE_BLOCKS = 64
_SAMPLE_BLOCK_BYTES = 64 * 2**10


@dataclass(frozen=True, kw_only=True)
class ShardInfo:
    """The files of one shard: tokens, document offsets, and sources and loss bits if any."""

    tokens: int
    documents: int
    bytes: int
    """Size of the token file."""
    tokens_hash: str
    tokens_sample: str
    """Hash of the first and last MiB and of blocks between, for a quick look at large files."""
    offsets_hash: str
    sources_hash: str | None = None
    """Of the file of sources; None where the dataset names none."""
    loss_hash: str | None = None
    """Of the file of loss bits; None where every token of the shard may be a target."""


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """The content of `dataset.json`."""

    version: int = FORMAT_VERSION
    dtype: str
    vocab_size: int
    """Ids of the full tokenizer, the end-of-document id included."""
    end_id: int
    """The id appended to every document."""
    tokenizer: str
    tokenizer_hash: str
    shards: tuple[ShardInfo, ...]
    sources: tuple[str, ...] = ()
    """Names of the sources that the documents come from."""
    built_from: dict[str, Any] = field(default_factory=dict)
    """Inputs and options of the build, and what it skipped."""

    @property
    def num_tokens(self) -> int:
        """Tokens of all shards."""
        return sum(shard.tokens for shard in self.shards)

    @property
    def num_documents(self) -> int:
        """Documents of all shards."""
        return sum(shard.documents for shard in self.shards)

    @property
    def num_bytes(self) -> int:
        """Bytes of all token files."""
        return sum(shard.bytes for shard in self.shards)

    @property
    def fingerprint(self) -> str:
        """Hex name of the content: equal exactly when tokens, documents and ids are."""
        content = self._content()
        for key in ("tokenizer", "built_from"):
            del content[key]
        return hash_json(content)

    def to_json(self) -> str:
        """The text of `dataset.json`."""
        content = self._content()
        return json.dumps({**content, "checksum": hash_json(content)}, indent=2) + "\n"

    def _content(self) -> dict[str, Any]:
        """All fields; what is optional and absent is left out, so that it changes no hash."""
        content = dataclasses.asdict(self)
        if not self.sources:
            del content["sources"]
        for shard in content["shards"]:
            for key in ("sources_hash", "loss_hash"):
                if shard[key] is None:
                    del shard[key]
        return content


def tokens_name(shard: int) -> str:
    """File name of a shard's tokens: raw little-endian ids, nothing else."""
    return f"shard-{shard:05d}.bin"


def offsets_name(shard: int) -> str:
    """File name of a shard's offsets: int64 `[documents + 1]`, from 0 to the number of tokens."""
    return f"shard-{shard:05d}.off.npy"


def sources_name(shard: int) -> str:
    """File name of a shard's sources: uint16 `[documents]`, indices into the manifest's names."""
    return f"shard-{shard:05d}.src.npy"


def loss_name(shard: int) -> str:
    """File name of a shard's loss bits: one a token, the lowest bit of a byte first."""
    return f"shard-{shard:05d}.loss.bin"


def source_name_problem(names: Sequence[str]) -> str | None:
    """What is wrong with names of sources, if anything; `@` and `=` mean something elsewhere."""
    for name in names:
        if not _SOURCE_NAME.fullmatch(name):
            return f"source name {name!r} may hold letters, digits, '.', '_' and '-' only"
    if len(set(names)) < len(names):
        return f"source names {', '.join(names)} are not all different"
    if len(names) > MAX_SOURCES:
        return f"{len(names):,} sources are more than {MAX_SOURCES:,}"
    return None


def token_dtype(vocab_size: int) -> "np.dtype[np.unsignedinteger[Any]]":
    """The smallest type on disk that holds every id of the vocabulary."""
    return np.dtype("<u2" if vocab_size <= 2**16 else "<u4")


def new_hash() -> "hashlib.blake2b":
    """The hash used throughout: BLAKE2b with 128 bits."""
    return hashlib.blake2b(digest_size=16)


def hash_json(value: Any) -> str:
    """Hash of a JSON value, independent of the order of keys."""
    digest = new_hash()
    digest.update(json.dumps(value, sort_keys=True).encode())
    return digest.hexdigest()


def hash_file(path: Path) -> str:
    """Hash of all bytes of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, new_hash).hexdigest()


def hash_sample(path: Path) -> str:
    """Hash of the size, the first and last MiB and 64 evenly spaced blocks of a file."""
    size = path.stat().st_size
    spans = [(0, _MIB), (max(size - _MIB, 0), _MIB)]
    spans += [(size * i // _SAMPLE_BLOCKS, _SAMPLE_BLOCK_BYTES) for i in range(_SAMPLE_BLOCKS)]
    digest = new_hash()
    digest.update(str(size).encode())
    with path.open("rb") as file:
        for start, length in spans:
            file.seek(start)
            digest.update(file.read(length))
    return digest.hexdigest()


def read_manifest(folder: Path) -> Manifest:
    """Read and check `dataset.json`.

    Raises:
        DatasetError: if it is missing, unreadable, of another version, or was edited.
    """
    path = folder / MANIFEST_NAME
    raw = _load(folder, path)
    version = raw.get("version")
    if version != FORMAT_VERSION:
        raise DatasetError(
            f"{path}: format version {version!r}, but this ringctx reads version "
            f"{FORMAT_VERSION}; build the dataset again with 'ringctx data build'"
        )
    checksum = raw.pop("checksum", None)
    actual = hash_json(raw)
    if checksum != actual:
        raise DatasetError(
            f"{path} was changed after the build (checksum {checksum}, content gives {actual}); "
            "restore it, or build the dataset again"
        )
    try:
        shards = tuple(ShardInfo(**shard) for shard in raw.pop("shards"))
        manifest = Manifest(**raw | {"sources": tuple(raw.get("sources", ()))}, shards=shards)
    except (KeyError, TypeError) as error:
        raise DatasetError(f"{path} is not a dataset manifest: {error}") from error
    counts = [manifest.vocab_size, *(n for s in shards for n in (s.tokens, s.documents, s.bytes))]
    if not shards or not all(isinstance(n, int) and n > 0 for n in counts):
        raise DatasetError(f"{path} is not a dataset manifest: its counts are {counts}")
    if manifest.dtype not in DTYPES:
        raise DatasetError(f"{path}: dtype {manifest.dtype!r} is none of {', '.join(DTYPES)}")
    _check_sources(path, manifest)
    return manifest


def _check_sources(path: Path, manifest: Manifest) -> None:
    named = bool(manifest.sources)
    strings = all(isinstance(name, str) for name in manifest.sources)
    if not strings or source_name_problem(manifest.sources):
        raise DatasetError(f"{path} is not a dataset manifest: its sources are {manifest.sources}")
    if any((shard.sources_hash is not None) != named for shard in manifest.shards):
        raise DatasetError(f"{path} is not a dataset manifest: not all shards have sources")


def _load(folder: Path, path: Path) -> dict[str, Any]:
    if not folder.is_dir():
        raise DatasetError(f"dataset {folder} does not exist: make it with 'ringctx data build'")
    if not path.is_file():
        raise DatasetError(
            f"{folder} holds no {MANIFEST_NAME}: it is no dataset, or its build was stopped; "
            "make one with 'ringctx data build'"
        )
    try:
        raw = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise DatasetError(
            f"{path} is not valid JSON ({error}); restore it, or build the dataset again"
        ) from error
    if not isinstance(raw, dict):
        raise DatasetError(f"{path} is not a dataset manifest: it holds a {type(raw).__name__}")
    return raw
