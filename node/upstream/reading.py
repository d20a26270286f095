"""What a completion server says, read into one form: pieces of text with the token ids and logprobs it gave. Pure.

Servers that speak OpenAI's completions differ in where they put what OpenAI's API has no place for:
  vLLM, SGLang        choices[].token_ids with `return_token_ids`; logprobs.tokens as `token_id:N`
                      with `return_tokens_as_token_ids`
  llama.cpp server    logprobs.content[].id, with gaps where a token ends inside a character
  llama_cpp.server    text only; logprobs of token texts
Sources: vLLM, "OpenAI-Compatible Server"; llama.cpp, tools/server/README.md; llama-cpp-python, server/types.py.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from node.upstream.http import UpstreamError

_TOKEN_ID: Final = re.compile(r"token_id:([0-9]{1,9})")

Named = int | str
"""A token by its id, or by its text where a server gives nothing better."""


@dataclass(frozen=True, slots=True)
class Piece:
    """A step of an answer. `ids`: None when the server gave none. `logprobs`: natural, None where it gave none.

    `tops`: per token the likeliest tokens with logprobs, as many as there are logprobs, or (). `finish`: as the server
    says it, "" while open. `prompt_tokens`, `completion_tokens`: usage, None where it is not (yet) given.
    """

    text: str
    ids: tuple[int, ...] | None = None
    logprobs: tuple[float, ...] | None = None
    tops: tuple[tuple[tuple[Named, float], ...], ...] = ()
    finish: str = ""
    prompt_tokens: int | None = None
    completion_tokens: int | None = None


def read_chunk(chunk: Mapping[str, Any]) -> Piece:
    """One event of a stream, or a whole answer. Raises: UpstreamError when it has another shape."""
    try:
        usage = chunk.get("usage") or {}
        counts = _count(usage.get("prompt_tokens")), _count(usage.get("completion_tokens"))
        choices = chunk.get("choices") or []
        if not choices:
            return Piece("", (), (), (), "", *counts)
        choice = choices[0]
        text, finish = choice.get("text") or "", choice.get("finish_reason") or ""
        if not isinstance(text, str) or not isinstance(finish, str):
            raise TypeError("text and finish_reason are no strings")
        given = choice.get("logprobs") or {}
        names, logprobs, tops = _logprobs(given)
        ids = _ids(choice, given, names)
    except (AttributeError, TypeError, ValueError, KeyError, IndexError) as exc:
        raise UpstreamError(f"the upstream server sent a completion in another form ({type(exc).__name__})") from exc
    if ids is None and not text:
        ids = ()
    if ids is not None and logprobs is not None and len(ids) != len(logprobs):
        logprobs, tops = None, ()
    return Piece(text, ids, logprobs, tops, finish, *counts)


def _count(value: Any) -> int | None:
    if value is None:
        return None
    if type(value) is not int or value < 0:
        raise TypeError("usage is no count")
    return value


def _ids(choice: Mapping[str, Any], given: Mapping[str, Any], names: Sequence[Named]) -> tuple[int, ...] | None:
    """Token ids where the server promises one for every token. The ids in `content` have gaps, so they do not count."""
    listed = choice.get("token_ids")
    if isinstance(listed, list):
        if any(type(item) is not int or item < 0 for item in listed):
            raise TypeError("token_ids are no ids")
        return tuple(listed)
    if names and "tokens" in given and all(type(name) is int for name in names):
        return tuple(name for name in names if isinstance(name, int))
    return None


def _logprobs(
    given: Mapping[str, Any],
) -> tuple[tuple[Named, ...], tuple[float, ...] | None, tuple[tuple[tuple[Named, float], ...], ...]]:
    """(tokens, logprobs, likeliest) of either form: parallel lists, or a list of objects."""
    content = given.get("content")
    if isinstance(content, list):
        names = tuple(_named(item) for item in content)
        rows = tuple(
            tuple((_named(top), _real(top["logprob"])) for top in item.get("top_logprobs") or ()) for item in content
        )
        return names, tuple(_real(item["logprob"]) for item in content), rows
    tokens, values = given.get("tokens"), given.get("token_logprobs")
    if not isinstance(tokens, list) or not isinstance(values, list) or len(tokens) != len(values):
        return (), None, ()
    names = tuple(_name(token) for token in tokens)
    if any(value is None for value in values):
        return names, None, ()
    tops = given.get("top_logprobs")
    rows = ()
    if isinstance(tops, list) and len(tops) == len(tokens):
        rows = tuple(_sorted({_name(name): _real(value) for name, value in (row or {}).items()}) for row in tops)
    return names, tuple(_real(value) for value in values), rows


def _named(item: Mapping[str, Any]) -> Named:
    found = item.get("id")
    return found if type(found) is int else _name(item["token"])


def _name(text: Any) -> Named:
    if not isinstance(text, str):
        raise TypeError("a token is no text")
    match = _TOKEN_ID.fullmatch(text)
    return int(match[1]) if match else text


def _real(value: Any) -> float:
    """A logprob; servers write minus infinity as null or a very large negative number."""
    if value is None:
        return -math.inf
    if isinstance(value, bool) or not isinstance(value, int | float) or math.isnan(value):
        raise TypeError("a logprob is no number")
    return min(0.0, float(value))


def _sorted(row: Mapping[Named, float]) -> tuple[tuple[Named, float], ...]:
    return tuple(sorted(row.items(), key=lambda item: (-item[1], str(item[0]))))
