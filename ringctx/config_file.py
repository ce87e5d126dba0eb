"""Reads the YAML of a run: units, overrides, unknown keys, types; all problems in one error.

OmegaConf parses and checks types; this thin layer adds sizes (`128k`, `0.5M`: powers of 1024),
"did you mean", and the collecting of problems over all sections.
"""

import dataclasses
import difflib
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from ringctx.config import Config
from ringctx.errors import ConfigError

__all__ = [
    "build_section",
    "config_to_dict",
    "config_to_yaml",
    "listed_sections",
    "load_config",
    "parse_size",
    "sections",
    "subsections",
]

# An entry of a list in the name of a setting: stages.0.len or stages[0].len.
_IN_LIST = re.compile(r"\.\d+(\.|$)|\[\d+\]")
_UNITS = {"": 1, "k": 2**10, "m": 2**20, "g": 2**30}
_SIZE = re.compile(r"(\d+(?:\.\d+)?)([kmg]?)", re.IGNORECASE)


def parse_size(text: str) -> int:
    """Read a size in tokens: `4096`, `128k`, `0.5M`, `2g` (k, M, G are powers of 1024).

    Raises:
        ConfigError: if the text is not a whole number of tokens.
    """
    match = _SIZE.fullmatch(text.strip().replace("_", "").replace(",", ""))
    size = float(match[1]) * _UNITS[match[2].lower()] if match else 0.5
    if size != int(size):
        raise ConfigError(f"'{text}' is not a size; write for example 4096, 128k or 0.5M")
    return int(size)


