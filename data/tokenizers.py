"""Text to ids and back: `bytes`, or a tiktoken-style file of ranks.

The end-of-document id comes right after the tokenizer's own ids, so the first n ranks of a file
are a whole, smaller tokenizer: ranks are merge order.
Price: bytes cost nothing; tiktoken encodes about 5 M tokens a second on one core.
Source: github.com/openai/tiktoken (engine, file format, and the pattern of cl100k_base).
"""

import base64
import binascii
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import tiktoken
from numpy.typing import NDArray

from ringctx.data.manifest import hash_json, new_hash
from ringctx.errors import ConfigError, DatasetError

__all__ = ["ByteTokenizer", "RankTokenizer", "Tokenizer", "load_tokenizer"]

# How text is split before merging, whatever the rank file: words with their leading space, digits
# by three, punctuation, white space. It is part of the tokenizer's hash.
PATTERN = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+"
    r"| ?[^\s\p{L}\p{N}]++[\r\n]*+|\s++$|\s*[\r\n]|\s+(?!\S)|\s"
)

_NUM_BYTES = 256
_WITH_COUNT = re.compile(r"(.+):(\d+)")


class Tokenizer(Protocol):
    """What a build needs of a tokenizer."""

    @property
    def name(self) -> str:
        """What `load_tokenizer` was given."""

    @property
    def hash(self) -> str:
        """Hex name of the mapping from text to ids."""

    @property
    def vocab_size(self) -> int:
        """Number of ids, the end-of-document id included."""

    @property
    def end_id(self) -> int:
        """The end-of-document id."""

    def encode(self, text: str) -> NDArray[np.unsignedinteger[Any]]:
        """Ids of a text, without the end-of-document id."""

    def decode(self, ids: Sequence[int] | NDArray[Any]) -> str:
        """Text of ids; end-of-document ids vanish, broken UTF-8 becomes the replacement sign."""


class ByteTokenizer:
    """UTF-8 bytes are the ids; 256 ends a document."""

    name = "bytes"
    vocab_size = _NUM_BYTES + 1
    end_id = _NUM_BYTES

    @property
    def hash(self) -> str:
        """Hex name of the mapping."""
        return hash_json("utf-8 bytes")

    def encode(self, text: str) -> NDArray[np.unsignedinteger[Any]]:
        """Ids of a text, without the end-of-document id."""
        return np.frombuffer(text.encode(), dtype=np.uint8)

    def decode(self, ids: Sequence[int] | NDArray[Any]) -> str:
        """Text of ids; end-of-document ids vanish, broken UTF-8 becomes the replacement sign."""
        return bytes(i for i in map(int, ids) if i != self.end_id).decode(errors="replace")


class RankTokenizer:
    """Byte-pair merges by rank, run by tiktoken."""

    def __init__(self, name: str, ranks: dict[bytes, int]) -> None:
        """Take ranks 0..n-1; n becomes the end-of-document id."""
        self.name = name
        self.end_id = len(ranks)
        self.vocab_size = len(ranks) + 1
        self.hash = _hash_ranks(ranks)
        self._encoding = tiktoken.Encoding(
            name, pat_str=PATTERN, mergeable_ranks=ranks, special_tokens={}
        )

    def encode(self, text: str) -> NDArray[np.unsignedinteger[Any]]:
        """Ids of a text, without the end-of-document id."""
        try:
            return self._encoding.encode_to_numpy(text, disallowed_special=())
        except ValueError:
            # The pattern backtracks once a character over a run of white space, and gives up
            # beyond some hundred thousand.
            if len(text) < 2:
                raise
            middle = len(text) // 2
            return np.concatenate([self.encode(text[:middle]), self.encode(text[middle:])])

    def decode(self, ids: Sequence[int] | NDArray[Any]) -> str:
        """Text of ids; end-of-document ids vanish, broken UTF-8 becomes the replacement sign."""
        return self._encoding.decode([i for i in map(int, ids) if i != self.end_id])


def load_tokenizer(spec: str) -> Tokenizer:
    """Make the tokenizer that a text names.

    Args:
        spec: `bytes`, the path of a rank file (on each line a base64 token and its rank), or
            `path:n` for the first n ranks of that file.

    Raises:
        ConfigError: if the name is not known, or n does not fit the file.
        DatasetError: if the file is broken, naming the line.
    """
    if spec == ByteTokenizer.name:
        return ByteTokenizer()
    path, count = Path(spec), None
    match = _WITH_COUNT.fullmatch(spec)
    if match and not path.exists():
        path, count = Path(match[1]), int(match[2])
    if not path.is_file():
        raise ConfigError(
            f"tokenizer '{spec}' is neither 'bytes' nor a rank file; a rank file may be followed "
            "by ':n' for its first n ranks"
        )
    ranks = _read_ranks(path)
    if count is not None:
        if not _NUM_BYTES <= count <= len(ranks):
            raise ConfigError(
                f"tokenizer '{spec}': {path} holds {len(ranks):,} ranks, so n must lie between "
                f"{_NUM_BYTES} and {len(ranks):,}"
            )
        ranks = {token: rank for token, rank in ranks.items() if rank < count}
    _check_bytes(path, ranks)
    return RankTokenizer(spec, ranks)


def _read_ranks(path: Path) -> dict[bytes, int]:
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(path.read_bytes().splitlines(), start=1):
        if not line.strip():
            continue
        try:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except (ValueError, binascii.Error) as error:
            raise DatasetError(
                f"{path}:{number}: expected a base64 token and its rank, got {line[:40]!r}"
            ) from error
    if sorted(ranks.values()) != list(range(len(ranks))):
        raise DatasetError(
            f"{path}: its {len(ranks):,} different tokens do not have the ranks 0 to "
            f"{len(ranks) - 1:,}, each once; the file is cut or mixed up"
        )
    return ranks


def _check_bytes(path: Path, ranks: dict[bytes, int]) -> None:
    missing = [byte for byte in range(_NUM_BYTES) if bytes([byte]) not in ranks]
    if missing:
        raise DatasetError(
            f"{path}: {len(missing)} of the 256 single bytes have no rank (the first is "
            f"{missing[0]:#04x}), so some text could not be encoded; use a complete file"
        )


def _hash_ranks(ranks: dict[bytes, int]) -> str:
    digest = new_hash()
    digest.update(PATTERN.encode())
    for token in sorted(ranks, key=ranks.__getitem__):
        digest.update(len(token).to_bytes(4, "little") + token)
    return digest.hexdigest()
