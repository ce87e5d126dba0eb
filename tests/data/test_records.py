"""A record is one of three kinds, and what is wrong with it is told with its line."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ringctx.data.records import MessageFormat, Span, parse_record
from ringctx.errors import ConfigError, DatasetError

PLAIN = MessageFormat(template="[{role}]{content}/", target_roles=("bot",))


def parse(record: Any) -> list[Span]:
    return parse_record(json.dumps(record), "a.jsonl:7", PLAIN)


def test_a_text_is_one_target() -> None:
    assert parse({"text": "all", "id": 3}) == [Span("all", target=True)]


def test_spans_stay_as_they_are() -> None:
    spans = [{"text": t, "target": t != "b"} for t in "aabca"]
    assert parse({"spans": spans}) == [Span(t, t != "b") for t in "aabca"]


def test_only_the_template_means_special_tokens() -> None:
    spans = parse({"messages": [{"role": "me", "content": "[x]"}, {"role": "bot", "content": "y"}]})
    assert spans == [
        Span("[me]", False, special=True),
        Span("[x]", False),
        Span("/[bot]", False, special=True),
        Span("y", True),
        Span("/", True, special=True),
    ]


@given(
    st.lists(st.tuples(st.sampled_from(["bot", "me"]), st.text(), st.sampled_from([None, 0, 1])))
)
def test_messages_render_one_after_another_whatever_is_a_target(
    messages: list[tuple[str, str, int | None]],
) -> None:
    records = [
        {"role": role, "content": content} | ({} if mark is None else {"target": bool(mark)})
        for role, content, mark in messages
    ]
    spans = parse({"messages": records})
    assert "".join(span.text for span in spans) == "".join(f"[{r}]{c}/" for r, c, _ in messages)
    told = [c + "/" for r, c, mark in messages if (mark if mark is not None else r == "bot")]
    assert "".join(span.text for span in spans if span.target) == "".join(told)


def test_a_role_that_looks_like_the_template_is_a_role() -> None:
    (head, *_) = parse({"messages": [{"role": "{content}", "content": "{role}"}]})
    assert head.text == "[{content}]"


@pytest.mark.parametrize(
    ("record", "message"),
    [
        (
            {"text": "x", "spans": []},
            r"exactly one of .* found an object with the keys text, spans",
        ),
        ({"messages": [], "text": "x"}, "exactly one of .* the keys messages, text"),
        ({"body": "x"}, "exactly one of .* the keys body"),
        ({"spans": "x"}, r'"spans" must be a list, found "x"'),
        ({"spans": ["x"]}, r"spans\[0\]: expected an object, found a str"),
        ({"spans": [{"text": "x"}]}, r'spans\[0\]: "target" must be true or false, it is missing'),
        ({"spans": [{"text": "x", "target": 1}]}, '"target" must be true or false, found 1'),
        ({"spans": [{"target": True}]}, r'spans\[0\]: "text" must be a string, it is missing'),
        ({"messages": [{"role": "bot"}]}, r'messages\[0\]: "content" must be a string, it is mis'),
        ({"messages": [{"content": "x"}]}, r'messages\[0\]: "role" must be a string'),
        ({"messages": [{"role": "b", "content": None}]}, '"content" must be a string, found null'),
        (
            {"messages": [{"role": "b", "content": "", "target": "yes"}]},
            r'messages\[0\]: "target" must be true or false, found "yes"',
        ),
    ],
)
def test_a_record_that_cannot_be_is_told_with_its_line(record: Any, message: str) -> None:
    with pytest.raises(DatasetError, match=rf"^a\.jsonl:7: .*{message}|^a\.jsonl:7: {message}"):
        parse(record)


@pytest.mark.parametrize("template", ["", "{role}", "{content}{content}", "{ content }"])
def test_rejects_a_template_without_exactly_one_content(template: str) -> None:
    with pytest.raises(ConfigError, match=r"must hold \{content\} exactly once"):
        MessageFormat(template=template)
