"""What a client may ask: JSON in, one checked `Call` out, or a 400 that names the parameter.

Parameters that change what is generated and that the network cannot honour are refused by name; parameters nobody
here knows are ignored, as OpenAI's own clients send new ones every month. `seed` is accepted and has no effect: the
seed of a job is drawn by both sides together, so that neither can choose the text.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Final

import msgspec

from node.gateway.errors import ApiError, invalid, unsupported
from node.gateway.limits import MAX_MESSAGES, MAX_MODEL_CHARS, MAX_STOP_CHARS, MAX_STOPS, MAX_TOP_LOGPROBS
from node.gateway.text import ChatMessage
from node.ports import Sampling
from protocol.units import MAX_PROMPT_TOKENS, Tier

_MICRO: Final = 1_000_000
_MAX_U32: Final = (1 << 32) - 1

Prompt = tuple[ChatMessage, ...] | str | tuple[int, ...]


class Kind(StrEnum):
    """Which of the two endpoints was asked; the value begins the answer's id."""

    CHAT = "chatcmpl"
    TEXT = "cmpl"


@dataclass(frozen=True, slots=True)
class Call:
    """One checked request. `max_tokens`: None when the client named none. `top_logprobs`: None when none are wanted.

    `service_tier`: the tier as the client named it, for the answer.
    """

    kind: Kind
    model: str
    prompt: Prompt
    max_tokens: int | None
    sampling: Sampling
    stops: tuple[str, ...]
    stream: bool
    include_usage: bool
    top_logprobs: int | None
    tier: Tier
    service_tier: str

    @property
    def prompt_param(self) -> str:
        return "messages" if self.kind is Kind.CHAT else "prompt"


def decode_body(body: bytes) -> dict[str, Any]:
    """The JSON object of a request. Raises: ApiError (400)."""
    try:
        value = msgspec.json.decode(body)
    except RecursionError as exc:
        raise invalid(None, "The body's JSON is nested too deeply. Nothing was sent or paid.", "invalid_json") from exc
    except (msgspec.MsgspecError, UnicodeError) as exc:
        raise invalid(
            None, f"The body is not valid JSON in UTF-8 ({exc}). Nothing was sent or paid.", "invalid_json"
        ) from exc
    if not isinstance(value, dict):
        raise invalid(None, "The body must be a JSON object. Nothing was sent or paid.", "invalid_json")
    return value


class _Fields:
    """Typed access to an object's fields; null counts as absent, as it does at OpenAI."""

    def __init__(self, values: dict[str, Any], path: str = "") -> None:
        self._values = values
        self._path = path

    def name(self, field: str) -> str:
        return f"{self._path}{field}"

    def get(self, field: str) -> Any:
        return self._values.get(field)

    def fail(self, field: str, message: str) -> ApiError:
        return invalid(self.name(field), f"{self.name(field)} {message}. Nothing was sent or paid.")

    def text(self, field: str) -> str | None:
        value = self.get(field)
        if value is None or isinstance(value, str):
            return value
        raise self.fail(field, "must be a string")

    def flag(self, field: str) -> bool:
        value = self.get(field)
        if value is None or isinstance(value, bool):
            return bool(value)
        raise self.fail(field, "must be true or false")

    def integer(self, field: str, low: int, high: int) -> int | None:
        value = self.get(field)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise self.fail(field, f"must be an integer from {low} to {high}")
        return value

    def number(self, field: str, low: float, high: float) -> float | None:
        value = self.get(field)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
            raise self.fail(field, f"must be a number from {low} to {high}")
        return float(value)

    def object(self, field: str) -> _Fields:
        value = self.get(field)
        if value is None:
            value = {}
        if not isinstance(value, dict):
            raise self.fail(field, "must be an object")
        return _Fields(value, f"{self.name(field)}.")


