"""A `tokenizer.json` gives the library's own ids, and nothing that the text does not hold."""

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

from ringctx.data.documents import open_dataset
from ringctx.data.ingest import build_dataset
from ringctx.data.tokenizers import Tokenizer, load_tokenizer, name_end_token
from ringctx.errors import ConfigError, DatasetError

TEXTS = ["the thing in the end", "then they think that this is thin", "ein Ding, äöü"] * 3
END = "<|end|>"

# Without surrogates, which are no text.
ANY_TEXT = st.text(st.characters(exclude_categories=["Cs"]))


def trained(*, special: bool = True) -> tokenizers.Tokenizer:
    """Byte-level BPE with an end token and a mask token, as models ship it."""
    inner = tokenizers.Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=270, initial_alphabet=alphabet, show_progress=False)
    inner.train_from_iterator(TEXTS, trainer)
    added = [tokenizers.AddedToken(text, special=special) for text in (END, "<mask>")]
    inner.add_special_tokens(added) if special else inner.add_tokens(added)
    return inner


def save(folder: Path, inner: tokenizers.Tokenizer, *, eos: Any = END) -> Path:
    folder.mkdir(exist_ok=True)
    inner.save(str(folder / "tokenizer.json"))
    if eos is not None:
        (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": eos}))
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("hf") / "bpe", trained())


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Tokenizer:
    return load_tokenizer(str(folder))


