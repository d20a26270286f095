"""What a client may ask: JSON in, one checked `Call` out, or a 400 that names the parameter.

Parameters that change what is generated and that the network cannot honour are refused by name; parameters nobody
here knows are ignored, as OpenAI's own clients send new ones every month. `seed` is accepted and has no effect: the
seed of a job is drawn by both sides together, so that neither can choose the text.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Final

from node.gateway.conversation import parse_messages
from node.gateway.errors import ApiError, unsupported
from node.gateway.fields import MAX_U32, Fields, token_ids
from node.gateway.limits import MAX_MODEL_CHARS, MAX_STOP_CHARS, MAX_STOP_IDS, MAX_STOPS, MAX_TOP_LOGPROBS
from node.gateway.terms import Terms, parse_terms
from node.gateway.text import ChatMessage
from node.gateway.tools import NO_TOOLS, Toolbox, parse_tools
from node.ports import Sampling
from protocol.options import MAX_GRAMMAR_BYTES, PENALTY_ONE, JobOptions, Syntax
from protocol.units import MAX_PROMPT_TOKENS

_MICRO: Final = 1_000_000

Prompt = tuple[ChatMessage, ...] | str | tuple[int, ...]


class Kind(StrEnum):
    """Which of the two endpoints was asked; the value begins the answer's id."""

    CHAT = "chatcmpl"
    TEXT = "cmpl"


@dataclass(frozen=True, slots=True)
class Call:
    """One checked request. `max_tokens`: None when the client named none. `top_logprobs`: None when none are wanted.

    `options`: what was asked for outright; stop ids that follow from `stops` and the grammar of a required call are
    added when the model is known.
    """

    kind: Kind
    model: str
    prompt: Prompt
    max_tokens: int | None
    sampling: Sampling
    options: JobOptions
    stops: tuple[str, ...]
    stream: bool
    include_usage: bool
    top_logprobs: int | None
    toolbox: Toolbox
    terms: Terms

    @property
    def prompt_param(self) -> str:
        return "messages" if self.kind is Kind.CHAT else "prompt"

    @property
    def messages(self) -> tuple[ChatMessage, ...]:
        """The conversation, () for a raw prompt."""
        return tuple(item for item in self.prompt if isinstance(item, ChatMessage))


def parse_chat(body: dict[str, Any]) -> Call:
    """A chat/completions request. Raises: ApiError (400)."""
    fields = Fields(body)
    _refuse_common(fields)
    modalities = fields.get("modalities")
    if fields.get("audio") or modalities not in (None, [], ["text"]):
        raise unsupported("audio" if fields.get("audio") else "modalities", "Only text is offered.")
    if fields.get("web_search_options"):
        raise unsupported("web_search_options", "Web search is not offered.")
    top = fields.integer("top_logprobs", 0, MAX_TOP_LOGPROBS)
    wanted = fields.flag("logprobs")
    if top is not None and not wanted:
        raise _without(fields, "top_logprobs", "logprobs")
    named = fields.integer("max_completion_tokens", 1, MAX_U32)
    older = fields.integer("max_tokens", 1, MAX_U32)
    toolbox = parse_tools(fields)
    call = _call(
        fields,
        kind=Kind.CHAT,
        prompt=parse_messages(fields),
        max_tokens=named if named is not None else older,
        top_logprobs=(top or 0) if wanted else None,
        toolbox=toolbox,
    )
    if toolbox.callable and call.options.syntax is not Syntax.NONE:
        raise unsupported("response_format", "response_format with tools is not offered: an answer has one form.")
    return call


def parse_completion(body: dict[str, Any]) -> Call:
    """A completions request. Raises: ApiError (400)."""
    fields = Fields(body)
    _refuse_common(fields)
    if fields.integer("best_of", 1, 1 << 10) not in (None, 1):
        raise unsupported("best_of", "best_of must be 1: each answer is one job, paid by the token.")
    if fields.flag("echo"):
        raise unsupported("echo", "echo is not offered: only generated tokens are paid for and returned.")
    if fields.text("suffix"):
        raise unsupported("suffix", "suffix is not offered: the network continues a prompt, it does not fill one in.")
    return _call(
        fields,
        kind=Kind.TEXT,
        prompt=_raw_prompt(fields),
        max_tokens=fields.integer("max_tokens", 1, MAX_U32),
        top_logprobs=fields.integer("logprobs", 0, 5),
        toolbox=NO_TOOLS,
    )


def model_of(fields: Fields) -> str:
    """The model's name. Raises: ApiError (400)."""
    model = fields.text("model")
    if not model or len(model) > MAX_MODEL_CHARS:
        raise fields.fail("model", "must name a model; GET /v1/models lists them")
    return model


def _without(fields: Fields, field: str, needed: str) -> ApiError:
    return fields.fail(field, f"has no meaning without {needed}")


