"""Find the documents of a build: which files there are, and which of them form one document.

An input is a path, or NAME=PATH where its documents belong to a named source.
Folders are walked in sorted order, so the documents of a dataset depend on names and contents only.
`.jsonl` files give one document a line; every other file is text, alone or joined with the other
files of its folder. All of them may be gzipped (`.gz`).
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ringctx.data.manifest import source_name_problem
from ringctx.errors import ConfigError

__all__ = [
    "GroupBy",
    "Inputs",
    "LineSource",
    "TextSource",
    "find_sources",
    "parse_group_by",
    "parse_inputs",
]

_GROUP_BY = re.compile(r"file|dir(?::(\d+))?")


@dataclass(frozen=True)
class TextSource:
    """One document: the text of these files, joined by newlines."""

    files: tuple[Path, ...]
    source: int = 0
    """Index into the names of the inputs, if they have any."""


@dataclass(frozen=True)
class LineSource:
    """A JSONL file: one document a line."""

    file: Path
    source: int = 0
    """Index into the names of the inputs, if they have any."""


@dataclass(frozen=True)
class Inputs:
    """What a build reads."""

    paths: tuple[Path, ...]
    names: tuple[str, ...] = ()
    """Names of the sources, in the order that they are first named; empty where none are."""
    name_of: tuple[int, ...] = ()
    """For each path, an index into `names`; all 0 where there are none."""


@dataclass(frozen=True)
class GroupBy:
    """Which text files are joined into one document."""

    folders: bool
    """False: every file is a document."""
    depth: int | None = None
    """Files that agree in this many folders below the input are joined; None: in all of them."""

    def key(self, file: Path) -> tuple[str, ...]:
        """What files of one document have in common; the path is relative to the input."""
        return file.parent.parts[: self.depth] if self.folders else file.parts


def parse_group_by(text: str) -> GroupBy:
    """Read `file`, `dir` (files of the same folder) or `dir:2` (same folder at depth 2).

    Raises:
        ConfigError: if it is none of these.
    """
    match = _GROUP_BY.fullmatch(text)
    if match is None:
        raise ConfigError(f"--group-by {text!r} is none of: file, dir, dir:DEPTH (as in dir:2)")
    return GroupBy(text != "file", int(match[1]) if match[1] else None)


def parse_inputs(inputs: Sequence[str | Path]) -> Inputs:
    """Read inputs of the form PATH or NAME=PATH; a path that exists as it is written wins.

    Raises:
        ConfigError: if an input does not exist or comes twice, a name cannot be, or some inputs are
            named and others are not.
    """
    pairs = [_name_and_path(item) for item in inputs]
    paths = tuple(path for _, path in pairs)
    _check(paths)
    given = [name for name, _ in pairs if name is not None]
    if not given:
        return Inputs(paths, name_of=(0,) * len(paths))
    if len(given) < len(pairs):
        bare = next(path for name, path in pairs if name is None)
        raise ConfigError(
            f"input {bare} has no name, but others have: name all of them (NAME={bare}), or none"
        )
    names = tuple(dict.fromkeys(given))
    if problem := source_name_problem(names):
        raise ConfigError(problem)
    return Inputs(paths, names, tuple(names.index(name) for name in given))


def find_sources(inputs: Inputs, *, glob: str, group_by: GroupBy) -> list[TextSource | LineSource]:
    """List the documents of files and folders, in a fixed order.

    Args:
        inputs: files, and folders to be walked.
        glob: which files of a folder to take, relative to it.
        group_by: which text files of a folder to join.

    Raises:
        ConfigError: if two inputs reach the same file, or if nothing matches.
    """
    sources: list[TextSource | LineSource] = []
    taken: set[Path] = set()
    for path, source in zip(inputs.paths, inputs.name_of, strict=True):
        found = _walk(path, glob) if path.is_dir() else [path]
        root = path if path.is_dir() else path.parent
        groups: dict[tuple[str, ...], list[Path]] = {}
        for file in found:
            if file.resolve() in taken:
                raise ConfigError(f"two inputs reach {file}; its documents would be repeated")
            taken.add(file.resolve())
            if is_jsonl(file):
                sources.append(LineSource(file, source))
            else:
                groups.setdefault(group_by.key(file.relative_to(root)), []).append(file)
        sources += [TextSource(tuple(files), source) for files in groups.values()]
    if not sources:
        names = ", ".join(map(str, inputs.paths))
        raise ConfigError(f"no file in {names} matches --glob {glob!r}; the default is '**/*'")
    return sources


def is_jsonl(file: Path) -> bool:
    """Whether a file has one document a line."""
    return file.name.endswith((".jsonl", ".jsonl.gz"))


def _name_and_path(item: str | Path) -> tuple[str | None, Path]:
    name, equals, path = str(item).partition("=")
    if Path(item).exists() or not equals:
        return None, Path(item)
    if problem := source_name_problem([name]):
        raise ConfigError(f"input {item} does not exist, and is not NAME=PATH either: {problem}")
    return name, Path(path)


def _check(paths: Sequence[Path]) -> None:
    if not paths:
        raise ConfigError("no input: name files or folders to build from")
    named: set[Path] = set()
    for path in paths:
        if not path.exists():
            raise ConfigError(f"input {path} does not exist")
        if path.resolve() in named:
            raise ConfigError(f"input {path} is named twice; its documents would be repeated")
        named.add(path.resolve())


def _walk(folder: Path, glob: str) -> list[Path]:
    try:
        found = [path for path in folder.glob(glob) if path.is_file()]
    except (ValueError, NotImplementedError) as error:
        raise ConfigError(f"--glob {glob!r} is not a pattern inside the folder: {error}") from error
    return sorted(found, key=lambda path: path.relative_to(folder).parts)
