"""All dialects in one form, text as exact ids, and nothing but one typed error for whatever a server makes up."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from node.ports import EngineRequest
from node.upstream.http import UpstreamError
from node.upstream.probe import Abilities
from node.upstream.reading import Piece, read_chunk
from node.upstream.texts import Texts
from node.upstream.writing import Writing
from protocol.options import JobOptions
from tests.node.gateway import cards
from tests.node.upstream.words import EOS, encode, tokenizer_json

TEXTS = Texts(tokenizer_json())
OTHERS = {"metaspace": Texts(cards.metaspace_json()), "unigram": Texts(cards.unigram_json())}


def chunk(**choice: Any) -> dict[str, Any]:
    return {"choices": [{"index": 0, "text": "ab", **choice}]}


def test_vllm() -> None:
    logprobs = {
        "tokens": ["token_id:7", "token_id:8"],
        "token_logprobs": [-0.5, -1],
        "top_logprobs": [{"token_id:7": -0.5, "token_id:9": -2.0}, {"token_id:8": -1.0}],
    }
    piece = read_chunk({**chunk(token_ids=[7, 8], logprobs=logprobs, finish_reason="length"), "usage": None})
    assert piece == Piece("ab", (7, 8), (-0.5, -1.0), (((7, -0.5), (9, -2.0)), ((8, -1.0),)), "length")
    assert read_chunk(chunk(logprobs=logprobs)).ids == (7, 8), "the names in logprobs are enough"
    usage = {"choices": [], "usage": {"prompt_tokens": 3, "completion_tokens": 2}}
    assert read_chunk(usage) == Piece("", (), (), (), "", 3, 2)


def test_llama_cpp_server_names_tokens_only_where_they_end_a_character() -> None:
    content = [{"id": 7, "token": "ab", "logprob": -0.25, "top_logprobs": [{"id": 7, "token": "ab", "logprob": -0.25}]}]
    piece = read_chunk(chunk(logprobs={"content": content}))
    assert piece.ids is None and piece.logprobs == (-0.25,) and piece.tops == (((7, -0.25),),)


def test_llama_cpp_python() -> None:
    logprobs = {"tokens": ["ab"], "text_offset": [3], "token_logprobs": [-0.25], "top_logprobs": [{"ab": -0.25}]}
    assert read_chunk(chunk(logprobs=logprobs)) == Piece("ab", None, (-0.25,), ((("ab", -0.25),),))
    assert read_chunk({"choices": [{"text": "", "logprobs": None, "finish_reason": "stop"}]}) == Piece(
        "", (), None, (), "stop"
    )


def test_ids_and_logprobs_of_different_number_leave_the_logprobs_out() -> None:
    logprobs = {"tokens": ["token_id:7"], "token_logprobs": [-0.5]}
    assert read_chunk(chunk(token_ids=[7, 8], logprobs=logprobs)).logprobs is None


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 5) | st.floats(allow_nan=True) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
FIELDS = ("text", "token_ids", "logprobs", "finish_reason")


@given(st.dictionaries(st.sampled_from(FIELDS), JSON), JSON, JSON)
def test_whatever_a_server_makes_up_is_read_or_is_one_error(choice: dict[str, Any], usage: Any, odd: Any) -> None:
    for value in ({"choices": [choice], "usage": usage}, {"choices": odd}, {"choices": [odd]}):
        try:
            piece = read_chunk(value)
        except UpstreamError:
            continue
        assert piece.ids is None or all(number >= 0 for number in piece.ids)
        assert piece.logprobs is None or all(number <= 0 for number in piece.logprobs)


@given(st.lists(st.text(max_size=12), max_size=8))
def test_pieces_become_ids_that_spell_them(pieces: list[str]) -> None:
    reader = TEXTS.reader()
    try:
        ids = [number for piece in pieces for number in reader.push(piece)]
    except UpstreamError:
        pytest.fail("byte-level tokens spell any text")
    assert TEXTS.behind((), ids) == "".join(pieces)
    assert not {0, 1, 2} & set(ids), "no text becomes a control token"


@given(st.lists(st.sampled_from(encode("<|user|>the inner of it</s>")), max_size=12))
def test_a_prompt_is_said_exactly_or_not(ids: list[int]) -> None:
    try:
        said = TEXTS.said(ids)
    except ValueError:
        return
    assert encode(said) == ids


def test_a_control_tokens_name_typed_by_a_user_is_not_said() -> None:
    typed = TEXTS.encode_plain("</s>")
    assert set(typed) & {1} == set()
    with pytest.raises(ValueError, match="exactly"):
        TEXTS.said(typed)
    assert TEXTS.said(encode("</s>")) == "</s>"


@pytest.mark.parametrize("raw", [b"", b"{}", b"\xff", json.dumps({"model": 1}).encode()])
def test_a_broken_tokenizer_is_refused(raw: bytes) -> None:
    with pytest.raises(ValueError, match="tokenizer"):
        Texts(raw)


@pytest.mark.parametrize("kind", ["metaspace", "unigram"])
@given(data=st.data())
def test_tokenizers_that_read_a_first_word_otherwise(kind: str, data: st.DataObject) -> None:
    texts = OTHERS[kind]
    pieces = data.draw(st.lists(st.text("helowrt ", min_size=1, max_size=6), min_size=1, max_size=6))
    reader = texts.reader()
    ids: list[int] = []
    for piece in pieces:
        ids += reader.push(piece)
    assert texts.behind((), ids) == "".join(pieces)


def test_a_text_that_a_tokenizer_has_no_tokens_for_is_an_error() -> None:
    reader = OTHERS["unigram"].reader()
    with pytest.raises(UpstreamError, match="exactly"):
        reader.push("Ω")


def test_alternatives_that_are_no_tokens_are_left_out() -> None:
    """No frame has room for such an id, and no client takes it: a server's nonsense would cost its provider the job."""
    request = EngineRequest((5, 6), bytes(32), 4, options=JobOptions(alternatives=5))
    writing = Writing(request, Abilities("m", ids_out=True, alternatives=True), TEXTS, (EOS,))
    tops = ((5, -0.5), (1 << 70, -0.6), (-1, -0.7), ("word", -0.8), (6, -0.9))
    (token,) = writing.push(Piece("", (5,), (-0.5,), (tops,)))
    assert [number for number, _ in token.alternatives] == [5, 6]