def parse_chat(body: dict[str, Any]) -> Call:
    """A chat/completions request. Raises: ApiError (400)."""
    fields = _Fields(body)
    _refuse_common(fields)
    _refuse_chat(fields)
    top = fields.integer("top_logprobs", 0, MAX_TOP_LOGPROBS)
    wanted = fields.flag("logprobs")
    if top is not None and not wanted:
        raise _without(fields, "top_logprobs", "logprobs")
    named = fields.integer("max_completion_tokens", 1, _MAX_U32)
    older = fields.integer("max_tokens", 1, _MAX_U32)
    return _call(
        fields,
        kind=Kind.CHAT,
        prompt=_messages(fields),
        max_tokens=named if named is not None else older,
        top_logprobs=(top or 0) if wanted else None,
    )


def parse_completion(body: dict[str, Any]) -> Call:
    """A completions request. Raises: ApiError (400)."""
    fields = _Fields(body)
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
        max_tokens=fields.integer("max_tokens", 1, _MAX_U32),
        top_logprobs=fields.integer("logprobs", 0, 5),
    )


def _without(fields: _Fields, field: str, needed: str) -> ApiError:
    return fields.fail(field, f"has no meaning without {needed}")


def _call(fields: _Fields, *, kind: Kind, prompt: Prompt, max_tokens: int | None, top_logprobs: int | None) -> Call:
    model = fields.text("model")
    if not model or len(model) > MAX_MODEL_CHARS:
        raise fields.fail("model", "must name a model; GET /v1/models lists them")
    stream = fields.flag("stream")
    include_usage = fields.object("stream_options").flag("include_usage")
    if include_usage and not stream:
        raise _without(fields, "stream_options", "stream: true")
    tier, service_tier = _tier(fields)
    return Call(
        kind=kind,
        model=model,
        prompt=prompt,
        max_tokens=max_tokens,
        sampling=_sampling(fields),
        stops=_stops(fields),
        stream=stream,
        include_usage=include_usage,
        top_logprobs=top_logprobs,
        tier=tier,
        service_tier=service_tier,
    )


def _sampling(fields: _Fields) -> Sampling:
    temperature = fields.number("temperature", 0, 2)
    top_p = fields.number("top_p", 0, 1)
    top_k = fields.integer("top_k", -1, _MAX_U32)
    return Sampling(
        temperature_micro=_MICRO if temperature is None else round(temperature * _MICRO),
        # A nucleus of no mass still holds the likeliest token; zero itself has no meaning on the wire.
        top_p_micro=_MICRO if top_p is None else max(1, round(top_p * _MICRO)),
        top_k=max(0, top_k or 0),
    )


def _stops(fields: _Fields) -> tuple[str, ...]:
    value = fields.get("stop")
    stops = [value] if isinstance(value, str) else [] if value is None else value
    if not isinstance(stops, list) or len(stops) > MAX_STOPS:
        raise fields.fail("stop", f"must be a string or a list of at most {MAX_STOPS} strings")
    for index, stop in enumerate(stops):
        if not isinstance(stop, str) or not 1 <= len(stop) <= MAX_STOP_CHARS:
            place = "stop" if isinstance(value, str) else f"stop[{index}]"
            raise fields.fail(place, f"must be a string of 1 to {MAX_STOP_CHARS} characters")
    return tuple(dict.fromkeys(stops))


_TIERS: Final = {
    "auto": Tier.STANDARD,
    "default": Tier.STANDARD,
    "standard": Tier.STANDARD,
    "flex": Tier.FLEX,
    "priority": Tier.PRIORITY,
}


def _tier(fields: _Fields) -> tuple[Tier, str]:
    name = fields.text("service_tier") or "auto"
    if name not in _TIERS:
        raise fields.fail("service_tier", f"must be one of {', '.join(_TIERS)}")
    return _TIERS[name], "default" if _TIERS[name] is Tier.STANDARD else name


