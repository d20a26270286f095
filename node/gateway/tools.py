"""Functions that a model may call: what a request says of them, and the JSON Schema that forces a call.

In `auto` the model decides, and its arguments are what it wrote. Where a call is `required`, or one function is named,
the output follows a grammar: one call, with arguments that fit the function's schema.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from enum import Enum
from typing import Any, Final

from node.gateway.errors import invalid, unsupported
from node.gateway.fields import Fields
from protocol.options import MAX_GRAMMAR_BYTES

MAX_TOOLS: Final = 128
"""Functions of one request, as at OpenAI. Each is written into the prompt and paid for there."""

_NAME: Final = re.compile(r"[a-zA-Z0-9_-]{1,64}")
"""A function's name, as at OpenAI."""


class Choice(Enum):
    """Whether the model calls a function. A named function is REQUIRED with that one alone."""

    NONE = "none"
    AUTO = "auto"
    REQUIRED = "required"


@dataclass(frozen=True, slots=True)
class Tool:
    """One function. `document`: as the template gets it. `parameters`: its JSON Schema."""

    name: str
    document: dict[str, Any]
    parameters: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Toolbox:
    """What a request offers the model. `forced`: the functions one of which must be called, () where none must.

    `parallel`: whether an answer may hold several calls.
    """

    tools: tuple[Tool, ...] = ()
    choice: Choice = Choice.NONE
    forced: tuple[Tool, ...] = ()
    parallel: bool = True

    @property
    def callable(self) -> bool:
        """Whether calls are looked for in the output."""
        return bool(self.tools) and self.choice is not Choice.NONE

    @property
    def names(self) -> frozenset[str]:
        """The functions' names."""
        return frozenset(tool.name for tool in self.forced or self.tools)


NO_TOOLS: Final = Toolbox()


def parse_tools(fields: Fields) -> Toolbox:
    """`tools`, `tool_choice` and `parallel_tool_calls`. Raises: ApiError (400)."""
    if fields.get("functions") or fields.get("function_call"):
        raise unsupported("functions", "functions is OpenAI's old form and is not offered; send tools instead.")
    listed = fields.items("tools", MAX_TOOLS)
    tools = tuple(_tool(item, f"{fields.name('tools')}[{index}]") for index, item in enumerate(listed))
    if len({tool.name for tool in tools}) != len(tools):
        raise fields.fail("tools", "must have names that differ")
    parallel = fields.get("parallel_tool_calls") is None or fields.flag("parallel_tool_calls")
    choice = fields.get("tool_choice")
    if not tools:
        if choice not in (None, "none", "auto"):
            raise fields.fail("tool_choice", "has no meaning without tools")
        return NO_TOOLS
    if isinstance(choice, dict):
        named = _named(fields.object("tool_choice"), tools)
        return Toolbox(tools, Choice.REQUIRED, (named,), parallel=False)
    if choice is not None and choice not in [kind.value for kind in Choice]:
        raise fields.fail("tool_choice", "must be none, auto, required or an object that names a function")
    kind = Choice.AUTO if choice is None else Choice(choice)
    return Toolbox(tools, kind, tools if kind is Choice.REQUIRED else (), parallel)


def _tool(value: Any, path: str) -> Tool:
    fields = Fields.of(value, path)
    if fields.text("type") != "function":
        raise unsupported(fields.name("type"), f"{fields.name('type')} must be 'function': no other tools are offered.")
    function = fields.object("function")
    name = function.text("name")
    if name is None or not _NAME.fullmatch(name):
        raise function.fail("name", "must be 1 to 64 letters, digits, _ or -")
    description = function.text("description")
    function.flag("strict")
    function.object("parameters")
    parameters = function.get("parameters") or {"type": "object", "properties": {}}
    if len(json.dumps(parameters, ensure_ascii=False).encode("utf-8", "replace")) > MAX_GRAMMAR_BYTES:
        raise function.fail("parameters", f"must be a JSON Schema of at most {MAX_GRAMMAR_BYTES} bytes")
    described = {"name": name, "description": description or "", "parameters": parameters}
    return Tool(name, {"type": "function", "function": described}, parameters)


def _named(choice: Fields, tools: tuple[Tool, ...]) -> Tool:
    if choice.text("type") != "function":
        raise choice.fail("type", "must be 'function'")
    name = choice.object("function").text("name")
    for tool in tools:
        if tool.name == name:
            return tool
    raise choice.fail("function.name", "must be one of the tools")


def call_schema(tools: tuple[Tool, ...], arguments_key: str) -> str:
    """A JSON Schema of one call of one of `tools`: `{"name": ..., "<arguments_key>": {...}}`.

    Raises: ApiError (400) when it is longer than a grammar may be.
    """
    calls = []
    definitions = {}
    for index, tool in enumerate(tools):
        place = f"tool{index}"
        definitions[place] = _moved(tool.parameters, f"#/$defs/{place}")
        calls.append(
            {
                "type": "object",
                "properties": {"name": {"const": tool.name}, arguments_key: {"$ref": f"#/$defs/{place}"}},
                "required": ["name", arguments_key],
                "additionalProperties": False,
            }
        )
    schema = {**(calls[0] if len(calls) == 1 else {"anyOf": calls}), "$defs": definitions}
    text = json.dumps(schema, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "replace").decode()
    if len(text.encode()) > MAX_GRAMMAR_BYTES:
        said = (
            f"The schemas of all tools together must have at most {MAX_GRAMMAR_BYTES} bytes where a call is required."
        )
        raise invalid("tools", f"{said} Nothing was sent or paid.")
    return text


def _moved(schema: Any, place: str) -> Any:
    """The schema with its references to itself following it to where it now stands."""
    if isinstance(schema, list):
        return [_moved(item, place) for item in schema]
    if not isinstance(schema, dict):
        return schema
    moved = {key: _moved(value, place) for key, value in schema.items()}
    reference = schema.get("$ref")
    if isinstance(reference, str) and (reference == "#" or reference.startswith("#/")):
        moved["$ref"] = place + reference[1:]
    return moved
