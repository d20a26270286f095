"""Text to ids and back: no content becomes a control token, and a stream shows what the whole would."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from datetime import UTC, datetime
from functools import cache
from itertools import pairwise
from pathlib import Path

import jinja2
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from node.gateway.detokenise import Token
from node.gateway.template import TemplateRefused
from node.gateway.text import ChatMessage, PastCall, TextCodec
from node.gateway.vocabulary import CardUnusable
from node.ports import ModelCard
from tests.node.gateway import cards

CARDS: dict[str, Callable[[], ModelCard]] = {
    "byte-level": cards.card,
    "metaspace": cards.llama_card,
    "unigram": cards.unigram_card,
}


@cache
def codec(kind: str) -> TextCodec:
    return TextCodec(CARDS[kind]())


@cache
def published(kind: str) -> Tokenizer:
    return Tokenizer.from_str(CARDS[kind]().tokenizer_json.decode())


def user(*contents: str) -> list[ChatMessage]:
    return [ChatMessage("user", content) for content in contents]


@cache
def control_ids(kind: str) -> frozenset[int]:
    """By name, not by the codec's own idea of them. The token for unknown characters is no danger: it says nothing."""
    names = [*cards.MARKERS, *cards.UNFLAGGED, "<|trim|>", "<s>", "</s>", "<end>"]
    added = {token.content: number for number, token in published(kind).get_added_tokens_decoder().items()}
    return frozenset(added[name] for name in names if name in added)


def control_count(kind: str, ids: Iterable[int]) -> int:
    return sum(number in control_ids(kind) for number in ids)


kinds = st.sampled_from(sorted(CARDS))
plain_text = st.text(st.characters(blacklist_categories=["Cs"]), max_size=40)
markers = st.sampled_from([*cards.MARKERS, *cards.UNFLAGGED, "<|trim|>", "</s>", "<s>", "<end>", "<END>", "＜end＞"])
fragments = markers.flatmap(lambda text: st.integers(0, len(text)).map(lambda at: text[:at]))
hostile = st.lists(st.one_of(plain_text, markers, fragments), max_size=6).map("".join)


# ------------------------------------------------------------------------------------------------- control tokens


@given(kinds, st.lists(hostile, min_size=1, max_size=4))
@settings(max_examples=150, deadline=None)
def test_no_content_becomes_a_control_token(kind: str, contents: list[str]) -> None:
    ids = codec(kind).encode_chat(user(*contents))
    harmless = codec(kind).encode_chat(user(*("x" for _ in contents)))
    assert control_count(kind, ids) == control_count(kind, harmless)


@pytest.mark.parametrize("kind", sorted(CARDS))
def test_every_control_token_is_read_as_its_letters(kind: str) -> None:
    tokenizer = published(kind)
    added = [token.content for token in tokenizer.get_added_tokens_decoder().values() if token.content.strip()]
    for text in added:
        assert control_count(kind, codec(kind).encode_text(text)) == control_count(kind, codec(kind).encode_text("x"))
        if text == "<unk>" and kind == "unigram":
            continue  # its decoder writes unknown characters as this very text
        shown = codec(kind).decode(codec(kind).encode_text(f"a {text} b"))
        assert shown.strip() == f"a {text} b"


@given(markers, st.data())
@settings(max_examples=100, deadline=None)
def test_a_control_token_split_over_messages_stays_text(marker: str, data: st.DataObject) -> None:
    at = data.draw(st.integers(0, len(marker)))
    bare = bare_codec()
    ids = bare.encode_chat(user(marker[:at], marker[at:]))
    assert not control_ids("byte-level").intersection(ids)
    assert bare.decode(ids) == marker


@cache
def bare_codec() -> TextCodec:
    """A template that writes nothing between the contents, so that two of them touch."""
    return TextCodec(cards.card(template="{% for m in messages %}{{ m.content }}{% endfor %}"))


def test_a_template_cannot_complete_a_control_token_with_content() -> None:
    split = TextCodec(cards.card(template="<|im_{% for m in messages %}{{ m.content }}{% endfor %}"))
    ids = split.encode_chat(user("end|>"))
    assert not control_ids("byte-level").intersection(ids)
    assert split.decode(ids) == "<|im_end|>"


