"""Function calls in a model's text: the same calls and the same rest, however the stream is cut."""

from __future__ import annotations

import json
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from node.gateway.tool_text import HERMES, LLAMA, MISTRAL, CallDelta, CallReader, ToolForm, form_of

NAMES = frozenset({"weather", "add"})
FORMS = {"hermes": HERMES, "mistral": MISTRAL, "llama": LLAMA}


def read(
    form: ToolForm, pieces: list[str], *, prefilled: bool = False, parallel: bool = True
) -> tuple[str, list[tuple[str, str]]]:
    """The text and the calls, as a client puts the deltas together. A name comes once and before its arguments."""
    reader = CallReader(form, NAMES, prefilled=prefilled, parallel=parallel)
    text: list[str] = []
    calls: list[tuple[str, str]] = []
    for item in [*(item for piece in pieces for item in reader.push(piece)), *reader.finish()]:
        if isinstance(item, str):
            assert item
            text.append(item)
        elif item.name is not None:
            assert item.index == len(calls)
            calls.append((item.name, item.arguments))
        else:
            assert item.index == len(calls) - 1
            calls[-1] = (calls[-1][0], calls[-1][1] + item.arguments)
    assert reader.calls == len(calls)
    return "".join(text), calls


def call(name: str, arguments: object, key: str = "arguments") -> str:
    return json.dumps({"name": name, key: arguments})


CASES = [
    ("hermes", "hello", "hello", []),
    ("hermes", '<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call>', "", [("add", '{"a": 1}')]),
    (
        "hermes",
        'Let me see.\n<tool_call>{"name": "add", "arguments": {"a": "}\\"{"}}</tool_call>\n'
        '<tool_call>{"arguments": {"b": [1, {"c": 2}]}, "name": "weather"}</tool_call>\n',
        "Let me see.",
        [("add", '{"a": "}\\"{"}'), ("weather", '{"b": [1, {"c": 2}]}')],
    ),
    ("hermes", '<tool_call>{"name": "add"}</tool_call>', "", [("add", "{}")]),
    ("hermes", '<tool_call>{"name": "add", "arguments": "{\\"a\\": 1}"}</tool_call>', "", [("add", '{"a": 1}')]),
    # What is no call is text, and a call may still follow.
    ("hermes", '<tool_call>{"name": "rob"}</tool_call>', '<tool_call>{"name": "rob"}</tool_call>', []),
    ("hermes", "a <tool_call> b", "a <tool_call> b", []),
    ("hermes", "x < y <tool_cal", "x < y <tool_cal", []),
    (
        "hermes",
        '<tool_call>nonsense</tool_call><tool_call>{"name": "add", "arguments": {}}</tool_call>',
        "<tool_call>nonsense</tool_call>",
        [("add", "{}")],
    ),
    # Cut off by max_tokens: what was written of the arguments is given, a call without any is text.
    ("hermes", '<tool_call>{"name": "add", "arguments": {"a": 1', "", [("add", '{"a": 1')]),
    ("hermes", '<tool_call>{"name": "add", "ar', '<tool_call>{"name": "add", "ar', []),
    ("hermes", '<tool_call>{"name": "add", "arguments": {}}</tool_call> Done.', " Done.", [("add", "{}")]),
    (
        "mistral",
        '[TOOL_CALLS] [{"name": "add", "arguments": {"a": 1}}, {"name": "weather", "arguments": {}}]',
        "",
        [("add", '{"a": 1}'), ("weather", "{}")],
    ),
    ("mistral", "[TOOL_CALLS] none", "[TOOL_CALLS] none", []),
    ("mistral", "[TOOL_C", "[TOOL_C", []),
    ("llama", '{"name": "add", "parameters": {"a": 1}}', "", [("add", '{"a": 1}')]),
    (
        "llama",
        ' {"name": "add", "parameters": {"a": 1}}; {"name": "weather", "parameters": {}}',
        "",
        [("add", '{"a": 1}'), ("weather", "{}")],
    ),
    ("llama", '{"answer": 42}', '{"answer": 42}', []),
    ("llama", 'Use {"name": "add", "parameters": {}}', 'Use {"name": "add", "parameters": {}}', []),
    ("llama", "{name: add}", "{name: add}", []),
    ("llama", "  \n", "  \n", []),
]


@pytest.mark.parametrize(("form", "written", "text", "calls"), CASES)
def test_calls_are_read(form: str, written: str, text: str, calls: list[tuple[str, str]]) -> None:
    assert read(FORMS[form], [written]) == (text, calls)
    assert read(FORMS[form], list(written)) == (text, calls)


