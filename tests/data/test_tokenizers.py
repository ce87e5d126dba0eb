"""Text to ids and back, and rank files that are broken."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ringctx.data.tokenizers import ByteTokenizer, RankTokenizer, Tokenizer, load_tokenizer
from ringctx.errors import ConfigError, DatasetError
from tests.data.samples import write_ranks

RANKS = {bytes([byte]): byte for byte in range(256)} | {b"th": 256, b"the": 257, b"  ": 258}
TOKENIZERS: list[Tokenizer] = [ByteTokenizer(), RankTokenizer("ranks", RANKS)]

# Without surrogates, which are no text.
TEXTS = st.text(st.characters(exclude_categories=["Cs"]))


@pytest.mark.parametrize("tokenizer", TOKENIZERS, ids=["bytes", "ranks"])
@given(text=TEXTS)
def test_decoding_gives_the_text_back(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    assert int(ids.max(initial=0)) < tokenizer.end_id == tokenizer.vocab_size - 1
    assert tokenizer.decode(np.append(ids, tokenizer.end_id)) == text


def test_ids_of_a_rank_file_are_its_merged_ranks(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(str(write_ranks(tmp_path / "r.tiktoken")))
    assert tokenizer.encode("the thin").tolist() == [257, ord(" "), 256, 259]
    assert (tokenizer.end_id, tokenizer.vocab_size) == (260, 261)


def test_the_first_n_ranks_are_a_smaller_tokenizer(tmp_path: Path) -> None:
    path = write_ranks(tmp_path / "r.tiktoken")
    whole, part = load_tokenizer(str(path)), load_tokenizer(f"{path}:257")
    assert part.vocab_size == 258 and part.hash != whole.hash
    assert part.encode("the").tolist() == [256, ord("e")]
    assert part.decode(part.encode("the thin")) == "the thin"


def test_the_hash_follows_the_ranks_and_not_the_path(tmp_path: Path) -> None:
    paths = [write_ranks(tmp_path / name) for name in ("a", "b")]
    other = write_ranks(tmp_path / "c", merges=[b"xy"])
    one, two, three = (load_tokenizer(str(path)).hash for path in (*paths, other))
    assert one == two != three


@pytest.mark.parametrize("text", [" " * 1_000_000 + "x", "a" * 300_000, "\n\t" * 200_000])
def test_long_runs_of_one_character_are_encoded(text: str) -> None:
    tokenizer = TOKENIZERS[1]
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_text_that_looks_like_a_special_token_is_text() -> None:
    tokenizer = TOKENIZERS[1]
    assert tokenizer.decode(tokenizer.encode("<|endoftext|>")) == "<|endoftext|>"


def test_rejects_a_name_that_is_neither_known_nor_a_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"'gpt-9' is neither 'bytes' nor a rank file"):
        load_tokenizer("gpt-9")


@pytest.mark.parametrize("count", [255, 261])
def test_rejects_more_ranks_than_there_are_or_too_few_for_all_bytes(
    tmp_path: Path, count: int
) -> None:
    path = write_ranks(tmp_path / "r.tiktoken")
    with pytest.raises(ConfigError, match="between 256 and 260"):
        load_tokenizer(f"{path}:{count}")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("only-one-word", r":261: expected a base64 token and its rank"),
        ("!!!! 260", r":261: expected a base64 token"),
        ("eHg= many", r":261: expected a base64 token"),
        ("eHg= 300", "ranks 0 to 260, each once"),
        ("eHg= 3", "ranks 0 to 260, each once"),
        ("YQ== 260", "ranks 0 to 259, each once"),
    ],
)
def test_a_broken_rank_file_is_named_with_its_line(tmp_path: Path, line: str, message: str) -> None:
    path = write_ranks(tmp_path / "r.tiktoken")
    path.write_text(path.read_text() + line + "\n")
    with pytest.raises(DatasetError, match=message):
        load_tokenizer(str(path))


def test_a_rank_file_without_all_bytes_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "short.tiktoken"
    path.write_text("YQ== 0\nYg== 1\n")
    with pytest.raises(DatasetError, match=r"254 of the 256 single bytes .* first is 0x00"):
        load_tokenizer(str(path))