@given(text=ANY_TEXT)
def test_ids_are_the_librarys_own_and_decode_to_the_text(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    assert ids.tolist() == trained_once().encode(text, add_special_tokens=False).ids
    assert tokenizer.decode(np.append(ids, tokenizer.end_id)) == text


_TRAINED: list[tokenizers.Tokenizer] = []


def trained_once() -> tokenizers.Tokenizer:
    if not _TRAINED:
        _TRAINED.append(trained())
        _TRAINED[0].encode_special_tokens = True
    return _TRAINED[0]


def test_a_folder_and_its_file_are_the_same_tokenizer(folder: Path, tokenizer: Tokenizer) -> None:
    by_file = load_tokenizer(str(folder / "tokenizer.json"))
    assert (by_file.hash, by_file.end_id) == (tokenizer.hash, tokenizer.end_id)
    assert by_file.name == str(folder / "tokenizer.json")


def test_added_tokens_count_in_the_vocabulary(tokenizer: Tokenizer) -> None:
    inner = trained()
    assert tokenizer.end_id == inner.token_to_id(END) == 270
    assert tokenizer.vocab_size == 272


def test_the_hash_is_that_of_the_file(folder: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    assert load_tokenizer(str(copy)).hash == tokenizer.hash
    file = copy / "tokenizer.json"
    file.write_text(file.read_text() + " ")
    assert load_tokenizer(str(copy)).hash != tokenizer.hash


@pytest.mark.parametrize("special", [True, False], ids=["special", "plain added token"])
@pytest.mark.parametrize("text", [END, f"a{END}b\0{END}{END}", f"<mask> {END[:-1]}"])
def test_an_end_token_spelled_out_in_a_text_is_text(
    tmp_path: Path, special: bool, text: str
) -> None:
    tokenizer = load_tokenizer(str(save(tmp_path / "t", trained(special=special))))
    ids = tokenizer.encode(text)
    assert tokenizer.end_id not in ids
    assert tokenizer.decode(ids) == text


def test_special_tokens_that_are_meant_are_special(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode(f"the<mask>{END}", special=True).tolist()
    assert ids == [*tokenizer.encode("the").tolist(), 271, 270]
    assert 271 not in tokenizer.encode(f"the<mask>{END}")


def test_what_the_file_says_for_prompts_is_not_done_to_texts(tmp_path: Path) -> None:
    inner = trained()
    expected = inner.encode("the end", add_special_tokens=False).ids
    inner.enable_truncation(2)
    inner.enable_padding(length=16)
    inner.post_processor = processors.TemplateProcessing(
        single=f"<mask> $A {END}", special_tokens=[("<mask>", 271), (END, 270)]
    )
    tokenizer = load_tokenizer(str(save(tmp_path / "t", inner)))
    assert tokenizer.encode("the end").tolist() == expected


@pytest.mark.parametrize("eos", [END, {"content": END, "special": True}])
def test_the_end_token_comes_from_the_configuration_beside_the_file(
    tmp_path: Path, eos: Any
) -> None:
    assert load_tokenizer(str(save(tmp_path / "t", trained(), eos=eos))).end_id == 270


def test_the_end_token_can_be_named_and_wins(folder: Path) -> None:
    spec = name_end_token(str(folder), "<mask>")
    tokenizer = load_tokenizer(spec)
    assert (tokenizer.end_id, tokenizer.name) == (271, f"{folder}:<mask>")
    assert load_tokenizer(f"{folder / 'tokenizer.json'}:<mask>").end_id == 271


@pytest.mark.parametrize("eos", [None, 5, {"special": True}])
def test_rejects_a_tokenizer_that_does_not_say_how_documents_end(tmp_path: Path, eos: Any) -> None:
    path = save(tmp_path / "t", trained(), eos=eos)
    message = r"which token ends a document: put tokenizer_config\.json .* --end-token"
    with pytest.raises(ConfigError, match=message):
        load_tokenizer(str(path))


def test_rejects_an_end_token_that_is_not_in_the_vocabulary(folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"has no token '</s>' .* special tokens are <\|end\|>"):
        load_tokenizer(f"{folder}:</s>")


def test_rejects_an_end_token_that_stands_for_unknown_text(tmp_path: Path) -> None:
    inner = tokenizers.Tokenizer(models.WordLevel({"a": 0, "</s>": 1}, unk_token="</s>"))
    tokenizer = load_tokenizer(str(save(tmp_path / "t", inner, eos="</s>")))
    assert tokenizer.encode("a").tolist() == [0]
    with pytest.raises(DatasetError, match="for text that it does not know; choose another"):
        tokenizer.encode("b")


@pytest.mark.parametrize("spec", ["bytes", "ranks", "named"])
def test_rejects_an_end_token_where_there_is_nothing_to_choose(
    folder: Path, tmp_path: Path, spec: str
) -> None:
    (tmp_path / "r.tiktoken").write_text("")
    specs = {"bytes": "bytes", "ranks": str(tmp_path / "r.tiktoken"), "named": f"{folder}:<mask>"}
    with pytest.raises(
        ConfigError, match=r"--end-token '</s>': tokenizer .*(its own|own;|already)"
    ):
        name_end_token(specs[spec], "</s>")


def test_without_the_library_the_extra_to_install_is_named(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(ConfigError, match=r"pip install 'ringctx\[hf\]'"):
        load_tokenizer(str(folder))


@pytest.mark.parametrize("content", ["", "{}", '{"model": 5}', "[" * 100_000])
@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
def test_broken_files_are_named(tmp_path: Path, content: str, name: str) -> None:
    path = save(tmp_path / "t", trained())
    (path / name).write_text(content)
    with pytest.raises((DatasetError, ConfigError), match=name.replace(".", r"\.")):
        load_tokenizer(str(path))


def test_a_folder_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"holds no tokenizer\.json"):
        load_tokenizer(str(tmp_path))


@pytest.mark.parametrize("workers", [1, 2])
def test_a_build_keeps_a_name_that_loads_the_tokenizer_again(
    folder: Path, tmp_path: Path, workers: int
) -> None:
    for i, text in enumerate(TEXTS):
        (tmp_path / f"{i}.txt").write_text(text)
    build_dataset(
        [tmp_path],
        tmp_path / "out",
        tokenizer=str(folder),
        end_token="<mask>",
        workers=workers,
    )
    dataset = open_dataset(tmp_path / "out")
    assert (dataset.end_id, dataset.vocab_size) == (271, 272)
    tokenizer = load_tokenizer(dataset.tokenizer)
    texts = [tokenizer.decode(dataset.document(i)) for i in range(dataset.num_documents)]
    assert texts == TEXTS


def test_the_type_on_disk_holds_every_added_token(tmp_path: Path) -> None:
    vocabulary = {f"w{i}": i for i in range(2**16 - 1)}
    (tmp_path / "a.txt").write_text("w65534 w0")
    for added, dtype in {(END,): "uint16", (END, "<mask>"): "uint32"}.items():
        inner = tokenizers.Tokenizer(models.WordLevel(vocabulary, unk_token="w0"))
        inner.pre_tokenizer = pre_tokenizers.Whitespace()
        inner.add_special_tokens(list(added))
        spec = str(save(tmp_path / dtype, inner, eos=added[-1]))
        build_dataset([tmp_path / "a.txt"], tmp_path / f"out-{dtype}", tokenizer=spec)
        dataset = open_dataset(tmp_path / f"out-{dtype}")
        assert dataset.manifest.dtype == dtype
        assert dataset.document(0).tolist() == [65_534, 0, dataset.vocab_size - 1]
