"""Reads and writes the YAML of a run: overrides, all sections, every problem in one error.

OmegaConf parses and merges; `ringctx.config.reading` makes the sections, with units and "did you
mean".
"""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, get_args, get_type_hints

from omegaconf import OmegaConf

from ringctx.config import Config
from ringctx.config.reading import build_section, read_all, unknown_key
from ringctx.config.sizes import parse_size
from ringctx.errors import ConfigError

__all__ = [
    "build_section",
    "config_to_dict",
    "config_to_yaml",
    "load_config",
    "parse_size",
    "section_lists",
    "sections",
    "subsections",
]


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read a YAML file, apply `key=value` overrides, and check everything.

    Args:
        path: the YAML file.
        overrides: `section.key=value`, as on the command line. A part of a list is named by its
            place (`curriculum.stages.0.len=1k`); a list as a whole is replaced, a section keeps
            the keys that are not named.

    Raises:
        ConfigError: naming every setting that is unknown, of a wrong type or out of range.
    """
    raw, classes = _read(path, overrides), sections()

    def read(name: str) -> Any:
        if name not in classes:
            raise ConfigError(unknown_key(name, name, list(classes)))
        return build_section(classes[name], raw.get(name), name=name)

    return Config(**read_all(dict.fromkeys([*classes, *raw]), read))


def sections() -> dict[str, type[Any]]:
    """The dataclass of each section, by name, in the order of the tree."""
    return get_type_hints(Config)


def subsections(section: type[Any]) -> dict[str, type[Any]]:
    """The fields of a section that are sections themselves, by name."""
    return {key: hint for key, hint in get_type_hints(section).items() if _is_section(hint)}


def section_lists(section: type[Any]) -> dict[str, type[Any]]:
    """The fields of a section that are lists of sections, by name, with the class of one."""
    return {
        key: get_args(hint)[0]
        for key, hint in get_type_hints(section).items()
        if get_args(hint) and _is_section(get_args(hint)[0])
    }


def config_to_dict(config: Any) -> dict[str, Any]:
    """The config, or one section, as plain dicts, lists, numbers and strings: as JSON gives it."""
    plain: dict[str, Any] = _plain(dataclasses.asdict(config))
    return plain


def config_to_yaml(config: Config) -> str:
    """The complete config as YAML that `load_config` reads back to an equal one."""
    return OmegaConf.to_yaml(OmegaConf.create(config_to_dict(config)))


def _is_section(hint: Any) -> bool:
    return isinstance(hint, type) and dataclasses.is_dataclass(hint)


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(inner) for key, inner in value.items()}
    return [_plain(inner) for inner in value] if isinstance(value, list | tuple) else value


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
        base = _spelled_out(base)
        for item in overrides:
            _override(base, item)
        raw = OmegaConf.to_container(base, resolve=True)
    except Exception as error:
        raise ConfigError(f"config {path} with {list(overrides)}: {error}") from error
    if not isinstance(raw, dict):
        raise ConfigError(f"config file {path} must hold sections, not a list")
    return {str(key): value for key, value in raw.items()}


def _override(base: Any, item: str) -> None:
    """Set what `section.key=value` names; unlike a merge, this reaches into lists."""
    key, _, _ = item.partition("=")
    node = _spelled_out(OmegaConf.from_dotlist([item]))
    value: Any = OmegaConf.to_container(node, resolve=False)
    for part in re.findall(r"[^.\[\]]+", key):
        value = value[part]
    OmegaConf.update(base, key, value)


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