def _refuse_common(fields: _Fields) -> None:
    if fields.integer("n", 1, 1 << 10) not in (None, 1):
        raise unsupported("n", "n must be 1: each answer is one job, paid by the token. Send the request n times.")
    for name in ("presence_penalty", "frequency_penalty"):
        if fields.number(name, -2, 2):
            raise unsupported(name, f"{name} is not offered: a validator could not recompute the answer.")
    if fields.get("logit_bias"):
        raise unsupported("logit_bias", "logit_bias is not offered: a validator could not recompute the answer.")


def _refuse_chat(fields: _Fields) -> None:
    for name in ("tools", "functions"):
        if fields.get(name):
            raise unsupported(name, f"{name} are not offered yet. Describe the call in the prompt instead.")
    if fields.get("tool_choice") not in (None, "none", "auto"):
        raise unsupported("tool_choice", "tool_choice is not offered yet.")
    kind = fields.object("response_format").text("type")
    if kind not in (None, "text"):
        raise unsupported("response_format", f"response_format {kind[:40]!r} is not offered yet; only text is.")
    modalities = fields.get("modalities")
    if fields.get("audio") or modalities not in (None, [], ["text"]):
        name = "audio" if fields.get("audio") else "modalities"
        raise unsupported(name, "Only text is offered.")
    if fields.get("web_search_options"):
        raise unsupported("web_search_options", "Web search is not offered.")


# ----------------------------------------------------------------------------------------------------------- prompts

_ROLES: Final = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}
"""OpenAI's role -> the template's. `developer` is the newer name of `system`."""


def _messages(fields: _Fields) -> tuple[ChatMessage, ...]:
    value = fields.get("messages")
    if not isinstance(value, list) or not 1 <= len(value) <= MAX_MESSAGES:
        raise fields.fail("messages", f"must be a list of 1 to {MAX_MESSAGES} messages")
    return tuple(_message(item, f"messages[{index}]") for index, item in enumerate(value))


def _message(value: Any, path: str) -> ChatMessage:
    if not isinstance(value, dict):
        raise invalid(path, f"{path} must be an object with role and content. Nothing was sent or paid.")
    fields = _Fields(value, f"{path}.")
    role = fields.text("role")
    if role in ("tool", "function"):
        raise unsupported(fields.name("role"), f"{fields.name('role')} {role!r}: tools are not offered yet.")
    if role not in _ROLES:
        raise fields.fail("role", f"must be one of {', '.join(_ROLES)}")
    for name in ("tool_calls", "function_call", "audio"):
        if fields.get(name):
            raise unsupported(fields.name(name), f"{fields.name(name)} is not offered yet.")
    return ChatMessage(_ROLES[role], _content(fields, role))


def _content(fields: _Fields, role: str) -> str:
    value = fields.get("content")
    if isinstance(value, str):
        return value
    if value is None and role == "assistant":
        return ""
    if not isinstance(value, list) or not value:
        raise fields.fail("content", "must be a string or a list of text parts")
    texts: list[str] = []
    for index, part in enumerate(value):
        path = f"{fields.name('content')}[{index}]"
        if not isinstance(part, dict):
            raise invalid(path, f"{path} must be an object. Nothing was sent or paid.")
        inner = _Fields(part, f"{path}.")
        kind = inner.text("type")
        if kind != "text":
            raise unsupported(
                inner.name("type"), f"{inner.name('type')} is {(kind or '')[:40]!r}; only text parts are offered."
            )
        text = inner.text("text")
        if text is None:
            raise inner.fail("text", "must be a string")
        texts.append(text)
    # Parts are separate pieces of one message; run together, words and paragraphs would touch.
    return "\n".join(texts)


def _raw_prompt(fields: _Fields) -> str | tuple[int, ...]:
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
    for index, number in enumerate(value):
        if isinstance(number, bool) or not isinstance(number, int) or not 0 <= number <= _MAX_U32:
            raise fields.fail(f"prompt[{index}]", "must be a token id")
    return tuple(value)
