"""A generation taken apart: the same thought, text and calls however its tokens are batched."""

from __future__ import annotations

from functools import cache
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from node.gateway.detokenise import Token
from node.gateway.reading import Part, Reading
from node.gateway.text import TextCodec
from node.gateway.tool_text import HERMES, MISTRAL
from protocol.metering import Reasoning
from tests.node.gateway import cards
from tests.node.gateway.test_structured import tool_json

NAMES = frozenset({"weather"})


@cache
def codec() -> TextCodec:
    return TextCodec(cards.card(tool_json()))


@cache
def tokenizer() -> Tokenizer:
    return Tokenizer.from_str(tool_json().decode())


def ids(text: str) -> list[int]:
    return list(tokenizer().encode(text, add_special_tokens=False).ids)


def reading(**changes: object) -> Reading:
    start, end = (tokenizer().token_to_id(marker) for marker in ("<think>", "</think>"))
    return Reading(**({"reasoning": Reasoning(start, end), "form": HERMES, "names": NAMES} | changes))  # type: ignore[arg-type]


def whole(how: Reading, batches: list[list[int]]) -> tuple[str, str, list[tuple[str, str]], list[int], bool]:
    """(thought, said, calls, ids of the tokens told, stopped)."""
    reader = codec().reader(how)
    parts: list[Part] = []
    for batch in batches:
        if not reader.stopped:
            parts.append(reader.push([Token(number) for number in batch]))
    parts.append(reader.finish())
    calls: list[tuple[str, str]] = []
    for delta in (delta for part in parts for delta in part.calls):
        if delta.name is not None:
            calls.append((delta.name, ""))
        calls[-1] = (calls[-1][0], calls[-1][1] + delta.arguments)
    told = [token.token_id for part in parts for token in part.tokens]
    return "".join(p.reasoning for p in parts), "".join(p.text for p in parts), calls, told, reader.stopped


CALL = '<tool_call>{"name": "weather", "arguments": {"city": "Oslo é"}}</tool_call>'
pieces = st.sampled_from(
    [CALL, "<think>", "</think>", "hello é日", " ", "\n", "<tool_call>", "{", "STOP", "<|im_end|>"]
)


@given(
    st.lists(pieces, max_size=8),
    st.lists(st.integers(0, 300), max_size=12),
    st.sampled_from([(), ("STOP",), ("\n", "lo é")]),
    st.booleans(),
    st.integers(0, 5),
)
@settings(max_examples=250, deadline=None)
def test_any_batches_give_the_same_parts(
    texts: list[str], cuts: list[int], stops: tuple[str, ...], open_: bool, free: int
) -> None:
    tokens = ids("".join(texts))
    how = reading(stops=stops, free=free)
    if open_:
        how = reading(stops=stops, free=free, reasoning=Reasoning(how.reasoning.start, how.reasoning.end, open=True))
    edges = [0, *sorted({cut % (len(tokens) + 1) for cut in cuts}), len(tokens)]
    batched = [tokens[start:end] for start, end in pairwise(edges)]
    assert whole(how, batched) == whole(how, [[number] for number in tokens])


def test_thought_text_and_calls_are_told_apart() -> None:
    tokens = ids("<think>so\n</think>Well.\n" + CALL)
    thought, said, calls, _, stopped = whole(reading(), [tokens])
    assert (thought, said, stopped) == ("so\n", "Well.", False)
    assert calls == [("weather", '{"city": "Oslo é"}')]


def test_a_stop_string_counts_from_the_minimum_on_thoughts_included() -> None:
    thoughts = ids("<think>so</think>")
    tokens = [*thoughts, *ids("aSTOPbSTOPc")]
    upto = len(thoughts) + len(ids("aSTOP"))
    assert whole(reading(stops=("STOP",)), [tokens])[1] == "a"
    assert whole(reading(stops=("STOP",), free=upto), [tokens])[1] == "aSTOPb"


def test_a_marker_that_is_special_is_read_all_the_same() -> None:
    json = tokenizer().to_str()
    special = Tokenizer.from_str(json)
    special.add_special_tokens(["[TOOL_CALLS]"])
    mistral = TextCodec(cards.card(special.to_str().encode()))
    reader = mistral.reader(reading(form=MISTRAL))
    text = '[TOOL_CALLS] [{"name": "weather", "arguments": {}}]'
    part = reader.push([Token(number) for number in special.encode(text, add_special_tokens=False).ids])
    assert [(call.name, call.arguments) for call in part.calls] == [("weather", "{}")] and part.text == ""


@pytest.mark.parametrize("parallel", [True, False])
def test_one_call_only_stops_the_job(parallel: bool) -> None:
    found = whole(reading(parallel=parallel), [ids(CALL), ids(CALL)])
    assert (len(found[2]), found[4]) == ((2, False) if parallel else (1, True))