def test_blank_control_tokens_are_not_made_by_blanks_around_a_content() -> None:
    tokenizer = Tokenizer.from_str(cards.byte_level_json().decode())
    tokenizer.add_special_tokens(["\n\n\n"])
    blank = TextCodec(cards.card(tokenizer.to_str().encode()))
    ids = blank.encode_chat(user("hello\n\n\n"))
    assert tokenizer.token_to_id("\n\n\n") in blank.control_ids
    assert tokenizer.token_to_id("\n\n\n") not in ids


TOOLS = (
    "{% for tool in tools %}{{ tool | tojson }}{{ tool.function.name }}"
    "{% for name, p in tool.function.parameters.properties | items %}{{ name }}: {{ p.type }} {{ p.description }}"
    "{% endfor %}{% endfor %}{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}{{ m.name }}"
    "{{ m.tool_call_id }}{{ m.reasoning_content }}{% for c in m.tool_calls %}<tool_call>{{ c | tojson(indent=1) }}"
    "{{ c.function.arguments | string }}{{ c.id }}</tool_call>{% endfor %}<|im_end|>{% endfor %}"
)


@cache
def tool_codec() -> TextCodec:
    return TextCodec(cards.card(template=TOOLS))


@given(st.lists(hostile, min_size=8, max_size=8))
@settings(max_examples=100, deadline=None)
def test_no_part_of_tools_or_calls_becomes_a_control_token(texts: list[str]) -> None:
    assert control_count("byte-level", with_tools(texts)) == control_count("byte-level", with_tools(["x"] * 8))


def with_tools(texts: list[str]) -> tuple[int, ...]:
    """A prompt in which every text that a client can choose is one of `texts`."""
    described, key, name, content, call_id, reasoning, value, inner = texts
    parameters = {"type": "object", "properties": {key: {"type": "string", "description": described, inner: [value]}}}
    tool = {"type": "function", "function": {"name": name, "description": described, "parameters": parameters}}
    asked = ChatMessage("assistant", content, (PastCall(call_id, name, {key: {inner: value}}),), reasoning=reasoning)
    return tool_codec().encode_chat([asked, ChatMessage("tool", content, call_id=call_id, name=name)], [tool])


def test_tools_and_calls_read_as_transformers_would_write_them() -> None:
    said = 'a "quoted"\nline é'
    template = (
        "{{ tools[0] | tojson }}|{{ messages[0].tool_calls[0].function.arguments | tojson }}|{{ messages[0].content }}"
    )
    made = TextCodec(cards.card(template=template))
    parameters = {"type": "object", "properties": {"x": {"enum": [said, 1, None, True]}}}
    tool = {"type": "function", "function": {"name": "f", "description": said, "parameters": parameters}}
    ids = made.encode_chat([ChatMessage("assistant", said, (PastCall("c", "f", {"x": [said, 2.5]}),))], [tool])
    expected = "|".join(
        (json.dumps(tool, ensure_ascii=False), json.dumps({"x": [said, 2.5]}, ensure_ascii=False), said)
    )
    assert made.decode(ids) == expected
    assert not TextCodec(cards.card()).takes_tools and made.takes_tools


def test_templates_may_measure_and_cut_the_ids_of_calls() -> None:
    template = (
        "{% if custom is defined %}{% set tools = custom %}{% endif %}{{ tools }}{% for m in messages %}"
        "{% for c in m.tool_calls %}{% if c.id | length != 9 %}{{ raise_exception('nine') }}{% endif %}{{ c.id[-4:] }}"
        "{% endfor %}{% endfor %}"
    )
    made = TextCodec(cards.card(template=template))
    assert made.takes_tools
    assert (
        made.decode(made.encode_chat([ChatMessage("assistant", "", (PastCall("abc456789", "f", {}),))])) == "None6789"
    )
    for odd in (
        "im_start",
        "a b c d e",
        "abc45678é",
    ):  # what could be part of a control token, or is no id, stays a mark
        with pytest.raises(TemplateRefused, match="nine"):
            made.encode_chat([ChatMessage("assistant", "", (PastCall(odd, "f", {}),))])


# ------------------------------------------------------------------------------------- the same ids as transformers

benign = st.text(st.characters(blacklist_categories=["Cs"], blacklist_characters="<>|｜＜＞"), max_size=60)


@given(kinds, st.lists(benign, min_size=1, max_size=3))
@settings(max_examples=120, deadline=None)
def test_harmless_contents_give_the_ids_of_the_whole_rendered_text(kind: str, contents: list[str]) -> None:
    messages = user(*contents)
    source = CARDS[kind]()
    environment = jinja2.Environment(trim_blocks=True, lstrip_blocks=True)
    rendered = environment.from_string(source.chat_template).render(
        messages=[{"role": m.role, "content": m.content} for m in messages],
        add_generation_prompt=True,
        **source.special,
    )
    expected = published(kind).encode(rendered, add_special_tokens=False).ids
    assert list(codec(kind).encode_chat(messages)) == expected


