"""Makes sections from plain values: unknown keys, types, units and ranges, all problems at once.

A field is read by its annotation. Sections, lists and mappings are taken apart here, so that a
problem inside names its place (`curriculum.stages[1].len`); OmegaConf checks and converts what is
left: numbers, names, choices.
"""

import dataclasses
import difflib
import functools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import NoneType, UnionType
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from ringctx.config.sizes import parse_size
from ringctx.errors import ConfigError

__all__ = ["build_section", "read_all", "unknown_key"]

K = TypeVar("K")
T = TypeVar("T")


def build_section(section: type[Any], values: Mapping[str, Any] | None, *, name: str) -> Any:
    """Make one section from plain values; None leaves all fields at their defaults.

    Raises:
        ConfigError: listing every problem of the section.
    """
    values = {} if values is None else values
    if not isinstance(values, Mapping):
        raise ConfigError(f"{name}={values!r} must be a section with keys of its own")
    hints = get_type_hints(section)
    needed = [field.name for field in dataclasses.fields(section) if _is_needed(field)]

    def read_field(key: str) -> Any:
        if key not in hints:
            raise ConfigError(unknown_key(f"{name}.{key}", key, list(hints)))
        if key not in values:
            raise ConfigError(f"{name}.{key} is not set, and has no default")
        return _read(hints[key], values[key], name=f"{name}.{key}")

    return section(**read_all(dict.fromkeys([*needed, *values]), read_field))


def read_all(keys: Iterable[K], read: Callable[[K], T]) -> dict[K, T]:
    """What `read` gives for each key.

    Raises:
        ConfigError: with the problems of all keys.
    """
    found: dict[K, T] = {}
    problems = []
    for key in keys:
        try:
            found[key] = read(key)
        except ConfigError as error:
            problems.append(str(error))
    if problems:
        raise ConfigError("\n".join(problems))
    return found


def unknown_key(full: str, key: str, known: Sequence[str]) -> str:
    """What to say of a key that there is not."""
    near = difflib.get_close_matches(key, known, n=1)
    hint = f"did you mean '{near[0]}'?" if near else f"valid keys: {', '.join(known)}"
    return f"unknown key '{full}': {hint}"


def _is_needed(field: "dataclasses.Field[Any]") -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def _read(hint: Any, value: Any, *, name: str) -> Any:
    """One value of the type that an annotation asks for."""
    kinds = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
    if value is None and NoneType in kinds:
        return None
    nested = next((kind for kind in kinds if _is_nested(kind)), None)
    if nested is None:
        return _read_plain(hint, value, name=name)
    if isinstance(value, str) and str in kinds:
        return value
    if isinstance(nested, type) and dataclasses.is_dataclass(nested):
        return build_section(nested, value, name=name)
    item = get_args(nested)[-1 if get_origin(nested) is dict else 0]
    if get_origin(nested) is dict and isinstance(value, Mapping):
        named = {str(key): inner for key, inner in value.items()}
        return read_all(named, lambda key: _read(item, named[key], name=f"{name}.{key}"))
    if get_origin(nested) is tuple and isinstance(value, Sequence) and not isinstance(value, str):
        places = range(len(value))
        read = read_all(places, lambda at: _read(item, value[at], name=f"{name}[{at}]"))
        return tuple(read.values())
    raise ConfigError(f"{name}={value!r} must be {_nested_rule(kinds, nested, item)}")


def _is_nested(kind: Any) -> bool:
    """Whether values of this type have parts to be read one by one."""
    many = get_origin(kind) is tuple and get_args(kind)[-1] is Ellipsis
    return many or get_origin(kind) is dict or dataclasses.is_dataclass(kind)


def _nested_rule(kinds: Sequence[Any], nested: Any, item: Any) -> str:
    """What a field of parts takes, in words."""
    if get_origin(nested) is dict:
        return "a section of names, such as {books: %s}" % ("0.5" if item is float else "a/folder")
    either = "a name or " if str in kinds else ""
    return either + ("a list of numbers" if item is float else "a list of sections")


def _read_plain(hint: Any, value: Any, *, name: str) -> Any:
    """A number, a name or a choice, checked and converted by OmegaConf."""
    kinds = set(get_args(hint) or [hint]) - {NoneType}
    node = OmegaConf.structured(_holder(hint))
    try:
        OmegaConf.update(node, "value", _with_unit(value) if int in kinds else value)
    except OmegaConfBaseException as error:
        rule = _plain_rule(kinds, value) or str(error).splitlines()[0]
        raise ConfigError(f"{name}={value!r}: {rule}") from error
    plain: Any = OmegaConf.select(node, "value")
    plain = OmegaConf.to_container(plain) if OmegaConf.is_config(plain) else plain
    if isinstance(plain, float) and not math.isfinite(plain):
        raise ConfigError(f"{name}={value} must be a finite number")
    return plain


@functools.cache
def _holder(hint: Any) -> type[Any]:
    """A class of one field, which is what OmegaConf takes annotations from."""
    return dataclasses.make_dataclass("Holder", [("value", hint)])


def _with_unit(value: Any) -> Any:
    """`128k` and `20e9` as whole numbers; anything else as it is."""
    if isinstance(value, float) and value.is_integer():
        return int(value)
    try:
        return parse_size(value) if isinstance(value, str) else value
    except ConfigError:
        return value


def _plain_rule(kinds: set[Any], value: Any) -> str | None:
    """What a field takes, in words for those who gave it something else."""
    if value is None:
        return "must not be null"
    if kinds == {float}:
        return "must be a plain number, without a unit; write for example 400, 0.5 or 3e14"
    if kinds == {int}:
        return "must be a whole number; write for example 4096, 128k or 0.5M"
    return None