fragments = st.sampled_from(
    [
        *(case[1] for case in CASES),
        *("<tool_call>", "</tool_call>", "[TOOL_CALLS]", "[", "]", "{", "}", '"', "\\", ":", ",", ";", " ", "\n", "é"),
        *('"name"', '"add"', '"arguments"', '"parameters"', '{"name": "add", "arguments": {', "null", "text"),
    ]
)


@given(st.sampled_from(sorted(FORMS)), st.lists(fragments, max_size=8), st.lists(st.integers(0, 400), max_size=12))
@settings(max_examples=400, deadline=None)
def test_any_cut_of_the_stream_gives_the_same(form: str, written: list[str], cuts: list[int]) -> None:
    whole = "".join(written)
    edges = [0, *sorted({cut % (len(whole) + 1) for cut in cuts}), len(whole)]
    pieces = [whole[start:end] for start, end in pairwise(edges)]
    assert read(FORMS[form], pieces) == read(FORMS[form], [whole])


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(st.characters(exclude_categories=["Cs"]), max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text('ab"{}\\', max_size=3), inner, max_size=3),
    max_leaves=8,
)


@pytest.mark.slow
@given(
    st.sampled_from(sorted(FORMS)),
    st.lists(st.tuples(st.sampled_from(sorted(NAMES)), st.dictionaries(st.text(max_size=4), json_values, max_size=3))),
    st.text("abc ", max_size=5),
    st.booleans(),
)
@settings(max_examples=200, deadline=None)
def test_what_a_model_calls_is_what_is_read(
    form: str, calls: list[tuple[str, dict[str, object]]], said: str, ascii_only: bool
) -> None:
    key = FORMS[form].arguments_key
    objects = [json.dumps({"name": n, key: a}, ensure_ascii=ascii_only) for n, a in calls]
    written = {
        "hermes": said + "\n".join(f"<tool_call>\n{item}\n</tool_call>" for item in objects),
        "mistral": said + (f"[TOOL_CALLS] [{', '.join(objects)}]" if objects else ""),
        "llama": "; ".join(objects),
    }[form]
    text, found = read(FORMS[form], list(written))
    assert [(name, json.loads(arguments)) for name, arguments in found] == calls
    if form != "llama":
        assert text == (said.rstrip() if calls else said)


def test_a_prompt_that_begins_the_call_is_read_on_from_there() -> None:
    body = '{"name": "add", "arguments": {"a": 1}}'
    for form in (HERMES, MISTRAL):
        assert read(form, [body], prefilled=True) == ("", [("add", '{"a": 1}')])
        assert read(form, ["sorry, no"], prefilled=True) == ("sorry, no", [])


@pytest.mark.parametrize("form", sorted(FORMS))
def test_one_call_at_a_time_ends_after_the_first(form: str) -> None:
    reader = CallReader(FORMS[form], NAMES, parallel=False)
    opener = {"hermes": "<tool_call>", "mistral": "[TOOL_CALLS][", "llama": ""}[form]
    key = FORMS[form].arguments_key
    out = reader.push(f"{opener}{call('add', {}, key)}")
    assert out == [CallDelta(0, "add", "{}")] and reader.over
    assert reader.push(f"{opener}{call('weather', {}, key)}") == [] == reader.finish()


def test_arguments_come_while_they_are_written() -> None:
    reader = CallReader(HERMES, NAMES)
    assert reader.push('<tool_call>{"name": "add", "arguments": {"a"') == [CallDelta(0, "add", '{"a"')]
    assert reader.push(": 1") == [CallDelta(0, None, ": 1")]
    assert reader.push("}}") == [CallDelta(0, None, "}")]


@pytest.mark.parametrize(
    ("template", "form"),
    [
        ('{{ tools }}<tool_call>\\n{"name": <function-name>, "arguments": <args>}', HERMES),
        ("{{ tools }}<tool_call>\n<function=name>", None),
        ("{{ tools }}[TOOL_CALLS] [", MISTRAL),
        ("{{ tools }}[TOOL_CALLS]name[ARGS]{}", None),
        ('{{ tools }}<|start_header_id|>ipython {"name": function name, "parameters": dictionary}', LLAMA),
        ("{{ tools }}", None),
    ],
)
def test_the_template_shows_the_form(template: str, form: ToolForm | None) -> None:
    assert form_of(template) is form
