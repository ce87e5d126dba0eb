"""Which token files an import takes: files by name, names before `.bin`, and folders searched.

The format follows from the names (`.npy`: OLMo; `.bin` with `.idx`: Megatron) unless it is given.
Folders are searched in sorted order, so the shards of a dataset depend on names only.
"""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, get_args

from ringctx.errors import ConfigError

__all__ = ["Format", "find_token_files"]

Format = Literal["olmo", "megatron"]

_SUFFIX: dict[Format, str] = {"olmo": ".npy", "megatron": ".bin"}


def find_token_files(
    sources: Sequence[str | Path], *, format: Format | None
) -> tuple[Format, list[Path]]:
    """List token files, as absolute paths.

    Args:
        sources: files, Megatron's names before `.bin`, and folders.
        format: of all of them; None: as the names say.

    Raises:
        ConfigError: if something is not there, is named twice, or has no format or several.
    """
    if format not in (None, *get_args(Format)):
        raise ConfigError(f"--format {format!r} is none of {', '.join(get_args(Format))}")
    if not sources:
        raise ConfigError("no source: name token files or folders to import")
    found = [(source, _candidates(Path(source), format)) for source in sources]
    formats = {kind for _, files in found for kind, _ in files}
    if len(formats) > 1:
        raise ConfigError(
            f"{', '.join(map(str, sources))} hold both .npy (OLMo) and .bin (Megatron) files; "
            "choose one with --format"
        )
    for source, files in found:
        if not files:
            raise ConfigError(_nothing(Path(source), format))
    paths = [Path(os.path.abspath(path)) for _, files in found for _, path in files]
    _refuse_twice(paths)
    return formats.pop(), paths


def _candidates(source: Path, format: Format | None) -> list[tuple[Format, Path]]:
    """The token files of a source, with the format that each would have."""
    formats = get_args(Format) if format is None else (format,)
    if source.is_dir():
        return [
            (kind, path)
            for kind in formats
            for path in sorted(source.rglob(f"*{_SUFFIX[kind]}"))
            if path.is_file()
        ]
    if "megatron" in formats:
        named = source.with_suffix(".bin") if source.suffix == ".idx" else source
        before = source.with_name(source.name + ".bin")
        for path in (named, before):
            if path.is_file() and path.suffix == ".bin":
                return [("megatron", path)]
    # A format that is given makes the name free: OLMo's tokens may lie in a file of any name.
    if "olmo" in formats and source.is_file() and (format == "olmo" or source.suffix == ".npy"):
        return [("olmo", source)]
    return []


def _nothing(source: Path, format: Format | None) -> str:
    wanted = " or ".join(
        _SUFFIX[kind] for kind in (get_args(Format) if format is None else (format,))
    )
    if source.is_dir():
        return f"{source} holds no {wanted} file"
    if not source.exists():
        return f"source {source} does not exist, nor does {source.name}.bin beside it"
    return f"source {source} is no {wanted} file; name its format with --format olmo or megatron"


def _refuse_twice(paths: Sequence[Path]) -> None:
    seen: set[Path] = set()
    for path in paths:
        if path.resolve() in seen:
            raise ConfigError(f"two sources reach {path}; its documents would be repeated")
        seen.add(path.resolve())