def test_control_tokens_that_swallow_blanks_still_do() -> None:
    template = "{% for m in messages %}{{ m.content }} <|trim|> x{% endfor %}"
    trimmed = TextCodec(cards.card(template=template))
    expected = published("byte-level").encode("hello   <|trim|> x", add_special_tokens=False).ids
    assert list(trimmed.encode_chat(user("hello  "))) == expected


def test_raw_text_gets_the_tokens_the_tokenizer_puts_around_it() -> None:
    assert list(codec("metaspace").encode_text("hello")) == published("metaspace").encode("hello").ids
    assert codec("metaspace").encode_text("hello")[0] == published("metaspace").token_to_id("<s>")


def test_half_a_surrogate_pair_is_read_as_a_question_mark() -> None:
    assert codec("byte-level").decode(codec("byte-level").encode_text("a\ud800b")) == "a?b"


def test_the_demo_model_card_encodes_chat() -> None:
    folder = Path(__file__).parents[3] / "devnet" / "model" / "tally-demo-4m"
    demo = TextCodec(cards.card((folder / "tokenizer.json").read_bytes()))
    ids = demo.encode_chat(user("What is <|im_end|>?"))
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    assert tokenizer.decode(ids, skip_special_tokens=False) == (
        "<|im_start|>user\nWhat is <|im_end|>?<|im_end|>\n<|im_start|>assistant\n"
    )
    assert ids.count(tokenizer.token_to_id("<|im_end|>")) == 1


# ------------------------------------------------------------------------------------------------------ templates


def test_templates_have_what_transformers_gives_them() -> None:
    template = (
        "{{ strftime_now('%Y') }}{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}"
        "{% if loop.index > 1 %}{% break %}{% endif %}{% endfor %}{{ {'a': 'é'} | tojson }}"
    )
    made = TextCodec(cards.card(template=template), now=lambda: datetime(2031, 1, 1, tzinfo=UTC))
    assert made.decode(made.encode_chat(user("one", "two", "three"))) == '2031onetwo{"a": "é"}'


@pytest.mark.parametrize(
    "template",
    [
        "{{ raise_exception('roles must alternate: ' ~ messages[0].content) }}",
        "{{ 'a' * 10000000000 }}",
        "{{ 9 ** 9 ** 9 }}",
        "{% for a in range(99999) %}{% for b in range(99999) %}aaaaaaaaaaaaaaaaaaaaaaaaaaaa{% endfor %}{% endfor %}",
        "{{ ''.__class__.__mro__ }}{{ messages.__init__.__globals__ }}",
        "{{ messages.append(1) }}",
        "{{ undefined_function() }}",
    ],
)
def test_a_template_that_refuses_or_misbehaves_is_an_error_with_a_remedy(template: str) -> None:
    with pytest.raises(TemplateRefused) as caught:
        TextCodec(cards.card(template=template)).encode_chat(user("secret"))
    assert "Nothing was sent or paid" in str(caught.value)
    assert "content" not in str(caught.value).split("messages:")[-1].split(". Nothing")[0]


def test_a_card_without_template_refuses_chat_and_takes_text() -> None:
    base = TextCodec(cards.card(template=""))
    assert base.decode(base.encode_text("hello")) == "hello"
    with pytest.raises(CardUnusable, match="/v1/completions"):
        base.encode_chat(user("hello"))


@pytest.mark.parametrize("broken", [b"", b"{}", b"\xff", b"[1]", b'{"added_tokens": [], "model": {}, "decoder": null}'])
def test_a_broken_tokenizer_is_named_as_such(broken: bytes) -> None:
    source = cards.card()
    with pytest.raises(CardUnusable, match="tokenizer"):
        TextCodec(type(source)(**{f: getattr(source, f) for f in source.__slots__} | {"tokenizer_json": broken}))


def test_a_broken_template_is_named_as_such() -> None:
    with pytest.raises(CardUnusable, match="template"):
        TextCodec(cards.card(template="{% for %}"))


def test_truncation_in_the_file_does_not_cut_a_prompt() -> None:
    truncation = {"max_length": 3, "strategy": "LongestFirst", "stride": 0, "direction": "Right"}
    cutting = TextCodec(cards.card(cards.edited(cards.byte_level_json(), truncation=truncation)))
    assert cutting.decode(cutting.encode_text("hello world again")) == "hello world again"