def _call(
    fields: Fields,
    *,
    kind: Kind,
    prompt: Prompt,
    max_tokens: int | None,
    top_logprobs: int | None,
    toolbox: Toolbox,
) -> Call:
    stream = fields.flag("stream")
    include_usage = fields.object("stream_options").flag("include_usage")
    if include_usage and not stream:
        raise _without(fields, "stream_options", "stream: true")
    min_tokens = fields.integer("min_tokens", 0, MAX_U32) or 0
    if max_tokens is not None and min_tokens > max_tokens:
        raise fields.fail("min_tokens", f"is above the {max_tokens} tokens that the answer may have")
    syntax, grammar = _format(fields)
    terms = parse_terms(fields)
    return Call(
        kind=kind,
        model=model_of(fields),
        prompt=prompt,
        max_tokens=max_tokens,
        sampling=_sampling(fields),
        options=JobOptions(
            stop_ids=tuple(sorted(set(fields.ids("stop_token_ids", MAX_STOP_IDS)))),
            min_tokens=min_tokens,
            frequency_milli=_penalty(fields, "frequency_penalty"),
            presence_milli=_penalty(fields, "presence_penalty"),
            syntax=syntax,
            grammar=grammar,
            alternatives=top_logprobs or 0,
        ),
        stops=_stops(fields),
        stream=stream and not terms.dry_run,
        include_usage=include_usage,
        top_logprobs=top_logprobs,
        toolbox=toolbox,
        terms=terms,
    )


def _sampling(fields: Fields) -> Sampling:
    temperature = fields.number("temperature", 0, 2)
    top_p = fields.number("top_p", 0, 1)
    top_k = fields.integer("top_k", -1, MAX_U32)
    return Sampling(
        temperature_micro=_MICRO if temperature is None else round(temperature * _MICRO),
        # A nucleus of no mass still holds the likeliest token; zero itself has no meaning on the wire.
        top_p_micro=_MICRO if top_p is None else max(1, round(top_p * _MICRO)),
        top_k=max(0, top_k or 0),
    )


def _penalty(fields: Fields, field: str) -> int:
    """Logits x 1000, as options carry it."""
    return round((fields.number(field, -2, 2) or 0.0) * PENALTY_ONE)


def _stops(fields: Fields) -> tuple[str, ...]:
    value = fields.get("stop")
    stops = [value] if isinstance(value, str) else [] if value is None else value
    if not isinstance(stops, list) or len(stops) > MAX_STOPS:
        raise fields.fail("stop", f"must be a string or a list of at most {MAX_STOPS} strings")
    for index, stop in enumerate(stops):
        if not isinstance(stop, str) or not 1 <= len(stop) <= MAX_STOP_CHARS:
            place = "stop" if isinstance(value, str) else f"stop[{index}]"
            raise fields.fail(place, f"must be a string of 1 to {MAX_STOP_CHARS} characters")
    return tuple(dict.fromkeys(stops))


def _format(fields: Fields) -> tuple[Syntax, str]:
    """What `response_format` asks for, as a grammar. Raises: ApiError (400)."""
    wanted = fields.object("response_format")
    kind = wanted.text("type")
    if kind in (None, "text"):
        return Syntax.NONE, ""
    if kind == "json_object":
        return Syntax.JSON, ""
    if kind != "json_schema":
        raise wanted.fail("type", "must be text, json_object or json_schema")
    inner = wanted.object("json_schema")
    inner.flag("strict")
    schema = inner.get("schema")
    if not isinstance(schema, dict):
        raise inner.fail("schema", "must be a JSON Schema, which is an object")
    grammar = json.dumps(schema, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "replace").decode()
    if len(grammar.encode()) > MAX_GRAMMAR_BYTES:
        raise inner.fail("schema", f"must have at most {MAX_GRAMMAR_BYTES} bytes")
    return Syntax.JSON_SCHEMA, grammar


def _refuse_common(fields: Fields) -> None:
    if fields.integer("n", 1, 1 << 10) not in (None, 1):
        raise unsupported("n", "n must be 1: each answer is one job, paid by the token. Send the request n times.")
    if fields.get("logit_bias"):
        raise unsupported("logit_bias", "logit_bias is not offered; stop_token_ids and response_format are.")


def _raw_prompt(fields: Fields) -> str | tuple[int, ...]:
    """A string or a list of token ids, alone or as the only item of a list."""
    value = fields.get("prompt")
    if isinstance(value, list) and value and not isinstance(value[0], int):
        if len(value) > 1:
            raise unsupported("prompt", "prompt must be a single prompt: each answer is one job. Send them one by one.")
        value = value[0]
    if isinstance(value, str) and value:
        return value
    if not isinstance(value, list) or not 1 <= len(value) <= MAX_PROMPT_TOKENS:
        raise fields.fail("prompt", "must be a string or a list of token ids, and not empty")
    return token_ids(value, fields.name("prompt"))
