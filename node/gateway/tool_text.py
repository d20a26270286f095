"""Function calls as models write them, read while the text is still coming.

Which form a model writes is seen from its chat template. However the text is cut into pieces, the same calls and the
same remaining text come out; held back is only what may still turn out to be part of a call. What turns out to be none
(an unknown function, JSON that breaks off before its arguments) is given as the text it is.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from enum import Enum, auto
from typing import Final


@dataclass(frozen=True, slots=True)
class ToolForm:
    """How a model writes calls. `opener` before them, `closer` after each; `listed`: they stand in a JSON array.

    `arguments_key`: as the model was taught it. `prefill`: the text that makes the next thing written a call.
    `short_ids`: the template wants call ids of nine letters and digits.
    """

    opener: str
    closer: str
    arguments_key: str
    prefill: str
    listed: bool = False
    short_ids: bool = False


HERMES: Final = ToolForm("<tool_call>", "</tool_call>", "arguments", "<tool_call>\n")
"""Hermes, Qwen 2.5 and 3, and many others."""

MISTRAL: Final = ToolForm("[TOOL_CALLS]", "", "arguments", "[TOOL_CALLS] [", listed=True, short_ids=True)
"""Mistral up to its third tokenizer version: `[TOOL_CALLS] [{...}, {...}]`."""

LLAMA: Final = ToolForm("", "", "parameters", "")
"""Llama 3.1 to 4: the whole output is the call's object, or several with `;` or blanks between."""


def form_of(template: str) -> ToolForm | None:
    """The form that a chat template teaches, None when it is none that is read here."""
    if "<tool_call>" in template:
        return None if "<function=" in template or "<arg_key>" in template else HERMES
    if "[TOOL_CALLS]" in template:
        return None if "[ARGS]" in template else MISTRAL
    if '"parameters"' in template and '"name"' in template and ("ipython" in template or "python_tag" in template):
        return LLAMA
    return None


@dataclass(frozen=True, slots=True)
class CallDelta:
    """More of call number `index`. `name` comes once, with the call's first delta; `arguments`: JSON text."""

    index: int
    name: str | None
    arguments: str


class _Object:
    """One call's JSON object, a character at a time.

    `name` and `started` (its arguments began, or it closed without any) decide that it is a call; until then it may be
    `rejected`. What has been read stands in `raw`.
    """

    def __init__(self, names: frozenset[str]) -> None:
        self._names = names
        self.raw: list[str] = []
        self.name: str | None = None
        self.started = False
        self.closed = False
        self.rejected = False
        self._arguments: list[str] = []
        self._depth = 0
        self._string: list[str] | None = None  # the JSON string being read at depth 1
        self._quoted = False
        self._escaped = False
        self._key: str | None = None
        self._at_key = True
        self._capturing = False

    @property
    def decided(self) -> bool:
        """Whether it is certainly a call."""
        return self.name is not None and self.started

    def take_arguments(self) -> str:
        """What was read of the arguments since the last time."""
        text, self._arguments = "".join(self._arguments), []
        return text

    def read(self, character: str) -> None:
        """One more character. Nothing is read once it is `closed` or `rejected`."""
        self.raw.append(character)
        if self._capturing:
            self._arguments.append(character)
        if self._quoted:
            self._in_string(character)
        elif character == '"':
            self._quoted = True
            self._string = [character] if self._depth == 1 else None
        elif character in "{[":
            self._open(character)
        elif character in "}]":
            self._close()
        elif self._depth == 1:
            self._between(character)

    def _in_string(self, character: str) -> None:
        if self._string is not None:
            self._string.append(character)
        if self._escaped:
            self._escaped = False
        elif character == "\\":
            self._escaped = True
        elif character == '"':
            self._quoted = False
            if self._string is not None:
                self._word("".join(self._string))
                self._string = None

    def _word(self, written: str) -> None:
        """A string at depth 1: a key, the name, or arguments that were written as a string."""
        try:
            # Not strict: models put line breaks into strings.
            word = json.loads(written, strict=False).encode("utf-8", "replace").decode()
        except ValueError:
            return self._spoil()
        if self._at_key:
            self._key = word
        elif self._key == "name" and self.name is None:
            self.name = word
            if word not in self._names:
                self._spoil()
        elif self._key in ("arguments", "parameters") and not self.started:
            self.started = True
            self._arguments.append(word)
        return None

    def _open(self, character: str) -> None:
        self._depth += 1
        if self._depth == 2:
            if self._at_key:
                self._spoil()
            elif self._key in ("arguments", "parameters") and character == "{" and not self.started:
                self.started = self._capturing = True
                self._arguments.append(character)

    def _close(self) -> None:
        self._depth -= 1
        if self._depth == 1:
            self._capturing = False
        elif self._depth == 0:
            if not self.started:
                self.started = True
                self._arguments.append("{}")
            self.closed = True
            self.rejected = self.name is None

    def _between(self, character: str) -> None:
        if character == ":":
            self._at_key = False
        elif character == ",":
            self._at_key, self._key = True, None
        elif not character.isspace() and self._at_key:
            self._spoil()

    def _spoil(self) -> None:
        """It is no call; or, if it was already given as one, nothing more of it can be read."""
        if self.decided:
            self.closed = True
        else:
            self.rejected = True


class _State(Enum):
    TEXT = auto()
    START = auto()  # only blanks so far, where a call needs no opener
    OPENED = auto()  # after the opener
    ITEM = auto()  # where an object must begin
    OBJECT = auto()
    AFTER = auto()  # an object closed
    IGNORED = auto()  # the one call that was allowed is over


