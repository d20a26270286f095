"""A model's chat template, run so that nothing a client sends can become a control token.

Every text of the client's (contents, names, arguments, schemas) stands in the template as an unguessable mark. Control
tokens are looked for in what the template itself wrote, and the texts are put in last. Words of JSON Schema stay as
they are, because templates look at them. A mark that went through `tojson` is replaced by the text as JSON escapes it.
A template that inspects contents (to strip earlier reasoning, say) sees the mark and whatever blanks surround the text,
so trimming and comparing work, and searching finds nothing.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection, Mapping
from datetime import datetime
from typing import Any, Final, NoReturn

import jinja2
from jinja2 import meta, nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from protocol.errors import TallyError

MAX_RENDERED_CHARS: Final = 16 << 20
"""Bound on a rendered prompt, contents left out of the count. Unit: characters. A template comes from a stranger's
model card; without a bound one that loops could fill this machine's memory. Doubled, it could fill twice as much."""

_WORDS: Final = (
    "type function name description parameters properties required enum items object array string number integer "
    "boolean null additionalProperties anyOf oneOf allOf const default format title minimum maximum $ref $defs strict "
    "minItems maxItems pattern nullable"
)
_PLAIN: Final = frozenset(_WORDS.split())
"""Words of tool definitions that a template sees as they are: it branches on them, and none of them is, or is part of,
a control token's text."""

_WORD: Final = re.compile(r"[a-zA-Z0-9_-]{1,64}")

_MARK: Final = re.compile(r"(content[0-9a-f]{32}x[0-9]{8})[rja]")
"""A mark of any request. Its last letter says how its text is put in: r as it is, j and a as JSON escapes it."""


class TemplateRefused(TallyError):
    """The model's chat template does not accept these messages; nothing was sent or paid."""


class Marks:
    """The client's texts and what stands for them. `nonce`: 32 unguessable hexadecimal digits.

    `control`: texts of the model's control tokens.
    """

    def __init__(self, nonce: str, control: Collection[str]) -> None:
        self._prefix = f"content{nonce}x"
        # Blanks around a text stay visible for templates that trim, unless a control token has blanks of its own.
        self._cut = str.strip if all(text == text.strip() for text in control) else str
        # A token that begins and ends with a sign can hold a word whole, and never a part of one.
        self._bounded = not any(_WORD.match(text) or _WORD.match(text[-1:]) for text in control)
        self._control = "\0".join(control)
        self._places: dict[str, str] = {}
        self._texts: dict[str, str] = {}

    @property
    def pattern(self) -> str:
        """A regular expression for all marks of this request."""
        return rf"{self._prefix}[0-9]{{8}}[rja]"

    def mark(self, text: str) -> str:
        """What the template sees of a text. The same text gets the same mark, so that templates can compare."""
        core = self._cut(text)
        if not core:
            return text
        before, _, after = text.partition(core)
        place = self._places.get(core)
        if place is None:
            place = self._places[core] = f"{self._prefix}{len(self._places):08d}"
            self._texts[place] = core
        return f"{before}{place}r{after}"

    def plain(self, word: str) -> str:
        """An id, which templates measure and cut: as it is, where it cannot be part of a control token."""
        harmless = self._bounded and _WORD.fullmatch(word) and word not in self._control
        return word if harmless else self.mark(word)

    def cover(self, value: Any) -> Any:
        """A JSON value with all its texts marked, those apart that are words of a schema."""
        if isinstance(value, str):
            return value if value in _PLAIN else self.mark(value)
        if isinstance(value, list):
            return [self.cover(item) for item in value]
        if isinstance(value, Mapping):
            return {self.cover(key): self.cover(item) for key, item in value.items()}
        return value

    def text(self, found: str) -> str:
        """What a mark that `pattern` found stands for. "" for one that no text has."""
        text, way = self._texts.get(found[:-1], ""), found[-1]
        return text if way == "r" else json.dumps(text, ensure_ascii=way == "a")[1:-1]


class ChatTemplate:
    """A compiled template. `now`: the time it may print. Raises: jinja2.TemplateError, RecursionError."""

    def __init__(self, source: str, now: Callable[[], datetime]) -> None:
        environment = _Environment(now)
        self._template = environment.from_string(source)
        self.takes_tools = "tools" in meta.find_undeclared_variables(environment.parse(source))

    def render(self, model: str, values: dict[str, Any]) -> str:
        """Raises: TemplateRefused, also for whatever the template itself raises."""
        parts: list[str] = []
        size = 0
        try:
            for part in self._template.generate(**values):
                parts.append(part)
                size += len(part)
                if size > MAX_RENDERED_CHARS:
                    raise TemplateRefused(
                        f"{model}'s chat template wrote more than {MAX_RENDERED_CHARS} characters. "
                        "Nothing was sent or paid. Send fewer messages, or choose another model."
                    )
        except TemplateRefused:
            raise
        except Exception as exc:  # a template is a stranger's program and may raise anything
            reason = _MARK.sub("…", str(exc))[:300]
            raise TemplateRefused(
                f"{model}'s chat template refused these messages: {reason}. Nothing was sent or paid. "
                "Most often roles must alternate between user and assistant, or no system message is allowed."
            ) from exc
        return "".join(parts)


class _Generation(Extension):
    """`{% generation %}`, by which some templates mark the assistant's words for training: here it only groups."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _Environment(ImmutableSandboxedEnvironment):
    """Jinja as transformers sets it up for chat templates, and no large repetitions."""

    intercepted_binops = frozenset(["*", "**"])

    def __init__(self, now: Callable[[], datetime]) -> None:
        super().__init__(
            trim_blocks=True, lstrip_blocks=True, autoescape=False, extensions=["jinja2.ext.loopcontrols", _Generation]
        )
        self.filters["tojson"] = _tojson
        self.globals["raise_exception"] = _raise_exception
        self.globals["strftime_now"] = lambda pattern: now().strftime(pattern)

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        """Multiply, but never text or lists by a large number, nor to a large power."""
        sizes = [len(side) if hasattr(side, "__len__") else abs(side) for side in (left, right)]
        if max(sizes) > 100_000 or (operator == "**" and max(sizes) > 64):
            raise jinja2.TemplateRuntimeError(f"{operator} with an operand above the limit")
        return super().call_binop(context, operator, left, right)


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateRuntimeError(message)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # Jinja's own filter escapes for HTML, which would change the prompt.
    text = json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
    return _MARK.sub(rf"\g<1>{'a' if ensure_ascii else 'j'}", text)
