"""The messages of a chat request, checked: roles, text parts, function calls and their results."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Final

import msgspec

from node.gateway.errors import unsupported
from node.gateway.fields import Fields
from node.gateway.limits import MAX_MESSAGES
from node.gateway.text import ChatMessage, PastCall
from node.gateway.tools import MAX_TOOLS

_ROLES: Final = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant", "tool": "tool"}
"""OpenAI's role -> the template's. `developer` is the newer name of `system`."""


def parse_messages(fields: Fields) -> tuple[ChatMessage, ...]:
    """`messages`. Raises: ApiError (400)."""
    value = fields.get("messages")
    if not isinstance(value, list) or not 1 <= len(value) <= MAX_MESSAGES:
        raise fields.fail("messages", f"must be a list of 1 to {MAX_MESSAGES} messages")
    messages = [_message(Fields.of(item, f"messages[{index}]")) for index, item in enumerate(value)]
    # Some templates want the function's name beside its result, which OpenAI's clients leave to the call's id.
    names = {call.id: call.name for message in messages for call in message.calls}
    return tuple(replace(m, name=m.name or names.get(m.call_id, "")) if m.call_id else m for m in messages)


def _message(fields: Fields) -> ChatMessage:
    role = fields.text("role")
    if role == "function":
        raise unsupported(fields.name("role"), f"{fields.name('role')} 'function' is OpenAI's old form; send 'tool'.")
    if role not in _ROLES:
        raise fields.fail("role", f"must be one of {', '.join(_ROLES)}")
    for name in ("function_call", "audio"):
        if fields.get(name):
            raise unsupported(fields.name(name), f"{fields.name(name)} is not offered.")
    if role != "assistant" and fields.get("tool_calls"):
        raise fields.fail("tool_calls", "belong to an assistant's message")
    call_id = fields.text("tool_call_id") or ""
    if role == "tool" and not call_id:
        raise fields.fail("tool_call_id", "must name the call whose result this is")
    return ChatMessage(
        _ROLES[role],
        _content(fields, role),
        calls=tuple(
            _call(Fields.of(item, f"{fields.name('tool_calls')}[{index}]"))
            for index, item in enumerate(fields.items("tool_calls", MAX_TOOLS))
        ),
        call_id=call_id if role == "tool" else "",
        name=(fields.text("name") or "") if role == "tool" else "",
        reasoning=(fields.text("reasoning_content") or "") if role == "assistant" else "",
    )


def _call(fields: Fields) -> PastCall:
    if fields.text("type") not in (None, "function"):
        raise fields.fail("type", "must be 'function'")
    function = fields.object("function")
    name = function.text("name")
    if not name:
        raise function.fail("name", "must name the function that was called")
    return PastCall(fields.text("id") or "", name, _arguments(function.text("arguments") or "{}"))


def _arguments(written: str) -> dict[str, Any] | str:
    """As an object, which templates expect; as it was written when the model wrote no JSON object."""
    try:
        arguments = msgspec.json.decode(written.encode("utf-8", "replace"))
    except (msgspec.MsgspecError, RecursionError):
        return written
    return arguments if isinstance(arguments, dict) else written


def _content(fields: Fields, role: str) -> str:
    value = fields.get("content")
    if isinstance(value, str):
        return value
    if value is None and role == "assistant":
        return ""
    if not isinstance(value, list) or not value:
        raise fields.fail("content", "must be a string or a list of text parts")
    # Parts are separate pieces of one message; run together, words and paragraphs would touch.
    return "\n".join(_part(part, f"{fields.name('content')}[{index}]") for index, part in enumerate(value))


def _part(value: Any, path: str) -> str:
    fields = Fields.of(value, path)
    kind = fields.text("type")
    if kind != "text":
        raise unsupported(
            fields.name("type"), f"{fields.name('type')} is {(kind or '')[:40]!r}; only text parts are offered."
        )
    text = fields.text("text")
    if text is None:
        raise fields.fail("text", "must be a string")
    return text