class CallReader:
    """Takes a model's text apart. `names`: functions that exist. `prefilled`: the output begins after `form.prefill`.

    `calls`: how many began. `over`: the one call that was allowed is complete, and what follows is not wanted.
    """

    def __init__(
        self, form: ToolForm, names: frozenset[str], *, prefilled: bool = False, parallel: bool = True
    ) -> None:
        self._form = form
        self._names = names
        self._parallel = parallel
        self._state = _State.TEXT if form.opener else _State.START
        if prefilled:
            self._state = _State.ITEM
        self._held = ""  # not yet read
        self._raw = ""  # read since the opener, to be given as text if it is no call
        self._space = ""  # blanks that are dropped when a call follows
        self._object = _Object(names)
        self._announced = False
        self._out: list[str | CallDelta] = []
        self.calls = 0

    @property
    def over(self) -> bool:
        return self._state is _State.IGNORED

    def push(self, text: str) -> list[str | CallDelta]:
        """Text and calls that became certain, in order."""
        self._held += text
        while self._held and self._step():
            pass
        return self._take()

    def finish(self) -> list[str | CallDelta]:
        """What was held back, now that no more text comes."""
        if self._state in (_State.TEXT, _State.START):
            self._text(self._held)
        elif self._state is _State.OBJECT and self._object.decided:
            self._announce()
        elif self._state in (_State.OPENED, _State.ITEM, _State.OBJECT):
            self._text(self._raw + "".join(self._object.raw) + self._held)
        self._held = self._raw = ""
        if not self.calls:
            self._out.append(self._space)
        return self._take()

    # ------------------------------------------------------------------------------------------------- states

    def _step(self) -> bool:
        """One move; False when it needs more text."""
        match self._state:
            case _State.TEXT:
                return self._in_text()
            case _State.START:
                return self._at_start()
            case _State.OPENED:
                return self._expect("[", _State.ITEM) if self._form.listed else self._go(_State.ITEM)
            case _State.ITEM:
                return self._begin()
            case _State.OBJECT:
                return self._in_object()
            case _State.AFTER:
                return self._after()
            case _State.IGNORED:
                self._held = ""
                return False

    def _go(self, state: _State) -> bool:
        self._state = state
        return True

    def _in_text(self) -> bool:
        opener = self._form.opener
        at = self._held.find(opener) if opener else -1
        if at >= 0:
            self._text(self._held[:at])
            self._raw, self._held = opener, self._held[at + len(opener) :]
            return self._go(_State.OPENED)
        keep = next(
            (n for n in range(min(len(opener) - 1, len(self._held)), 0, -1) if opener.startswith(self._held[-n:])), 0
        )
        cut = len(self._held) - keep
        self._text(self._held[:cut])
        self._held = self._held[cut:]
        return False

    def _at_start(self) -> bool:
        """Blanks, and `;` between two calls, until an object or something else begins."""
        rest = self._held.lstrip(" \t\r\n;" if self.calls else None)
        if not rest:
            return False
        if rest[0] != "{":
            return self._go(_State.TEXT)
        if not self.calls:
            self._raw = self._held[: len(self._held) - len(rest)]
        self._held = rest
        return self._go(_State.ITEM)

    def _expect(self, character: str, then: _State) -> bool:
        rest = self._held.lstrip()
        if not rest:
            return False
        if rest[0] != character:
            return self._refuse()
        self._raw += self._held[: len(self._held) - len(rest) + 1]
        self._held = rest[1:]
        return self._go(then)

    def _begin(self) -> bool:
        rest = self._held.lstrip()
        if not rest:
            return False
        self._raw += self._held[: len(self._held) - len(rest)]
        self._held = rest
        self._object, self._announced = _Object(self._names), False
        return self._go(_State.OBJECT) if rest[0] == "{" else self._refuse()

    def _in_object(self) -> bool:
        item = self._object
        read = 0
        for character in self._held:
            item.read(character)
            read += 1
            if item.closed or item.rejected:
                break
        self._held = self._held[read:]
        if item.rejected:
            return self._refuse()
        if item.decided:
            self._announce()
        if not item.closed:
            return False
        self._raw = ""
        self._object = _Object(self._names)
        return self._go(_State.AFTER if self._parallel else _State.IGNORED)

    def _after(self) -> bool:
        rest = self._held.lstrip()
        if not rest:
            return False
        if self._form.listed:
            if rest[0] in ",]":
                self._held = rest[1:]
                return self._go(_State.ITEM if rest[0] == "," else _State.TEXT)
        elif self._form.closer:
            if rest.startswith(self._form.closer):
                self._held = rest[len(self._form.closer) :]
            elif self._form.closer.startswith(rest):
                return False
        else:
            return self._go(_State.START)
        return self._go(_State.TEXT)

    # ------------------------------------------------------------------------------------------------- output

    def _announce(self) -> None:
        """Give what is known of the object being read."""
        arguments = self._object.take_arguments()
        if not self._announced:
            self._announced = True
            self._space = ""
            self._out.append(CallDelta(self.calls, self._object.name, arguments))
            self.calls += 1
        elif arguments:
            self._out.append(CallDelta(self.calls - 1, None, arguments))

    def _refuse(self) -> bool:
        """What stands after the opener is no call: it is text, and calls may still follow it."""
        said, self._raw = self._raw + "".join(self._object.raw), ""
        self._object = _Object(self._names)
        self._text(said)
        return self._go(_State.TEXT)

    def _text(self, text: str) -> None:
        """Blanks wait for what follows them: they are dropped before a call and after the last one."""
        text = self._space + text
        shown = text.rstrip()
        self._space = text[len(shown) :]
        if shown:
            self._out.append(shown)

    def _take(self) -> list[str | CallDelta]:
        out, self._out = self._out, []
        return [item for item in out if item != ""]