def build_section(section: type[Any], values: Mapping[str, Any], *, name: str) -> Any:
    """Make one section from plain values: unknown keys, types, units and ranges checked.

    Raises:
        ConfigError: listing every problem of the section.
    """
    known = [f.name for f in dataclasses.fields(section)]
    inner, listed = subsections(section), listed_sections(section)
    built: dict[str, Any] = {}
    node = OmegaConf.structured(section)
    OmegaConf.set_readonly(node, False)
    problems: list[str] = []
    for key, value in values.items():
        if key not in known:
            problems.append(_unknown(f"{name}.{key}", key, known))
            continue
        if key in inner or key in listed:
            build = _build_named if key in inner else _build_list
            try:
                built[key] = build((inner | listed)[key], value, name=f"{name}.{key}")
            except ConfigError as error:
                problems.append(str(error))
            continue
        try:
            OmegaConf.update(node, key, _with_unit(node, key, value))
        except OmegaConfBaseException as error:
            rule = _rule(section, key, value) or str(error).splitlines()[0]
            problems.append(f"{name}.{key}={value!r}: {rule}")
            continue
        now = OmegaConf.select(node, key)
        if isinstance(now, float) and not math.isfinite(now):
            problems.append(f"{name}.{key}={value} must be a finite number")
    if problems:
        raise ConfigError("\n".join(problems))
    # Made once: a section checks its fields against one another.
    plain = {key: OmegaConf.select(node, key) for key in known if key not in built}
    return section(**{key: _as_object(value) for key, value in plain.items()}, **built)


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read a YAML file, apply `key=value` overrides, and check everything.

    Args:
        path: the YAML file.
        overrides: `section.key=value`, as on the command line.

    Raises:
        ConfigError: naming every setting that is unknown, of a wrong type or out of range.
    """
    raw, classes = _read(path, overrides), sections()
    known = list(classes)
    problems = [_unknown(key, key, known) for key in raw if key not in known]
    built: dict[str, Any] = {}
    for name, section in classes.items():
        try:
            built[name] = _build_named(section, raw.get(name), name=name)
        except ConfigError as error:
            problems.append(str(error))
    if problems:
        raise ConfigError("\n".join(problems))
    return Config(**built)


def sections() -> dict[str, type[Any]]:
    """The dataclass of each section, by name, in the order of the tree."""
    return get_type_hints(Config)


def subsections(section: type[Any]) -> dict[str, type[Any]]:
    """The fields of a section that are sections themselves, by name."""
    return {
        key: hint
        for key, hint in get_type_hints(section).items()
        if isinstance(hint, type) and dataclasses.is_dataclass(hint)
    }


def listed_sections(section: type[Any]) -> dict[str, type[Any]]:
    """The fields of a section that are lists of sections, by name: the section of an entry."""
    return {
        key: get_args(hint)[0]
        for key, hint in get_type_hints(section).items()
        if get_origin(hint) is tuple and dataclasses.is_dataclass(get_args(hint)[0])
    }


def config_to_dict(config: Any) -> dict[str, Any]:
    """The config, or one section, as plain dicts, lists, numbers and strings."""
    plain: dict[str, Any] = dataclasses.asdict(config)
    return plain


def config_to_yaml(config: Config) -> str:
    """The complete config as YAML that `load_config` reads back to an equal one."""
    return OmegaConf.to_yaml(OmegaConf.create(config_to_dict(config)))


def _build_named(section: type[Any], values: Any, *, name: str) -> Any:
    values = {} if values is None else values
    if not isinstance(values, Mapping):
        raise ConfigError(f"{name}={values!r} must be a section with keys of its own")
    return build_section(section, values, name=name)


def _build_list(section: type[Any], values: Any, *, name: str) -> tuple[Any, ...]:
    """A list of sections, each with its own problems named."""
    if not isinstance(values, Sequence) or isinstance(values, str):
        raise ConfigError(f"{name}={values!r} must be a list of sections")
    built, problems = [], []
    for number, entry in enumerate(values):
        try:
            built.append(_build_named(section, entry, name=f"{name}[{number}]"))
        except ConfigError as error:
            problems.append(str(error))
    if problems:
        raise ConfigError("\n".join(problems))
    return tuple(built)


def _as_object(value: Any) -> Any:
    """A node as sections, dicts, lists, numbers and strings."""
    return OmegaConf.to_object(value) if OmegaConf.is_config(value) else value


def _read(path: str | Path, overrides: Sequence[str]) -> dict[str, Any]:
    try:
        base = OmegaConf.load(path)
    except FileNotFoundError as error:
        raise ConfigError(f"config file {path} does not exist") from error
    except Exception as error:
        raise ConfigError(f"config file {path} is not valid YAML: {error}") from error
    for item in overrides:
        if "=" not in item or item.startswith(("=", "-")):
            raise ConfigError(f"'{item}' is not an override; write section.key=value")
    try:
        whole = [item for item in overrides if not _IN_LIST.search(item.partition("=")[0])]
        given = (base, *(OmegaConf.from_dotlist([item]) for item in whole))
        merged = OmegaConf.merge(*(_spelled_out(node) for node in given))
        for item in overrides:
            if item not in whole:
                _set_in_list(merged, item)
        raw = OmegaConf.to_container(merged, resolve=True)
    except Exception as error:
        raise ConfigError(f"config {path} with {list(overrides)}: {error}") from error
    if not isinstance(raw, dict):
        raise ConfigError(f"config file {path} must hold sections, not a list")
    return {str(key): value for key, value in raw.items()}


def _set_in_list(merged: Any, item: str) -> None:
    """`stages.0.len=1k`: a merge would take the whole list from the override."""
    key, _, _ = item.partition("=")
    node = OmegaConf.from_dotlist([f"value={item[len(key) + 1 :]}"])
    OmegaConf.update(merged, key, node["value"], force_add=True)


def _spelled_out(node: Any) -> Any:
    """`topology: cables` as `topology: {kind: cables}`.

    Before the merge, so that neither a kind replaces the other keys nor they replace the kind.
    """
    for name, section in sections().items():
        for key, inner in subsections(section).items():
            value = OmegaConf.select(node, f"{name}.{key}") if OmegaConf.is_dict(node) else None
            if isinstance(value, str):
                first = dataclasses.fields(inner)[0].name
                OmegaConf.update(node, f"{name}.{key}", {first: value})
    return node


def _rule(section: type[Any], key: str, value: Any) -> str | None:
    """What a field takes, in words for those who gave it something else."""
    if value is None:
        return "must not be null"
    hint = get_type_hints(section)[key]
    kinds = set(get_args(hint) or [hint]) - {type(None)}
    if kinds == {float}:
        return "must be a plain number, without a unit; write for example 400, 0.5 or 3e14"
    if kinds == {int}:
        return "must be a whole number; write for example 4096, 128k or 0.5M"
    return None


def _with_unit(node: Any, key: str, value: Any) -> Any:
    """Turn `128k` and `20e9` into whole numbers where the field takes one."""
    hint = str(node._metadata.object_type.__annotations__[key])
    if "int" not in hint:
        return value
    if isinstance(value, float) and value.is_integer():
        return int(value)
    is_size = isinstance(value, str) and _SIZE.fullmatch(value.strip().replace("_", ""))
    return parse_size(value) if is_size else value


def _unknown(full: str, key: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(key, known, n=1)
    hint = f"did you mean '{near[0]}'?" if near else f"valid keys: {', '.join(known)}"
    return f"unknown key '{full}': {hint}"