# ------------------------------------------------------------------------------------------------------- streaming


def batches(ids: list[int], cuts: list[int]) -> Iterable[list[int]]:
    edges = [0, *sorted({cut % (len(ids) + 1) for cut in cuts}), len(ids)]
    return [ids[start:end] for start, end in pairwise(edges)]


def streamed(kind: str, ids: list[int], cuts: list[int], stops: list[str]) -> tuple[str, str | None]:
    stream = codec(kind).stream(stops)
    pieces = [stream.push([Token(number) for number in batch]).text for batch in batches(ids, cuts)]
    return "".join([*pieces, stream.finish().text]), stream.stopped


def cut_at_stop(text: str, stops: list[str]) -> str:
    """The plain reference: one character at a time, the first stop to be complete wins."""
    for end in range(1, len(text) + 1):
        found = [len(stop) for stop in stops if text[:end].endswith(stop)]
        if found:
            return text[: end - max(found)]
    return text


@given(st.lists(st.integers(0, 410), max_size=40), st.lists(st.integers(0, 50), max_size=10))
@settings(max_examples=150, deadline=None)
def test_pieces_join_to_the_whole_whatever_the_batches(ids: list[int], cuts: list[int]) -> None:
    tokenizer = published("byte-level")
    known = [number for number in ids if number < tokenizer.get_vocab_size()]
    text, _ = streamed("byte-level", ids, cuts, [])
    assert text == codec("byte-level").decode(ids) == tokenizer.decode(known, skip_special_tokens=True)


@given(st.sampled_from(["byte-level", "metaspace"]), plain_text)
@settings(max_examples=150, deadline=None)
def test_no_replacement_character_appears_inside_good_text(kind: str, text: str) -> None:
    ids = list(codec(kind).encode_text(text))
    stream = codec(kind).stream()
    pieces = [stream.push([Token(number)]).text for number in ids]
    shown = "".join([*pieces, stream.finish().text])
    assert shown.count("�") == text.count("�")
    assert shown == published(kind).decode(ids, skip_special_tokens=True)


@given(
    st.text("ab é", max_size=20),
    st.lists(st.text("ab é", min_size=1, max_size=4), min_size=1, max_size=4),
    st.lists(st.integers(0, 50), max_size=10),
)
@settings(max_examples=250, deadline=None)
def test_text_ends_before_the_first_stop_wherever_tokens_end(text: str, stops: list[str], cuts: list[int]) -> None:
    ids = list(codec("byte-level").encode_text(text))
    shown, stopped = streamed("byte-level", ids, cuts, stops)
    assert shown == cut_at_stop(text, stops)
    assert (stopped is not None) == any(stop in text for stop in stops)


@given(st.text("abc é日", max_size=20), st.lists(st.text("ab日", min_size=1, max_size=3), max_size=2))
@settings(max_examples=120, deadline=None)
def test_each_token_is_reported_once_in_order_with_its_bytes(text: str, stops: list[str]) -> None:
    ids = list(codec("byte-level").encode_text(text))
    stream = codec("byte-level").stream(stops)
    pieces = [stream.push([Token(number, -float(place))]) for place, number in enumerate(ids)]
    pieces.append(stream.finish())
    tokens = [token for piece in pieces for token in piece.tokens]
    assert [token.logprob for token in tokens] == [-float(place) for place in range(len(tokens))]
    shown = "".join(piece.text for piece in pieces)
    assert b"".join(token.data for token in tokens).startswith(shown.encode())
    if stream.stopped is None:
        assert b"".join(token.data for token in tokens) == text.encode()
    assert all(token.offset < len(shown) for token in tokens)


def test_the_end_of_sequence_token_is_not_text() -> None:
    end = published("byte-level").token_to_id("<|im_end|>")
    ids = [*codec("byte-level").encode_text("hello"), end]
    assert streamed("byte-level", ids, [], [])[0] == "hello"


def test_control_tokens_without_the_special_flag_are_shown_when_generated() -> None:
    think = published("byte-level").token_to_id("<think>")
    assert codec("byte-level").decode([think]) == "<think>"


def test_a_single_token_stop_string_becomes_a_stop_id() -> None:
    newline = codec("byte-level").encode_text("\n")
    assert codec("byte-level").stop_ids(["\n", "no single token spells this"]) == newline
