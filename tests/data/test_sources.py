"""Which files there are, and which of them form one document."""

from pathlib import Path

import pytest

from ringctx.data.sources import (
    LineSource,
    TextSource,
    find_sources,
    parse_group_by,
    parse_inputs,
)
from ringctx.errors import ConfigError

FILES = ["top.py", "b/two.py", "b/one.py", "b/c/three.py", "b/c/d/four.py", "a/five.txt"]


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    for name in FILES:
        path = tmp_path / "in" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)
    return tmp_path / "in"


def found(tree: Path, *, glob: str = "**/*", group_by: str = "file") -> list[list[str]]:
    """Files of each document, relative to the input."""
    sources = find_sources(parse_inputs([tree]), glob=glob, group_by=parse_group_by(group_by))
    return [
        [file.relative_to(tree).as_posix() for file in source.files]
        for source in sources
        if isinstance(source, TextSource)
    ]


def test_every_file_is_a_document_in_sorted_order(tree: Path) -> None:
    assert found(tree) == [[name] for name in sorted(FILES)]


def test_glob_chooses_files(tree: Path) -> None:
    assert found(tree, glob="**/*.txt") == [["a/five.txt"]]
    assert found(tree, glob="*.py") == [["top.py"]]


def test_dir_joins_the_files_of_each_folder(tree: Path) -> None:
    assert found(tree, group_by="dir") == [
        ["a/five.txt"],
        ["b/c/d/four.py"],
        ["b/c/three.py"],
        ["b/one.py", "b/two.py"],
        ["top.py"],
    ]


def test_dir_with_a_depth_joins_all_files_below_each_folder_of_that_depth(tree: Path) -> None:
    assert found(tree, group_by="dir:1") == [
        ["a/five.txt"],
        ["b/c/d/four.py", "b/c/three.py", "b/one.py", "b/two.py"],
        ["top.py"],
    ]
    assert found(tree, group_by="dir:2") == [
        ["a/five.txt"],
        ["b/c/d/four.py", "b/c/three.py"],
        ["b/one.py", "b/two.py"],
        ["top.py"],
    ]
    assert len(found(tree, group_by="dir:0")) == 1


def test_jsonl_files_are_never_joined(tree: Path) -> None:
    for name in ("b/x.jsonl", "b/y.jsonl.gz"):
        (tree / name).write_text("")
    sources = find_sources(parse_inputs([tree]), glob="b/*", group_by=parse_group_by("dir:0"))
    assert sources == [
        LineSource(tree / "b/x.jsonl"),
        LineSource(tree / "b/y.jsonl.gz"),
        TextSource((tree / "b/one.py", tree / "b/two.py")),
    ]


def test_files_can_be_named_directly_whatever_the_glob(tree: Path) -> None:
    sources = find_sources(
        parse_inputs([tree / "top.py", tree / "a"]), glob="*.txt", group_by=parse_group_by("dir")
    )
    assert sources == [TextSource((tree / "top.py",)), TextSource((tree / "a/five.txt",))]


@pytest.mark.parametrize("text", ["dirs", "dir:", "dir:-1", "dir:two", "", "files"])
def test_rejects_unknown_groupings(text: str) -> None:
    with pytest.raises(ConfigError, match=r"is none of: file, dir, dir:DEPTH"):
        parse_group_by(text)


def test_rejects_inputs_that_do_not_exist_or_come_twice(tree: Path) -> None:
    by_file = parse_group_by("file")
    with pytest.raises(ConfigError, match="nowhere does not exist"):
        find_sources(parse_inputs([tree / "nowhere"]), glob="*", group_by=by_file)
    with pytest.raises(ConfigError, match="is named twice"):
        find_sources(parse_inputs([tree, tree / "a" / ".."]), glob="*", group_by=by_file)
    with pytest.raises(ConfigError, match="no input"):
        find_sources(parse_inputs([]), glob="*", group_by=by_file)


@pytest.mark.parametrize("glob", ["*.rst", "nowhere/**"])
def test_rejects_a_pattern_that_nothing_matches(tree: Path, glob: str) -> None:
    with pytest.raises(ConfigError, match="matches --glob"):
        found(tree, glob=glob)


@pytest.mark.parametrize("glob", ["", "/etc/*"])
def test_rejects_a_pattern_that_is_none(tree: Path, glob: str) -> None:
    with pytest.raises(ConfigError, match="not a pattern inside the folder"):
        found(tree, glob=glob)


def test_rejects_inputs_that_reach_a_file_twice(tree: Path) -> None:
    with pytest.raises(ConfigError, match=r"two inputs reach .*b/c/d/four\.py"):
        find_sources(parse_inputs([tree, tree / "b"]), glob="**/*", group_by=parse_group_by("file"))
    apart = find_sources(
        parse_inputs([tree / "a", tree / "b"]), glob="**/*", group_by=parse_group_by("file")
    )
    assert len(apart) == 5


def test_inputs_name_sources_in_the_order_of_their_first_naming(tree: Path) -> None:
    inputs = parse_inputs([f"prose={tree / 'a'}", f"code={tree / 'top.py'}", f"prose={tree / 'b'}"])
    assert inputs.names == ("prose", "code")
    found = find_sources(inputs, glob="**/*", group_by=parse_group_by("dir:0"))
    assert [source.source for source in found] == [0, 1, 0]


def test_lines_have_the_source_of_their_file(tree: Path) -> None:
    (tree / "x.jsonl").write_text("")
    inputs = parse_inputs([f"code={tree / 'top.py'}", f"chat={tree / 'x.jsonl'}"])
    found = find_sources(inputs, glob="**/*", group_by=parse_group_by("file"))
    assert found == [TextSource((tree / "top.py",)), LineSource(tree / "x.jsonl", 1)]


def test_a_path_that_exists_as_written_is_no_name(
    tree: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tree)
    for name in ("b=top.py", "top.py"):
        (tree / name).write_text("")
    inputs = parse_inputs(["b=top.py"])
    assert (inputs.paths, inputs.names) == ((Path("b=top.py"),), ())
    assert parse_inputs(["c=top.py"]).names == ("c",)


def test_rejects_names_for_some_inputs_only(tree: Path) -> None:
    message = r"input .*/b has no name, but others have: name all of them \(NAME=.*/b\), or none"
    with pytest.raises(ConfigError, match=message):
        parse_inputs([f"x={tree / 'a'}", tree / "b"])


def test_rejects_names_that_cannot_be_and_named_paths_that_do_not_exist(tree: Path) -> None:
    with pytest.raises(ConfigError, match=r"is not NAME=PATH either: source name 'a@b' may hold"):
        parse_inputs([f"a@b={tree}"])
    with pytest.raises(ConfigError, match=r"input .*nowhere does not exist"):
        parse_inputs([f"a={tree / 'nowhere'}"])
