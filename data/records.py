"""A line of JSONL as spans of text, each of them a target or not.

Three kinds of record: `text` (all of it is a target), `spans` (marked one by one), `messages`
(rendered by a template; what chosen roles say is a target). A span is encoded by itself, so that
borders of targets are borders of tokens.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ringctx.errors import ConfigError, DatasetError

__all__ = ["CHATML", "MessageFormat", "Span", "parse_record"]

CHATML = "<|im_start|>{role}\n{content}<|im_end|>\n"

_KINDS = ("text", "spans", "messages")


@dataclass(frozen=True)
class Span:
    """Text that is encoded by itself."""

    text: str
    target: bool = True
    special: bool = False
    """Whether special tokens of the tokenizer that are spelled out here are meant."""


@dataclass(frozen=True, kw_only=True)
class MessageFormat:
    """How a list of messages becomes text, and what of it is a target."""

    template: str = CHATML
    """One message; `{role}` and `{content}` stand for its own."""
    target_roles: tuple[str, ...] = ("assistant",)
    """Roles whose content, and what follows it in the template, is a target."""

    def __post_init__(self) -> None:
        """Check the template."""
        strange = set(re.findall(r"\{\w+\}", self.template)) - {"{role}", "{content}"}
        if strange:
            raise ConfigError(
                f"--message-template {self.template!r} holds {', '.join(sorted(strange))}; only "
                "{role} and {content} stand for something"
            )
        if self.template.count("{content}") != 1:
            raise ConfigError(
                f"--message-template {self.template!r} must hold {{content}} exactly once, as "
                f"{CHATML!r} does"
            )

    def render(self, role: str, content: str, target: bool | None) -> list[Span]:
        """The spans of a message; a target of None follows the role."""
        before, after = self.template.split("{content}")
        if target is None:
            target = role in self.target_roles
        return [
            Span(before.replace("{role}", role), target=False, special=True),
            Span(content, target),
            Span(after.replace("{role}", role), target, special=True),
        ]


def parse_record(line: str, place: str, messages: MessageFormat) -> list[Span]:
    """Read one line.

    Args:
        line: a JSON object with exactly one of `text`, `spans`, `messages`; other keys are free.
        place: file and line, for errors.
        messages: how messages become text.

    Raises:
        DatasetError: naming the place, what was expected and what is there.
    """
    record = _parse(line, place)
    kinds = [kind for kind in _KINDS if isinstance(record, dict) and kind in record]
    if len(kinds) != 1:
        if isinstance(record, dict):
            held = f"an object with the keys {', '.join(record) or 'none'}"
        else:
            held = f"a {type(record).__name__}"
        raise DatasetError(
            f'{place}: expected an object with exactly one of "text", "spans" and "messages", '
            f"found {held}"
        )
    (kind,) = kinds
    if kind == "text":
        return [Span(_field(record, "text", str, place))]
    items = _field(record, kind, list, place)
    places = [f"{place}: {kind}[{i}]" for i in range(len(items))]
    if kind == "spans":
        return [_span(item, at) for item, at in zip(items, places, strict=True)]
    return _merge(
        [
            span
            for item, at in zip(items, places, strict=True)
            for span in _message(item, at, messages)
        ]
    )


def _parse(line: str, place: str) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError) as error:
        # Nested too deeply, or a number of thousands of digits, is not broken but as useless.
        raise DatasetError(f"{place}: not valid JSON: {error}") from error


def _span(item: Any, place: str) -> Span:
    return Span(_field(item, "text", str, place), _field(item, "target", bool, place))


def _message(item: Any, place: str, messages: MessageFormat) -> list[Span]:
    role, content = (_field(item, key, str, place) for key in ("role", "content"))
    target = _field(item, "target", bool, place) if "target" in item else None
    return messages.render(role, content, target)


def _field(item: Any, key: str, kind: type, place: str) -> Any:
    """A field that must be there and of this type."""
    if not isinstance(item, dict):
        raise DatasetError(f"{place}: expected an object, found a {type(item).__name__}")
    if not isinstance(item.get(key), kind):
        names = {str: "a string", bool: "true or false", list: "a list"}
        held = f"found {json.dumps(item[key])[:40]}" if key in item else "it is missing"
        raise DatasetError(f'{place}: "{key}" must be {names[kind]}, {held}')
    return item[key]


def _merge(spans: Sequence[Span]) -> list[Span]:
    """Join neighbours of one kind: between two messages the template is one text."""
    merged: list[Span] = []
    for span in spans:
        last = merged[-1] if merged else None
        if last and (last.target, last.special) == (span.target, span.special):
            merged[-1] = Span(last.text + span.text, span.target, span.special)
        else:
            merged.append(span)
    return merged
